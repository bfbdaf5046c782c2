"""Allocations as ComfyUI-MultiGPU's nodes define them: virtual VRAM, donors, expert-mode strings.

An allocation is the number of bytes for each device. Bytes that are assigned to no device stay on
the one that computes.
"""
import math
import re
from collections.abc import Sequence

import torch

from ...loaders.container.weight_file import safe_repr
from ...loaders.devices import CPU, find_device, total_memory
from ...ops.pickle_names import short_error_name

GIB = 1 << 30
MAX_AMOUNT = 1e18  # in any unit; an infinite number could not be divided
UNIT_BYTES = {"g": GIB, "m": 1 << 20, "k": 1 << 10, "b": 1, "": 1}  # by a unit's first letter
AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([gmk]i?b?|b|%|)|\*", re.I)

Allocation = dict[torch.device, int]


@short_error_name
class UnreadableError(ValueError):
    """An expert-mode string that cannot be read; names the part and what was expected."""

    def __init__(self, part: str, expected: str):
        super().__init__(f"{safe_repr(part.strip())}: expected {expected}")


def allocate_virtual_vram(
    size: int, virtual_vram_gb: float, compute: torch.device, donors: Sequence[torch.device]
) -> Allocation:
    """Assigns a part of a model to donors, each of which is filled up to its memory.

    Args:
        size: bytes of the model.
        virtual_vram_gb: GiB that go to the donors.
        compute: the device that computes, which keeps the rest.
        donors: filled in this order.
    """
    moved = min(size, max(0, virtual_vram_gb) * GIB)
    requests = [(compute, size - moved), *((donor, total_memory(donor)) for donor in donors)]
    return _allocate(size, compute, requests)


def parse_allocation_string(
    text: str, size: int, compute: torch.device
) -> tuple[Allocation, list[str]]:
    """Reads an expert-mode string.

    Each part is a device and an amount: bytes, filled in the order of the string, and the rest to
    the device of `*` or the CPU (`cuda:0,2.5gb;cuda:1,8gb;cpu,*`); percentages of the model
    (`cuda:0,25%;cpu,75%`); or fractions of each device's memory, the CPU last
    (`cuda:0,0.1;cpu,0.5`).

    Args:
        text: the string.
        size: bytes of the model.
        compute: the device that computes.

    Returns:
        (allocation, sentences about devices that this machine lacks).

    Raises:
        UnreadableError: a part has no device or no amount, or its unit does not go with the others.
    """
    parts = []
    notes = []
    for part in filter(str.strip, text.split(";")):
        name, _, value = (word.strip() for word in part.partition(","))
        match = AMOUNT.fullmatch(value)
        if not match:
            raise UnreadableError(part, "a device and an amount, as in cuda:0,2.5gb;cpu,*")
        device, note = find_device(name, "the cpu")
        notes += [note] if note else []
        number = min(float(match[1] or 0), MAX_AMOUNT)
        unit = value if value == "*" else match[2][:1].lower()
        parts.append((part, device or CPU, number, unit))
    if not parts:
        raise UnreadableError(text, "a device and an amount, as in cuda:0,2.5gb;cpu,*")
    units = {unit for *_, unit in parts}
    if units & {"*", "g", "m", "k", "b"}:
        percent = next((part for part, *_, unit in parts if unit == "%"), None)
        if percent is not None:
            raise UnreadableError(percent, "bytes, because other parts have bytes or *")
        rest = next((device for _, device, _, unit in parts if unit == "*"), CPU)
        requests = [
            (device, number * UNIT_BYTES[unit]) for _, device, number, unit in parts if unit != "*"
        ]
        requests.append((rest, size))
    elif "%" in units:
        total = sum(number for _, _, number, _ in parts) or 1
        requests = [(device, size * number / total) for _, device, number, _ in parts]
    else:
        requests = [(device, number * total_memory(device)) for _, device, number, _ in parts]
        requests.sort(key=lambda request: (request[0] == CPU, str(request[0])))
    return _allocate(size, compute, requests), notes


def _allocate(
    size: int, compute: torch.device, requests: Sequence[tuple[torch.device, float]]
) -> Allocation:
    """Grants requests in order, in whole bytes, until all bytes are assigned.

    Bytes that nobody requests go to the device that computes.
    """
    allocation = {compute: 0}
    remaining = size
    for device, amount in requests:
        granted = min(math.ceil(amount), remaining)
        allocation[device] = allocation.get(device, 0) + granted
        remaining -= granted
    allocation[compute] += remaining
    return allocation
