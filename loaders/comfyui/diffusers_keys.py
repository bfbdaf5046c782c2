"""Converts models with diffusers' names by the host's conversion, packed weights included."""
import bisect
import re
from collections.abc import Mapping, Sequence

import comfy.model_detection
import comfy.utils
import torch

from ...ops.layers.load_hooks import FillEmpty
from ...ops.log import log
from ...ops.tensor.packed_layout import is_packed
from ...ops.tensor.row_slicing import join_rows, take_rows
from ..container.weight_file import DOWNLOAD_AGAIN, WeightFileError, safe_repr
from ..name_lists import join_some
from .detection import try_detect

# diffusers' names that the host's tables lack, and the names that the tables or its models have.
UNKNOWN_TO_COMFYUI = (
    (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_1\.", r"\1.in_layer."),  # Chroma
    (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_2\.", r"\1.out_layer."),
    (r"^time_guidance_embed\.", "time_text_embed."),  # Flux.2
    (r"^((double|single)_stream_modulation\w*)\.linear\.", r"\1.lin."),
)

# Wan, of which the host has no table (diffusers 0.42 `transformer_wan.py`): a tensor that only its
# models have, and the names of diffusers, which are the first that match, and those of the host.
WAN = "condition_embedder.time_embedder.linear_1.weight"
WAN_NAMES = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.to_([qkv])\.", r".self_attn.\1."),
    (r"\.attn2\.to_([qkv])\.", r".cross_attn.\1."),
    (r"\.attn1\.to_out\.0\.", ".self_attn.o."),
    (r"\.attn2\.to_out\.0\.", ".cross_attn.o."),
    (r"\.attn2\.add_([kv])_proj\.", r".cross_attn.\1_img."),
    (r"\.attn2\.norm_added_k\.", ".cross_attn.norm_k_img."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
))


def from_diffusers(state_dict: dict[str, torch.Tensor],
                   lazy: bool = False) -> dict[str, torch.Tensor]:
    """Converts weights from diffusers' names and parts (q, k and v apart) to the host's.

    The host's conversion handles plain tensors only. So it gets row numbers in place of rows, and
    its output shows which row of which tensor each row of a weight is. If a part of a weight is
    missing, of another width or of whole numbers, its other parts keep their names.

    Args:
        state_dict: of a model, without a prefix.
        lazy: return a weight of several dense tensors as `JoinedRows`, which takes no memory yet.
    """
    if try_detect(comfy.model_detection.detect_unet_config, state_dict, "") is not None:
        return state_dict
    if WAN in state_dict:
        return {_convert_wan(name): tensor for name, tensor in state_dict.items()}
    tensors = {_convert_by_tables(name): tensor for name, tensor in state_dict.items()}
    found = _joined_rows(tensors)
    if found is None:
        return state_dict
    weights, used = found
    out: dict = {name: tensor for name, tensor in tensors.items() if name not in used}
    for target, (parts, is_whole) in weights.items():
        rows = [(tensors[name], first, end) for name, first, end in parts]
        if not is_whole or len({
                (part.shape[1:], part.is_floating_point()) for part, _, _ in rows}) > 1:
            out |= {name: tensors[name] for name, _, _ in parts}
        else:
            dense = len(rows) > 1 and not any(is_packed(tensor) for tensor, _, _ in rows)
            out[target] = JoinedRows(rows) if lazy and dense else _join_rows(target, rows)
    return out


def reject_incomplete(name: str, state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Raises WeightFileError where weights are missing that the host joins with others.

    Its conversion of diffusers' names would leave the rows of a missing one as the memory is.

    Args:
        name: of the file.
        state_dict: its tensors, of which only the shapes matter.

    Returns:
        The names that the conversion leaves behind, of which the host says nothing.
    """
    if try_detect(comfy.model_detection.detect_unet_config, state_dict, "") is not None:
        return []
    joined = _joined_rows(state_dict)
    if joined is None:
        config = try_detect(comfy.model_detection.model_config_from_diffusers_unet, state_dict)
        names = comfy.utils.unet_to_diffusers(config.unet_config) if config else state_dict
        return [name for name in state_dict if name not in names]
    weights, used = joined
    incomplete = [target for target, (parts, is_whole) in weights.items() if parts and not is_whole]
    if incomplete:
        raise WeightFileError(
            f"{name} lacks some of the weights that ComfyUI joins to"
            f" {join_some(map(safe_repr, incomplete))}. {DOWNLOAD_AGAIN}")
    return [name for name in state_dict if name not in used]


def _joined_rows(tensors: Mapping[str, torch.Tensor]) -> tuple[
        dict[str, tuple[list[tuple[str, int, int]], bool]], set[str]] | None:
    """Runs the host's conversion on row numbers in place of rows.

    Returns:
        Weight -> the parts that it is joined of, as (name, first row, end), and whether they are
        all of it; and the names of tensors that the host converts. None where it converts none.
    """
    names = [name for name, tensor in tensors.items() if tensor.ndim and tensor.numel()]
    starts = []
    numbers = {}
    next_number = 1
    for name in names:
        starts.append(next_number)
        numbers[name] = torch.arange(next_number, next_number + len(tensors[name]))
        next_number += len(tensors[name]) + 1  # the gap keeps two tensors from forming one run
    # The host reads the width of a Flux from this bias, which Flux.2 lacks.
    if "x_embedder.weight" in numbers:
        numbers.setdefault("x_embedder.bias", torch.zeros_like(numbers["x_embedder.weight"]))
    # zeros number no row: the host leaves memory as it is where a part is missing
    with FillEmpty(torch.Tensor.zero_):
        converted = try_detect(comfy.model_detection.convert_diffusers_mmdit, numbers, "")
    if converted is None:
        return None
    weights = {}
    for target, rows in converted.items():
        written = rows[rows > 0]
        parts = []
        for run in _consecutive_runs(written):
            source = bisect.bisect(starts, run[0].item()) - 1
            first = run[0].item() - starts[source]
            parts.append((names[source], first, first + len(run)))
        weights[target] = parts, len(written) == len(rows)
    return weights, set(names).difference(numbers)  # the conversion pops what it uses


def _consecutive_runs(numbers: torch.Tensor) -> Sequence[torch.Tensor]:
    """Splits (n,) numbers into runs of consecutive ones."""
    if not len(numbers):
        return ()
    return numbers.tensor_split((numbers.diff() != 1).nonzero().flatten() + 1)


def _convert_wan(name: str) -> str:
    """Returns the host's name of a tensor of Wan."""
    for pattern, replacement in WAN_NAMES:
        converted, count = pattern.subn(replacement, name)
        if count:
            return converted
    return name


def _convert_by_tables(name: str) -> str:
    for pattern, replacement in UNKNOWN_TO_COMFYUI:
        name = re.sub(pattern, replacement, name)
    return name


class JoinedRows:
    """A weight made of rows of several tensors, which are concatenated on demand.

    Args:
        parts: (tensor, first row, end) of each.
    """

    def __init__(self, parts: list[tuple[torch.Tensor, int, int]]):
        self.parts = parts
        tensor = parts[0][0]
        rows = sum(end - first for _, first, end in parts)
        self.dtype = tensor.dtype
        self.shape = torch.Size([rows, *tensor.shape[1:]])

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor, _, _ in self.parts]

    def numel(self) -> int:
        return self.shape.numel()

    def joined(self) -> torch.Tensor:
        return join_rows(
            [take_rows(tensor, slice(first, end)) for tensor, first, end in self.parts])


def _join_rows(name: str, parts: list[tuple[torch.Tensor, int, int]]) -> torch.Tensor:
    """Concatenates parts as `JoinedRows` has them; packed if all have the same packed format."""
    joined = join_rows([take_rows(tensor, slice(first, end)) for tensor, first, end in parts])
    if not is_packed(joined) and any(is_packed(tensor) for tensor, _, _ in parts):
        log.info(
            "%s is dequantized: its parts have different formats, or blocks across"
            " their borders.", name)
    return joined
