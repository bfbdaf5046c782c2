"""Faster kernels for packed weights: what a device uses.

The torch code of `ops.format` and `ops.product` runs everywhere and is the reference. A backend is
the module `ops/kernels/<name>_backend.py` with a constant `BACKEND` (see `kernel`), listed in
`registry`.

A GPU's kernels are tried in another process when ComfyUI starts (`start_trials`), once for each
driver, torch and version of the kernels (`trial`): of those that are right it uses the fastest for
each format, and torch where that is faster. What was proven when a kernel was first asked for is
used until the process ends; what no trial has met is noted for the next start.

A CPU's kernels, made for it by the machine's own compiler, and a backend that is asked for by name
are compiled and checked in this process, in threads in the background. Kernels of "dequantize" have
the reference's bits: nobody waits for them, torch works until one is ready, and it is taken up at
the next call. The others differ by rounding: the first call waits for one, as long as
`WAIT_SECONDS` says and until the user cancels, and what is decided then stays until the process
ends.

So a picture can be made again in the same process, bit for bit, whenever the kernels come.
"""
import logging
import os
import threading
from collections.abc import Callable, Iterable

import torch

from ..format import Format
from ..registration import contiguous
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
    "dequantize_into",
    "find",
    "prepare",
    "start_trials",
    "used"
]

log = logging.getLogger(__name__)

VARIABLE = "FEATHERWEIGHT_KERNELS"
TRIALED = {"cuda", "mps"}  # kinds of devices whose kernels need a trial
LOG_AFTER_SECONDS = 5  # that a node waits to tell what its model uses

_selectors: dict[torch.device, InProcessSelector | TrialedSelector] = {}
_selecting = threading.Lock()  # held while one is made, which waits for no kernel


def _selector(device: torch.device) -> InProcessSelector | TrialedSelector:
    device = _with_index(device)
    if device not in _selectors:
        with _selecting:
            if device not in _selectors:
                _selectors[device] = _new_selector(device)
    return _selectors[device]


def _with_index(device: torch.device) -> torch.device:
    """As tensors name the device they lie on."""
    return torch.device("mps", 0) if device.type == "mps" else device


def _new_selector(device: torch.device) -> InProcessSelector | TrialedSelector:
    asked, known = os.environ.get(VARIABLE, "").lower(), {"torch", "auto"}.union(*PRIORITY.values())
    if asked and asked not in known:
        log.warning("[Featherweight] %s is %s; it can be %s. It counts as not set.", VARIABLE,
                    asked, ", ".join(sorted(known)))
    names, need_trials = _backends(device)
    return (TrialedSelector if need_trials else InProcessSelector)(device, names)


def _backends(device: torch.device) -> tuple[tuple[str, ...], bool]:
    """Names of what a device may use, as the environment variable asks, and whether trials say what
    of that."""
    names, asked = PRIORITY.get(device.type, ()), os.environ.get(VARIABLE, "").lower()
    if asked == "torch":
        return (), False
    return ((asked,), False) if asked in names else (names, device.type in TRIALED)


def find(capability: str, device: torch.device, packed_format: type[Format] | None,
         dtype: torch.dtype, value_dtype: torch.dtype | None = None,
         tokens: int | None = None) -> Callable[..., None] | None:
    """The `run` of a kernel (see `Kernel`), or None: use the reference.

    Args:
        packed_format: None for "int8_tokens".
        value_dtype: what `run` will be given.
        tokens: rows of the input, for "linear".
    """
    kernel = _selector(device).find(capability, packed_format, dtype, value_dtype, tokens)
    return None if kernel is None else kernel.run


def start_trials(devices: Iterable[torch.device]):
    """Has the kernels of devices tried in the background, as far as they need it and it is not
    known what comes of it."""
    start_thread(lambda: _try_kernels([*map(_with_index, devices)]), "featherweight-trials")


def _try_kernels(devices: list[torch.device]):
    for device in devices:
        names, need_trials = _backends(device)
        if need_trials:
            try_kernels(device, names, lambda: device in _selectors)


def prepare(device: torch.device, cases: Iterable[Case]):
    """Notes what a model that is being loaded will ask for on a device, for the next start."""
    selector = _selector(device)
    if isinstance(selector, TrialedSelector):
        selector.note(list(cases))


def used(device: torch.device, seconds: float = LOG_AFTER_SECONDS) -> str:
    """What dequantises on a device, in words, as far as it is known after so many seconds."""
    selector = _selector(device)
    names = selector.backend_names(seconds)
    return " and ".join(names) or (
        "torch until kernels are proven" if selector.is_pending else "torch"
    )


def dequantize_into(packed_format: type[Format], tensors: list[torch.Tensor], out: torch.Tensor,
                value_dtype: torch.dtype | None = None, first: int = 0) -> torch.Tensor:
    """`Format.dequantize_into` by the fastest means of `out`'s device. tensors: may lie in
    pieces."""
    if value_dtype == out.dtype:
        value_dtype = None
    tensors = contiguous(tensors)
    run = find("dequantize", out.device, packed_format, out.dtype, value_dtype)
    if run is None:
        return packed_format.dequantize_into(tensors, out, value_dtype, first)
    run(packed_format, tensors, out, value_dtype, first)
    return out
