"""The parts of a batch that need no Ray: workflows, rows, the store, progress and the command."""
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

from devtools.cluster import workflow

import pytest

from devtools import ROOT
from featherweight.cluster.actor_pool import Share, share_out
from featherweight.cluster.batch_progress import BatchProgress
from featherweight.cluster.batch_rows import RowIndex, RowScan, read_lines, scan_rows
from featherweight.cluster.comfyui_install import (
    MachineError,
    find_comfyui,
    installed_versions,
    is_pack,
    launch_arguments,
    own_comfyui,
)
from featherweight.cluster.picture_store import Store
from featherweight.cluster.worker import RowRenderer
from featherweight.cluster.workflow_graph import GraphError, apply_changes, digest, read, upstream


def command(*arguments, **options):
    return subprocess.run([sys.executable, str(ROOT / "batch.py"), *map(str, arguments)],
                          capture_output=True, text=True, **options)


# --- graphs ---

@pytest.mark.parametrize(("path", "message"), [
    ("seed", "'seed' is not an input of the workflow: write node, dot, input"),
    ("99.seed", "no node 99"), ("7.sed", "Node 7 .KSampler. has no input 'sed', only model,"),
    ("7.model", "'7.model' comes from another node, 61")])
def test_a_change_of_what_is_not_there_says_so(path, message):
    with pytest.raises(GraphError, match=message):
        apply_changes(workflow(), {path: 1})


def test_changing_leaves_the_original_as_it_is():
    graph = workflow(seed=1)
    assert apply_changes(graph, {"7.seed": 2})["7"]["inputs"]["seed"] == 2
    assert graph == workflow(seed=1)


def test_titles_and_order_do_not_count_in_a_digest_and_values_do():
    graph = workflow()
    titled = {name: {**graph[name], "_meta": {"title": "a title"}} for name in reversed(graph)}
    assert digest(titled) == digest(graph) != digest(apply_changes(graph, {"7.seed": 2}))


def test_what_is_before_a_link_is_found():
    assert upstream(workflow(), ["4", 0]).keys() == {"4", "2"}
    with pytest.raises(GraphError, match="no node 9, though another is connected to it"):
        upstream({"4": {"class_type": "A", "inputs": {"image": ["9", 0]}}}, ["4", 0])
    with pytest.raises(GraphError, match="no node 9 8, though another is connected to it"):
        upstream({"4": {"class_type": "A", "inputs": {"image": ["9\n8", 0]}}}, ["4", 0])


def test_a_machine_without_comfyui_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(MachineError, match="set COMFYUI_PATH"):
        find_comfyui()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(MachineError, match="no main.py"):
        find_comfyui()
    monkeypatch.setenv("COMFYUI_ARGUMENTS", "--lowvram 'x")
    with pytest.raises(
            MachineError,
            match="COMFYUI_ARGUMENTS is --lowvram 'x, which cannot be taken apart .No closing"):
        launch_arguments(True)


def test_commands_and_workers_take_comfyui_by_one_rule(tmp_path, monkeypatch):
    pack = tmp_path / "comfyui" / "custom_nodes" / "pack"
    for folder in (tmp_path / "comfyui", tmp_path / "named"):
        (folder / "comfy").mkdir(parents=True)
        (folder / "main.py").touch()
    monkeypatch.chdir(tmp_path / "comfyui")
    monkeypatch.setenv("PWD", str(tmp_path / "comfyui"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert own_comfyui(str(pack)) == find_comfyui() == str(tmp_path / "comfyui")
    assert own_comfyui(str(tmp_path)) == ""
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "named"))
    assert own_comfyui(str(pack)) == find_comfyui() == str(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "typo"))
    message = "typo, which has no main.py and comfy: set it to ComfyUI's folder"
    with pytest.raises(MachineError, match=message):
        own_comfyui(str(pack))
    with pytest.raises(MachineError, match=message):
        find_comfyui()


def test_a_disabled_copy_of_the_pack_does_not_count_as_installed(tmp_path):
    for name, version in (("a-copy.disabled", "0.1"), ("pack", "0.2")):
        folder = tmp_path / "custom_nodes" / name
        folder.mkdir(parents=True)
        project = f'name = "featherweight"\nversion = "{version}"\n'
        (folder / "pyproject.toml").write_text(project)
    assert installed_versions(str(tmp_path))["Featherweight"] == "0.2"
    os.rename(tmp_path / "custom_nodes" / "pack", tmp_path / "custom_nodes" / "pack.disabled")
    assert installed_versions(str(tmp_path))["Featherweight"] == ""


def test_the_pack_is_told_from_other_packs_by_its_project_file(tmp_path):
    other = tmp_path / "custom_nodes" / "a-pack"
    other.mkdir(parents=True)
    (other / "pyproject.toml").write_bytes(
        'name = "gew\u00f6hnlich"\nversion = "9.9"\n'.encode("latin-1"))
    assert installed_versions(str(tmp_path))["Featherweight"] == ""
    (tmp_path / "custom_nodes" / "pack").symlink_to(ROOT, target_is_directory=True)
    assert installed_versions(str(tmp_path))["Featherweight"] and not is_pack(str(other))


# --- rows and store ---

def save_picture(store, row):
    """Saves a picture of a row of `RowScan.pending`, so that the row is done."""
    name, _, stamp, _ = row
    store.save(name, {"9_0.png": b"picture"}, {"stamp": stamp})


def test_what_is_done_is_not_left_and_what_was_changed_is(tmp_path):
    lines = [
        (index + 1, json.dumps({"id": f"{index}", "7.seed": index}).encode()) for index in range(4)
    ]
    store = Store(str(tmp_path))
    for item in scan_rows(str(tmp_path), workflow(), lines).pending[:3]:
        save_picture(store, item)
    lines[1] = (2, b'{"id": "1", "7.seed": 99}')
    (tmp_path / "2_9_0.png").unlink()
    pending = scan_rows(str(tmp_path), workflow(), lines).pending
    assert [item[0] for item in pending] == ["1", "2", "3"]
    # with another workflow none is done
    assert len(scan_rows(str(tmp_path), workflow(steps=3), lines).pending) == 4


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "a\\b",
        ".hidden",
        "",
        "x" * 151,
        "c:d",
        "a.",
        "new\nline",
        None,
        1.5,
        ["a"],
        "\ud800",
        "a\ud800",
        "\u753b" * 61,
    ],
)
def test_an_id_that_is_no_file_name_is_refused(tmp_path, name):
    line = json.dumps({"id": name, "7.seed": 1}).encode()
    scan = scan_rows(str(tmp_path), workflow(), [(1, line)])
    assert len(scan.invalid) == 1 and not scan.pending


def test_empty_lines_do_not_shift_the_parts(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n\n".join(json.dumps({"id": str(index)}) for index in range(10)),
                    encoding="utf-8")
    lines = list(read_lines(str(rows)))
    for part in (1, 2):
        index = RowIndex((part, 2))
        for chunk in (lines[:3], lines[3:]):
            index.add(scan_rows(str(tmp_path), workflow(), chunk))
        assert [int(item[0]) % 2 for item in index.pending] == [part - 1] * 5


def test_odd_rows_fail_alone(tmp_path):
    """Each is reported and none ends the batch, even on a terminal that cannot show its letters."""
    rows = tmp_path / "rows.jsonl"
    odd = [
        '{"id": "\\ud800"}', '{"id": "a", "\\ud800.x": 1}', "[" * 200_000,
        '{"id": "b", "4.text": ' + "[" * 200_000
    ]
    rows.write_text(
        "\n".join([*odd, json.dumps({"id": "\u753b" * 80}),
                   json.dumps({"id": "\u753b" * 61})]), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = command(ROOT / "docs/batch/workflow_api.json", rows, tmp_path / "out", env=environment)
    assert result.stdout.count("Line ") == 6, result.stdout[-2000:]
    assert "0 generated, 0 already done, 6 failed" in result.stdout
    assert not result.stderr


def test_ids_that_a_file_system_takes_for_one_are_refused():
    index = RowIndex()
    index.add(RowScan(names=[(1, "A"), (2, "a")],
                      pending=[("A", "{}", "", 1), ("a", "{}", "", 2)]))
    assert [item[0] for item in index.pending] == ["A"]
    assert index.invalid == [(2, "has the id 'a', as line 1 has")]


def test_a_row_drawn_again_leaves_no_file_of_its_earlier_version(tmp_path):
    store = Store(str(tmp_path))
    store.save("a", {f"9_{n}.png": b"old" for n in range(3)}, {"stamp": "1"})
    store.save("a", {"9_0.png": b"new"}, {"stamp": "2"})
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a_9_0.png"]
    assert store.is_done("a", "2") and not store.is_done("a", "1")


def test_a_row_whose_writing_ended_in_the_midst_is_not_done(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.save("a", {"9_0.png": b"old", "9_1.png": b"old"}, {"stamp": "1"})
    write = Store.write
    monkeypatch.setattr(
        Store, "write", lambda self, name, data: write(self, name, data)
        if name != "a_9_0.png" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save("a", {"9_0.png": b"new"}, {"stamp": "2"})
    monkeypatch.undo()
    assert not store.is_done("a", "1") and not store.is_done("a", "2")
    store.save("a", {"9_0.png": b"new"}, {"stamp": "2"})
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a_9_0.png"]


def test_json_that_a_row_saves_is_not_the_record_of_another_row(tmp_path):
    store = Store(str(tmp_path))
    store.save("a_9_0", {"9_0.png": b"picture"}, {"stamp": "1"})
    store.save("a", {"9_0.json": b"{}", "9_1.JSON": b"{}"}, {"stamp": "2"})
    assert store.is_done("a_9_0", "1") and store.is_done("a", "2")
    assert store.read("a_9_0..json") == b"{}" and (tmp_path / "a_9_1..JSON").is_file()
    store.save("a", {"9_0.png": b"picture"}, {"stamp": "3"})
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a_9_0.json", "a_9_0.png", "a_9_0_9_0.png"]


def test_a_row_of_an_earlier_version_that_saved_json_is_done_and_takes_no_record_away(tmp_path):
    store = Store(str(tmp_path))
    (tmp_path / "a.json").write_text(
        json.dumps({"stamp": "1", "files": ["a_9_0.json", "a_9_1.png"]}), encoding="utf-8")
    (tmp_path / "a_9_1.png").touch()
    store.save("a_9_0", {"9_0.png": b"picture"}, {"stamp": "2"})
    assert store.is_done("a", "1")
    store.save("a", {"9_0.png": b"picture"}, {"stamp": "3"})
    assert store.is_done("a_9_0", "2") and not (tmp_path / "a_9_1.png").exists()


def test_a_record_removes_files_of_its_row_only(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a_").mkdir()
    (tmp_path / "precious").touch()
    (tmp_path / "out" / "a.json").write_text(
        json.dumps({"stamp": "1", "files": ["a_/../../precious", 5]}), encoding="utf-8")
    Store(str(tmp_path / "out")).save("a", {"9_0.png": b"picture"}, {"stamp": "2"})
    assert (tmp_path / "precious").exists()


def test_only_half_files_of_own_rows_are_removed(tmp_path):
    for name in ("a_9_0.png", "a_9_1..json", "a.json", "b_9_0.png", "a_9.json"):
        (tmp_path / f".{name}.0123abcd.part").touch()
    (tmp_path / ".a_9_0.png.part").touch()
    assert Store(str(tmp_path)).remove_parts({"a"}) == 3
    assert sorted(os.listdir(tmp_path)) == [
        ".a_9.json.0123abcd.part",
        ".a_9_0.png.part",
        ".b_9_0.png.0123abcd.part",
    ]


def test_a_bucket_is_written_by_fsspec():
    out = "memory://test-of-a-batch/pictures"
    store = Store(out)
    assert store.read("a.json") is None
    store.save("a", {"9_0.png": b"old", "9_1.png": b"old"}, {"stamp": "1"})
    store.save("a", {"9_0.gz": b"what a workflow saved"}, {"stamp": "2"})
    assert store.is_done("a", "2") and not store.is_done("b", "2")
    assert Store(out).read("a_9_0.gz") == b"what a workflow saved"  # by the name unpacked
    assert sorted(path.rpartition("/")[2] for path in store.bucket.find(store.root)) == [
        "a.json",
        "a_9_0.gz",
    ]


def test_a_uri_of_a_folder_means_what_other_programs_mean_by_it(tmp_path):
    assert Store((tmp_path / "my pictures").as_uri()).root == str(tmp_path / "my pictures")
    with pytest.raises(ValueError,
                       match="file://share/pictures does not name a folder: write file:///"):
        Store("file://share/pictures")


def test_a_bucket_whose_package_is_missing_says_what_to_install(monkeypatch):
    for name in ("s3fs", "fsspec", "fsspec.core"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
                ValueError,
                match="s3://a/b needs a package that is missing .* -m pip install s3fs for s3://"):
            Store("s3://a/b")


def test_another_command_for_the_same_rows_takes_nothing_away(tmp_path, monkeypatch):
    store, fsync, removed = Store(str(tmp_path)), os.fsync, []

    def other(descriptor):
        fsync(descriptor)
        removed.append(len(removed) < 2 and Store(str(tmp_path)).remove_parts({"a"}))

    monkeypatch.setattr(os, "fsync", other)
    store.save("a", {"9_0.png": b"picture"}, {"stamp": "1"})
    assert store.is_done("a", "1") and removed == [1, 1, False, False]


def test_a_machine_that_cannot_write_is_told_in_one_sentence(tmp_path):
    """Ray raises another machine's OSError as an OSError too, whose text is a traceback."""
    cause = PermissionError(13, "Permission denied", "/pictures/a.png")
    error = type("RayTaskError", (OSError,),
                 {"cause": cause, "__str__": lambda self: "Traceback (most recent call last):"})()
    worker = RowRenderer.__new__(RowRenderer)
    worker.info, worker.name = {"name": "attic"}, "attic:1"
    worker.store = SimpleNamespace(is_done=Mock(side_effect=error))
    answer = worker.render({}, {"id": "a", "stamp": ""})
    assert answer["status"] == "refused"
    assert re.fullmatch(
        r"attic could not write the images: .* Permission denied: '/pictures/a.png'",
        answer["message"])


# --- progress ---

def test_the_progress_line_has_rows_rate_workers_failures_and_time_left(monkeypatch):
    clock, printed = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = BatchProgress(100, lambda text, **_: printed.append(text.strip()))
    for index in range(5):
        clock[0] += 20
        status = "failed" if index == 2 else "drawn"
        progress.add(
            {"id": f"{index}", "status": status, "message": "why", "worker": f"w{index % 2}"})
    assert printed[0] == "1 of 100 rows, 1 worker, 0 failed"
    assert printed[-1] == "5 of 100 rows, 2 workers, 1 failed, 0.05 a second, 32 min left"
    assert "2: why" in printed


# --- the command ---

def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("", encoding="utf-8")
    for path in sorted((ROOT / "example_workflows").glob("*.json"))[:1]:
        result = command(path, rows, tmp_path / "out")
        assert result.returncode == 1 and not result.stderr
        assert re.search(r"editor's format.*Export \(API\)", result.stdout)
    example = ROOT / "docs/batch/workflow_api.json"
    for files, missing in (((example, tmp_path / "none.jsonl"), "none.jsonl"),
                           ((tmp_path / "none.json", rows), "none.json")):
        result = command(*files, tmp_path / "out")
        assert result.returncode == 1 and not result.stderr
        assert (
            result.stdout
            == f"Failed: {tmp_path / missing} cannot be opened: No such file or directory.\n"
        )
    rows.write_text('{"id": "a", "99.seed": 1}\n', encoding="utf-8")
    result = command(example, rows, tmp_path / "out")
    assert "Line 1 (a): The workflow has no node 99, which '99.seed' names.\n" in result.stdout
    assert command("a", "b", "c", "--shard", "3/2").returncode == 2


def test_models_are_fetched_no_more_and_the_page_says_how_to_copy_them():
    result = command("workflow.json", "rows.jsonl", "out", "--check", "--fetch-models")
    assert result.returncode == 2 and not result.stderr and result.stdout.count("\n") == 1
    assert (
        "--fetch-models sends no files any more" in result.stdout
        and "docs/machines.md" in result.stdout
    )


def test_a_comfyui_path_that_is_none_is_refused_and_not_passed_over(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a"}', encoding="utf-8")
    result = command(ROOT / "docs/batch/workflow_api.json", rows, tmp_path / "out",
                    env={**os.environ, "COMFYUI_PATH": str(tmp_path / "typo")})
    assert result.returncode == 1 and not result.stderr
    assert result.stdout.startswith(
        f"Failed: COMFYUI_PATH is {tmp_path / 'typo'}, which has no main.py and comfy: set it to")


@pytest.mark.parametrize(
    ("machine", "gpus", "cpus", "count"),
    [
        ({"memory": 1.0}, 0, 0, 0),
        ({"CPU": 4.0}, 0, 0, 4),
        ({"CPU": 4.0}, 0, 2, 2),
        ({"CPU": 4.0}, 1, 2, 0),
        ({"CPU": 8.0, "GPU": 2.0}, 0.25, 1, 8),
        ({"GPU": 2.0}, 1, 0, 2),
        ({"GPU": 2.0}, 1, 1, 0),
    ],
)
def test_a_machine_has_room_for_as_many_workers_as_its_cpus_and_gpus_allow(
        machine, gpus, cpus, count):
    assert Share(cpus, gpus).worker_count(machine) == count


@pytest.mark.parametrize(
    ("machines", "requested", "shared"),
    [
        ([], (None, None), Share(1)),
        ([{"memory": 1.0}, {"CPU": 4.0}, {"CPU": 6.0}], (None, None), Share(4)),
        ([{"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}], (None, None), Share(8, 1)),
        ([{"CPU": 6.0, "GPU": 4.0}], (None, None), Share(1, 1)),
        ([{"CPU": 2.0, "GPU": 4.0}], (None, None), Share(0.5, 1)),
        ([{"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}], (0, None), Share(4)),
        ([{"CPU": 4.0}], (None, 0), Share(0)),
    ],
)
def test_cpus_are_shared_out_alike_among_the_workers_of_all_machines(machines, requested, shared):
    assert share_out(machines, *requested) == shared


def test_a_finished_batch_needs_no_ray(tmp_path):
    example = ROOT / "docs" / "batch"
    graph = read((example / "workflow_api.json").read_text(encoding="utf-8"))
    lines = list(enumerate((example / "rows.jsonl").read_bytes().splitlines(), start=1))
    for item in scan_rows(str(tmp_path / "out"), graph, lines).pending:
        save_picture(Store(str(tmp_path / "out")), item)
    blocked = tmp_path / "without"
    blocked.mkdir()
    (blocked / "ray.py").write_text("raise ImportError('not here')", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    result = command(example / "workflow_api.json", example / "rows.jsonl", tmp_path / "out",
                    env=environment)
    assert result.returncode == 0 and "0 generated, 12 already done, 0 failed" in result.stdout
    (tmp_path / "out" / "0003.json").unlink()
    result = command(example / "workflow_api.json", example / "rows.jsonl", tmp_path / "out",
                    env=environment)
    assert result.returncode == 1 and "-m pip install ray\n" in result.stdout and not result.stderr
