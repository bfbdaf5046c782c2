"""Faster kernels for packed weights, and their selection for each device.

The torch code of `ops.formats` and `ops.layers.product` runs everywhere and is the reference. A
backend is the module `ops/kernels/<name>_backend.py` with a constant `BACKEND` (see `kernel`),
listed in `registry`.

A GPU's kernels are tried in another process when ComfyUI starts (`start_trials`), once for each
driver, torch and version of the kernels (`trial_process`). Of those that are right, the fastest is
used for each format, and torch where that is faster. What was proven when a kernel was first
requested is used until the process ends; cases that no trial has tried are noted for the next
start.

A CPU's kernels, compiled by the machine's own compiler, and a backend that the user selects by name
are compiled and checked in this process, in background threads. Kernels of "dequantize" and of
"channels_last" have the reference's bits: nobody waits for them, torch works until one is ready,
and the next call uses it. The others differ by rounding: the first call waits for one, for up to
`WAIT_SECONDS` of `selector` or until the user cancels, and the decision then holds until the
process ends.

So a picture is reproducible bit for bit within a process, whenever the kernels become ready.
"""
import logging
import os
import threading
from collections.abc import Callable, Iterable

import torch

from ..formats.base import Format
from ..formats.low_rank_and_joined import Composite
from ..layers.torch_registration import contiguous
from .background import start_thread
from .kernel import Backend, Case, Kernel
from .registry import PRIORITY
from .selector import InProcessSelector, TrialedSelector
from .trial_startup import try_kernels

__all__ = [
    "PRIORITY",
    "VARIABLE",
    "Backend",
    "Case",
    "Kernel",
    "cast_channels_last",
    "dequantize_into",
    "find",
    "is_off",
    "prepare",
    "start_trials",
    "used"
]

log = logging.getLogger(__name__)

VARIABLE = "FEATHERWEIGHT_KERNELS"
TRIALED = {"cuda", "mps"}  # types of devices whose kernels need a trial
LOG_AFTER_SECONDS = 5  # how long a node waits before it shows what its model uses

_selectors: dict[torch.device, InProcessSelector | TrialedSelector] = {}
_creating = threading.Lock()  # held while a selector is created, which waits for no kernel


def _selector(device: torch.device) -> InProcessSelector | TrialedSelector:
    """Returns the device's selector, created on the first call."""
    device = _with_index(device)
    if device not in _selectors:
        with _creating:
            if device not in _selectors:
                _selectors[device] = _new_selector(device)
    return _selectors[device]


def _with_index(device: torch.device) -> torch.device:
    """Returns the device as its tensors name it."""
    return torch.device("mps", 0) if device.type == "mps" else device


def _new_selector(device: torch.device) -> InProcessSelector | TrialedSelector:
    setting = _setting()
    valid = {"torch", "auto"}.union(*PRIORITY.values())
    if setting and setting not in valid:
        log.warning("[Featherweight] The environment variable %s is %s and is ignored; expected one"
                    " of %s.", VARIABLE, setting, ", ".join(sorted(valid)))
    names, need_trials = _backends(device)
    return TrialedSelector(device, names) if need_trials else InProcessSelector(device, names)


def _setting() -> str:
    return os.environ.get(VARIABLE, "").lower()


def is_off() -> bool:
    """Returns whether the user has torch do all work as it would by itself."""
    return _setting() == "torch"


def _backends(device: torch.device) -> tuple[tuple[str, ...], bool]:
    """Returns the names of the backends that a device may use, and whether they need a trial."""
    names = PRIORITY.get(device.type, ())
    if is_off():
        return (), False
    setting = _setting()
    if setting in names:
        return (setting,), False
    return names, device.type in TRIALED


def find(capability: str, device: torch.device, packed_format: Format | None,
         dtype: torch.dtype, tokens: int | None = None) -> Callable[..., None] | None:
    """Returns the `run` of a kernel (see `Kernel`), or None: use the reference.

    Args:
        capability: As in `Kernel`.
        device: That of the tensors.
        packed_format: None for a capability without formats.
        dtype: As in `Kernel`.
        tokens: Rows of the input, for "linear".
    """
    kernel = _selector(device).find(capability, packed_format, dtype, tokens)
    return None if kernel is None else kernel.run


def start_trials(devices: Iterable[torch.device]):
    """Tries the devices' kernels in the background, those that need a trial and have no verdict."""
    start_thread(lambda: _try_kernels([*map(_with_index, devices)]), "featherweight-trials")


def _try_kernels(devices: list[torch.device]):
    for device in devices:
        names, need_trials = _backends(device)
        if need_trials:
            try_kernels(device, names, lambda: device in _selectors)


def prepare(device: torch.device, cases: Iterable[Case]):
    """Notes the cases that a model being loaded will need on a device, for the next trial."""
    selector = _selector(device)
    if isinstance(selector, TrialedSelector):
        selector.note(list(cases))


def used(device: torch.device, seconds: float = LOG_AFTER_SECONDS) -> str:
    """Returns the names of what dequantises on a device, as far as known after so many seconds."""
    selector = _selector(device)
    if names := selector.backend_names(seconds):
        return " and ".join(names)
    return "torch until kernels are proven" if selector.is_pending else "torch"


def dequantize_into(packed_format: Format, tensors: list[torch.Tensor], out: torch.Tensor,
                    first: int = 0) -> torch.Tensor:
    """Runs `Format.dequantize_into` by the fastest kernel for `out`'s device.

    Args:
        packed_format: Of the weight.
        tensors: As `Format.dequantize_into` takes them, but of any strides.
        out: Contiguous, of any float dtype.
        first: The first block to dequantise.

    Returns:
        `out`.
    """
    tensors = contiguous(tensors)
    if isinstance(packed_format, Composite):
        return packed_format.dequantize_parts(tensors, out, first, dequantize_into)
    run = find("dequantize", out.device, packed_format, out.dtype)
    if run is None:
        return packed_format.dequantize_into(tensors, out, first)
    run(packed_format, tensors, out, first)
    return out


def cast_channels_last(values: torch.Tensor, out: torch.Tensor):
    """Casts the weight of a convolution and writes it with its channels last.

    Args:
        values: (rows, channels, taps), contiguous, of any float dtype.
        out: (rows, taps, channels), contiguous, of any float dtype.
    """
    run = find("channels_last", out.device, None, out.dtype)
    if run is not None:
        run(values, out)
        return
    if values.dtype != out.dtype:
        # between two types of 16 bits a CPU converts one number at a time, by way of float32 many
        values = values.float().to(out.dtype)
    out.copy_(values.transpose(1, 2))
