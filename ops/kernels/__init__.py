"""Faster kernels for packed weights: what a device uses.

The torch code of `ops.format` and `ops.product` runs everywhere and is the reference. A backend is the module
`ops/kernels/<name>_backend.py` with a constant `BACKEND` (see `kernel`), listed in `registry`.

A GPU's kernels are tried in another process when ComfyUI starts (`start_trials`), once for each driver, torch and version of
the kernels (`trial`): of those that are right it uses the fastest for each format, and torch where that is faster. What was
proven when a kernel was first asked for is used until the process ends; what no trial has met is noted for the next start.

A CPU's kernels, made for it by the machine's own compiler, and a backend that is asked for by name are compiled and checked in
this process, in threads in the background. Kernels of "unpack" have the reference's bits: nobody waits for them, torch works
until one is ready, and it is taken up at the next call. The others differ by rounding: the first call waits for one, as long as
`WAIT_SECONDS` says and until the user cancels, and what is decided then stays until the process ends.

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
from .selector import ISSUES, WAIT_SECONDS, InProcessSelector, TrialedSelector

__all__ = ["ISSUES", "PRIORITY", "VARIABLE", "Backend", "Case", "Kernel", "backend_of", "find", "prepare", "start_trials",
           "unpack_into", "used"]

log = logging.getLogger(__name__)

VARIABLE = "FEATHERWEIGHT_KERNELS"
TRIALED = {"cuda", "mps"}  # kinds of devices whose kernels need a trial
TOLD_AFTER_SECONDS = 5  # that a node waits to tell what its model uses

_selectors: dict[torch.device, InProcessSelector | TrialedSelector] = {}
_selecting = threading.Lock()  # held for no longer than a thread takes to start


def _selector(device: torch.device) -> InProcessSelector | TrialedSelector:
    if device.type == "mps":
        device = torch.device("mps", 0)  # which is what its tensors lie on
    if device not in _selectors:
        with _selecting:
            if device not in _selectors:
                _selectors[device] = _new_selector(device)
    return _selectors[device]


def _new_selector(device: torch.device) -> InProcessSelector | TrialedSelector:
    """As the environment variable asks."""
    names = PRIORITY.get(device.type, ())
    asked = os.environ.get(VARIABLE, "").lower()
    known = {"torch", "auto"}.union(*PRIORITY.values())
    if asked and asked not in known:
        log.warning("[Featherweight] %s is %s; it can be %s. It counts as not set.", VARIABLE, asked, ", ".join(sorted(known)))
    if asked == "torch" or not names:
        return InProcessSelector(device, ())
    if asked in names:
        return InProcessSelector(device, (asked,))
    return (TrialedSelector if device.type in TRIALED else InProcessSelector)(device, names)


def find(capability: str, device: torch.device, packed_format: type[Format] | None, dtype: torch.dtype,
         value_dtype: torch.dtype | None = None, tokens: int | None = None) -> Callable[..., None] | None:
    """The `run` of a kernel (see `Kernel`), or None: use the reference.

    Args:
        packed_format: None for "int8_tokens".
        value_dtype: what `run` will be given.
        tokens: rows of the input, for "linear".
    """
    kernel = _selector(device).find(capability, packed_format, dtype, value_dtype, tokens)
    return None if kernel is None else kernel.run


def start_trials(devices: Iterable[torch.device]):
    """Has the kernels of devices tried in the background, as far as they need it and it is not known what comes of it."""
    start_thread(lambda: _try_kernels(list(devices)), "featherweight-trials")


def _try_kernels(devices: list[torch.device]):
    for selector in map(_selector, devices):
        if isinstance(selector, TrialedSelector):
            selector.try_kernels()


def prepare(device: torch.device, cases: Iterable[Case]):
    """Notes what a model that is being loaded will ask for on a device, for the next start."""
    selector = _selector(device)
    if isinstance(selector, TrialedSelector):
        selector.note(list(cases))


def backend_of(device: torch.device) -> str:
    """Name of the backend that a device uses, "torch" for none. Waits as the first product does."""
    return " and ".join(_selector(device).backend_names(WAIT_SECONDS["linear"])) or "torch"


def used(device: torch.device) -> str:
    """What unpacks on a device, in words, as far as it is known now."""
    selector = _selector(device)
    names = selector.backend_names(TOLD_AFTER_SECONDS)
    return " and ".join(names) or ("torch until kernels are proven" if selector.is_pending else "torch")


def unpack_into(packed_format: type[Format], tensors: list[torch.Tensor], out: torch.Tensor,
                value_dtype: torch.dtype | None = None, first: int = 0) -> torch.Tensor:
    """`Format.unpack_into` by the fastest means of `out`'s device. tensors: may lie in pieces."""
    if value_dtype == out.dtype:
        value_dtype = None
    tensors = contiguous(tensors)
    run = find("unpack", out.device, packed_format, out.dtype, value_dtype)
    if run is None:
        return packed_format.unpack_into(tensors, out, value_dtype, first)
    run(packed_format, tensors, out, value_dtype, first)
    return out
