"""Where ComfyUI-MultiGPU's nodes were told to keep a model's weights: virtual VRAM, donors, the
strings of the expert mode.

A plan is the bytes that go to each device. What no device is given stays on the one that computes.
"""
import math
import re
from collections.abc import Sequence

import comfy.model_management
import torch

from ...loaders.devices import CPU, find_device
from ...loaders.files.container import safe_repr

GIB = 1 << 30
MOST = 1e18  # of whatever a part asks for: an endless number shares nothing
BYTES = {"g": GIB, "m": 1 << 20, "k": 1 << 10, "b": 1, "": 1}  # by the first letter of a unit
AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([gmk]i?b?|b|%|)|\*", re.I)

Allocation = dict[torch.device, int]


class UnreadableError(ValueError):
    """A string of the expert mode that cannot be read: which part, and what was expected."""

    def __init__(self, part: str, expected: str):
        super().__init__(f"{safe_repr(part.strip())}: expected {expected}")


def allocate_virtual_vram(
    size: int, virtual_vram_gb: float, compute: torch.device, donors: Sequence[torch.device]
) -> Allocation:
    """Of a model of size bytes, virtual_vram_gb GiB go to the donors, to each in turn what its
    memory can hold."""
    left = min(size, max(0, virtual_vram_gb) * GIB)
    return _shared(
        size, compute, [(compute, size - left), *((donor, _memory(donor)) for donor in donors)]
    )


def parse_allocation_string(
    text: str, size: int, compute: torch.device
) -> tuple[Allocation, list[str]]:
    """(plan, sentences about devices that are not here) by a string of the expert mode, for a model
    of size bytes.

    Each part is a device and an amount: bytes, filled in the order of the string, and the rest to
    the device of `*` or the CPU (`cuda:0,2.5gb;cuda:1,8gb;cpu,*`); shares of the model
    (`cuda:0,25%;cpu,75%`); or fractions of each device's memory, the CPU's last
    (`cuda:0,0.1;cpu,0.5`). Raises UnreadableError.
    """
    parts, notes = [], []
    for part in filter(str.strip, text.split(";")):
        name, _, value = (word.strip() for word in part.partition(","))
        match = AMOUNT.fullmatch(value)
        if not match:
            raise UnreadableError(part, "a device and an amount, as in cuda:0,2.5gb;cpu,*")
        device, note = find_device(name, "the cpu")
        notes += [note] if note else []
        parts.append(
            (
                part,
                device or CPU,
                min(float(match[1] or 0), MOST),
                value if value == "*" else match[2][:1].lower(),
            )
        )
    if not parts:
        raise UnreadableError(text, "a device and an amount, as in cuda:0,2.5gb;cpu,*")
    kinds = {unit for *_, unit in parts}
    if kinds & {"*", "g", "m", "k", "b"}:
        percent = next((part for part, *_, unit in parts if unit == "%"), None)
        if percent is not None:
            raise UnreadableError(percent, "bytes, for other parts have bytes or *")
        rest = next((device for _, device, _, unit in parts if unit == "*"), CPU)
        wanted = [
            (device, number * BYTES[unit]) for _, device, number, unit in parts if unit != "*"
        ] + [(rest, size)]
    elif "%" in kinds:
        whole = sum(number for _, _, number, _ in parts) or 1
        wanted = [(device, size * number / whole) for _, device, number, _ in parts]
    else:
        wanted = [(device, number * _memory(device)) for _, device, number, _ in parts]
        wanted.sort(key=lambda each: (each[0] == CPU, str(each[0])))
    return _shared(size, compute, wanted), notes


def _shared(
    size: int, compute: torch.device, wanted: Sequence[tuple[torch.device, float]]
) -> Allocation:
    """To each device in turn what it wants of what is left, in whole bytes; the rest to the one
    that computes."""
    plan, left = {compute: 0}, size
    for device, amount in wanted:
        part = min(math.ceil(amount), left)
        plan[device] = plan.get(device, 0) + part
        left -= part
    plan[compute] += left
    return plan


def _memory(device: torch.device) -> float:
    return comfy.model_management.get_total_memory(device)
