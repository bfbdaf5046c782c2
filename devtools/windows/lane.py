"""Makes a Windows Python with torch and ComfyUI's packages in .dev/windows; runs pytest there."""
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import tomllib

from devtools import ROOT
from devtools.commands import WHOLE_FILES, processes
from devtools.host.environment import (
    DEV,
    EXTRAS,
    LOCKED,
    OPTIONAL,
    SetupError,
    read,
    requirements,
    uv_of,
)
from devtools.host.server import HOST, PACK
from devtools.windows import portable, python
from devtools.windows.missing_in_wine import complex_numbers
from devtools.windows.programs import compile_program

LANE = DEV / "windows"
PREFIX = LANE / "prefix"
PORTABLE = LANE / "Zoë's 模型" / "ComfyUI_windows_portable"  # letters that code pages lack
PACKAGES = LANE / "python" / "Lib" / "site-packages"
SOURCES = Path(__file__).with_name("missing_in_wine")
KNOWN = Path(__file__).with_name("known.toml")
# what has no build for Windows, or needs none here
APART = re.compile(r"(?i)(nvidia|triton|cuda|ray|nodesafe|pyright|ruff|playwright)")
# of the pack's C runtime, which Microsoft ships: Wine's own are not complete
OWN_DLLS = ("msvcp140", "msvcp140_1", "msvcp140_2", "vcruntime140", "vcruntime140_1", "vcomp140",
            "concrt140", "ucrtbase", "ucrtwine")
FOLDERS = ("tests/loaders", "tests/node", "tests/ops/formats", "tests/ops/kernels/test_zig.py",
           "tests/server")
CHECK = "import numpy; import torch; import ssl"  # one that fails is in the traceback


def main(arguments: list[str]) -> int:
    """Runs the tests of files and folders, by default `FOLDERS`, of which it runs what a day draws.

    Returns pytest's exit code, 1 if a test of known.toml passes, 2 if the lane cannot be made.
    """
    try:
        for step in (fetch_wine, make_prefix, make_python, install_packages, check):
            _once(step)
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        print(f"Failed: the lane for Windows cannot be made: {error}")
        return 2
    report = LANE / "report.txt"
    report.unlink(missing_ok=True)
    is_whole = all(name.startswith("-") for name in arguments)
    whole = "-n", str(processes()), *WHOLE_FILES, "--drawn", *FOLDERS
    tests = [*arguments, *(whole if is_whole else ())]
    print("Running the tests on Windows", flush=True)
    code = run("-m", "pytest", "-p", "no:cacheprovider", "-p", "devtools.windows.outcomes",
               "--continue-on-collection-errors", *tests,
               FEATHERWEIGHT_OUTCOMES=windows_path(report), OMP_NUM_THREADS="1")
    code = judge(read(report), tomllib.loads(read(KNOWN)), code)
    return code or (draw_in_portable() if is_whole else 0)


def draw_in_portable() -> int:
    """Draws with ComfyUI's portable version. Returns 0 if it did."""
    print(f"Drawing in {PORTABLE}", flush=True)
    portable.lay_out(PORTABLE, LANE / "python", HOST)
    program = PORTABLE / "ComfyUI" / "custom_nodes" / PACK / "devtools" / "windows" / "portable.py"
    return run("-s", windows_path(program), folder=PORTABLE,
               python=PORTABLE / "python_embeded" / "python.exe")


def judge(report: str, known: dict, code: int) -> int:
    """Compares outcomes of tests with those that known.toml expects.

    Args:
        report: a line "OUTCOME ID" for each test.
        known: the parsed known.toml.
        code: pytest's exit code.

    Returns:
        1 if another test failed or one of the table has passed, else 0; pytest's own code if it ran
        no test.
    """
    rows = [_literal(row["test"]) for row in known["tests"]]
    outcomes = {test: outcome for outcome, _, test in (
        line.partition(" ") for line in report.splitlines())}
    if not outcomes or code not in (0, 1):
        return code or 1
    unknown, mended = [], []
    for test, outcome in outcomes.items():
        is_known = any(fnmatch.fnmatchcase(test, row) for row in rows)
        if outcome == "failed" and not is_known:
            unknown.append(test)
        elif outcome == "passed" and is_known:
            mended.append(test)
    for title, tests in (("fails on Windows", unknown),
                         ("passes on Windows: take its row out of known.toml", mended)):
        for test in tests:
            print(f"{test} {title}")
    return 1 if unknown or mended else 0


def _literal(name: str) -> str:
    return name.replace("[", "[[]")  # of an id with parameters; * stands for any of them


def run(*arguments: str, folder: Path = ROOT, python: Path = LANE / "python" / "python.exe",
        **variables: str) -> int:
    """Runs a Windows Python in a folder. Returns its exit code."""
    # CPython does not start on what Wine makes of a file's handle, so all streams are pipes
    process = subprocess.Popen(["wine", str(python), *arguments],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, cwd=folder,
                               env={**environment(), **variables})
    shown = threading.Thread(target=_show, args=(process.stdout,), daemon=True)
    shown.start()
    process.wait()
    shown.join(5)  # what it has started may hold the pipe longer
    return process.returncode


def _show(lines: Iterable[bytes]):
    for line in lines:
        if b"Read access denied for device" not in line:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()


def environment() -> dict[str, str]:
    """Returns the environment variables of programs in Wine."""
    hidden = {"DISPLAY", "HOME", "XDG_CACHE_HOME", "TMPDIR", "PYTHONPATH", "PYTHONHOME"}
    return {name: value for name, value in os.environ.items() if name not in hidden} | {
        "WINEPREFIX": str(PREFIX), "WINEARCH": "win64", "WINEDEBUG": "-all", "LC_ALL": "C.UTF-8",
        "WINEDLLOVERRIDES":
            f"mscoree,mshtml=;winemenubuilder.exe=;{','.join(OWN_DLLS)}=n,b",
        # AMX takes a permission of Linux, for which nothing asks in Wine
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "KMP_AFFINITY": "disabled",
        "PYTHONDONTWRITEBYTECODE": "1",
        "COMFYUI_PATH": windows_path(HOST.resolve()),
        "ZIG_LINUX": _zig(), "ZIG_PREFIX": str(PREFIX),
    }


def windows_path(path: Path) -> str:
    """Returns how a program in Wine names a file of Linux."""
    return "Z:" + str(path).replace("/", "\\")


def _zig() -> str:
    import ziglang
    return str(Path(next(iter(ziglang.__path__))) / "zig")


# --- the steps ---

def _once(step: Callable[[], None]):
    """Runs a step, unless its mark says that it has been run as it is."""
    mark = LANE / "marks" / step.__name__
    if read(mark) == python.PINNED:
        return
    print(f"Windows: {(step.__doc__ or '').partition('.')[0].lower()}", flush=True)
    started = time.monotonic()
    step()
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(python.PINNED)
    print(f"  {time.monotonic() - started:.0f} s", flush=True)


def fetch_wine():
    """Installing Wine."""
    if sys.platform != "linux":
        raise SetupError("it needs Linux; on Windows, dev.py test runs there itself.")
    if shutil.which("wine") is None:
        if os.getuid() or shutil.which("apt-get") is None:
            raise SetupError("Wine is missing. Install it (on Debian and Ubuntu the package wine),"
                             " then run this again.")
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "wine",
                        "wine64"], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def make_prefix():
    """Making Wine's folder, with the functions that Wine lacks."""
    shutil.rmtree(PREFIX, ignore_errors=True)
    PREFIX.mkdir(parents=True)
    for command in (("wineboot", "-i"), ("wineserver", "-w"),
                    ("wine", "reg", "add", r"HKCU\Software\Wine", "/v", "Version", "/t", "REG_SZ",
                     "/d", "win10", "/f"), ("wineserver", "-w")):
        subprocess.run(command, env=environment(), check=True, capture_output=True,
                       stdin=subprocess.DEVNULL)
    system = PREFIX / "drive_c" / "windows" / "system32"
    complex_numbers.make_libraries(system)
    if not any(Path("/usr/lib").rglob("wine/x86_64-windows/bcryptprimitives.dll")):
        compile_program(SOURCES / "process_prng.c", system / "bcryptprimitives.dll", "-shared",
                        "-ladvapi32")


def make_python():
    """Making the Windows Python."""
    python.make(LANE / "python")


def install_packages():
    """Installing ComfyUI's packages for Windows."""
    # pip reads the conditions of requirements for the system that it runs on, uv for another
    wanted = ["torch", *requirements(HOST), *EXTRAS, *OPTIONAL, "accelerate", "pip"]
    wanted = [package for package in wanted if not APART.match(package)]
    command = [*uv_of(Path(sys.executable)), "pip", "install", "--quiet", "--no-cache",
               "--python-platform", "windows", "--python-version",
               f"{sys.version_info.major}.{sys.version_info.minor}", "--target", str(PACKAGES),
               "--only-binary", ":all:", "--no-binary", "toml", "-c", str(LOCKED), *wanted]
    subprocess.run(command, check=True)
    # Zig for Windows does not run in Wine: in its place stands a program that calls Linux's
    compile_program(SOURCES / "zig.c", PACKAGES / "ziglang" / "zig.exe", "-municode")


def check():
    """Importing numpy, torch and ssl."""
    if code := run("-c", CHECK):
        raise SetupError(f"the import above failed in Wine, with exit code {code}. Delete {LANE}"
                         " and run this again.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
