"""Models for the tests of the patcher: a packed Flux beside the dense one of its values, on a CPU
and in dynamic VRAM, and what is placed on fake GPUs."""
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import dynamic_vram
import pytest
import torch
from fake_gpus import ON_FAKE_GPUS
from gpu_memory import step
from patched_models import (
    dense_flux,
    error_by_effect,
    flux_file,
    flux_pair,
    forget_models,
    limit,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
    plain_outputs,
)
from small_encoders import encode, lora_for_t5, patched_clip

from featherweight.loaders.models.placement import place, place_clip

# a format of ours, and some of the host's beside NF4: computed by the host in float, by its own
# product, and by us
ON_A_CPU = ("Q4_K", "float8_e4m3fn", "int8_tensorwise", "asym_w4a8_int8 exact")
IN_DYNAMIC_VRAM = [pytest.param(name, id=f"dynamic-{name}", marks=pytest.mark.fake_gpus(
    dynamic=True)) for name in (*ON_A_CPU[:3], "nvfp4 exact")]
each_format = pytest.mark.parametrize("models", ON_A_CPU, indirect=True)
in_dynamic_vram = pytest.mark.parametrize("models", IN_DYNAMIC_VRAM, indirect=True)
everywhere = pytest.mark.parametrize("models", [*ON_A_CPU, *IN_DYNAMIC_VRAM], indirect=True)


def load(*patchers):
    comfy.model_management.load_models_gpu(list(patchers))


def with_dense_parts(lora: dict, values: dict) -> dict:
    """A LoRA that also changes norms and biases, which the host patches by itself."""
    for seed, (name, value) in enumerate(values.items()):
        if value.ndim == 1:
            generator = torch.Generator().manual_seed(seed)
            # as the host names norms
            layer, _, param = name.replace(".scale", ".weight").rpartition(".")
            suffix = "diff_b" if param == "bias" else "diff"
            lora[f"diffusion_model.{layer}.{suffix}"] = (
                torch.randn(value.shape, generator=generator) * 0.1)
    return lora


class Models(NamedTuple):
    """plain, without: the outputs of the two models without patches. uploads: the list of modules
    whose weights are uploaded, in dynamic VRAM."""

    format_name: str
    packed: Any
    dense: Any
    plain: torch.Tensor
    without: torch.Tensor
    count: int
    uploads: list | None

    @property
    def values(self) -> dict[str, torch.Tensor]:
        return flux_file(self.format_name)[1]

    @property
    def pair(self) -> tuple:
        return self.packed, self.dense

    def loras(self) -> tuple[dict, dict]:
        """Two for the packed matrices, the second also one for dense norms and biases: in dynamic
        VRAM for one bias, as the host uploads the layer then."""
        changed = {name: value for name, value in self.values.items()
                   if self.uploads is None or name == "double_blocks.0.img_mlp.0.bias"}
        second = lora_for(self.values, seed=2)
        return lora_for(self.values, seed=1), with_dense_parts(second, changed)

    def is_right(self, actual: torch.Tensor, expected: torch.Tensor, *without) -> bool:
        """Whether a patched output is the dense model's; without: what `without` and `plain` are
        of other outputs."""
        without = without or (self.without, self.plain)
        return error_by_effect(actual, expected, *without) < limit(self.format_name)

    def is_packed(self) -> bool:
        """Whether as many weights are packed as at first."""
        return len(packed_layers(self.packed)) == self.count


@pytest.fixture
def models(request, monkeypatch, small_models):
    name, uploads = request.param, None
    if ON_FAKE_GPUS:
        uploads = dynamic_vram.uploads(monkeypatch)
        pair = packed_flux(name), dense_flux(name)
    else:
        pair = flux_pair(name)
    yield Models(name, *pair, *plain_outputs(*pair, name), len(packed_layers(pair[0])), uploads)
    if ON_FAKE_GPUS:
        forget_models()


# --- on fake GPUs ---


class Subject(NamedTuple):
    """A model or text encoder, a LoRA for it, and the functions for one of its kind."""

    model: Any
    lora: dict
    patched: Callable
    place: Callable
    run: Callable

    @classmethod
    def of_flux(cls, patcher, values: dict, **options) -> "Subject":
        return cls(patcher, lora_for(values, **options), patched, place, step)

    @classmethod
    def of_t5(cls, clip, values: dict, **options) -> "Subject":
        packed = {name: value for name, value in values.items()
                  if "relative_attention_bias" not in name}
        return cls(clip, lora_for_t5(packed, **options), patched_clip, place_clip, encode)


def patcher_of(model):
    return getattr(model, "patcher", model)
