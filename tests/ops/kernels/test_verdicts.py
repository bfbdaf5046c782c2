"""The files of verdicts and notes: what is stored, for whom, and that only this user's count."""
import json
import os
import shutil
import threading
import types
from importlib import metadata

import pytest
import torch
from unsafe_files import each_reason

from featherweight.ops import formats  # noqa: F401
from featherweight.ops.kernels import verdicts as module
from featherweight.ops.kernels.kernel import Case
from featherweight.ops.kernels.verdicts import (
    MAX_FILE_BYTES,
    MAX_NOTES,
    RETRY_AFTER_S,
    WEEK,
    Notes,
    Verdicts,
    device_key,
    source_hash,
)

CPU = torch.device("cpu")
DEQUANTIZE = Case("dequantize", "Q4_K", torch.bfloat16)
LINEAR = Case("linear", "NF4", torch.float16)
TOKENS = Case("int8_tokens", None, torch.float16)
NAME = f"{DEQUANTIZE}, rows 1 to any by nvrtc"


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Verdicts.of_device(CPU, ("nvrtc",))


def known(verdicts) -> dict[str, str]:
    return {name: line["verdict"] for name, line in verdicts.results().lines.items()}


def reopened() -> Verdicts:
    """Returns them as another process reads them."""
    return Verdicts.of_device(CPU, ("nvrtc",))


def test_a_verdict_is_known_to_the_next_process(verdicts):
    verdicts.add(NAME, "begun")
    verdicts.add(NAME, "right", seconds=[0.001, 0.002])
    verdicts.add(str(DEQUANTIZE), "tried")
    results = reopened().results()
    assert results.lines[NAME]["seconds"] == [0.001, 0.002] and results.unfinished is None
    assert results.untried([DEQUANTIZE, LINEAR]) == [LINEAR]


def test_a_begin_without_an_end_names_the_kernel(verdicts):
    verdicts.add("one", "begun")
    verdicts.add("one", "works")
    verdicts.add("two", "begun")
    assert reopened().results().unfinished["name"] == "two"


@pytest.mark.parametrize("verdict", RETRY_AFTER_S)
def test_what_may_mend_itself_is_forgotten_after_its_time(verdict, verdicts, monkeypatch):
    verdicts.add(NAME, verdict, seconds=[1.0, 2.0])
    verdicts.add("before", "crashed")
    forgotten = {0: verdict == "stopped", WEEK + 1: RETRY_AFTER_S[verdict] <= WEEK}
    for seconds, is_forgotten in forgotten.items():
        now = module.time.time() + seconds
        with monkeypatch.context() as patch:
            patch.setattr(module.time, "time", lambda now=now: now)
            assert known(verdicts) == ({} if is_forgotten else {NAME: verdict}) | {
                "before": "crashed"
            }


def test_a_reader_sees_whole_lines_while_others_write(verdicts):
    counts, threads = [0], []
    for writer in range(2):
        def write(writer=writer):
            for number in range(30):
                reopened().add(f"{writer} {number}", "wrong", why="x" * 300)

        threads.append(threading.Thread(target=write))
        threads[-1].start()
    while any(thread.is_alive() for thread in threads):
        counts.append(len(known(verdicts)))
    assert counts == sorted(counts) and len(known(verdicts)) == 60


DAMAGED = [b"", b"\0" * 300, b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000,
           *(json.dumps({"name": NAME, "at": 1, "verdict": "right", "seconds": [1, 2]} | change
                        ).encode() for change in (
                 {"verdict": "splendid"}, {"verdict": None}, {"seconds": [0, 1]}, {"seconds": [1]},
                 {"seconds": ["1", 2]}, {"seconds": {}}, {"seconds": None}, {"at": "today"},
                 {"at": 1e300}, {"name": 5}, {"name": [NAME]}, {"seconds": [1, 1e300]},
                 {"verdict": "wrong", "why": 5}))]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_verdict_counts_as_none(line, verdicts):
    verdicts.add("before", "wrong")
    with open(verdicts.path, "ab") as file:
        file.write(b"\n" + line)
    verdicts.add("after", "wrong")
    assert known(verdicts) == {"before": "wrong", "after": "wrong"}


def test_a_file_that_grew_too_large_is_replaced(verdicts):
    verdicts.add("before", "wrong")
    with open(verdicts.path, "ab") as file:
        file.write(b" " * MAX_FILE_BYTES)
    assert known(verdicts) == {}
    verdicts.add("after", "wrong")
    assert known(verdicts) == {"after": "wrong"} and verdicts.path.stat().st_size < 1000


@pytest.mark.skipif(os.name != "posix", reason="Windows has other owners")
@each_reason
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_somebody_else_may_have_written_is_not_believed(spoil, what, verdicts):
    verdicts.add(NAME, "wrong")
    before = verdicts.path.read_bytes()
    spoil(verdicts.path if what == "file" else verdicts.path.parent)
    assert known(verdicts) == {}
    with pytest.raises(PermissionError, match="remove it"):
        verdicts.add(NAME, "right", seconds=[1, 2])
    assert verdicts.path.read_bytes() == before


def test_a_cache_that_cannot_be_written_loses_nothing_in_this_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    Verdicts.of_device(CPU, ("nvrtc",)).add(NAME, "wrong")
    assert known(reopened()) == {NAME: "wrong"}


# --- the cases that models have needed ---


def test_what_was_asked_for_is_read_again_and_written_once(verdicts):
    Notes().add([DEQUANTIZE, LINEAR, TOKENS, DEQUANTIZE])
    size = Notes().path.stat().st_size
    Notes().add([LINEAR])
    assert Notes().cases() == [DEQUANTIZE, LINEAR, TOKENS] and Notes().path.stat().st_size == size
    assert Notes().path.parent.stat().st_mode & 0o777 == 0o700


def test_the_latest_notes_count(verdicts):
    for number in range(MAX_NOTES + 20):
        Notes().append(case=Case("dequantize", f"Q{number}", torch.float32).as_json())
    cases = Notes().cases()
    assert len(cases) == MAX_NOTES and cases[-1].format == f"Q{MAX_NOTES + 19}"


CASE = ["dequantize", "Q4_K", "bfloat16", None]


@pytest.mark.parametrize(
    "case",
    [
        [],
        CASE[:3],
        ["eval", *CASE[1:]],
        ["dequantize", None, "bfloat16", None],
        ["int8_tokens", "Q4_K", "float16", None],
        ["dequantize", "../Q4_K", "bfloat16", None],
        ["dequantize", "Q" * 50, "bfloat16", None],
        ["dequantize", "Q4_K", "load", None],
        ["dequantize", "Q4_K", "bfloat16", "hub"],
        ["dequantize", 4, "bfloat16", None],
        {"dequantize": 1},
        None,
        [[], {}, [], {}],
    ],
    ids=str,
)
def test_a_damaged_case_counts_as_none(case, verdicts):
    Notes().append(case=case)
    Notes().append(case=CASE)
    assert Notes().cases() == [DEQUANTIZE]


def test_a_case_is_the_same_after_a_journey_as_json():
    for case in (DEQUANTIZE, LINEAR, TOKENS, Case("int8_rows", "NF4_128", torch.int8)):
        assert Case.of_json(json.loads(json.dumps(case.as_json()))) == case
    assert str(LINEAR) == "linear of NF4 to float16"


# --- what verdicts depend on ---


class AmdCuda:
    """Replaces `torch.cuda` by a device of AMD."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_device_name(self, device):
        return "AMD Radeon Graphics"

    def get_device_capability(self, device):
        return 11, 0

    def get_device_properties(self, device):
        return types.SimpleNamespace(gcnArchName=self.architecture)


def test_devices_of_amd_with_one_name_have_the_verdicts_of_their_architecture(monkeypatch):
    def key(architecture, override=None):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cuda", AmdCuda(architecture))
            patch.setattr(torch.version, "hip", "7.0")
            if override:
                patch.setenv("HSA_OVERRIDE_GFX_VERSION", override)
            return str(device_key(torch.device("cuda", 0), ("nvrtc",)))

    assert key("gfx1100") == key("gfx1100")
    keys = {key("gfx1100"), key("gfx1103"), key("gfx1103", "11.0.0"), key("gfx1103", "11.0.1")}
    assert len(keys) == 4


@pytest.mark.parametrize("changed", ["torch", "driver", "compiler", "backends"])
def test_other_verdicts_are_for_another_driver_torch_or_compiler(changed, verdicts, monkeypatch):
    installed = {"nvidia-cuda-nvrtc": "13.0"}

    def version(name):
        if name in installed:
            return installed[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    first, backends = Verdicts.of_device(CPU, ("nvrtc",)), ("nvrtc",)
    first.add(NAME, "wrong")
    assert known(reopened()) == {NAME: "wrong"}
    if changed == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif changed == "driver":
        monkeypatch.setattr(module.platform, "mac_ver", lambda: ("99.9", (), ""))
    elif changed == "compiler":
        installed["nvidia-cuda-nvrtc"] = "13.1"
    else:
        backends = ("nvrtc", "metal")
    assert known(Verdicts.of_device(CPU, backends)) == {}


def test_other_verdicts_are_for_other_sources(tmp_path):
    folder, copy = module.Path(module.__file__).parent, tmp_path / "kernels"
    shutil.copytree(folder, copy)
    assert source_hash(copy) == source_hash(folder)
    hashes = {source_hash(copy)}
    names = ("runtime_compiler.py", "source/weight.h", "source/cuda/dequantize.cu",
             "kernel_source.py", "validation.py", "quantize_validation.py")
    for name in names:
        assert (copy / name).is_file()
        with open(copy / name, "a") as file:
            file.write("\n")
        hashes.add(source_hash(copy))
    assert len(hashes) == 1 + len(names)
    (copy / "selector.py").write_text("")
    assert source_hash(copy) in hashes
