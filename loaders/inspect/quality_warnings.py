"""Warns of files that draw badly or not at all, and says what to take instead."""
from collections.abc import Iterator, Mapping

import torch
from comfy.supported_models_base import BASE

from ...ops.packing.pack_types import pack_type
from ..comfyui.contents import Contents
from ..comfyui.detection import try_detect
from ..comfyui.model_summary import title_of
from ..container.weight_file import safe_repr
from ..quantizers.judgement import judge

EXACT_BITS = 8  # bits a value from which on a vector keeps what a model needs of it
OTHER_CONVERSION = "Download the file again, or get another conversion of the model."


def weight_warnings(contents: Contents) -> Iterator[str]:
    """Yields a sentence for each fault of how a model's weights are packed."""
    if contents.problem:
        yield f"It does not load: {contents.problem}"
    coarse = [
        name for name, tensor in contents.tensors.items()
        if tensor.numel() == max(tensor.shape, default=0)
        and pack_type(contents.formats[name]).bits_per_value() < EXACT_BITS
    ]
    if coarse:
        subject = _count(coarse, "norm, bias or other vector is",
                         "norms, biases and other vectors are")
        yield (
            f"{subject} packed in less than {EXACT_BITS} bits, such as {safe_repr(coarse[0])} in"
            f" {title_of(contents.formats[coarse[0]])}: that costs quality and saves hardly any"
            " memory. Take a file that keeps them in F32, F16 or BF16, as those of ComfyUI-GGUF's"
            " converter and of Save Packed Model (Featherweight) do.")
    if contents.file is not None:
        yield from contents.file.notes
        return
    judgement = judge(contents.tensors, {}, contents.tensors.__getitem__)
    if judgement.refused is not None:
        yield f"{judgement.refused.problem}. {judgement.refused.advice}"
    yield from judgement.told


def shape_warnings(config: BASE, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yields a sentence for weights of other sizes than the model's, and one for missing weights.

    Args:
        config: the host's configuration of a diffusion model.
        tensors: its weights in the file on the meta device, with the host's names without a prefix.
    """
    model = try_detect(config.get_model, tensors, "", device="meta")
    weights: dict[str, torch.Tensor] | None = try_detect(
        config.process_unet_state_dict, dict(tensors))
    if model is None or weights is None:
        return  # a model that is not built without values
    expected: dict[str, tuple[int, ...]] = {
        name: tuple(weight.shape) for name, weight in model.diffusion_model.state_dict().items()
    }
    wrong = [
        name for name, weight in weights.items()
        if name in expected and _without_ones(expected[name]) != _without_ones(tuple(weight.shape))
    ]
    if wrong:
        yield (
            f"{_count(wrong, 'weight has', 'weights have')} other sizes than the model's, such as"
            f" {safe_repr(wrong[0])} of {tuple(weights[wrong[0]].shape)}, expected"
            f" {expected[wrong[0]]}. {OTHER_CONVERSION}")
    missing = [name for name in expected if name not in weights]
    if missing:
        yield (
            f"{_count(missing, 'weight of the model is', 'weights of the model are')} missing, such"
            f" as {safe_repr(missing[0])}: it gives noise or black images. {OTHER_CONVERSION}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _count(names: list[str], one: str, many: str) -> str:
    return f"{len(names)} {many if names[1:] else one}"
