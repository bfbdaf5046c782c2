"""Says what ComfyUI's own Load LoRA makes of a LoRA that matches here."""
import collections
import inspect
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch

from ...ops.patches.adapters import OrthogonalAdapter, adapter_fields, alpha_scale, rank_of
from ..files.container import first_line
from .header_alpha import HeaderAlpha
from .tensor_names import SINGULAR


def load_lora_text(state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str],
                   names: Mapping[str, Any], patches: Mapping[Any, Any],
                   alpha: HeaderAlpha) -> str:
    """Returns half a sentence on what Load LoRA does otherwise; "the same" if nothing.

    Args:
        state_dict, metadata: of the file.
        names: the host's names of layers -> targets.
        patches: target -> value, as its writer means it.
        alpha: of the file, in `patches`.
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
    scales = {names[stem]: scale for stem, (scale, _) in alpha.scales.items() if stem in names}
    is_adaptive = any(name.endswith(SINGULAR) for name in state_dict)
    counts = collections.Counter(
        _difference(value, found.get(target), scales.get(target, 1.0), is_adaptive)
        for target, value in patches.items())
    counts.pop(None, None)
    return "; ".join(f"{count} of {len(patches)} {difference}"
                     for difference, count in counts.items()) or "the same"


def _difference(meant: Any, hosts: Any, scale: float, is_adaptive: bool) -> str | None:
    """Returns what the host does otherwise with a layer, or None.

    Args:
        meant, hosts: values of patches; None where the host has none.
        scale: that the header's alpha gives a layer.
        is_adaptive: whether the LoRA is an AdaLoRA.
    """
    if hosts is None:
        return "layers are left out"
    if isinstance(meant, tuple) or isinstance(hosts, tuple):
        return None if type(meant) is type(hosts) else "layers are changed in another way"
    fields, rank = adapter_fields(meant), rank_of(meant)
    if is_adaptive:
        return "layers lack the factors of their ranks"
    if isinstance(fields, OrthogonalAdapter):
        is_right = not fields.limit and (
            fields.rescale is None if fields.blocks.ndim == 3 else fields.limit is not None)
    else:
        is_right = type(meant) is type(hosts)
    if not is_right:
        return "layers are changed in another way"
    if rank is not None:
        scale = alpha_scale(getattr(fields, "alpha", None), rank) / alpha_scale(
            getattr(adapter_fields(hosts), "alpha", None), rank)
    return None if abs(scale - 1) < 1e-6 else f"layers count {1 / scale:.3g} times as meant"
