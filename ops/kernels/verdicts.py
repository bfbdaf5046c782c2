"""Stores the verdicts on a device's kernels, in an append-only file in the user's cache."""
import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import psutil
import torch

from ...child_process import is_ending
from ..bounded_json import read_json
from .kernel import Backend
from .private_files import cache_folder, is_private, private_folder

MAX_FILE_BYTES = 4 << 20
COMPUTER_STARTED = psutil.boot_time()  # seconds since 1970
# "faulty": the compiler found a fault in the source. "begun": it is being checked; where the
# computer was started again since, it has ended with the kernel, which counts as a crash. "open":
# that check has ended without a verdict. "refused" of 0.2.3, also of compilers that were killed,
# counts no more.
VERDICTS = ("right", "wrong", "crashed", "faulty", "begun", "open")
COMPILER_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu11", "nvidia-cuda-nvrtc-cu12",
                     "rocm-sdk-core")
NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
NVML_VERSION_BYTES = 80  # nvml.h, NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


class Verdicts:
    """The verdicts on one device's kernels, a line of JSON each.

        {"name": "dequantize of Q4_K to float16, rows 1 to any by nvrtc, 0a1b2c3d", "at": 1.7e9,
         "verdict": "right"}

    "name" ends with a digest of what the kernel is made of and checked by. "verdict" is one of
    `VERDICTS`, "at" in seconds since 1970, and others may have a "why".
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def of_device(cls, device: torch.device, backend: Backend) -> "Verdicts":
        """Returns the file for a device, a backend and the versions in use.

        Raises:
            OSError: The file cannot be written. A driver may raise anything else.
        """
        key = device_key(device, backend)
        folder = private_folder(cache_folder() / "verdicts")
        verdicts = cls(folder / f"{digest_of([str(key)])}.jsonl")
        if not verdicts.path.exists():
            verdicts._append(key=key)
        return verdicts

    def add(self, name: str, verdict: str, why: str = ""):
        """Appends a verdict with the current time, through to the drive, because what follows may
        end the computer; one that is none of `VERDICTS` only withdraws "begun". Raises OSError.

        While this process ends, nothing but "right" is known: compilers are killed."""
        if verdict not in VERDICTS or (is_ending() and verdict != "right"):
            verdict, why = "open", ""
        if verdict == "open" and name not in being_checked:
            return
        if verdict == "begun":
            being_checked[name] = self
        more = {"why": why} if why else {}
        self._append(name=name, verdict=verdict, at=time.time(), **more)
        if verdict != "begun":
            being_checked.pop(name, None)

    def read(self) -> dict[str, dict]:
        """Returns the last line of each name; none of a file that others may have written. Raises
        OSError."""
        lines = {line["name"]: line for line in self._lines() if is_verdict(line)}
        for name, line in list(lines.items()):
            if line["verdict"] == "begun" and line["at"] < COMPUTER_STARTED:
                lines[name] = {**line, "verdict": "crashed", "why": "the computer ended meanwhile"}
            elif line["verdict"] in ("begun", "open"):
                del lines[name]
        return lines

    def _lines(self) -> list[dict]:
        if not self._is_own() or self.path.stat().st_size > MAX_FILE_BYTES:
            return []
        lines = []
        for line in self.path.read_bytes().splitlines():
            try:
                lines.append(read_json(line))
            except ValueError:  # empty or cut short
                pass
        return [line for line in lines if isinstance(line, dict)]

    def _append(self, **line):
        if os.path.lexists(self.path):
            if not self._is_own():
                raise PermissionError(f"{self.path} or its folder is a link, belongs to another "
                                      "user or can be written by others; remove it")
            if self.path.stat().st_size > MAX_FILE_BYTES:
                self.path.unlink()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(handle, "wb") as file:
            file.write(b"\n" + json.dumps(line).encode())  # after a line that was cut short
            file.flush()
            os.fsync(handle)

    def _is_own(self) -> bool:
        return is_private(self.path.parent, stat.S_ISDIR) and is_private(self.path, stat.S_ISREG)


being_checked: dict[str, Verdicts] = {}  # kernels that are begun, of this process


@atexit.register
def withdraw_all():
    """Withdraws what is begun: its check ends with this process."""
    for name, verdicts in list(being_checked.items()):
        with contextlib.suppress(OSError):
            verdicts.add(name, "open")


def is_verdict(line: object) -> bool:
    """Returns whether a line has the form that `Verdicts` describes."""
    match line:
        case {"name": str(), "verdict": str(verdict), "at": int() | float() as at, **more}:
            return verdict in VERDICTS and 0 < at < 1e15 and isinstance(more.get("why", ""), str)
    return False


def device_key(device: torch.device, backend: Backend) -> dict[str, str]:
    """Returns what verdicts depend on besides the kernels: devices with equal keys share them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = driver_version()
        capability = f"{torch.cuda.get_device_capability(device)} {amd_architecture(device)}"
    else:
        name = device.type
        driver = platform.mac_ver()[0]
        capability = platform.machine()
    return {
        "device": name,
        "driver": driver,
        "compute capability": capability,
        "system": sys.platform,
        "torch": torch.__version__,
        "runtime": str(torch.version.cuda or torch.version.hip),
        "backend": backend.name,
        "compilers": f"{backend.compiler()} {compiler_versions()}",
    }


def amd_architecture(device: torch.device) -> str:
    """Returns what ROCm compiles for, "" without ROCm.

    Devices of the same name may differ in it, and environment variables may override it.
    """
    if not torch.version.hip:
        return ""
    overrides = [f"{name}={value}" for name, value in sorted(os.environ.items())
                 if name.startswith("HSA_OVERRIDE_GFX_VERSION")]
    architecture = getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")
    return " ".join([architecture, *overrides])


def driver_version() -> str:
    """Returns the version of NVIDIA's driver or of AMD's kernel module, "" where neither is
    known."""
    if torch.version.hip:
        file = Path("/sys/module/amdgpu/version")
        return file.read_text().strip() if file.is_file() else platform.release()
    text = ctypes.create_string_buffer(NVML_VERSION_BYTES)
    try:
        nvml = ctypes.CDLL(NVML)
        if not nvml.nvmlInit_v2():
            nvml.nvmlSystemGetDriverVersion(text, NVML_VERSION_BYTES)
            nvml.nvmlShutdown()
    except (OSError, AttributeError):
        pass
    return text.value.decode(errors="replace")


def compiler_versions() -> str:
    """Returns the versions of the packages that compile kernels."""
    versions = []
    for package in COMPILER_PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    return ", ".join(versions)


def digest_of(parts: Iterable[str | bytes | Path]) -> str:
    """Returns a digest of texts and of the contents of files, 32 characters."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.read_bytes() if isinstance(part, Path) else part
        digest.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return digest.hexdigest()[:32]
