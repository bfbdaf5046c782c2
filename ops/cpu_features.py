"""What the CPU multiplies natively, asked of torch, and who made it."""
import functools
import os
import platform
from pathlib import Path

import torch

AMD = "AuthenticAMD"


def is_x86() -> bool:
    """Returns whether the CPU runs x86 instructions of 64 bits."""
    return platform.machine().lower() in ("x86_64", "amd64")


def identifier() -> str:
    """Returns what Windows says of the CPU: its family, model and maker; "" on other systems."""
    return os.environ.get("PROCESSOR_IDENTIFIER", "")


@functools.cache
def is_amd() -> bool:
    """Returns whether AMD made the CPU. False where the system does not say."""
    if AMD in identifier():
        return True
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and AMD in cpuinfo.read_text(errors="replace")


def multiplies_bfloat16() -> bool:
    """Returns whether the CPU has products of bfloat16 that torch uses: AVX512-BF16, AMX or Arm's
    BF16.

    Other CPUs, on which torch converts every number to float32 first, are slower in bfloat16.
    """
    return torch.backends.mkldnn.is_available() and _has(
        "avx512_bf16", "amx_bf16", "bf16",
        older=("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def has_avx512_bfloat16() -> bool:
    """Returns whether AVX512-BF16 is the fastest that the CPU multiplies bfloat16 by: it is not
    where there is AMX."""
    return (_has("avx512_bf16", older=("_is_avx512_bf16_supported",))
            and not _has("amx_bf16", older=("_is_amx_tile_supported",)))


def has_vnni() -> bool:
    """Returns whether the CPU sums products of bytes in int32; int16 sums may overflow."""
    return _has("avx512_vnni", "avx_vnni", "amx_int8", older=("_is_vnni_supported",))


def _has(*capabilities: str, older: tuple[str, ...]) -> bool:
    """Returns whether the CPU has one of the capabilities.

    Args:
        capabilities: keys of `torch.cpu.get_capabilities()`.
        older: functions of `torch.cpu` to call instead where torch is too old for that.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        present = torch.cpu.get_capabilities()
        return any(present.get(name, False) for name in capabilities)
    return any(getattr(torch.cpu, name, lambda: False)() for name in older)
