"""Compiled kernels are loaded only from files that nobody but this user can have written."""
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from featherweight.ops.kernels import own_files
from featherweight.ops.kernels.cpp_backend import CppCompiler

COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
SOURCE = 'extern "C" int answer() { return 1; }\n'
SOMEBODY = 12345  # the number of another user

pytestmark = pytest.mark.skipif(COMMAND is None or sys.platform == "win32", reason="needs a C++ compiler")


@pytest.fixture
def folder(tmp_path, caplog):
    """Where kernels are kept, with a planted one that the source does not say."""
    own_files._temporary_folder.cache_clear()
    elsewhere, path = tmp_path / "elsewhere" / "kernels", tmp_path / "featherweight" / "kernels"
    assert answer(elsewhere) == 1  # another path, for a library is loaded from one path once
    path.mkdir(parents=True, mode=0o700)
    planted, (compiled,) = tmp_path / "planted.cpp", elsewhere.iterdir()
    planted.write_text(SOURCE.replace("1", "2"))
    subprocess.run([COMMAND, "-shared", "-fPIC", str(planted), "-o", str(path / compiled.name)], check=True)
    caplog.set_level(logging.INFO)
    yield path
    own_files._temporary_folder.cache_clear()


def answer(path: Path) -> int:
    return CppCompiler(COMMAND, path).library(SOURCE).answer()


def belongs_to_somebody_else(path: Path):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, SOMEBODY, -1, follow_symlinks=False)


def can_be_written_by_all(path: Path):
    path.chmod(0o777)


def can_be_written_by_its_group(path: Path):
    path.chmod(0o770)


def is_a_link(path: Path):
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


each_reason = pytest.mark.parametrize(
    "spoil", [belongs_to_somebody_else, can_be_written_by_all, can_be_written_by_its_group, is_a_link])


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
    assert warning.levelno == logging.WARNING and str(spoilt) in warning.message and "remove it" in warning.message
    temporary = Path(own_files._temporary_folder(spoilt).name)
    assert temporary.stat().st_mode & 0o777 == 0o700 and list(temporary.glob("*.so"))


@each_reason
def test_a_file_that_others_may_have_written_is_compiled_anew(folder, spoil, caplog):
    (compiled,) = folder.iterdir()
    spoil(compiled)
    assert answer(folder) == answer(folder) == 1
    assert compiled.is_file() and not compiled.is_symlink() and compiled.stat().st_mode & 0o777 == 0o700
    assert not caplog.records


def test_the_folder_is_made_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        assert answer(tmp_path / "cache" / "featherweight" / "kernels") == 1
    finally:
        os.umask(before)
    made = [tmp_path / "cache" / "featherweight", tmp_path / "cache" / "featherweight" / "kernels"]
    assert [path.stat().st_mode & 0o777 for path in [*made, *made[1].iterdir()]] == [0o700] * 3
