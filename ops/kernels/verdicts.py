"""Stores the verdicts of trials on a device's kernels, and the cases that models have needed.

Both are append-only files of JSON lines in the user's cache.
"""
import ctypes
import hashlib
import json
import math
import os
import platform
import stat
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from ..bounded_json import read_json
from .kernel import Backend, Case, Kernel
from .private_files import cache_folder, is_private, private_folder

MAX_FILE_BYTES = 4 << 20
MAX_NOTES = 200  # cases; the latest count
WEEK = 7 * 86400
# Each verdict, and the seconds after which it expires: a compiler may be installed, and the machine
# may have more time and memory. "begun": it is being tried, or it ended the process that tried it,
# or the whole computer. "works": of a probe. "refused": the kernel or its compiler raised an error.
# "killed": another program ended the process, as a system without memory does. "stopped": nothing
# is known of the kernel. "tried", "tried in part": of a case.
RETRY_AFTER_S = {"works": math.inf, "right": math.inf, "slower": math.inf, "wrong": math.inf,
                 "crashed": math.inf, "refused": WEEK, "hung": WEEK, "killed": WEEK, "begun": WEEK,
                 "stopped": 0, "tried": math.inf, "tried in part": WEEK}
# Of the files that make the kernels, and of the trial that they pass.
SOURCES = ("*_backend.py", "runtime_compiler.py", "kernel_source.py", "*validation.py",
           "trial_process.py", "source/**/*")
COMPILER_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu11", "nvidia-cuda-nvrtc-cu12",
                     "rocm-sdk-core")
NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
NVML_VERSION_BYTES = 80  # nvml.h, NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


class JsonLines:
    """A file of JSON objects, one per line, that only this user can have written."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        """Returns the valid lines; none of a file that others may have written.

        Raises:
            OSError
        """
        if not self._is_own() or self.path.stat().st_size > MAX_FILE_BYTES:
            return []
        lines = []
        for line in self.path.read_bytes().splitlines():
            try:
                lines.append(read_json(line))
            except ValueError:  # empty or cut short
                pass
        return [line for line in lines if isinstance(line, dict)]

    def append(self, **line):
        """Writes a line through to the drive, because what follows may end the process.

        Raises:
            OSError
        """
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


class Verdicts(JsonLines):
    """The verdicts on one device's kernels: a line before and after each, and after each case.

        {"name": "dequantize of Q4_K to float16, rows 1 to any by nvrtc", "verdict": "begun",
         "at": 1.7e9}
        {"name": the same, "verdict": "right", "at": 1.7e9, "seconds": [kernel's, torch's]}
        {"name": "dequantize of Q4_K to float16", "verdict": "tried", "at": 1.7e9}

    "verdict" is a key of `RETRY_AFTER_S`, "at" in seconds since 1970. "right" and "slower" (than
    torch) have "seconds", other verdicts may have a "why". A backend's probe has the name "probe by
    nvrtc".
    """

    @classmethod
    def of_device(cls, device: torch.device, backends: tuple[str, ...]) -> "Verdicts":
        """Returns the file for a device, these backends and the versions in use.

        Raises:
            OSError: The file cannot be written. A driver may raise anything else.
        """
        key = device_key(device, backends)
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        verdicts = cls(private_folder(cache_folder() / "verdicts") / f"{digest}.jsonl")
        if not verdicts.path.exists():
            verdicts.append(key=key)
        return verdicts

    def add(self, name: str, verdict: str, **more):
        """Appends a verdict with the current time. Raises OSError."""
        self.append(name=name, verdict=verdict, at=time.time(), **more)

    def results(self) -> "Results":
        """Returns the verdicts that have not expired. Raises OSError."""
        lines = [line for line in self.read() if is_verdict(line)]
        latest = {line["name"]: line for line in lines}
        current = {name: line for name, line in latest.items()
                   if time.time() - line["at"] < RETRY_AFTER_S[line["verdict"]]}
        is_unfinished = bool(lines) and lines[-1]["verdict"] == "begun"
        return Results(current, lines[-1] if is_unfinished else None)


class Results(NamedTuple):
    """The content of a file of `Verdicts`.

    Attributes:
        lines: The last line of each name, without those that have expired.
        unfinished: The file's last line, if its verdict is "begun".
    """
    lines: dict[str, dict]
    unfinished: dict | None

    def verdict(self, name: str) -> str | None:
        """Returns the verdict on a kernel, probe or case, None where there is none."""
        return self.lines[name]["verdict"] if name in self.lines else None

    def untried(self, cases: Iterable[Case]) -> list[Case]:
        """Returns the cases without a verdict."""
        return [case for case in cases if str(case) not in self.lines]

    def kernels(self, case: Case, backends: Iterable[Backend]) -> list[Kernel]:
        """Returns the kernels that are right and faster than torch, the fastest first."""
        time_ratios: dict[Kernel, float] = {}
        for backend in backends:
            for kernel in backend.kernels:
                name = case.kernel_name(backend.name, kernel)
                if self.verdict(name) == "right" and kernel.capability == case.capability:
                    kernel_seconds, torch_seconds = self.lines[name]["seconds"]
                    time_ratios[kernel] = kernel_seconds / torch_seconds
        return sorted(time_ratios, key=time_ratios.__getitem__)


def is_verdict(line: dict) -> bool:
    """Returns whether a line has the form that `Verdicts` describes."""
    match line:
        case {"name": str(), "verdict": "right" | "slower", "at": int() | float() as at,
              "seconds": [int() | float() as kernel_seconds, int() | float() as torch_seconds]}:
            return all(0 < number < 1e15 for number in (at, kernel_seconds, torch_seconds))
        case {"name": str(), "verdict": str(verdict), "at": int() | float() as at}:
            return (verdict in RETRY_AFTER_S and verdict not in ("right", "slower")
                    and 0 < at < 1e15 and isinstance(line.get("why", ""), str))
    return False


class Notes(JsonLines):
    """The cases that models have needed, one per line: {"case": result of `Case.as_json`}."""

    def __init__(self):
        super().__init__(private_folder(cache_folder() / "trials") / "notes.jsonl")

    def cases(self) -> list[Case]:
        """Returns the latest cases, each once. Raises OSError."""
        cases = filter(None, (Case.of_json(line.get("case")) for line in self.read()))
        return list(dict.fromkeys(cases))[-MAX_NOTES:]

    def add(self, cases: Iterable[Case]):
        """Notes the new ones among cases that a trial can try. Raises OSError."""
        noted = self.cases()
        for case in cases:
            if case not in noted:
                self.append(case=case.as_json())


def device_key(device: torch.device, backends: tuple[str, ...]) -> dict[str, str]:
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
        "backends": ", ".join(backends),
        "compilers": compiler_versions(),
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
    for path in sorted(path for pattern in SOURCES for path in folder.glob(pattern)):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
