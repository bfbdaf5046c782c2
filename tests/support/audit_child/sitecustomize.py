"""With this folder on PYTHONPATH, a Python that has AUDIT_LOG in its environment writes down what
it opens, starts, connects
to, imports and unpickles: a line of JSON for each, [seconds, event, [texts]], in a file of its own
in that folder. Its program notices nothing, and every Python that it starts does the same.
"""
import json
import os
import sys
import time

EVENTS = {
    "open", "import", "exec", "compile", "ctypes.dlopen", "pickle.find_class", "subprocess.Popen",
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.putenv",
    "os.unsetenv", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir",
    "os.chmod", "os.chown", "os.truncate", "os.utime", "os.mkfifo", "os.mknod", "os.listdir",
    "os.scandir", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.sendto", "urllib.Request"
}
ONCE = {"import", "exec", "compile"}  # for each text of these one line is enough
# Event -> (places of paths, places of the folders that they are relative to).
FOLDERS = {
    "os.rename": ((0, 1), (2, 3)), "os.link": ((0, 1), (2, 3)), "os.symlink": ((1,), (2,)),
    "os.mkdir": ((0,), (2,)), "os.remove": ((0,), (1,)), "os.rmdir": ((0,), (1,)),
    "os.chmod": ((0,), (2,)), "os.chown": ((0,), (3,)), "os.utime": ((0,), (3,)),
    "open": ((0,), ()), "os.listdir": ((0,), ()), "os.scandir": ((0,), ()),
    "os.truncate": ((0,), ())
}
seen = set()


def text(value) -> str:
    if isinstance(value, (str, bytes, os.PathLike)):
        return os.fsdecode(value)
    if isinstance(value, (list, tuple)):
        return " ".join(map(text, value))
    if isinstance(value, dict):  # an environment: what is not this process's own
        return " ".join(f"{text(name)}={text(given)}" for name, given in value.items()
                        if os.environ.get(text(name)) != text(given))
    if hasattr(value, "co_filename"):
        return f"{value.co_filename} {value.co_name}"
    return repr(value)[:300]


def path_of(value, folder: int) -> str:
    if isinstance(value, int) or value is None:
        return ""
    inside = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    return os.path.normpath(os.path.join(inside, os.fsdecode(value)))


def texts(event: str, arguments: tuple) -> list[str]:
    given = list(arguments)
    if event.startswith("socket.") and event not in ("socket.getaddrinfo", "socket.gethostbyname"):
        given = given[1:]  # without the socket itself
    if event in FOLDERS:
        paths, folders = FOLDERS[event]
        for index, place in enumerate(paths):
            given[place] = path_of(given[place],
                                   given[folders[index]] if index < len(folders) else -1)
    if event == "import":
        given = given[:2]
    return [text(value) for value in given]


def install(folder: str):
    files = {}

    def hook(event, arguments):
        if event not in EVENTS:
            return
        try:
            found = texts(event, arguments)
            if event in ONCE:
                key = event, *found
                if key in seen:
                    return
                seen.add(key)
            number = os.getpid()
            if number not in files:  # a forked process has its own
                files[number] = None  # while that is opened
                files[number] = os.open(f"{folder}/{number}.log",
                                        os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            if files[number] is not None:
                os.write(files[number], json.dumps([time.time(), event, found]).encode() + b"\n")
        except Exception as error:  # it may not be the program's
            os.write(2, f"audit: {event}: {error!r}\n".encode())

    sys.addaudithook(hook)
    with open("/proc/self/cmdline", "rb") as file:
        sys.audit("compile", "program", file.read().replace(b"\0", b" "))


if "AUDIT_LOG" in os.environ:
    install(os.environ["AUDIT_LOG"])
