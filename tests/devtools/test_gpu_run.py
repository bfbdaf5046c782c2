"""`dev.py gpu`: every stage runs at a tiny size where there is no GPU, so that on one nothing but
the device is new."""
import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest
from PIL import Image

from devtools import ROOT, fakegpu
from devtools.gpu import __main__ as command
from devtools.gpu import offline_bundle
from devtools.gpu.stages import PARTS, STAGES
from devtools.host.environment import SetupError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# rows of the first stage that ask the driver for what a fake GPU has not
FAKE_ONLY = {"the device", "graphs and streams"}


def run(folder, *arguments: str) -> str:
    command = [
        sys.executable, "-m", "devtools.gpu", "--device", "cpu", "--out",
        str(folder), *arguments
    ]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                          check=True).stdout


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of a run of one stage."""
    folder = tmp_path_factory.mktemp("gpu")
    run(folder, "--only", "LoRA")
    return folder


def test_a_stage_gives_rows_and_a_table_on_a_cpu(rehearsal):
    figures = json.loads((rehearsal / "gpu.json").read_text())
    assert figures.keys() & STAGES.keys() == {"LoRA"}
    assert figures["LoRA"]["ended"].startswith("done"), (rehearsal / "log.txt").read_text()[-3000:]
    assert figures["LoRA"]["rows"] and "\n## LoRA\n" in (rehearsal / "gpu.md").read_text()
    with Image.open(rehearsal / "gpu.png") as picture:
        assert picture.width > 600 and picture.height > 100


# What the bench measures too is in test_bench.py, a model larger than its device below.
@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("stage", ["first", "imports", "device", "kernels"])
def test_another_stage_gives_rows_on_a_cpu(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = dict(STAGES[stage].rows(quick=True))
    assert rows and all(rows.values())


def test_a_command_has_time_for_each_of_its_stages():
    for stages in PARTS.values():
        assert sum(stage.seconds for stage in stages.values()) <= 9 * 60 - command.LAST


def test_every_stage_has_its_function():
    for stage in STAGES.values():
        module, name = stage.function.split(":")
        assert callable(getattr(importlib.import_module(f"devtools.{module}"), name))


def test_the_stage_of_tests_says_how_many_passed_and_which_failed(tmp_path, monkeypatch):
    from devtools.gpu import kernels as stage

    tests = tmp_path / "test_made_up.py"
    tests.write_text(
        "import pytest\ndef test_one(): pass\ndef test_two(): pytest.skip()\ndef test_three():"
        " assert 0\n"
    )
    monkeypatch.setattr(stage, "TESTS", [str(tests)])
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    (row,) = STAGES["tests"].rows(quick=True)
    assert row[0] == str(tests) and row[1]["failed"] == "test_three"
    assert row[1]["tests"].startswith("1 failed, 1 passed, 1 skipped")


def test_a_stage_that_takes_too_long_is_stopped_and_the_run_goes_on(tmp_path):
    """Its row, which would come at its end, is not shown."""
    child = command.Child(["tests", "--quick"], "--cpu", STAGES["tests"], tmp_path / "log.txt")
    assert child.run(0.5, pytest.fail) == "stopped" and not child.is_running


def test_a_stage_that_ends_with_an_error_says_so_and_the_next_one_runs(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import devtools.gpu.first as first\ncalls = []\ndef rows(options):\n"
        "    calls.append(options)\n    if len(calls) == 1: raise OSError('no such card')\n"
        "    yield 'a row', {'of': 'it'}\nfirst.rows = rows\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    rows = []
    child = command.Child(["first", "first", "--quick"], "--cpu", STAGES["first"],
                          tmp_path / "log.txt")
    assert child.run(60, pytest.fail).startswith("ended with an error") and child.is_running
    assert child.run(60, lambda *row: rows.append(row)) == "done"
    assert rows == [("a row", {"of": "it"})]
    child.end()
    assert "OSError: no such card" in (tmp_path / "log.txt").read_text()


def test_a_process_that_ends_says_with_what(tmp_path):
    child = command.Child(["no such stage"], "--cpu", STAGES["tests"], tmp_path / "log.txt")
    assert child.run(60, pytest.fail).startswith("ended with 2") and not child.is_running
    assert "invalid choice" in (tmp_path / "log.txt").read_text()


def test_the_first_stage_imports_no_comfyui():
    code = ("import sys, types; from devtools.gpu import first;"
            " print(len(list(first.rows(types.SimpleNamespace(quick=True)))),"
            " 'comfy' in sys.modules, 'nodes' in sys.modules)")
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT,
                           capture_output=True, text=True, check=True)
    count, *imported = found.stdout.split()
    assert int(count) > 6 and imported == ["False", "False"]


@pytest.mark.fake_gpus(devices=1)
def test_the_first_stage_fails_in_no_row_but_where_a_kernel_must_be_compiled(monkeypatch):
    from devtools.gpu import first

    monkeypatch.setattr(first.cuda_backend, "BACKEND", types.SimpleNamespace(kernels=()))
    rows = dict(first.rows(argparse.Namespace(quick=True)))
    assert {title for title, row in rows.items() if "failed" in row} <= FAKE_ONLY, rows
    assert rows["Q8_0"]["same bits"] and rows["Q8_0"]["with a pitch"]


def test_a_run_that_is_cut_off_leaves_the_rows_it_had(tmp_path):
    from devtools.measure.figures import Report

    report = Report(tmp_path, "gpu")
    report.begin("device", "What it is.")
    report.add("device", "device", {"name": "a card"})
    assert json.loads((tmp_path / "gpu.json").read_text())["device"] == {
        "about": "What it is.", "rows": {"device": {"name": "a card"}}, "ended": "cut off"}


def test_the_report_says_which_figures_are_reached(tmp_path):
    from devtools.measure.figures import Report

    from devtools.gpu.goals import GOALS, closing, goals

    stage, title, variant, most = GOALS[0]
    report = Report(tmp_path, "gpu", closing=functools.partial(closing, is_judged=True))
    report.begin(stage, "")
    for ratio, verdict in ((most - 0.01, "reached"), (most + 0.01, "missed")):
        report.add(stage, title, {"dense": {"median": 1.0, "min": 1.0, "max": 1.0},
                                  variant: {"median": ratio, "min": ratio, "max": ratio}})
        assert goals(report.figures)[0][3] == verdict
        assert f"| {verdict} |" in (tmp_path / "gpu.md").read_text()
    assert {line[3] for line in goals(report.figures)[1:]} == {"not measured"}


def rows_on_a_fake_gpu(stage: str, arguments: str = "", late: bool = False) -> dict[str, dict]:
    """Returns the rows of a stage at a tiny size. arguments: of the host."""
    if fakegpu.why_not():
        pytest.skip(fakegpu.why_not())
    variables = {"HOST_ARGUMENTS": arguments, "FEATHERWEIGHT_KERNELS": "torch"}
    output = subprocess.run(
        [sys.executable, "-m", "devtools.gpu.stages", stage, "--quick"], cwd=ROOT,
        env={**ENVIRONMENT, **fakegpu.environment(1, 4, late=late), **variables},
        capture_output=True, text=True, check=True).stdout
    return dict(json.loads(line.removeprefix("ROW ")) for line in output.splitlines()
                if line.startswith("ROW "))


@pytest.mark.parametrize("stage", [
    "dynamic VRAM", pytest.param("static", marks=pytest.mark.heavy)])
def test_a_model_larger_than_its_device_gives_the_same_bits_on_a_fake_gpu(stage):
    rows = rows_on_a_fake_gpu(stage, f"--fp32-unet {STAGES[stage].arguments}", late=True)
    assert rows["sizes"]["dynamic VRAM"] == (stage == "dynamic VRAM")
    compared = [row["same bits"] for row in rows.values() if "same bits" in row]
    assert len(compared) > 5 and all(compared)
    assert rows["a budget of 30 %"].keys() == {"plain", "profiled"}
    assert rows["after unloading"]["more memory used than before"] == 0


@pytest.mark.parametrize("stage", [
    "LoRA", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("shapes", "dequantize"))])
def test_a_stage_whose_calls_are_queued_runs_on_a_fake_gpu(stage):
    rows = list(rows_on_a_fake_gpu(stage).values())
    assert rows and all(times["median"] > 0 for row in rows for times in row.values())
    special = {"LoRA": "apart", "shapes": "dequantised"}.get(stage, "kernels")
    assert any(special in name for name in rows[0])


# --- a bare machine ---


def wheel(folder, name: str, version: str):
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"version = {version!r}")


def test_a_bare_machine_gets_what_it_lacks_and_the_versions_that_comfyui_asks_for(tmp_path):
    packed = tmp_path / "packed"
    (packed / offline_bundle.WHEELS).mkdir(parents=True)
    (tmp_path / "requirements.txt").write_text("gguf==0.0.1\n")
    for name in (offline_bundle.HOST, offline_bundle.KITCHEN):
        with tarfile.open(packed / name, "w:xz") as archive:
            archive.add(tmp_path / "requirements.txt", "requirements.txt")
    wheel(packed / offline_bundle.WHEELS, "not_installed_here", "1.0")
    wheel(packed / offline_bundle.WHEELS, "gguf", "0.0.1")
    wheel(packed / offline_bundle.WHEELS, "numpy", "0.0.1")
    environment, site = offline_bundle.environment(packed, tmp_path)
    assert (environment.host / "requirements.txt").is_file()
    assert sorted(os.listdir(site)) == ["gguf", "not_installed_here", "requirements.txt"]
    assert importlib.metadata.version("numpy") != "0.0.1"


def test_a_folder_that_was_not_packed_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(SetupError, match="dev.py gpu --pack"):
        offline_bundle.environment(tmp_path, tmp_path)


def test_comfyui_imports_a_stand_in_for_what_nothing_on_a_bare_machine_runs(tmp_path):
    (tmp_path / "av").mkdir()
    shutil.copyfile(offline_bundle.STAND_IN, tmp_path / "av" / "__init__.py")
    code = ("import av; from av.container import InputContainer; import av.video.frame;"
            " from av.subtitles.stream import SubtitleStream; av.VideoFrame, av.video.Reformatter;"
            " print(hasattr(av, '__version__'), InputContainer.__name__)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert found.stdout.split() == ["False", "InputContainer"]


@pytest.mark.heavy
def test_what_a_bare_machine_lacks_is_carried_at_once(tmp_path):
    packed = tmp_path / "packed"
    offline_bundle.pack(packed)  # refuses what does not fit beside the project's own files
    names = {file.name.split("-")[0] for file in (packed / offline_bundle.WHEELS).iterdir()}
    assert {"gguf", "comfy_aimdo"} <= names and not {"av", "comfy_kitchen"} & names
    with tarfile.open(packed / offline_bundle.KITCHEN) as archive:
        names = archive.getnames()
    assert any("backends/cuda/_C" in name for name in names)
    assert not any("backends/hip/_C" in name for name in names)
    with tarfile.open(packed / offline_bundle.HOST) as archive:
        names = archive.getnames()
    assert "./comfy/sd.py" in names and not any("_tokenizer/" in name for name in names)


def test_comfyui_behind_a_link_is_packed_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "comfyui" / "main.py").write_text("")
    (tmp_path / "comfyui" / "requirements.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "comfyui")
    monkeypatch.setattr(offline_bundle, "prepare", lambda: types.SimpleNamespace(
        host=tmp_path / "link", python=None))
    monkeypatch.setattr(offline_bundle, "FURTHER", ())
    offline_bundle.pack(tmp_path / "packed")
    with tarfile.open(tmp_path / "packed" / offline_bundle.HOST) as archive:
        assert "./main.py" in archive.getnames()


@pytest.mark.heavy
def test_a_bundle_that_cannot_be_carried_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_bundle, "CARRIED", offline_bundle._tracked_bytes() + 1_000_000)
    with pytest.raises(SetupError, match="1.0 MB can be carried"):
        offline_bundle.pack(tmp_path / "packed")
