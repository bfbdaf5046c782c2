"""What ComfyUI-MultiGPU's nodes ask for: virtual VRAM on donors, and expert-mode strings.

Of a string only what it gives the device that computes is used.
"""
import math
import re
from collections.abc import Sequence

import torch

from ...loaders.container.weight_file import safe_repr
from ...loaders.devices import CPU, find_device, total_memory
from ...ops.stable_names import short_error_name

GIB = 1 << 30
MAX_AMOUNT = 1e18  # in any unit; an infinite number could not be divided
UNIT_BYTES = {"g": GIB, "m": 1 << 20, "k": 1 << 10, "b": 1, "": 1}  # by a unit's first letter
AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([gmk]i?b?|b|%|)|\*", re.I)


@short_error_name
class UnreadableError(ValueError):
    """An expert-mode string that cannot be read; names the part and what was expected."""

    def __init__(self, part: str, expected: str):
        super().__init__(f"{safe_repr(part.strip())}: expected {expected}")


def allocate_virtual_vram(
    size: int, virtual_vram_gb: float, compute: torch.device, donors: Sequence[torch.device]
) -> dict[torch.device, int]:
    """Returns the bytes of a model for each device; donors are filled up to their memory.

    Args:
        size: bytes of the model.
        virtual_vram_gb: GiB that go to the donors.
        compute: the device that computes, which keeps the rest.
        donors: filled in this order.
    """
    remaining = math.floor(min(size, max(0, virtual_vram_gb) * GIB))
    allocation = {compute: size - remaining}
    for donor in donors:
        granted = min(math.ceil(total_memory(donor)), remaining)
        allocation[donor] = allocation.get(donor, 0) + granted
        remaining -= granted
    allocation[compute] += remaining
    return allocation


def read_expert_string(text: str, size: int, compute: torch.device) -> tuple[int, bool]:
    """Returns what an expert-mode string leaves on the device that computes.

    Each part is a device and an amount: bytes, granted in the order of the string, and the rest to
    the device of `*` or the CPU (`cuda:0,2.5gb;cuda:1,8gb;cpu,*`); percentages of the model
    (`cuda:0,25%;cpu,75%`); or fractions of each device's memory (`cuda:0,0.1;cpu,0.5`). The last of
    several parts of a device counts.

    Args:
        text: the string.
        size: bytes of the model.
        compute: the device that computes.

    Returns:
        (bytes, whether other devices than the CPU are given some too).

    Raises:
        UnreadableError: a part has no device or no amount, or its unit does not go with the others.
    """
    parts = []
    for part in filter(str.strip, text.split(";")):
        name, _, value = (word.strip() for word in part.partition(","))
        match = AMOUNT.fullmatch(value)
        if not match:
            raise UnreadableError(part, "a device and an amount, as in cuda:0,2.5gb;cpu,*")
        unit = value if value == "*" else match[2][:1].lower()
        parts.append((part, find_device(name)[0] or name, unit,
                      min(float(match[1] or 0), MAX_AMOUNT)))
    if not parts:
        raise UnreadableError(text, "a device and an amount, as in cuda:0,2.5gb;cpu,*")
    units = {unit for _, _, unit, _ in parts}
    amounts: dict[torch.device | str, float] = {}
    if units & {"*", "g", "m", "k", "b"}:
        percent = next((part for part, _, unit, _ in parts if unit == "%"), None)
        if percent is not None:
            raise UnreadableError(percent, "bytes, because other parts have bytes or *")
        remaining, rest = float(size), None
        for _, device, unit, number in parts:
            if unit == "*":
                rest = device
            elif granted := min(number * UNIT_BYTES[unit], remaining):
                amounts[device] = granted
                remaining -= granted
        if rest is not None:
            amounts[rest] = amounts.get(rest, 0) + remaining
    else:
        amounts = {device: number for _, device, _, number in parts}
        total = sum(amounts.values()) or 1
        whole = size / total if "%" in units else total_memory(compute)
        amounts = {device: number * whole for device, number in amounts.items()}
    others = any(amounts[device] for device in amounts.keys() - {compute, CPU})
    return math.floor(min(amounts.get(compute, 0), size)), others
