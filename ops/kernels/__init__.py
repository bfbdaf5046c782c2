"""Faster kernels for packed weights, and their selection for each device.

The torch code of `ops.formats` and `ops.layers.product` runs everywhere and is the reference. A
backend is a module `*_backend.py` with a constant `BACKEND` (see `kernel`), listed in `registry`.

A kernel is used where it is proven right on its device (`validation`). A case (capability, format,
dtype, device) is decided before the step that needs it, while a model loads (`decide`), and stays
decided as long as the process runs: a model gives the same picture, bit for bit, all that time.
GPUs' kernels are checked in another process, the others in this one. What no device has run yet,
backends of `ON_REQUEST` and a `Kernel` that is untried, is used only where the user asks for it.
Verdicts are kept for each driver, torch and compiler (`verdicts`). A step that needs a case that is
not decided has torch do its work.
"""
import os
import textwrap
import threading
from collections.abc import Callable, Iterable

import torch

from ..formats.base import Format
from ..formats.low_rank_and_joined import Composite
from ..formats.row_layout import RowFormat
from ..log import log
from .checker import ProcessChecker
from .decider import Decider
from .kernel import PITCHED_MULTIPLE, QUANTIZING, Backend, Case, Kernel, Need, multiplies
from .registry import BACKENDS, ON_REQUEST
from .torch_registration import contiguous

__all__ = [
    "BACKENDS",
    "VARIABLE",
    "Backend",
    "Case",
    "Kernel",
    "Need",
    "cast_channels_last",
    "decide",
    "dequantize_into",
    "dequantizes_with_pitch",
    "find",
    "is_off",
    "multiplies",
    "used",
]

VARIABLE, UNTRIED = "FEATHERWEIGHT_KERNELS", "untried"
REASON_LENGTH = 130  # characters on a node of why torch does a kernel's work

_deciders: dict[torch.device, Decider] = {}
_found: dict[tuple, tuple[Kernel, ...]] = {}  # kernels that are right, by what is asked for
_creating = threading.Lock()  # held while a decider is created, which waits for no kernel


def _decider(device: torch.device) -> Decider:
    """Returns the device's decider, created on the first call."""
    device = torch.device("mps", 0) if device.type == "mps" else device  # as its tensors name it
    if device not in _deciders:
        with _creating:
            if device not in _deciders:
                _deciders[device] = _new_decider(device)
    return _deciders[device]


def _new_decider(device: torch.device) -> Decider:
    setting, name = _setting(), BACKENDS.get(device.type)
    valid = {"torch", "auto", UNTRIED, *filter(None, BACKENDS.values())}
    if setting and setting not in valid:
        log.warning("The environment variable %s is %s and is ignored; expected one"
                    " of %s.", VARIABLE, setting, ", ".join(sorted(valid)))
    if is_off() or name is None or (
            name in ON_REQUEST and setting not in (name, UNTRIED)):
        return Decider(device, None)
    is_apart = name in ON_REQUEST or (device.type == "cuda" and setting != name)
    return Decider(device, name, ProcessChecker() if is_apart else None, setting == UNTRIED)


def _setting() -> str:
    return os.environ.get(VARIABLE, "").lower()


def is_off() -> bool:
    """Returns whether the user has torch do all work as it would by itself."""
    return _setting() == "torch"


def decide(device: torch.device, needed: Iterable[Need], makes_room: bool = False):
    """Decides what does the work of cases, and waits for that; at once for those that are decided.

    Args:
        device: Where they will be needed.
        needed: Cases.
        makes_room: Whether ComfyUI may unload models from a GPU for that: not while it loads some.

    Raises:
        Exception: What `waiting.host.raise_if_cancelled` raises.
    """
    if _decider(device).decide(needed, makes_room):
        _found.clear()


def find(capability: str, device: torch.device, packed_format: Format | None,
         dtype: torch.dtype, tokens: int | None = None) -> Callable[..., None] | None:
    """Returns the `run` of a kernel (see `Kernel`), or None: use the reference.

    Args:
        capability: As in `Kernel`. What quantises is decided first, if need be: no step does.
        device: That of the tensors.
        packed_format: None for a capability without formats.
        dtype: As in `Kernel`.
        tokens: Rows of the input, for "linear".
    """
    key = capability, device, packed_format, dtype
    found = _found.get(key)
    if found is None:
        found = _look_up(*key)
    for kernel in found:
        if tokens is None or kernel.takes(tokens):
            return kernel.run
    return None


def _look_up(capability: str, device: torch.device, packed_format: Format | None,
             dtype: torch.dtype) -> tuple[Kernel, ...]:
    if capability in QUANTIZING:
        decide(device, [(capability, packed_format, dtype)])
    case, decider = Case.of(capability, packed_format, dtype), _decider(device)
    decision = decider.find(case)
    if decision is None:
        decider.meet(case)
        return ()
    return _found.setdefault((capability, device, packed_format, dtype), decision.kernels)


def used(device: torch.device, formats: Iterable[Format], dtype: torch.dtype,
         capability: str = "dequantize") -> str:
    """Returns what dequantises a model, in words: "CPU kernels", or "CPU kernels; MXFP4 by torch:
    there is no kernel".

    Args:
        device: That the model runs on.
        formats: Of its weights.
        dtype: That it computes in.
        capability: "linear" for what multiplies with inputs of few rows.
    """
    decider = _decider(device)
    if decider.is_off:
        return "torch"
    decisions = {packed_format.kernel_key: decider.find(Case.of(capability, packed_format, dtype))
                 for packed_format in formats}
    by_torch: dict[str, list[str]] = {}
    for key, decision in decisions.items():
        if decision is None or decision.verdict != "right":
            verdict, why = ("open", "") if decision is None else decision[1:]
            why = textwrap.shorten(why, REASON_LENGTH, placeholder=" …")
            reason = WORDS.get(verdict, verdict) + (f" ({why})" if why else "")
            by_torch.setdefault(reason, []).append(key)
    if len(by_torch) == 1 and len(*by_torch.values()) == len(decisions):
        return f"torch: {next(iter(by_torch))}"
    parts = [f"{', '.join(keys)} by torch: {reason}" for reason, keys in by_torch.items()]
    name = decider.backend_name or "torch"
    return "; ".join([TITLES.get(name, name), *parts])


TITLES = {"cpp": "CPU kernels", "nvrtc": "NVIDIA kernels", "hiprtc": "AMD kernels",
          "metal": "Apple kernels"}
# verdict -> why torch does a kernel's work
WORDS = {"none": "there is no kernel", "off": "no kernel works here",
         "open": "its kernel could not be checked", "hung": "its kernel took too long"}


def dequantize_into(packed_format: Format, tensors: list[torch.Tensor], out: torch.Tensor,
                    first: int = 0) -> torch.Tensor:
    """Runs `Format.dequantize_into` by the fastest kernel for `out`'s device.

    Args:
        packed_format: Of the weight.
        tensors: As `Format.dequantize_into` takes them, but of any strides.
        out: Of any float dtype, contiguous or whole rows with a pitch.
        first: The first block to dequantise.

    Returns:
        `out`.
    """
    if not out.is_contiguous() and not dequantizes_with_pitch(packed_format, out.device, out.dtype,
                                                              out.shape[1]):
        return out.copy_(dequantize_into(packed_format, tensors, out.new_empty(out.shape), first))
    tensors = contiguous(tensors)
    if isinstance(packed_format, Composite):
        return packed_format.dequantize_parts(tensors, out, first, dequantize_into)
    run = find("dequantize", out.device, packed_format, out.dtype)
    if run is None:
        return packed_format.dequantize_into(tensors, out, first)
    run(packed_format, tensors, out, first)
    return out


def dequantizes_with_pitch(packed_format: Format, device: torch.device, dtype: torch.dtype,
                           columns: int) -> bool:
    """Returns whether a kernel writes rows of so many columns with a pitch; see `Kernel`."""
    if isinstance(packed_format, Composite) or columns % PITCHED_MULTIPLE or (
            isinstance(packed_format, RowFormat) and columns != packed_format.block_length):
        return False
    key = "dequantize", device, packed_format, dtype
    return True in [kernel.takes_pitch for kernel in _found.get(key) or _look_up(*key)]


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
