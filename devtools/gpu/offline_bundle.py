"""An environment on a bare machine: Linux with Python, torch for its GPU and what images for
machine learning hold, but without ComfyUI and without a package index. `pack` gathers what it
lacks, `environment` uses it there.

Standard library only: it runs before anything is installed.
"""
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from devtools.host.environment import Environment, SetupError, prepare, read

PYTHON = "3.12"
LIMIT = 55e6  # bytes of the folder
# What such an image holds beside torch. scipy alone is 35 MB.
EXPECTED = {
    "torch", "torchvision", "torchaudio", "numpy", "scipy", "transformers", "pillow", "requests",
    "tqdm"
}
# Not part of what is measured: the editor, databases, video in nodes that nobody runs here.
LEFT_OUT = {
    "comfyui-frontend-package", "comfyui-workflow-templates", "comfyui-embedded-docs", "alembic",
    "sqlalchemy", "aiohttp", "yarl", "kornia", "pyopengl", "comfy-angle", "pydantic",
    "pydantic-settings"
}
# ours, and what some of them need
FURTHER = ("gguf>=0.19.0", "pytest", "iniconfig", "pluggy", "trampoline")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + [
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
UNUSED = {
    ".git", "blueprints", "comfy_api_nodes", "models", "input", "output", "temp", "user",
    "custom_nodes"
}
PURE = {"comfy-kitchen"}  # its wheel with kernels is 45 MB; packed weights run on ours
HOST, WHEELS, PEERS = "host.tar.xz", "wheels", "peers"


def pack(folder: Path, peer: Path | None = None):
    """Fill `folder` with ComfyUI's source, wheels, and another pack to compare with."""
    environment = prepare()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / WHEELS).mkdir(parents=True)
    with tarfile.open(folder / HOST, "w:xz") as archive:
        archive.add(environment.host, ".", filter=_wanted)
    for requirement in [*_requirements(environment.host), *FURTHER]:
        _download(environment.python, requirement, folder / WHEELS)
    if peer is not None:
        shutil.copytree(peer, folder / PEERS / peer.name,
                        ignore=shutil.ignore_patterns(".git", "__pycache__"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT:
        raise SetupError(f"{folder} has {size / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f} MB.")
    print(
        f"Done: {size / 1e6:.1f} MB in {folder}. On the machine with the GPU: python3 dev.py gpu"
        f" --packed {folder.name}"
    )


def _wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    parts = Path(member.name).parts
    return None if parts and (parts[0] in UNUSED or "__pycache__" in parts) else member


def _requirements(host: Path) -> list[str]:
    lines = [line.strip() for line in read(host / "requirements.txt").splitlines()]
    return [
        line for line in lines if line and line[0] != "#" and _name(line) not in EXPECTED | LEFT_OUT
    ]


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def _download(python: Path, requirement: str, folder: Path):
    platforms = ["any"] if _name(requirement) in PURE else PLATFORMS
    command = [
        str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", PYTHON,
        *(f"--platform={name}" for name in platforms), "--dest",
        str(folder), requirement
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise SetupError(
            f"No wheel of {requirement} for Python {PYTHON} on Linux:"
            f" {found.stderr.strip().splitlines()[-1]}"
        )


def environment(folder: Path, place: Path) -> tuple[Environment, str]:
    """What `pack` gathered and this machine lacks, unpacked into `place`, and the folder in it for
    PYTHONPATH.

    Raises SetupError. A wheel of which the machine has another version is used where ComfyUI asks
    for that version alone.
    """
    if not (folder / HOST).is_file():
        raise SetupError(f"{folder} has no {HOST}. Fill it on a machine with a package index: "
                         f"python3 dev.py gpu --pack {folder.name}")
    with tarfile.open(folder / HOST) as archive:
        archive.extractall(place / "host", filter="data")
    pinned = {_name(line) for line in _requirements(place / "host") if "==" in line}
    for wheel in sorted((folder / WHEELS).glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        found = _installed(name)
        if found is None or (_name(name) in pinned and found != version):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place / "site")
    return Environment(place / "host", Path(sys.executable)), str(place / "site")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
