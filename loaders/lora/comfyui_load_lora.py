"""Says what ComfyUI's own Load LoRA makes of a LoRA that matches here."""
import collections
import inspect
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch

from ...ops.patches.adapters import adapter_fields, adapter_tensors, alpha_scale, rank_of
from ..container.weight_file import first_line


def load_lora_text(state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str],
                   names: Mapping[str, Any], patches: Mapping[Any, Any]) -> str:
    """Returns what Load LoRA does otherwise; "the same" if nothing.

    Args:
        state_dict, metadata: of the file.
        names: the host's names of layers -> targets.
        patches: target -> value, as its writer means it.
    """
    if "general.architecture" in metadata:
        return "cannot read GGUF"
    load: Any = comfy.lora.load_lora
    # its change 15830 reads alpha from metadata
    options = {"metadata": metadata} if "metadata" in inspect.signature(load).parameters else {}
    try:
        found = load(comfy.lora_convert.convert_lora(dict(state_dict)), names, log_missing=False,
                     **options)
    except Exception as error:  # such as that a half of a pair is missing
        return f"stops with an error ({type(error).__name__}: {first_line(error)})"
    counts = collections.Counter(
        _difference(value, found.get(target)) for target, value in patches.items())
    del counts[None]
    return "; ".join(f"{count} of {len(patches)} layers {difference}"
                     for difference, count in counts.items()) or "the same"


def _difference(meant: Any, hosts: Any) -> str | None:
    """Returns what the host's value of a patch does otherwise, or None."""
    if hosts is None:
        return "are left out"
    if type(meant) is not type(hosts) or any(
            one is not other for one, other in zip(adapter_tensors(meant), adapter_tensors(hosts))):
        return "are changed in another way"
    rank = rank_of(meant)
    if rank is None:
        return None
    ours, theirs = (alpha_scale(getattr(adapter_fields(value), "alpha", None), rank)
                    for value in (meant, hosts))
    return None if abs(theirs - ours) <= 1e-6 * abs(ours) else (
        f"count {theirs / ours:.3g} times as meant")
