"""What the verdict on a kernel depends on: the device, its driver, torch, the backend and the kernel's own text."""
import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

from .nvrtc import nvrtc_libraries

HERE = Path(__file__).parent
# Of a backend: the files that make its kernels, and the check that they passed.
CHECK = ("check*.py", "trial.py", "timing.py")
C_PLUS_PLUS = ("cxx_text.py", "source/*.h", "source/formats/*")
TEXTS = {"triton": ("triton_*.py",), "nvrtc": ("nvrtc*.py", "source/cuda/*", *C_PLUS_PLUS),
         "metal": ("metal_*.py", "source/metal/*", *C_PLUS_PLUS), "cpp": ("cpp_*.py", "source/cpu/*", *C_PLUS_PLUS)}
COMPILERS = ("c++", "g++", "clang++")  # of C++, after the environment variable CXX
NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
VERSION_BYTES = 80  # nvml.h, NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


def device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def key_of(device: torch.device, backend: str) -> dict[str, str]:
    """Equal where a verdict of the one holds for the other. backend: a name; it is not imported."""
    if device.type == "cuda":
        of_device = {"device": torch.cuda.get_device_name(device), "driver": driver_version(),
                     "capability": f"{torch.cuda.get_device_capability(device)} {amd_architecture(device)}".rstrip(),
                     "runtime": str(torch.version.cuda or torch.version.hip)}
    else:
        of_device = {"device": device.type, "driver": platform.mac_ver()[0],
                     "capability": f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}"}
    return {**of_device, "system": f"{sys.platform} {platform.machine()}", "torch": torch.__version__, "backend": backend,
            "version": backend_version(backend), "text": text_digest(backend)}


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found[1] if found else platform.machine()  # `processor` would start a program


def amd_architecture(device: torch.device) -> str:
    """What ROCm compiles for, "" without it. Devices of one name may differ in that, and variables may pretend another one."""
    pretended = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("HSA_OVERRIDE_GFX_VERSION")]
    found = getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")
    return " ".join([found, *pretended]) if torch.version.hip else ""


def driver_version() -> str:
    """NVIDIA's, or the kernel module's of AMD; "" where neither says."""
    if torch.version.hip:
        file = Path("/sys/module/amdgpu/version")
        return file.read_text().strip() if file.is_file() else platform.release()
    text = ctypes.create_string_buffer(VERSION_BYTES)
    try:
        nvml = ctypes.CDLL(NVML)
        if nvml.nvmlInit_v2():
            return ""
        nvml.nvmlSystemGetDriverVersion(text, VERSION_BYTES)
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        pass
    return text.value.decode(errors="replace")


def backend_version(name: str) -> str:
    """Of what compiles a backend's kernels, as far as it can be told without it."""
    if name == "triton":
        found = _installed("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm")
        return ", ".join([*found, str(shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"))])
    if name == "nvrtc":
        found = [os.path.basename(os.path.realpath(path)) for path in nvrtc_libraries()]
        return ", ".join(dict.fromkeys([*found, *_installed("nvidia-cuda-nvrtc", *(f"nvidia-cuda-nvrtc-cu{major}"
                                                                                  for major in (11, 12, 13)))]))
    if name == "cpp":
        return os.path.realpath(compiler) if (compiler := cpp_compiler()) else ""
    return ""


def cpp_compiler() -> str | None:
    """The program, or None where there is none."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))), None)


def _installed(*packages: str) -> list[str]:
    """Those that are there, each with its version."""
    found = []
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return found


def text_digest(backend: str) -> str:
    paths = sorted({path for pattern in (*TEXTS.get(backend, ()), *CHECK) for path in HERE.glob(pattern)})
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
