"""What must hold while an input is read, and what did not: `Guard.run` gives a `Finding` or None.

| kind | what it is | how it is seen |
|---|---|---|
| foreign | an error that is not one of the target's own, or that is not a sentence | raised |
| foreign | an error of the target's own without the name of the file | raised |
| slow | more than 2 s of this process's time | `time.process_time` |
| memory | more than ten times the input and `SPARE` of Python's objects | `tracemalloc` |
| memory | `RESIDENT` bytes more than before, of torch's too | peak, address space |
| opened, wrote | a path outside of the target's folder, links followed | audit: `open`, `os.*` |
| code | compiled, executed or imported, not of this installation | `compile`, `exec`, `import` |
| pickle | a class for pickle | `pickle.find_class` |
| network, process | a socket; a program | `socket.*`, `subprocess.*` |

What opens files without Python (Rust's safetensors, torch's reader of zip files) is not seen; they
get paths that Python has looked at. The end of the process is seen by its parent.
"""
import os
import re
import sys
import time
import traceback
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

from devtools import ROOT

from .targets import Target

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 2.0
TIMES, SPARE = 10, 1 << 19
RESIDENT, ADDRESS_SPACE = 64 << 20, 1 << 30
LONGEST = 4000  # characters of a message
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
            "os.startfile", "ctypes.dlopen")
WRITING = re.compile(
    r"os\.(mkdir|rename|remove|rmdir|symlink|link|chmod|chown|truncate|utime|mkfifo)$|shutil\.")
SYSTEM = (os.devnull, "/proc/meminfo")  # which the host reads, to know how much memory there is
READING = ("os.listdir", "os.scandir")


@dataclass
class Finding:
    """kind: of the table above. where: the last line of the pack before it. text: for people."""

    kind: str
    where: str
    text: str

    @property
    def key(self) -> tuple[str, str]:
        """Findings of one key are one mistake."""
        return self.kind, self.where


class Guard:
    """One for each process: an audit hook cannot be taken out again."""

    def __init__(self):
        self.folder, self.armed, self.seen = "", False, []
        installed = (sys.prefix, sys.base_prefix, ROOT, os.path.dirname(os.__file__),
                     os.environ.get("COMFYUI_PATH") or ROOT)
        self.installed = tuple({os.path.realpath(path) + os.sep for path in installed})
        sys.addaudithook(self._audit)
        self.settle()

    def settle(self):
        """What memory the process has taken until now is not the next inputs'."""
        self.peak = _peak()
        if resource is not None and sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_AS,
                               (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def run(self, target: Target, data: bytes) -> Finding | None:
        """Returns what went wrong while a target read `data`."""
        found = self._with_files(target, data)
        # not what Python itself needed once, such as a larger table of names
        if found is not None and found.kind == "memory":
            found = self._with_files(target, data)
        return found

    def _with_files(self, target: Target, data: bytes) -> Finding | None:
        given = target.lay_out(data)
        try:
            return self._read(target, given, len(data))
        finally:
            target.clear()

    def _read(self, target: Target, given, length: int) -> Finding | None:
        error, self.seen, self.folder = None, [], os.path.realpath(target.folder)
        tracemalloc.start(1)
        started = time.process_time()
        self.armed = True
        try:
            target.read(given)
        except Exception as raised:
            self.armed = False
            error = _wrong_error(target, raised)
        finally:
            self.armed = False
            took, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
            tracemalloc.stop()
        if self.seen:
            return self.seen[0]
        if error is not None:
            return error
        if took > SECONDS:
            return Finding("slow", "", f"took {took:.1f} s")
        if peak > TIMES * length + SPARE:
            return Finding("memory", "",
                           f"{peak} bytes of Python's objects for an input of {length} bytes")
        before, self.peak = self.peak, max(self.peak, _peak())
        if self.peak > before + RESIDENT:
            return Finding(
                "memory", "resident",
                f"{self.peak - before} bytes more resident for an input of {length} bytes")
        return None

    def _audit(self, event: str, arguments: tuple):
        if not self.armed:
            return
        self.armed = False  # what is asked here is not asked about
        try:
            found = self._breach(event, arguments)
            if found:
                self.seen.append(
                    Finding(found[0], _last_line(sys._getframe()), f"{event}: {found[1]}"))
        finally:
            self.armed = True

    def _breach(self, event: str, arguments: tuple) -> tuple[str, str] | None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or bool(
                isinstance(flags, int)
                and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            )
            if isinstance(path, int) or self._is_inside(path, writes):
                return None
            return ("wrote" if writes else "opened"), os.fsdecode(path)
        if WRITING.match(event) or event in READING:
            path = arguments[0]
            writes = event not in READING
            if path is None or isinstance(path, int) or self._is_inside(path, writes):
                return None
            return ("wrote" if writes else "opened"), os.fsdecode(path)
        if event == "pickle.find_class":
            return "pickle", ".".join(map(str, arguments))
        if event.startswith("socket."):
            return "network", repr(arguments[1:])[:200]
        if event in PROGRAMS:
            return "process", repr(arguments)[:200]
        if event == "exec" and not self._is_installed(getattr(arguments[0], "co_filename", "")):
            return "code", repr(arguments[0])[:200]
        if event == "compile" and not self._is_installed(os.fsdecode(arguments[1] or "")):
            return "code", repr(arguments)[:200]
        if event == "import" and arguments[1] and not self._is_installed(arguments[1]):
            return "code", repr(arguments[:2])
        return None

    def _is_inside(self, path, writes: bool) -> bool:
        if path in SYSTEM:
            return True
        real = os.path.realpath(os.fsdecode(path))
        allowed = (self.folder + os.sep, *(() if writes else self.installed))
        return (real + os.sep).startswith(allowed)

    def _is_installed(self, file: str) -> bool:
        return file.startswith("<frozen ") or os.path.realpath(file).startswith(self.installed)


def _wrong_error(target: Target, error: Exception) -> Finding | None:
    """Returns what is wrong with an error, None for a sentence of the pack with the file's name."""
    message = str(error)
    if not isinstance(error, target.own):
        why = "not an error of the pack"
    elif "\n" in message.strip() or not 10 < len(message) < LONGEST:
        why = "its message is no sentence"
    elif target.made and not any(path.name in message for path in target.made):
        why = "its message does not name the file"
    else:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    last = (_our_frames(error) or frames)[-1]
    where = f"{type(error).__name__} at {_place(last.filename, last.name)}"
    text = f"{type(error).__module__}.{type(error).__name__}: {message[:500]!a} ({why})"
    return Finding("foreign", where, text + "".join(
        f"\n  {_place(frame.filename, frame.name)}:{frame.lineno}" for frame in frames[-8:]))


def _our_frames(error: Exception) -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_tb(error.__traceback__)
            if _is_ours(frame.filename)]


def _last_line(frame) -> str:
    while frame is not None and not _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return _place(frame.f_code.co_filename, frame.f_code.co_name) if frame is not None else ""


def _is_ours(file: str) -> bool:
    return any(f"{os.sep}{room}{os.sep}" in file[len(str(ROOT)):][:10]
               for room in ("cluster", "loaders", "nodes", "ops"))


def _place(file: str, name: str) -> str:
    is_here = file.startswith(str(ROOT))
    return f"{os.path.relpath(file, ROOT) if is_here else os.path.basename(file)}, {name}"


def _peak() -> int:
    """Bytes that were resident at most; 0 where the system does not say."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
