"""An environment on a bare machine: Linux with Python, torch for its GPU and what images for
machine learning hold, but without ComfyUI and without a package index. `pack` gathers what it
lacks, `pack_kitchen` ComfyUI's own CUDA kernels, and `environment` uses both there.

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
PURE = {"comfy-kitchen"}  # its kernels travel apart
HOST, WHEELS = "host.tar.xz", "wheels"
KITCHEN, PART_BYTES = "kitchen.tar.xz", 20_000_000
STAND_IN = Path(__file__).with_name("av_stand_in.py")  # of a package of 35 MB
# Pythons before 3.11.4 have no filters
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def pack(folder: Path):
    """Fill `folder` with ComfyUI's source and wheels."""
    environment = prepare()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / WHEELS).mkdir(parents=True)
    with tarfile.open(folder / HOST, "w:xz") as archive:
        archive.add(environment.host.resolve(), ".", filter=_wanted)  # a link is followed
    for requirement in [*_requirements(environment.host), *FURTHER]:
        _download(environment.python, requirement, folder / WHEELS,
                  ["any"] if _name(requirement) in PURE else PLATFORMS)
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
    return None if parts and (parts[0] in UNUSED or "__pycache__" in parts) else member


def _tracked_bytes() -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = (ROOT / name for name in listed.stdout.split("\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file())


def pack_kitchen(folder: Path):
    """Fill `folder` with the newest comfy_kitchen and its CUDA kernels, in parts of 20 MB.

    Each part is a folder of its own, since two of them do not fit into one transfer.
    """
    environment = prepare()
    shutil.rmtree(folder, ignore_errors=True)
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as wheels:
        _download(environment.python, "comfy-kitchen", Path(wheels), PLATFORMS)
        (wheel,) = Path(wheels).iterdir()
        with zipfile.ZipFile(wheel) as archive, tarfile.open(fileobj=packed, mode="w:xz",
                                                             preset=9) as out:
            for name in archive.namelist():
                if "/backends/hip/_C" not in name and not name.endswith("/"):
                    member = tarfile.TarInfo(name)
                    data = archive.read(name)
                    member.size = len(data)
                    out.addfile(member, io.BytesIO(data))
    data = packed.getvalue()
    parts = [data[start:start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]
    for number, part in enumerate(parts, 1):
        path = folder / str(number) / f"{KITCHEN}.{number}-of-{len(parts)}"
        path.parent.mkdir(parents=True)
        path.write_bytes(part)
    print(f"Done: {wheel.name}, {len(data) / 1e6:.1f} MB in {len(parts)} folders of {folder}. Carry"
          f" one in each call, then: python3 dev.py gpu --packed FOLDER --kitchen {folder.name}")


def _requirements(host: Path) -> list[str]:
    lines = [line.strip() for line in read(host / "requirements.txt").splitlines()]
    return [
        line for line in lines if line and line[0] != "#" and _name(line) not in EXPECTED | LEFT_OUT
    ]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _download(python: Path, requirement: str, folder: Path, platforms: list[str]):
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


def environment(folder: Path, place: Path,
                kitchen: Path | None = None) -> tuple[Environment, str]:
    """What `pack` gathered and this machine lacks, unpacked into `place`, and the folder in it for
    PYTHONPATH.

    Raises SetupError. A wheel of which the machine has another version is used where ComfyUI asks
    for that version alone. kitchen: what `pack_kitchen` filled, used in place of the wheel.
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
    if kitchen is not None:
        for old in site.glob("comfy_kitchen*"):
            shutil.rmtree(old)
        with tarfile.open(fileobj=io.BytesIO(_joined(kitchen))) as archive:
            archive.extractall(site, **SAFELY)
    if _installed("av") is None:
        (site / "av").mkdir()
        shutil.copyfile(STAND_IN, site / "av" / "__init__.py")
    return Environment(place / "host", Path(sys.executable)), str(site)


def _joined(kitchen: Path) -> bytes:
    """What `pack_kitchen` parted. Raises SetupError if a part has not arrived."""
    parts = {path.suffix: path for path in kitchen.glob(f"*/{KITCHEN}.*-of-*")}
    count = next((int(suffix.rpartition("-of-")[2]) for suffix in parts), 0)
    names = [f".{number}-of-{count}" for number in range(1, count + 1)]
    missing = [name[1:] for name in names if name not in parts]
    if missing or not parts:
        raise SetupError(f"{kitchen} lacks the part {', '.join(missing) or '1'} of ComfyUI's"
                         " kernels. Carry its other folder in another call first.")
    return b"".join(parts[name].read_bytes() for name in names)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
