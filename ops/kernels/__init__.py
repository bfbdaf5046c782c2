"""Faster kernels for packed weights: what a device uses.

The torch code of `ops.format` and `ops.product` runs everywhere and is the reference. A backend is the module
`ops/kernels/<name>_backend.py` with a constant `BACKEND` (see `kernel`), listed in `backends`.

A GPU's kernels are tried in another process when ComfyUI starts (`start_trials`), once for each driver, torch and version of
the kernel: of those that are right it uses the fastest for each format and number of rows, and torch where that is faster.
Until then torch does the work; what no trial has met is noted for the next start. What a trial has proven is checked in this
process once more. A CPU's kernels, made for it by the machine's own compiler, and a backend that is asked for by name are
checked in this process alone.

All that, compiling too, happens in threads in the background, and no lock is held meanwhile. Kernels of "unpack" have the
reference's bits: nobody waits for them, torch works until one is ready, and it is taken up at the next call. The others differ
by rounding, so which of the two works is decided when one is first asked for and stays until the process ends. That call waits
for a kernel that is to be checked here, as long as `PATIENCE` says and until the user cancels, and for no trial: what one finds
out after that is for the next process. So a picture can be made again in the same process, bit for bit, whenever the kernels
come.
"""
import logging
import os
import threading
from collections.abc import Callable, Iterable

import torch

from ..format import Format
from ..registration import contiguous
from .background import start_thread
from .backends import BACKENDS
from .choices import PATIENCE, CheckedHere, Choice, ProvenInTrials
from .kernel import Backend, Kernel
from .proving import ISSUES
from .verdicts import Case

__all__ = ["BACKENDS", "ISSUES", "VARIABLE", "Backend", "Case", "Kernel", "backend_of", "find", "prepare", "start_trials",
           "unpack_into", "used"]

log = logging.getLogger(__name__)

VARIABLE = "FEATHERWEIGHT_KERNELS"
TRIED = {"cuda", "mps"}  # kinds of devices whose kernels need a trial
SHOWN_AFTER = 5  # seconds that a node waits to tell what its model uses

_choices: dict[torch.device, Choice] = {}
_choosing = threading.Lock()  # held for no longer than a thread takes to start


def _choice(device: torch.device) -> Choice:
    if device.type == "mps":
        device = torch.device("mps", 0)  # which is what its tensors lie on
    if device not in _choices:
        with _choosing:
            if device not in _choices:
                _choices[device] = _new_choice(device)
    return _choices[device]


def _new_choice(device: torch.device) -> Choice:
    """As the environment variable asks."""
    names = BACKENDS.get(device.type, ())
    asked = os.environ.get(VARIABLE, "").lower()
    known = {"torch", "auto"}.union(*BACKENDS.values())
    if asked and asked not in known:
        log.warning("[Featherweight] %s is %s; it can be %s. It counts as not set.", VARIABLE, asked, ", ".join(sorted(known)))
    if asked == "torch" or not names:
        return CheckedHere(device, ())
    if asked in names:
        return CheckedHere(device, (asked,))
    return (ProvenInTrials if device.type in TRIED else CheckedHere)(device, names)


def find(op: str, device: torch.device, packed_format: type[Format] | None, dtype: torch.dtype,
         value_dtype: torch.dtype | None = None, tokens: int | None = None) -> Callable[..., None] | None:
    """The `run` of a kernel (see `Kernel`), or None: use the reference.

    What is not known of a CPU's kernels yet is found out in the background from the first call on; see `PATIENCE`.
    value_dtype is what `run` will be given. tokens: rows of the input, for "linear". packed_format: None for "int8_tokens".
    """
    kernel = _choice(device).find(op, packed_format, dtype, value_dtype, tokens)
    return None if kernel is None else kernel.run


def start_trials(devices: Iterable[torch.device]):
    """Has the kernels of devices tried in the background, as far as they need it and it is not known what comes of it."""
    start_thread(lambda: _start_trials(list(devices)), "featherweight-trials")


def _start_trials(devices: list[torch.device]):
    for choice in map(_choice, devices):
        if isinstance(choice, ProvenInTrials):
            choice.prover.start()


def prepare(device: torch.device, cases: Iterable[Case], shapes: dict[str, set[tuple[int, int]]]):
    """Notes what a model that is being loaded will ask for on a device, so that the next start of ComfyUI tries what is new.

    shapes: name of a format -> (N, K) of the model's weights, which the trial times.
    """
    choice = _choice(device)
    if isinstance(choice, ProvenInTrials):
        choice.prover.note(list(cases), shapes)


def backend_of(device: torch.device) -> str:
    """Name of the backend that a device uses, "torch" for none. Waits for the choice, as the first product does, but for no
    trial."""
    return _choice(device).backend(PATIENCE["linear"]) or "torch"


def used(device: torch.device) -> str:
    """What unpacks on a device, in words, as far as it is known now."""
    choice = _choice(device)
    name = choice.backend(SHOWN_AFTER)
    return name or ("torch until kernels are proven" if choice.is_open else "torch")


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
