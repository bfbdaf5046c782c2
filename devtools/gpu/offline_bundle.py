"""An environment on a bare machine: Linux with Python, torch for its GPU and what images for
machine learning hold, but without ComfyUI and without a package index. `pack` gathers what it
lacks, ComfyUI's own CUDA kernels too, and `environment` uses it there.

Standard library only: it runs before anything is installed.
"""
import importlib.metadata
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from devtools import ROOT
from devtools.host.environment import Environment, SetupError, prepare, read

PYTHON = "3.12"
CARRIED = 64 << 20  # bytes that reach such a machine at once, with the project's own files
# What such an image holds beside torch.
EXPECTED = {
    "torch", "torchvision", "torchaudio", "triton", "numpy", "scipy", "transformers", "tokenizers",
    "sentencepiece", "safetensors", "einops", "pillow", "requests", "tqdm", "psutil", "pyyaml",
    "filelock", "aiohttp", "yarl"
}
# Not part of what is measured: the editor, databases, video in nodes that nobody runs here.
LEFT_OUT = {
    "comfyui-frontend-package", "comfyui-workflow-templates", "comfyui-embedded-docs", "alembic",
    "sqlalchemy", "kornia", "pyopengl", "comfy-angle", "pydantic", "pydantic-settings", "av"
}
# ours, and what some of them need; pytest itself is in the image
FURTHER = ("gguf>=0.19.0", "pytest-rerunfailures", "trampoline")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + [
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
UNUSED = {
    ".git", "blueprints", "comfy_api_nodes", "models", "input", "output", "temp", "user",
    "custom_nodes"
}
TOKENIZERS = "_tokenizer"  # how the folders end that hold them, 28 MB: no stage encodes a text
HOST, WHEELS, KITCHEN = "host.tar.xz", "wheels", "kitchen.tar.xz"
STAND_IN = Path(__file__).with_name("av_stand_in.py")  # of a package of 35 MB
# Pythons before 3.11.4 have no filters
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def pack(folder: Path):
    """Fill `folder` with ComfyUI's source, its newest comfy_kitchen, and wheels."""
    environment = prepare()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / WHEELS).mkdir(parents=True)
    with tarfile.open(folder / HOST, "w:xz") as archive:
        archive.add(environment.host.resolve(), ".", filter=_wanted)  # a link is followed
    for requirement in [*_requirements(environment.host), *FURTHER]:
        if _name(requirement) == "comfy-kitchen":
            _pack_kitchen(environment.python, folder / KITCHEN)
        else:
            _download(environment.python, requirement, folder / WHEELS)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    left = CARRIED - _tracked_bytes()
    if size > left:
        raise SetupError(
            f"{folder} has {size / 1e6:.1f} MB. Beside the project's own files {left / 1e6:.1f} MB"
            " can be carried to such a machine at once.")
    print(
        f"Done: {size / 1e6:.1f} MB in {folder}. On the machine with the GPU: python3 dev.py gpu"
        f" --packed {folder.name}"
    )


def _wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    parts = Path(member.name).parts
    is_left_out = parts and (parts[0] in UNUSED or "__pycache__" in parts
                             or any(part.endswith(TOKENIZERS) for part in parts))
    return None if is_left_out else member


def _tracked_bytes() -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = (ROOT / name for name in listed.stdout.split("\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file())


def _pack_kitchen(python: Path, path: Path):
    """Write the newest comfy_kitchen with its CUDA kernels, of which xz makes half."""
    with tempfile.TemporaryDirectory() as wheels:
        _download(python, "comfy-kitchen", Path(wheels))
        (wheel,) = Path(wheels).iterdir()
        with zipfile.ZipFile(wheel) as archive, tarfile.open(path, "w:xz", preset=9) as out:
            for name in archive.namelist():
                if "/backends/hip/_C" not in name and not name.endswith("/"):
                    member, data = tarfile.TarInfo(name), archive.read(name)
                    member.size = len(data)
                    out.addfile(member, io.BytesIO(data))


def _requirements(host: Path) -> list[str]:
    lines = [line.strip() for line in read(host / "requirements.txt").splitlines()]
    return [
        line for line in lines if line and line[0] != "#" and _name(line) not in EXPECTED | LEFT_OUT
    ]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _download(python: Path, requirement: str, folder: Path):
    command = [
        str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", PYTHON,
        *(f"--platform={name}" for name in PLATFORMS), "--dest",
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
        archive.extractall(place / "host", **SAFELY)
    site = place / "site"
    site.mkdir(exist_ok=True)
    pinned = {_name(line) for line in _requirements(place / "host") if "==" in line}
    for wheel in sorted((folder / WHEELS).glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        found = _installed(name)
        if found is None or (_name(name) in pinned and found != version):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    with tarfile.open(folder / KITCHEN) as archive:
        archive.extractall(site, **SAFELY)
    if _installed("av") is None:
        (site / "av").mkdir()
        shutil.copyfile(STAND_IN, site / "av" / "__init__.py")
    return Environment(place / "host", Path(sys.executable)), str(site)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
