"""What a server and all processes behind it do while a stranger's workflows run, and what of that
no workflow may bring about.

Python's audit events are written down by `audit_child` in every Python that is started; what opens
files without Python (Rust's safetensors, torch) is seen by the kernel's inotify on the folders that
nobody may touch; connections, by a listener.
"""
import ctypes
import json
import os
import re
import socket
import struct
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from devtools import ROOT
from devtools.host import server as servers

CHILD = Path(__file__).with_name("audit_child")
WRITING = {
    "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.chmod",
    "os.chown", "os.truncate", "os.utime", "os.mkfifo", "os.mknod"
}
STARTING = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile"
}
CONNECTING = {
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "urllib.Request"
}
# Of the system: what it is, how much memory it has, its time zone and its names of hosts.
SYSTEM = re.compile(
    r"/proc/(\d+|self|thread-self)/(stat|statm|status|maps|smaps\w*|cgroup|mounts|mountinfo|fd|task|cmdline|io"
    r"|net|limits|oom_score_adj)(/.*)?|/proc(/(stat|meminfo|cpuinfo|vmstat|diskstats|loadavg|mounts|uptime|version"
    r"|filesystems|sys/.*|net/.*|driver.*|pressure/.*))?|/sys(/.*)?|/etc/(localtime|timezone|hosts|resolv.conf"
    r"|nsswitch.conf|ld.so.*|os-release|lsb-release|debian_version|host.conf|mime.types|gai.conf|ssl/.*|machine-id)"
    r"|/dev/(null|urandom|random|shm(/.*)?)|/(usr|lib|lib64|bin|sbin|run)(/.*)?")
# which Ray's dashboard asks whose machine it is on
CLOUD = ("169.254.169.254", "metadata.google.internal")


@dataclass(frozen=True)
class Event:
    pid: int
    name: str
    texts: tuple[str, ...]


class Audit:
    """Folders in `base` and the rules for them.

    mark: what is in every hostile value, and in nothing else. outside: a folder beside the server's
    that nobody may touch.
    """

    def __init__(self, base: Path, mark: str):
        self.base, self.mark = Path(base).resolve(), mark
        self.server, self.outside, self.log = (self.base / name
                                               for name in ("server", "outside", "log"))
        self.own = [self.base / name for name in ("home", "cache", "tmp")]
        for folder in (self.server, self.outside, self.log, *self.own):
            folder.mkdir(parents=True)
        self.ray = Path(tempfile.mkdtemp(prefix="fwr"))  # whose sockets' paths may not be long
        installed = (
            sys.prefix,
            sys.base_prefix,
            ROOT,
            ROOT / ".dev",
            servers.HOST,
            os.path.dirname(os.__file__),
        )
        self.readable = [
            *map(os.path.realpath, installed),
            *(str(path) for path in (self.server, self.ray, *self.own))
        ]
        writable = (
            *(self.server / name for name in ("models", "input", "output", "temp", "user")),
            self.ray,
            *self.own,
        )
        self.writable = [str(path) for path in writable]

    def environment(self) -> dict[str, str]:
        """Variables for the server."""
        home, cache, temporary = map(str, self.own)
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(CHILD), os.environ.get("PYTHONPATH")))),
            "AUDIT_LOG": str(self.log), "HOME": home,
            "XDG_CACHE_HOME": cache, "TMPDIR": temporary, "RAY_TMPDIR": str(self.ray),
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "PYTHONDONTWRITEBYTECODE": "1"
        }

    def position(self) -> dict[str, int]:
        """Where the files of events end now."""
        return {path.name: path.stat().st_size for path in self.log.glob("*.log")}

    def events(self, since: dict[str, int] | None = None) -> list[Event]:
        """Those after a `position`."""
        since = since or {}
        found = []
        for path in self.log.glob("*.log"):
            for line in path.read_bytes()[since.get(path.name, 0):].splitlines():
                _, name, texts = json.loads(line)
                found.append(Event(int(path.stem), name, tuple(texts)))
        return found

    def programs(self) -> dict[int, str]:
        """Process -> its command line, of each Python that was started."""
        return {
            event.pid: event.texts[1] for event in self.events() if event.texts[:1] == ("program",)
        }

    def breaches(self, since: dict[str, int], host: int) -> list[str]:
        """What no workflow may bring about, of what was done after a `position`. host: the process
        of ComfyUI."""
        events = dict.fromkeys(self.events(since))
        reasons = ((self.breach(event, event.pid == host), event) for event in events)
        return [
            f"{reason}: {event.name} {' | '.join(event.texts)}"[:600] for reason, event in reasons
            if reason
        ]

    def breach(self, event: Event, is_host: bool) -> str:
        """Which rule an event breaks, "" for none."""
        name, texts = event.name, event.texts
        is_marked = any(self.mark in text for text in texts)
        if name in ("open", "os.listdir", "os.scandir") or name in WRITING:
            paths = [
                path for path in texts[:2 if name in ("os.rename", "os.link", "os.symlink") else 1]
                if path
            ]
            writes = name in WRITING or (name == "open" and writes_file(texts))
            lists_devices = (
                name in ("os.listdir", "os.scandir")
                and not is_host
                and re.fullmatch(r"/dev(/\w+)?", texts[0])
            )
            if any(not self.may(path, writes) for path in paths) and not lists_devices:
                return "a file outside is written" if writes else "a file outside is opened"
            return ""
        if name in CONNECTING:
            if is_marked or (is_host and not texts[0].startswith(("/", "\0"))):
                return "a connection"
            return (
                ""
                if is_local(texts[0]) or texts[0].split(" ")[0] in CLOUD
                else "a connection to another machine"
            )
        if name in STARTING:
            if is_marked:
                return "a program with an argument"
            return "a program of its own" if is_host and not self.is_known_program(texts) else ""
        if name == "pickle.find_class":
            return (
                "a pickle"
                if is_marked or is_host or texts[0] in ("os", "posix", "nt", "subprocess")
                else ""
            )
        if name in ("os.putenv", "os.unsetenv"):
            return "a variable of the environment" if is_marked or is_host else ""
        return (
            f"{name} of a value"
            if is_marked and name in ("import", "exec", "compile", "ctypes.dlopen")
            else ""
        )

    def may(self, path: str, writes: bool) -> bool:
        real = os.path.realpath(path) if "\0" not in path else path
        folders = self.writable if writes else self.readable
        if any(real == folder or real.startswith(folder + os.sep) for folder in folders):
            return not real.startswith(str(self.server / "custom_nodes" / "private.disabled"))
        if writes:
            return real in ("/dev/null", "/dev/shm") or real.startswith("/dev/shm/")
        return bool(SYSTEM.fullmatch(real))

    def is_known_program(self, texts: tuple[str, ...]) -> bool:
        """Whether it stands in the table of tests/security.md: a C++ compiler, and this Python with
        a text of the pack's own."""
        from featherweight.cluster import batch_child
        from featherweight.ops.kernels import cpp_backend

        command = texts[1]
        if os.path.basename(texts[0]) in ("c++", "g++", "clang++", "zig"):
            flags = " ".join(cpp_backend.FLAGS)
            return (
                command.endswith(("--version", "zig version"))
                or (f" {flags} " in command
                and f" -o {self.own[1]}" in command)
            )
        return command == f"{sys.executable} {batch_child.BATCH} serve"


def writes_file(texts: tuple[str, ...]) -> bool:
    mode, flags = texts[1], int(texts[2])
    return any(letter in mode for letter in "wax+") if mode != "None" else bool(
        flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def is_local(address: str) -> bool:
    """address: as `audit_child` writes one, "('127.0.0.1', 80)" or a path."""
    own = {
        "localhost", "127.0.0.1", "0.0.0.0", "::1", "::", "", "None", "b''",
        socket.gethostname()
    }
    host = address.split(" ")[0]
    return address.startswith(("/", "\0")) or host in own


class Untouched:
    """Folders that nobody opens, reads, lists or writes inside a `with` block, whatever does it.
    Linux. `touched`: what was."""

    # of inotify: all but closing what nobody wrote
    EVENTS = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400
    HEAD = struct.Struct("iIII")

    def __init__(self, *folders: Path):
        self.folders = folders

    def __enter__(self):
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        self.watched = {
            libc.inotify_add_watch(self.descriptor, os.fsencode(folder), self.EVENTS): folder
            for folder in self.folders
        }
        assert self.descriptor >= 0 and min(self.watched) >= 0, os.strerror(ctypes.get_errno())
        return self

    def __exit__(self, *_):
        os.close(self.descriptor)

    def touched(self) -> list[str]:
        """Since the last call: folder, name, and the bits of what happened."""
        found = []
        while True:
            try:
                data = os.read(self.descriptor, 1 << 20)
            except BlockingIOError:
                return found
            while data:
                watch, mask, _, length = self.HEAD.unpack_from(data)
                name = data[self.HEAD.size:self.HEAD.size + length].rstrip(b"\0")
                found.append(f"{self.watched[watch]} {name.decode()} {mask:#x}")
                data = data[self.HEAD.size + length:]


class Listener:
    """Waits on 127.0.0.1 for connections, which nobody is to make."""

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self._accepted = self._own = 0
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self):
        try:
            while True:
                connection, _ = self.socket.accept()
                self._accepted += 1
                connection.close()
        except OSError:
            pass

    @property
    def count(self) -> int:
        """The connections that others have made until now, also those not accepted yet."""
        with socket.create_connection(("127.0.0.1", self.port)) as own:
            own.recv(1)  # ends when this one is accepted, after all before it
        self._own += 1
        return self._accepted - self._own

    def __exit__(self, *_):
        self.socket.close()
