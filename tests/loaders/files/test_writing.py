"""A file that is written is there whole, or not at all, whatever ends its writer."""
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from featherweight.loaders.files import atomic_file
from featherweight.loaders.files.atomic_file import WriteError, atomic_writer

PACKAGES = ("featherweight", "featherweight.loaders", "featherweight.loaders.files")


def left_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_child(code: str, *arguments) -> subprocess.Popen:
    """A process that runs `code` with `atomic_writer` at hand."""
    packages = [(name, sys.modules[name].__path__[0]) for name in PACKAGES]
    start = textwrap.dedent(f"""
        import sys, types
        for name, folder in {packages}:  # needs nothing else of the pack
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [folder]
        from featherweight.loaders.files.atomic_file import WriteError, atomic_writer
    """)
    return subprocess.Popen(
        [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_file_gets_its_name_when_it_is_whole_and_ends_where_it_was_written_last(tmp_path):
    path = tmp_path / "model.gguf"
    with atomic_writer(path, 1000) as file:
        assert left_in(tmp_path) == [f"model.gguf.{os.getpid()}.featherweight.part"]
        file.write(b"0123456789")
        file.seek(2)
        file.write(b"xy")
        file.seek(8)
    assert left_in(tmp_path) == ["model.gguf"]
    assert path.read_bytes() == b"01xy4567"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_ends_a_writer_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_writer(tmp_path / "model.gguf", 1000) as file:
        file.write(b"half")
        raise error
    assert left_in(tmp_path) == []


def test_a_name_that_exists_is_overwritten_only_when_asked(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with pytest.raises(WriteError, match="exists"), atomic_writer(path, 10):
        raise AssertionError("the work began")
    with pytest.raises(RuntimeError), atomic_writer(path, 10, overwrite=True) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with atomic_writer(path, 10, overwrite=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert left_in(tmp_path) == ["model.gguf"]


def test_a_file_in_use_is_told_before_the_work(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with (
        open(path, "rb"),
        pytest.raises(WriteError, match="is in use, by a model .*; nothing was written"),
        atomic_writer(path, 10, overwrite=True),
    ):
        raise AssertionError("the work began")
    assert path.read_bytes() == b"old"


def test_a_file_that_is_used_meanwhile_stays_and_the_new_one_gets_a_free_name(tmp_path):
    path, taken = tmp_path / "model.gguf", tmp_path / "model (2).gguf"
    for each in (path, taken):
        each.write_bytes(b"old")
    with contextlib.ExitStack() as user:
        with (
            pytest.raises(WriteError, match=r"is in use.*; the finished file is model \(3\)\.gguf"),
            atomic_writer(path, 10, overwrite=True) as file,
        ):
            file.write(b"new")
            user.enter_context(open(path, "rb"))
    assert path.read_bytes() == taken.read_bytes() == b"old"
    assert (tmp_path / "model (3).gguf").read_bytes() == b"new"
    assert len(left_in(tmp_path)) == 3


def test_a_name_that_came_to_be_meanwhile_stays(tmp_path):
    path = tmp_path / "model.gguf"
    with (
        pytest.raises(WriteError, match="was created by another program"),
        atomic_writer(path, 10) as file,
    ):
        file.write(b"new")
        path.write_bytes(b"somebody else's")
    assert path.read_bytes() == b"somebody else's"
    assert left_in(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize("step", ["link", "rename", "replace"])
def test_a_name_that_came_to_be_just_before_the_renaming_stays(tmp_path, monkeypatch, step):
    path, run, others = tmp_path / "model.gguf", getattr(os, step), []

    def taken_before(part, name):
        if name == path:
            path.write_bytes(b"somebody else's")
            others.append(step)
        run(part, name)

    monkeypatch.setattr(atomic_file.os, step, taken_before)
    with contextlib.suppress(WriteError), atomic_writer(path, 10) as file:
        file.write(b"new")
    assert path.read_bytes() == (b"somebody else's" if others else b"new")
    assert left_in(tmp_path) == ["model.gguf"]


def test_a_full_drive_is_told_before_the_work(tmp_path, monkeypatch):
    usage = atomic_file.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic_file.shutil, "disk_usage",
                        lambda path: usage._replace(free=5_000_000_000))
    with (
        pytest.raises(WriteError, match="takes 6.00 GB, but .* has 5.00 GB free"),
        atomic_writer(tmp_path / "model.gguf", 6_000_000_000),
    ):
        raise AssertionError("the work began")
    monkeypatch.setattr(atomic_file.shutil, "disk_usage",
                        lambda path: usage._replace(free=2_000_000))
    with pytest.raises(WriteError, match="takes 62.00 KB.* has 2.00 MB free"), atomic_writer(
            tmp_path / "model.gguf", 62_000):
        raise AssertionError("the work began")
    assert left_in(tmp_path) == []


def write_nothing(path, nbytes: int):
    with atomic_writer(path, nbytes):
        pass


@pytest.mark.parametrize("begin", [atomic_file.check_writable, write_nothing])
def test_what_a_killed_writer_left_does_not_count_as_taken(begin, tmp_path, monkeypatch):
    """On a drive that is nearly full; what a writer that runs has taken does."""
    size, usage = 6_000_000_000, atomic_file.shutil.disk_usage(tmp_path)

    def nearly_full(path):
        taken = sum(part.stat().st_size for part in tmp_path.glob("*.part"))
        return usage._replace(free=size + atomic_file.SPARE + 1000 - taken)

    monkeypatch.setattr(atomic_file.shutil, "disk_usage", nearly_full)
    monkeypatch.setattr(atomic_file, "_preallocate", lambda file, nbytes: None)
    left = tmp_path / f"model.gguf.{2**22 + 1}.featherweight.part"  # a number Linux gives to none
    with open(left, "wb") as file:
        file.truncate(size)  # takes no room
    begin(tmp_path / "other.gguf", size)
    assert not left.exists()
    with atomic_writer(tmp_path / "a.gguf", 3000) as file:
        file.write(bytes(2000))
        with pytest.raises(WriteError, match="free"):
            begin(tmp_path / "b.gguf", size)


def test_a_folder_that_may_not_be_written_to_is_told_before_the_work(tmp_path, monkeypatch):
    # whoever runs as root may write everywhere
    monkeypatch.setattr(atomic_file.os, "access", lambda path, mode: False)
    with (
        pytest.raises(WriteError, match="is not writable by this user"),
        atomic_writer(tmp_path / "model.gguf", 10),
    ):
        raise AssertionError("the work began")
    with pytest.raises(WriteError,
                       match="does not exist"), atomic_writer(tmp_path / "no" / "model.gguf", 10):
        raise AssertionError("the work began")
    with pytest.raises(WriteError, match="is a folder"), atomic_writer(tmp_path, 10):
        raise AssertionError("the work began")


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
@pytest.mark.parametrize("set_aside", [True, False])
def test_a_drive_that_gets_full_in_the_midst_leaves_nothing(tmp_path, set_aside):
    child = in_a_child("""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            with atomic_writer(sys.argv[1], int(sys.argv[2])) as file:
                for _ in range(8):
                    file.write(bytes(1 << 18))
                print("wrote all of it")
        except WriteError as error:
            print(error)
    """, tmp_path / "model.gguf", (2 << 20) * set_aside)
    said, problems = child.communicate(timeout=60)
    assert "cannot be written" in said and "no partial file was left" in said, said + problems
    assert left_in(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_writers_file_is_not(
        tmp_path):
    code = """
        with atomic_writer(sys.argv[1], 1000) as file:
            file.write(b"half")
            print("writing", flush=True)
            sys.stdin.read() if sys.stdin else None
            import time; time.sleep(60)
    """
    killed, alive = (in_a_child(code, tmp_path / f"{name}.gguf") for name in ("killed", "alive"))
    try:
        for child in (killed, alive):
            assert child.stdout.readline() == "writing\n", child.stderr.read()
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=60)
        time.sleep(0.1)
        # downloads, and the like
        others = ["flux.v1.0.part", "model.safetensors.001.part", "notes.part", "wan.gguf.7.part"]
        for name in others:
            (tmp_path / name).write_text("not ours")
        with atomic_writer(tmp_path / "next.gguf", 10) as file:
            file.write(b"next")
        assert left_in(tmp_path) == [
            f"alive.gguf.{alive.pid}.featherweight.part",
            *others[:2],
            "next.gguf",
            *others[2:],
        ]
    finally:
        for child in (killed, alive):
            child.kill()
            child.wait()
            child.stdout.close()
            child.stderr.close()


posix = pytest.mark.skipif(atomic_file.fcntl is None, reason="locks of POSIX")


def before_next(monkeypatch, module, name: str, action):
    """Let the next call of a function do something else first, as another process may at that
    moment."""
    function = getattr(module, name)

    def call(*arguments):
        monkeypatch.setattr(module, name, function)
        action()
        return function(*arguments)

    monkeypatch.setattr(module, name, call)


@posix
@pytest.mark.not_as_on_windows
@pytest.mark.parametrize(
    ("module", "name"),
    [(atomic_file.os, "replace"), (atomic_file.fcntl, "flock")],
    ids=["before it has its name", "before it is locked"],
)
def test_another_writer_in_the_folder_takes_no_file_away(tmp_path, monkeypatch, module, name):
    with contextlib.ExitStack() as stack:
        if name == "flock":
            before_next(monkeypatch, module, name, lambda: atomic_file.remove_stale_parts(tmp_path))
        file = stack.enter_context(atomic_writer(tmp_path / "model.gguf", 10))
        file.write(b"whole")
        if name == "replace":
            before_next(monkeypatch, module, name, lambda: atomic_file.remove_stale_parts(tmp_path))
    assert (
        left_in(tmp_path) == ["model.gguf"] and (tmp_path / "model.gguf").read_bytes() == b"whole"
    )


@posix
@pytest.mark.not_as_on_windows
def test_a_cleaner_that_comes_late_takes_no_later_file_of_the_name_away(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    with contextlib.ExitStack() as second:
        first = contextlib.ExitStack()
        first.enter_context(atomic_writer(path, 10)).write(b"first")

        def next_writer():
            first.close()
            second.enter_context(atomic_writer(path, 10, overwrite=True)).write(b"second")

        before_next(monkeypatch, atomic_file.fcntl, "flock", next_writer)
        atomic_file.remove_stale_parts(tmp_path)
    assert left_in(tmp_path) == ["model.gguf"] and path.read_bytes() == b"second"


def test_without_locks_the_parts_of_living_writers_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_file, "fcntl", None)  # as on Windows
    monkeypatch.setattr(
        atomic_file.psutil, "pid_exists", {7: True, 8: False, os.getpid(): True}.get
    )
    for writer in (7, 8, os.getpid()):
        (tmp_path / f"model.gguf.{writer}.featherweight.part").touch()
    with atomic_writer(tmp_path / "next.gguf", 10) as file:
        file.write(b"next")
    assert left_in(tmp_path) == ["model.gguf.7.featherweight.part", "next.gguf"]
