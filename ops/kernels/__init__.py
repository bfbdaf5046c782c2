"""Faster kernels for packed weights, and their selection for each device.

The torch code of `ops.formats` and `ops.layers.product` runs everywhere and is the reference. A
backend is a module `*_backend.py` with a constant `BACKEND` (see `kernel`), listed in `registry`.

A kernel is used once it is proven right on its device (`validation`); until then, and where it is
slower or does not work, torch does its work. Nobody waits. A GPU's kernels are validated in another
process (`validator`), which starts with ComfyUI; a CPU's, and those of a backend that the user
selects by name, by a thread of this process. Verdicts are kept for each driver, torch and version
of the kernels (`verdicts`).

Kernels of "dequantize" and "channels_last" have the reference's bits: they are used at once.
Products differ by rounding: they are used from the next load of a model on. So a model gives the
same picture, bit for bit, from its load until it is loaded again.
"""
import os
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping

import torch

from ..formats.base import Format
from ..formats.low_rank_and_joined import Composite
from ..log import log
from .background import submit
from .kernel import EXACT, Backend, Case, Kernel, multiplies
from .registry import BACKENDS
from .selector import LATEST, Selector, current_load
from .torch_registration import contiguous
from .validator import ProcessValidator

__all__ = [
    "BACKENDS",
    "LATEST",
    "VARIABLE",
    "Backend",
    "Case",
    "Kernel",
    "cast_channels_last",
    "current_load",
    "dequantize_into",
    "find",
    "is_off",
    "list_backends",
    "multiplies",
    "request",
    "start_validation",
    "used",
    "when_decided",
]

VARIABLE = "FEATHERWEIGHT_KERNELS"
REASON_LENGTH = 130  # characters on a node of why torch does a kernel's work
VALIDATED_APART = {"cuda", "mps"}  # types of devices whose kernels another process validates

_selectors: dict[torch.device, Selector] = {}
_creating = threading.Lock()  # held while a selector is created, which waits for no kernel
_validator: ProcessValidator | None = None


def _selector(device: torch.device) -> Selector:
    """Returns the device's selector, created on the first call."""
    device = torch.device("mps", 0) if device.type == "mps" else device  # as its tensors name it
    if device not in _selectors:
        with _creating:
            if device not in _selectors:
                _selectors[device] = _new_selector(device)
    return _selectors[device]


def _new_selector(device: torch.device) -> Selector:
    setting, name = _setting(), BACKENDS.get(device.type)
    valid = {"torch", "auto", *filter(None, BACKENDS.values())}
    if setting and setting not in valid:
        log.warning("The environment variable %s is %s and is ignored; expected one"
                    " of %s.", VARIABLE, setting, ", ".join(sorted(valid)))
    if is_off() or name is None:
        return Selector(device, None)
    is_apart = device.type in VALIDATED_APART and setting != name
    return Selector(device, name, _validator, is_apart)


def _setting() -> str:
    return os.environ.get(VARIABLE, "").lower()


def is_off() -> bool:
    """Returns whether the user has torch do all work as it would by itself."""
    return _setting() == "torch"


def find(capability: str, device: torch.device, packed_format: Format | None,
         dtype: torch.dtype, tokens: int | None = None,
         load: int = LATEST) -> Callable[..., None] | None:
    """Returns the `run` of a kernel (see `Kernel`), or None: use the reference.

    Args:
        capability: As in `Kernel`.
        device: That of the tensors.
        packed_format: None for a capability without formats.
        dtype: As in `Kernel`.
        tokens: Rows of the input, for "linear".
        load: `current_load` when the model was loaded: products proven later are left out.
    """
    kernel = _selector(device).find(capability, packed_format, dtype, tokens, load)
    return None if kernel is None else kernel.run


def start_validation(dtypes: Mapping[torch.device, torch.dtype]):
    """Starts the process that validates the kernels of GPUs, for all layouts and for the products
    of the last models, in the background.

    Args:
        dtypes: Of the devices that models run on, the dtype that each computes in.
    """
    global _validator
    apart = [device for device in dtypes if device.type in VALIDATED_APART]
    if apart and not is_off():
        try:
            _validator = ProcessValidator()
        except OSError as error:
            log.warning("Kernels are not validated: torch does their work (%s).",
                        error)
    for device, dtype in dtypes.items():
        selector = _selector(device)
        submit(lambda selector=selector, dtype=dtype: selector.start(dtype))


def request(device: torch.device, needed: Iterable[tuple[str, Format | None, torch.dtype]]) -> int:
    """Has the kernels validated that a model being loaded needs.

    Args:
        device: That the model will run on.
        needed: Capability, format and dtype of each case.

    Returns:
        The number of the load, see `find`.
    """
    selector = _selector(device)
    if selector.wait_until_read():
        # first what is used at once
        in_order = sorted(needed, key=lambda case: case[0] not in EXACT)
        for capability, packed_format, dtype in in_order:
            selector.request(Case.of(capability, packed_format, dtype), packed_format)
    return current_load()


def are_pending(device: torch.device,
                needed: Iterable[tuple[str, Format | None, torch.dtype]]) -> bool:
    """Returns whether some of these kernels have no verdict yet. needed: as for `request`."""
    selector = _selector(device)
    return any(selector.verdict(*case)[0] == "pending" for case in needed)


def when_decided(device: torch.device,
                 needed: Iterable[tuple[str, Format | None, torch.dtype]], owner: object,
                 callback: Callable[[], None]):
    """Calls a function once all of these kernels have a verdict.

    Args:
        device, needed: as for `request`.
        owner: Once it is freed the function is no longer called.
        callback: Runs in another thread, and refers to no model: one that is freed there while
            ComfyUI unloads others makes ComfyUI fail.
    """
    _selector(device).when_decided(list(needed), owner, callback)


def used(device: torch.device, formats: Iterable[Format], dtype: torch.dtype,
         capability: str = "dequantize") -> str:
    """Returns what dequantises a model, in words: "CPU kernels", or "CPU kernels; MXFP4 by torch:
    the kernel is slower".

    Args:
        device: That the model runs on.
        formats: Of its weights.
        dtype: That it computes in.
        capability: "linear" for what multiplies with inputs of few rows.
    """
    selector = _selector(device)
    verdicts = {packed_format.kernel_key: selector.verdict(capability, packed_format, dtype)
                for packed_format in formats}
    by_torch: dict[str, list[str]] = {}
    for key, (verdict, why) in verdicts.items():
        if verdict != "right":
            why = textwrap.shorten(why, REASON_LENGTH, placeholder=" …")
            reason = WORDS.get(verdict, verdict) + (f" ({why})" if why else "")
            by_torch.setdefault(reason, []).append(key)
    if selector.is_off:
        return "torch"
    if len(by_torch) == 1 and len(*by_torch.values()) == len(verdicts):
        return f"torch: {next(iter(by_torch))}"
    parts = [f"{', '.join(keys)} by torch: {reason}" for reason, keys in by_torch.items()]
    name = selector.backend_name or "torch"
    return "; ".join([TITLES.get(name, name), *parts])


TITLES = {"cpp": "CPU kernels", "nvrtc": "NVIDIA kernels", "hiprtc": "AMD kernels",
          "metal": "Apple kernels"}
# verdict -> why torch does a kernel's work
WORDS = {"pending": "works now, faster after the next load", "none": "there is no kernel",
         "off": "no kernel works here", "slow": "the kernel is slower"}


def list_backends() -> dict[str, dict]:
    """Returns what each device that has been used dequantises and multiplies with.

    Returns:
        By the names of devices: "backend", None where torch does all work; "reason", why a backend
        does not work; "kernels", the names of kernels by their verdicts.
    """
    return {str(device): {"backend": selector.backend_name, "reason": selector.reason,
                          "kernels": selector.summary()}
            for device, selector in _selectors.items()}


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
