"""Stores the verdicts on a device's kernels, in an append-only file in the user's cache."""
import ctypes
import hashlib
import json
import math
import os
import platform
import stat
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from ...child_process import is_ending
from ..bounded_json import read_json
from .kernel import Backend
from .private_files import cache_folder, is_private, private_folder

MAX_FILE_BYTES = 4 << 20
WEEK = 7 * 86400
# Each verdict, and the seconds after which it expires: a compiler may be installed, and the machine
# may have more time and memory. "refused": the kernel or its compiler raised an error. "slow": it
# is slower than torch. "begun": it is being validated, or the process that did so has ended, or the
# whole computer. "stopped": nothing is known of it.
RETRY_AFTER_S = {"right": math.inf, "slow": math.inf, "wrong": math.inf, "crashed": math.inf,
                 "refused": WEEK, "hung": WEEK, "begun": WEEK, "stopped": 0}
# What "refused" says of a kernel whose compiler an ending process has killed or not started:
# versions before 0.2.3 have stored that.
REFUSED_AT_END = ("this process is ending", ": it failed')")
# Of the files that make the kernels, and of what validates them.
SOURCES = ("*_backend.py", "*compiler.py", "kernel_source.py", "*validation*.py",
           "source/**/*")
COMPILER_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu11", "nvidia-cuda-nvrtc-cu12",
                     "rocm-sdk-core")
OLDER_FILES = 3  # that are read for what models have needed
NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
NVML_VERSION_BYTES = 80  # nvml.h, NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


class Verdicts:
    """The verdicts on one device's kernels: a line of JSON before and after each is validated.

        {"name": "dequantize of Q4_K to float16, rows 1 to any by nvrtc", "verdict": "begun",
         "at": 1.7e9}
        {"name": the same, "verdict": "right", "at": 1.7e9, "seconds": [kernel's, torch's]}

    "verdict" is a key of `RETRY_AFTER_S`, "at" in seconds since 1970. "seconds" are there where a
    kernel was timed, and others may have a "why".
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
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        verdicts = cls(private_folder(cache_folder() / "verdicts") / f"{digest}.jsonl")
        if not verdicts.path.exists():
            verdicts._append(key=key)
        return verdicts

    def add(self, name: str, verdict: str, **more) -> dict:
        """Appends a verdict with the current time, through to the drive, because what follows may
        end the process. Returns the line. Raises OSError.

        While this process ends, nothing but "right" is known: compilers are killed."""
        if verdict != "right" and is_ending():
            verdict = "stopped"
        return self._append(name=name, verdict=verdict, at=time.time(), **more)

    def read(self) -> dict[str, dict]:
        """Returns the last line of each name, without those that have expired; none of a file that
        others may have written. Raises OSError."""
        lines = {line["name"]: line for line in self._lines() if is_verdict(line)}
        return {name: line for name, line in lines.items()
                if time.time() - line["at"] < RETRY_AFTER_S[line["verdict"]]
                and not any(text in line.get("why", "") for text in REFUSED_AT_END)}

    def of_earlier_versions(self) -> list[str]:
        """Returns the names in the latest files of other versions. Raises OSError."""
        others = sorted((path for path in self.path.parent.glob("*.jsonl") if path != self.path),
                        key=lambda path: path.stat().st_mtime, reverse=True)
        return [name for path in others[:OLDER_FILES] for name in Verdicts(path).read()]

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

    def _append(self, **line) -> dict:
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
        return line

    def _is_own(self) -> bool:
        return is_private(self.path.parent, stat.S_ISDIR) and is_private(self.path, stat.S_ISREG)


def is_verdict(line: object) -> bool:
    """Returns whether a line has the form that `Verdicts` describes."""
    match line:
        case {"name": str(), "verdict": str(verdict), "at": int() | float() as at, **more}:
            seconds = more.get("seconds", [1, 1])
            return (verdict in RETRY_AFTER_S and 0 < at < 1e15
                    and isinstance(more.get("why", ""), str)
                    and isinstance(seconds, list) and len(seconds) == 2
                    and all(isinstance(number, int | float) and 0 < number < 1e15
                            for number in seconds))
    return False


def device_key(device: torch.device, backend: Backend) -> dict[str, str]:
    """Returns what verdicts depend on: devices with equal keys share their verdicts."""
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
        "source": source_hash(Path(__file__).parent),
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


def source_hash(folder: Path) -> str:
    """Returns a digest of the files in `SOURCES`, in a folder that holds the kernels."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in folder.glob(pattern)}):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
