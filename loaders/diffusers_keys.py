"""Models in diffusers' names: the host's conversion, for packed weights."""
import bisect
import contextlib
import logging
import re

import comfy.model_detection
import torch
from torch.overrides import TorchFunctionMode

from ..ops.load_hooks import after_each_load
from ..ops.packed_layout import is_packed
from ..ops.row_slicing import join_rows, take_rows
from .detection import try_detect
from .files.container import WeightFile, WeightFileError, safe_repr
from .wording import join_some

log = logging.getLogger(__name__)

# Names of diffusers that the host's tables lack, and what those or its models have in their place.
UNKNOWN_TO_COMFYUI = (
    (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_1\.", r"\1.in_layer."),  # Chroma
    (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_2\.", r"\1.out_layer."),
    (r"^time_guidance_embed\.", "time_text_embed."),  # Flux.2
    (r"^((double|single)_stream_modulation\w*)\.linear\.", r"\1.lin."),
)


def from_diffusers(state_dict: dict[str, torch.Tensor],
                   later: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a model in diffusers' names and parts (q, k and v apart) under the host's
    names and whole.

    The host's conversion writes into plain tensors only. It gets row numbers in place of rows, and
    what it makes of them tells where each row of a weight comes from. Parts of a weight of which
    another is missing keep their names.
    later: what is made of several dense tensors comes as `JoinedRows`, which takes no memory yet.
    """
    if try_detect(comfy.model_detection.detect_unet_config, state_dict, "") is not None:
        return state_dict
    tensors = {_convert_by_tables(name): tensor for name, tensor in state_dict.items()}
    names = [name for name, tensor in tensors.items() if tensor.ndim and tensor.numel()]
    starts, numbers, count = [], {}, 1
    for name in names:
        starts.append(count)
        numbers[name] = torch.arange(count, count + len(tensors[name]))
        count += len(tensors[name]) + 1  # a gap, so that two tensors never read as one run of rows
    # the host reads the width of a Flux from its bias, which Flux.2 has not
    if "x_embedder.weight" in numbers:
        numbers.setdefault("x_embedder.bias", torch.zeros_like(numbers["x_embedder.weight"]))
    with _ZeroFilledEmpty():
        converted = try_detect(comfy.model_detection.convert_diffusers_mmdit, numbers, "")
    if converted is None:
        return state_dict
    known = set(names).difference(numbers)  # the conversion takes out what it uses
    out = {name: tensor for name, tensor in tensors.items() if name not in known}
    for target, rows in converted.items():
        written, sources, parts = rows[rows > 0], [], []
        for run in written.tensor_split((written.diff() != 1).nonzero().flatten() +
                                        1) if len(written) else ():
            source = bisect.bisect(starts, run[0].item()) - 1
            first = run[0].item() - starts[source]
            sources.append(names[source])
            parts.append((tensors[names[source]], first, first + len(run)))
        if len(written) < len(rows):
            out |= {name: tensors[name] for name in sources}
        else:
            dense = len(parts) > 1 and not any(is_packed(tensor) for tensor, _, _ in parts)
            out[target] = JoinedRows(parts) if later and dense else _join_rows(target, parts)
    return out


def _convert_by_tables(name: str) -> str:
    for pattern, replacement in UNKNOWN_TO_COMFYUI:
        name = re.sub(pattern, replacement, name)
    return name


class _ZeroFilledEmpty(TorchFunctionMode):
    """Inside of it torch's new tensors are of zeros, the number of no row: the host leaves them so
    where a part is missing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.zero_() if func in (torch.empty, torch.empty_like) else out


def reject_partial_conversion(
        file: WeightFile, state_dict: dict[str, torch.Tensor]) -> contextlib.AbstractContextManager:
    """While the host loads a model of a file's weights whose names were changed: WeightFileError
    where that went half the way.

    It is told by names that the model does not have while others are missing. The host runs such a
    model with zeros.
    """
    def refuse(model, names):
        left, missing = sorted(names.unexpected_keys), names.missing_keys
        if left and missing:
            raise WeightFileError(
                f"{file.path.name} makes only a part of a model in ComfyUI's names:"
                f" {join_some(map(safe_repr, missing))} would be zeros, and for"
                f" {join_some(map(safe_repr, left))} there is no place. Download it again where a"
                " part of it may be missing; otherwise update ComfyUI, or get the model in"
                " ComfyUI's names.")

    if state_dict.keys() <= file.entries.keys():
        return contextlib.nullcontext()
    return after_each_load(lambda name, module: name == "diffusion_model", refuse)


class JoinedRows:
    """A weight made of rows `first` to `last` of several tensors, one below the other. They are put
    together when asked for."""

    def __init__(self, parts: list[tuple[torch.Tensor, int, int]]):
        self.parts = parts
        tensor = parts[0][0]
        self.dtype, self.shape = (
            tensor.dtype,
            torch.Size([sum(last - first for _, first, last in parts), *tensor.shape[1:]]),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor, _, _ in self.parts]

    def numel(self) -> int:
        return self.shape.numel()

    def joined(self) -> torch.Tensor:
        return join_rows(
            [take_rows(tensor, slice(first, last)) for tensor, first, last in self.parts])


def _join_rows(name: str, parts: list[tuple[torch.Tensor, int, int]]) -> torch.Tensor:
    """Rows `first` to `last` of each tensor, one below the other. Packed where all parts have one
    packed format."""
    joined = join_rows([take_rows(tensor, slice(first, last)) for tensor, first, last in parts])
    if not is_packed(joined) and any(is_packed(tensor) for tensor, _, _ in parts):
        log.info(
            "[Featherweight] %s is dequantised: its parts have different formats, or blocks across"
            " their borders.",
            name)
    return joined
