"""Tries adapters once, because the host would find out at every run of a layer that it cannot apply
one."""
import logging
import math
import threading
from collections.abc import Callable, Sequence

import comfy.lora
import torch
from comfy.weight_adapter import WeightAdapterBase

from .adapters import LoRA, OrthogonalAdapter, adapter_fields, like


class _Errors(logging.Filter):
    """Keeps what this thread logs with the root logger, as the host does, from being shown."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self.thread:
            return True
        if record.levelno >= logging.WARNING:
            self.messages.append(record.getMessage())
        return False


def trial_error(value, shape: Sequence[int], offset: tuple[int, int, int] | None = None,
                function: Callable | None = None) -> str | None:
    """Returns why the host cannot apply an adapter, although its factors have the right shapes.

    Args:
        value: of a patch; any but an adapter passes.
        shape: of the weight.
        offset, function: of the patch.

    Returns:
        Part of a sentence; None where the host can apply it.
    """
    if not isinstance(value, WeightAdapterBase):
        return None
    fields = adapter_fields(value)
    if isinstance(fields, LoRA) and fields[3:] == (None, None, None):
        return None
    scale, most = getattr(fields, "dora_scale", None), max(shape[0], math.prod(shape[1:]))
    if scale is not None and scale.numel() > most:  # which the host would spread over the weight
        return (f"this ComfyUI cannot compute it (its dora_scale has {scale.numel():,} values,"
                f" expected at most {most:,})")
    if isinstance(fields, OrthogonalAdapter) and fields.limit is not None:
        # The bound depends on values, which a tensor on "meta" does not have.
        value = like(value, fields._replace(limit=0.0))
    error = _error(value, torch.empty(shape, device="meta", dtype=torch.float32), offset, function)
    if error is not None:  # perhaps another one that depends on values
        error = _error(value, torch.zeros(shape, dtype=torch.float32), offset, function)
    return error and f"this ComfyUI cannot compute it ({error})"


def _error(value: WeightAdapterBase, weight: torch.Tensor, offset: tuple[int, int, int] | None,
           function: Callable | None) -> str | None:
    errors, log = _Errors(), logging.getLogger()
    log.addFilter(errors)
    try:
        with torch.no_grad():
            comfy.lora.calculate_weight([(1.0, value, 1.0, offset, function)], weight, "weight")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # adapters raise anything
        errors.messages.append(str(error))
    finally:
        log.removeFilter(errors)
    if not errors.messages:
        return None
    lines = errors.messages[0].removeprefix(f"ERROR {value.name} weight ").splitlines() or [""]
    return lines[0]
