"""Compiled kernels are loaded only from undamaged files that only this user can have written."""
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pack_api import cpp_backend
from unsafe_files import each_reason

from featherweight.ops.kernels import private_files
from featherweight.ops.kernels.cpp_backend import CompilerError, CppCompiler

COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
SOURCE = 'extern "C" int answer() { return 1; }\n'
PACK = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(COMMAND is None or sys.platform == "win32",
                                reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def new_process(caplog):
    """Forgets what was logged, and the temporary folders of other tests."""
    caches = (private_files.temporary_folder, private_files._temporary_substitute,
              private_files._warn_not_private)
    for cache in caches:
        cache.cache_clear()
    caplog.set_level(logging.INFO)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """Where kernels are kept, with one of this user's whose answer is not the source's."""
    other_folder, path = tmp_path / "other" / "kernels", tmp_path / "featherweight" / "kernels"
    assert answer(other_folder) == 1  # another path, because a path is loaded only once
    path.mkdir(parents=True, mode=0o700)
    planted, (compiled,) = tmp_path / "planted.cpp", other_folder.iterdir()
    planted.write_text(SOURCE.replace("1", "2"))
    library = tmp_path / "planted.so"
    subprocess.run([COMMAND, "-shared", "-fPIC", str(planted), "-o", str(library)], check=True)
    digest = hashlib.sha256(library.read_bytes()).hexdigest()[:32]
    library.rename(path / f"{compiled.stem.partition('-')[0]}-{digest}.so")
    return path


def answer(path: Path) -> int:
    return CppCompiler((COMMAND,), path).library(SOURCE).answer()


def test_what_this_user_compiled_is_loaded_again(folder, caplog):
    assert answer(folder) == 2
    assert not caplog.records


@each_reason
@pytest.mark.parametrize("which", ["the folder", "its parent"])
def test_nothing_is_loaded_from_a_folder_that_others_may_have_written(folder, which, spoil, caplog):
    spoilt = folder if which == "the folder" else folder.parent
    spoil(spoilt)
    assert answer(folder) == answer(folder) == 1
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert str(spoilt) in warning.message and "remove it" in warning.message
    temporary = private_files.temporary_folder(None)
    assert temporary.stat().st_mode & 0o777 == 0o700 and list(temporary.glob("*.so"))


@each_reason
def test_a_file_that_others_may_have_written_is_compiled_again(folder, spoil, caplog):
    (planted,) = folder.iterdir()
    spoil(planted)
    assert answer(folder) == answer(folder) == 1
    (compiled,) = folder.glob("*.so")
    assert compiled != planted and compiled.is_file() and not compiled.is_symlink()
    assert compiled.stat().st_mode & 0o777 == 0o700
    assert not caplog.records


def test_the_folder_is_made_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        assert answer(tmp_path / "cache" / "featherweight" / "kernels") == 1
    finally:
        os.umask(before)
    folder = tmp_path / "cache" / "featherweight"
    paths = [folder, folder / "kernels", *(folder / "kernels").iterdir()]
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o700] * 3


def cut_short(data: bytes) -> bytes:
    return data[:len(data) // 2]


def last_page_lost(data: bytes) -> bytes:
    return data[:-4096]


def half_zeroed(data: bytes) -> bytes:
    return data[:len(data) // 2] + bytes(len(data) - len(data) // 2)


def all_zeros(data: bytes) -> bytes:
    return bytes(len(data))


def emptied(data: bytes) -> bytes:
    return b""


def one_bit_changed(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


DAMAGES = [cut_short, last_page_lost, half_zeroed, all_zeros, emptied, one_bit_changed]
LOADS = """
import sys, types, logging
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
pack = types.ModuleType("featherweight")
pack.__path__ = [sys.argv[1]]
sys.modules["featherweight"] = pack
from featherweight.ops.kernels.cpp_backend import CppCompiler
for folder in sys.argv[4:]:
    for _ in range(2):
        library = CppCompiler((sys.argv[2],), Path(folder)).library(sys.argv[3])
        print("answer", library.answer(), flush=True)
"""


def test_damaged_kernels_are_compiled_again_and_end_no_process(tmp_path):
    """Another process loads them, because such damage might end this one."""
    whole = tmp_path / "whole" / "kernels"
    assert answer(whole) == 1
    (compiled,) = whole.iterdir()
    expected, folders = [], []
    for damage in DAMAGES:
        folder = tmp_path / damage.__name__ / "kernels"
        shutil.copytree(whole.parent, folder.parent)
        (folder / compiled.name).write_bytes(damage(compiled.read_bytes()))
        line = (f"[Featherweight] The compiled kernel {folder / compiled.name} is damaged and is "
                "compiled again.")
        expected += [line, "answer 1", "answer 1"]
        folders.append(str(folder))
    command = [sys.executable, "-c", LOADS, str(PACK), COMMAND, SOURCE, *folders]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.stdout.splitlines() == expected and not child.returncode


def test_a_kernel_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(old, new):
        done.append(f"{Path(old).name} is {Path(new).parent.name}")
        replace(old, new)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    folder = tmp_path / "featherweight" / "kernels"
    assert answer(folder) == 1
    built, renaming, synced_folder = done
    assert built.endswith("kernel.so") and renaming == "kernel.so is kernels"
    assert synced_folder == str(folder)


def test_the_scratch_of_a_killed_compiler_is_removed_later(tmp_path, monkeypatch):
    """The compiler's own temporary files are in the source's folder."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$TMPDIR" > {tmp_path}/tmpdir\nexec {COMMAND} "$@"\n')
    compiler.chmod(0o755)
    folder = tmp_path / "cache" / "kernels"
    cpp_compiler = CppCompiler((str(compiler),), folder)
    cpp_compiler.library('extern "C" int one() { return 1; }')
    (library,) = folder.iterdir()
    assert (tmp_path / "tmpdir").read_text().startswith(str(folder / cpp_backend.SCRATCH_PREFIX))
    stale, now = folder / f"{cpp_backend.SCRATCH_PREFIX}stale", time.time()
    stale.mkdir()
    (stale / "cc.s").write_text("")
    cpp_compiler.library('extern "C" int two() { return 2; }')
    assert stale.is_dir()  # its compiler may still be running
    os.utime(stale, (now, now - cpp_backend.STALE_SECONDS - 60))
    cpp_compiler.library('extern "C" int three() { return 3; }')
    assert not stale.exists() and library.is_file()


# --- without a usable folder ---


def no_home(monkeypatch, tmp_path):
    def unknown(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)


def a_home_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "home"))


@pytest.mark.parametrize("home", [no_home, a_home_that_cannot_be_made])
def test_without_a_home_kernels_are_kept_until_the_process_ends(
    home, monkeypatch, tmp_path, caplog
):
    home(monkeypatch, tmp_path)
    monkeypatch.setattr(private_files.tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        folder = private_files.cache_folder() / "kernels"
        assert answer(folder) == 1
    assert len(list(private_files.temporary_folder(None).rglob("*.so"))) == 1
    (line,) = list(caplog.records)
    assert line.levelno == logging.INFO
    assert "cannot be used" in line.message and "XDG_CACHE_HOME" in line.message


@pytest.fixture
def refuses_to_run(monkeypatch):
    """refuses_to_run(folder, ...): no library is loaded from these folders, as from a drive that is
    mounted noexec."""
    real = cpp_backend.ctypes.CDLL

    def refuse(*folders):
        def load(name, *rest):
            if any(Path(name).is_relative_to(folder) for folder in folders):
                raise OSError(f"{name}: failed to map segment from shared object")
            return real(name, *rest)
        monkeypatch.setattr(cpp_backend.ctypes, "CDLL", load)
    return refuse


def test_a_kernel_that_cannot_run_where_it_is_kept_is_kept_in_another_folder(
        tmp_path, monkeypatch, refuses_to_run):
    monkeypatch.setattr(private_files.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(cpp_backend, "OTHER_TEMPORARY", (str(tmp_path / "other"),))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "other").mkdir()
    compiler = CppCompiler((COMMAND,), tmp_path / "cache" / "kernels")
    refuses_to_run(tmp_path / "cache", tmp_path / "temporary")
    assert compiler.library(SOURCE).answer() == 1
    assert len(list((tmp_path / "other").rglob("*.so"))) == 1
    compiler.library(SOURCE + "// another one")
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1  # nothing is compiled there any more


def test_where_no_folder_can_run_a_kernel_the_error_says_why(tmp_path, monkeypatch, refuses_to_run):
    monkeypatch.setattr(private_files.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cpp_backend, "OTHER_TEMPORARY", (str(tmp_path / "missing"),))
    refuses_to_run(tmp_path)
    with pytest.raises(
            CompilerError,
            match="no folder can be written and run from; XDG_CACHE_HOME .* failed to map segment"):
        CppCompiler((COMMAND,), tmp_path / "cache" / "kernels").library(SOURCE)
