"""The files of verdicts: what is stored, for whom, and that only this user's count."""
import json
import os
import threading
import types
from importlib import metadata

import pytest
import torch
from unsafe_files import each_reason

from featherweight import child_process
from featherweight.ops import formats  # noqa: F401
from featherweight.ops.kernels import verdicts as module
from featherweight.ops.kernels.kernel import Backend, Case
from featherweight.ops.kernels.verdicts import MAX_FILE_BYTES, VERDICTS, Verdicts, device_key

CPU = torch.device("cpu")
DEQUANTIZE = Case("dequantize", "Q4_K", torch.bfloat16)
NAME = f"{DEQUANTIZE}, rows 1 to any by nvrtc"
BACKEND = Backend("nvrtc", print, ())


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "being_checked", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Verdicts.of_device(CPU, BACKEND)


def known(verdicts) -> dict[str, str]:
    return {name: line["verdict"] for name, line in verdicts.read().items()}


def reopened() -> Verdicts:
    """Returns them as another process reads them."""
    return Verdicts.of_device(CPU, BACKEND)


def test_a_verdict_is_known_to_the_next_process(verdicts):
    verdicts.add(NAME, "begun")
    verdicts.add(NAME, "wrong", why="so")
    assert reopened().read()[NAME]["why"] == "so"


def test_a_kernel_with_which_the_computer_ended_is_not_run_again(verdicts, monkeypatch):
    """One with which only a process ended is asked again, or judged by who started that."""
    verdicts.add("before", "right")
    verdicts.add(NAME, "begun")
    assert known(reopened()) == {"before": "right"}
    monkeypatch.setattr(module, "COMPUTER_STARTED", module.time.time() + 60)
    assert known(reopened()) == {"before": "right", NAME: "crashed"}


@pytest.mark.parametrize("verdict", ["open", "failed", "hung"])
def test_a_check_that_ends_without_a_verdict_is_withdrawn(verdict, verdicts, monkeypatch):
    verdicts.add(NAME, verdict)
    assert "open" not in verdicts.path.read_text()  # it was not begun
    verdicts.add(NAME, "begun")
    verdicts.add(NAME, verdict)
    monkeypatch.setattr(module, "COMPUTER_STARTED", module.time.time() + 60)
    assert known(reopened()) == {}


def test_what_an_earlier_version_stored_as_refused_is_asked_again(verdicts):
    """A compiler that was killed, or had no room on the drive, counted so."""
    verdicts._append(name=NAME, verdict="refused", at=module.time.time(), why="Killed signal")
    assert known(reopened()) == {}
    verdicts.add(NAME, "faulty", why="so")
    assert known(reopened()) == {NAME: "faulty"}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_an_ending_process_stores_nothing_against_a_kernel(verdict, verdicts, monkeypatch):
    monkeypatch.setattr(child_process, "_ending", True)
    verdicts.add(NAME, verdict)
    assert known(reopened()) == ({NAME: "right"} if verdict == "right" else {})


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
           *(json.dumps({"name": NAME, "at": 1, "verdict": "right"} | change).encode()
             for change in ({"verdict": "splendid"}, {"verdict": None}, {"at": "today"},
                            {"at": 1e300}, {"name": 5}, {"name": [NAME]},
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
        verdicts.add(NAME, "right")
    assert verdicts.path.read_bytes() == before


def test_a_cache_that_cannot_be_written_loses_nothing_in_this_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    Verdicts.of_device(CPU, BACKEND).add(NAME, "wrong")
    assert known(reopened()) == {NAME: "wrong"}


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
            return str(device_key(torch.device("cuda", 0), BACKEND))

    assert key("gfx1100") == key("gfx1100")
    keys = {key("gfx1100"), key("gfx1103"), key("gfx1103", "11.0.0"), key("gfx1103", "11.0.1")}
    assert len(keys) == 4


@pytest.mark.parametrize("changed", ["torch", "driver", "package", "compiler", "backend"])
def test_other_verdicts_are_for_another_driver_torch_or_compiler(changed, verdicts, monkeypatch):
    installed = {"nvidia-cuda-nvrtc": "13.0"}

    def version(name):
        if name in installed:
            return installed[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    first, backend = Verdicts.of_device(CPU, BACKEND), BACKEND
    first.add(NAME, "wrong")
    assert known(reopened()) == {NAME: "wrong"}
    if changed == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif changed == "driver":
        monkeypatch.setattr(module.platform, "mac_ver", lambda: ("99.9", (), ""))
    elif changed == "package":
        installed["nvidia-cuda-nvrtc"] = "13.1"
    elif changed == "compiler":
        backend = Backend("nvrtc", print, (), compiler=lambda: "another")
    else:
        backend = Backend("metal", print, ())
    assert known(Verdicts.of_device(CPU, backend)) == {}
