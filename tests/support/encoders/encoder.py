"""The host's text encoders at sizes a test can afford, as files of llama.cpp and as the host's own
models.

The host takes an encoder by the names of its tensors and the widths of some. What it does not read
is shrunken. Names in GGUF files are those of gguf-py; what else a converter changes is stated here
for each encoder.
"""
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import comfy.memory_management
import comfy.model_management
import comfy.sd
import gguf
import numpy as np
import pytest
import torch
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders.gpt_oss import LensGptOssClipModel
from families import relative_error
from pack_api import load_text_encoder

from devtools.files.gguf_files import K_QUANTS, dequantize, pack, quantize, random_rows, write_gguf

# What comes in an mmproj file.
TOWERS = ("vision_model.", "multi_modal_projector.", "audio_model.", "audio_projector.", "visual.")
TOKENS = [3, 17, 5, 250, 99, 42, 7, 1]

Weights = dict[str, torch.Tensor]


def as_it_is(weights: Weights) -> Weights:
    return weights


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """One text encoder of the host.

    te_model: the name the host detects. clip_type: as in a loader. architecture: gguf-py's; None
    for files with the host's names. config: what of the host's configuration is shrunken.
    config_of: the host's name before `_model_config` or `_config`.
    markers: names and shapes of tensors that the detection reads; those that the shrunken model
    lacks are written as zeros.
    changed: what the converter does to the weights before it names them, host's names -> names that
    gguf-py knows.
    metadata: what the file says beside its tensors. published: the names in the host's model ->
    those in the files that the host loads. towers: dictionaries of the host that configure what an
    encoder sees and hears through, and what of each is shrunken (see `small_towers`). mmproj: the
    weights of the tower -> the tensors of the mmproj file that stands beside the encoder. extra:
    what the host's loader needs beside the weights (a tokenizer), which files with the host's names
    hold too.
    options: more of the host's `model_options`. problem: what keeps the host from loading it with
    the installed packages.
    """

    te_model: str
    clip_type: str
    architecture: gguf.MODEL_ARCH | None
    config: Mapping[str, Any]
    config_of: str = ""
    markers: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    changed: Callable[[Weights], Weights] = as_it_is
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""
    towers: Sequence[tuple[dict[str, Any], Mapping[str, Any]]] = ()
    published: Callable[[Weights], Weights] = as_it_is
    mmproj: Callable[[Weights], Weights] | None = None

    @property
    def unusable(self) -> str:
        """Why the host cannot load it here; empty if it can."""
        if not hasattr(comfy.sd.TEModel, self.te_model):
            return f"this ComfyUI has no text encoder {self.te_model}"
        return self.problem

    @property
    def model_options(self) -> dict[str, Any]:
        # The host puts the last into the place of the first for CLIP, with the length of its
        # position embedding.
        config = {
            f"{self.config_of}{ending}": dict(self.config)
            for ending in ("_model_config", "_config")
        }
        return {**config, "dtype": torch.float32, **self.options, "model_config": dict(self.config)}


@contextlib.contextmanager
def small_towers(encoder: Encoder):
    """While models of this encoder are built, their towers are small."""
    with contextlib.ExitStack() as stack:
        for config, changes in encoder.towers:
            stack.enter_context(mock.patch.dict(config, changes))
        yield


def seeded(shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Float32 weights: matrices that keep the size of what they multiply, norms and other factors
    about one."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(tuple(shape), generator=generator)
        is_matrix = len(shape) > 1
        is_factor = "bias" not in name and ("norm" in name or "scala" in name)
        weights[name] = values * shape[-1] ** -0.5 if is_matrix else 0.1 * values + is_factor
    return weights


def host_clip(encoder: Encoder, weights: Weights) -> comfy.sd.CLIP:
    """What the host makes of dense weights under the names in its model. Skips the test where it
    cannot load the encoder."""
    if encoder.unusable:
        pytest.skip(encoder.unusable)
    weights = encoder.published(weights)
    markers = {
        name: torch.zeros(shape) for name, shape in encoder.markers.items() if name not in weights
    }
    return comfy.sd.load_text_encoder_state_dicts(
        [weights | markers | dict(encoder.extra)],
        clip_type=getattr(comfy.sd.CLIPType, encoder.clip_type.upper()),
        model_options=encoder.model_options,
    )


def load_encoder(path, encoder: Encoder, **options) -> comfy.sd.CLIP:
    """What the pack makes of a file."""
    return load_text_encoder([str(path)], encoder.clip_type, model_options=encoder.model_options,
                             **options)


def text_model(clip: comfy.sd.CLIP) -> SDClipModel | LensGptOssClipModel:
    return next(module for module in clip.cond_stage_model.modules()
                if isinstance(module, (SDClipModel, LensGptOssClipModel)))


def random_weights(encoder: Encoder, towers: bool = False) -> Weights:
    """Seeded weights under all names of the host's shrunken model; matrices have values that Q8_0
    holds exactly.

    towers: those of the towers, in place of those of the text model. With an mmproj file they are
    always among them.
    """
    weights = seeded(shapes_of(encoder, towers))
    return {
        name: rounded(values) if values.ndim in (2, 3) else values
        for name, values in weights.items()
    }


@functools.lru_cache
def shapes_of(encoder: Encoder, towers: bool = False) -> Mapping[str, tuple[int, ...]]:
    """The host's names of the weights in its shrunken model, see `random_weights`, and their
    shapes."""
    with (small_towers(encoder),
          # With it, layers have no weights until they load.
          mock.patch.object(comfy.memory_management, "aimdo_enabled", False)):
        model = text_model(host_clip(encoder, {})).transformer
    return {name: tuple(value.shape) for name, value in model.state_dict().items()
            if encoder.mmproj or name.startswith(TOWERS) == towers}


def rounded(values: torch.Tensor, packed_type: str = "Q8_0") -> torch.Tensor:
    """What is left of a matrix after it was packed; packed once more as Q8_0 or MXFP4 it does not
    change."""
    if values.shape[-1] % 32:
        return values
    if packed_type == "Q8_0":  # which the package of gguf takes six times as long for
        blocks = values.reshape(-1, 32)
        steps = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
        return (blocks / steps).round_().mul_(steps).nan_to_num_(0).view(values.shape)
    ggml_type = gguf.GGMLQuantizationType[packed_type]
    return torch.from_numpy(dequantize(quantize(values.numpy(), ggml_type), ggml_type))


def write_encoder(path, encoder: Encoder, weights: Weights, packed_type: str = "Q8_0",
                  architecture: str | None = "",
                  metadata: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Write a GGUF file as llama.cpp does, and its mmproj file: matrices packed, the rest F32.
    Returns what `write_gguf` does.

    packed_type: matrices of a K-quant have other values than `weights`, drawn at random.
    architecture: what the file says it is; None: nothing. metadata: in place of the encoder's.
    """
    def write(path, tensors, **options):
        is_matrix = {
            name: tensor.ndim in (2, 3) and name.endswith(".weight")
            for name, tensor in tensors.items()
        }
        return write_gguf(path, tensors, lambda name, values: packed_type
                          if is_matrix[name] else "F32",
                          pack=random_rows if packed_type in K_QUANTS else pack, **options)

    if encoder.mmproj:
        tower = {name: tensor for name, tensor in weights.items() if name.startswith(TOWERS)}
        weights = {name: tensor for name, tensor in weights.items() if name not in tower}
        write(path.with_name(f"mmproj-{path.name}"), encoder.mmproj(tower), architecture="clip")
    weights = encoder.published(weights)
    markers = {
        name: torch.zeros(shape) for name, shape in encoder.markers.items() if name not in weights
    }
    stored = encoder.changed(weights | markers)
    if encoder.architecture is None:
        stored = stored | dict(encoder.extra)
    else:
        stored = in_gguf_names(stored, encoder.architecture)
    if architecture == "":
        architecture = gguf.MODEL_ARCH_NAMES.get(encoder.architecture)
    return write(path, stored, architecture=architecture,
                 metadata=encoder.metadata if metadata is None else metadata)


@functools.lru_cache
def name_map(architecture: gguf.MODEL_ARCH) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(architecture, 64)


def in_gguf_names(weights: Weights, architecture: gguf.MODEL_ARCH) -> Weights:
    """Weights under the names that gguf-py gives to those of transformers."""
    names, stored = name_map(architecture), {}
    for name, tensor in weights.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name, f"gguf-py knows no name for {name}"
        stored[gguf_name] = tensor
    return stored


def hidden_states(clip: comfy.sd.CLIP, tokens=TOKENS) -> torch.Tensor:
    """What the last layer gives for some tokens, float32 (1, tokens, width)."""
    comfy.model_management.load_models_gpu([clip.patcher])
    model = text_model(clip)
    with torch.inference_mode():
        if isinstance(model, LensGptOssClipModel):
            return model.transformer(torch.tensor([tokens]))["last_hidden_state"]
        model.layer, model.layer_idx = "last", None
        if type(model).process_tokens is SDClipModel.process_tokens:
            return model([tokens])[0]
        # The host has this encoder only write text, for which it runs the model in another way.
        embeds = SDClipModel.process_tokens(model, [tokens], torch.device("cpu"))[0]
        ids = torch.tensor([[token for token in tokens if isinstance(token, int)]])
        return model.transformer.model(None, embeds=embeds, input_ids=ids)[0]


def error_of(clip: comfy.sd.CLIP, encoder: Encoder, weights: Weights) -> float:
    """The relative error of `hidden_states` against those of the host's own model."""
    return relative_error(hidden_states(clip), hidden_states(host_clip(encoder, weights)))
