"""Sources of whole checkpoints: a diffusion model, its text encoders and its VAE in one file.

Names are those that the host gives them in a checkpoint. What it stores otherwise than its model
has it, such as the projections of OpenCLIP, is built once, in 16 bits.
"""
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import comfy.model_detection
import comfy.ops
import torch
from comfy.supported_models_base import BASE

from ..comfyui.comfy_quant_weights import as_tensors, host_metadata, read_marked
from ..comfyui.detection import try_detect
from ..comfyui.weight_keys import model_prefix
from ..families import rules_for
from ..files.open_weights import open_weights
from ..quantizers.comfy_quant_marks import MARK, mark_of
from ..refusals.wrong_kind import VAE_PREFIXES
from .source import (
    INPUT_SCALES,
    MARKERS,
    CheckpointPart,
    SaveError,
    Source,
    Weight,
    extra_tensor,
    source_of_file,
    source_of_model,
    source_of_patcher,
    tokenizer_tensors,
    weight_of_file,
)

ANY_FORMAT = {"format": "float8_e4m3fn"}  # settings of a layer that the host reads packed


def source_of_checkpoint(model, clip, vae) -> Source:
    """Returns the source of a MODEL, a CLIP and a VAE, with their patches, as one checkpoint.

    Args:
        model: the host's ModelPatcher, packed or not; see `source_of_model`.
        clip: the host's CLIP, None for none.
        vae: the host's VAE, None for none.

    Raises:
        SaveError: where the host reads no text encoders from checkpoints of this model.
    """
    source = source_of_model(model)
    others = {}
    for role, patcher in (("clip", getattr(clip, "patcher", None)),
                          ("vae", getattr(vae, "patcher", None))):
        if patcher is not None:
            others[role] = source_of_patcher(patcher)
    if clip is not None:
        for name, tensor in tokenizer_tensors(clip.tokenizer).items():
            others["clip"].weights[name] = extra_tensor(name, tensor)
    weights = {"model": {name: weight for name, weight in source.weights.items()
                         if name not in MARKERS},
               **{role: other.weights for role, other in others.items()}}
    named = _in_the_hosts_names(model.model, weights)
    file_names = {name: file_name for file_name, (role, name, _) in named.items()
                  if role == "model"}
    renamed = {file_name: replace(weight, name=file_name)
               for file_name, (role, _, weight) in named.items()
               if role != "model" and file_name not in source.weights}
    encoders = [name for name in renamed if named[name][0] == "clip"]
    sources = [source, *others.values()]
    paths = {path for each in sources for path in each.paths}

    def guard():
        for each in sources:
            each.guard()

    return _whole(replace(source, file_names=file_names, guard=guard, paths=paths), renamed,
                  encoders, model.model.model_config)


def source_of_checkpoint_file(path: str | os.PathLike,
                              loras: Sequence[tuple[str, float]] = ()) -> Source:
    """Returns the source of a checkpoint in a file, with LoRAs on its diffusion model.

    Args:
        path, loras: as for `source_of_file`.

    Raises:
        WeightFileError: for a file that cannot be read.
        SaveError: for a file that is no checkpoint, or a LoRA that does not fit.
    """
    source, file = source_of_file(path, loras), open_weights(path)
    state_dict = read_marked(file)
    prefix, name = model_prefix(state_dict), os.path.basename(path)
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
              for name, tensor in state_dict.items()}
    config = prefix and try_detect(comfy.model_detection.model_config_from_unet, shapes, prefix,
                                   metadata=host_metadata(file))
    if not config:
        raise SaveError(
            f"{name} is not a checkpoint that this ComfyUI knows: expected a diffusion model,"
            " text encoders and a VAE in one file. Leave out --checkpoint.")
    others = {
        name: weight_of_file(name, tensor) for name, tensor in as_tensors(file, state_dict).items()
        if not name.startswith(prefix) and name not in MARKERS and not name.endswith(INPUT_SCALES)}
    file_names = {name: f"{prefix}{name}" for name in source.weights if name not in MARKERS}
    encoders = [name for name in others if not name.startswith(VAE_PREFIXES)]

    def drop_pages():
        source.drop_pages()
        file.drop_pages()

    return _whole(replace(source, file_names=file_names, drop_pages=drop_pages), others, encoders,
                  config)


def _in_the_hosts_names(model, weights: Mapping[str, Mapping[str, Weight]]
                        ) -> dict[str, tuple[str, str, Weight]]:
    """Returns name in a checkpoint -> (role, name in its model, weight), as the host saves them.

    Args:
        model: the host's model, which names the weights of all parts.
        weights: role ("model", "clip", "vae") -> name -> weight.
    """
    empty = {role: {name: torch.empty(weight.shape, dtype=torch.float16, device="meta")
                    for name, weight in of_role.items()} for role, of_role in weights.items()}
    places = {id(tensor): (role, name)
              for role, tensors in empty.items() for name, tensor in tensors.items()}
    saved = _state_dict_for_saving(model, empty)
    kept = {places[id(tensor)] for tensor in saved.values() if id(tensor) in places}
    if any(id(tensor) not in places and tensor.is_meta for tensor in saved.values()):
        # what is joined or transposed needs values
        given = {role: {name: (tensor if (role, name) in kept else _half_values(
            weights[role][name])) for name, tensor in tensors.items()}
            for role, tensors in empty.items()}
        saved = _state_dict_for_saving(model, given)
    named = {}
    for file_name, tensor in saved.items():
        if id(tensor) in places:
            role, name = places[id(tensor)]
            named[file_name] = role, name, weights[role][name]
        else:
            tensor = tensor.detach().contiguous()
            named[file_name] = "clip", file_name, extra_tensor(file_name, tensor)
    return named


def _state_dict_for_saving(model, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict:
    clip, vae = (dict(tensors[role]) if role in tensors else None for role in ("clip", "vae"))
    return model.state_dict_for_saving(dict(tensors["model"]), clip, vae)


def _half_values(weight: Weight) -> torch.Tensor:
    values = weight.patched(0, weight.shape[0] if weight.shape else 1)
    return values.cpu().to(torch.bfloat16 if weight.half == "BF16" else torch.float16)


def _whole(source: Source, others: Mapping[str, Weight], encoders: Collection[str],
           config: BASE) -> Source:
    """Adds the other parts of a checkpoint to the source of its diffusion model.

    Args:
        source: of the diffusion model.
        others: name in the file -> weight.
        encoders: names of those that are of text encoders.
        config: the host's, of the model.

    Raises:
        SaveError: where the host reads no text encoders from checkpoints of this model.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in others:
        start, _, rest = name.partition(".transformer.")
        groups.setdefault(start if name in encoders and rest else "", {})[rest or name] = name
    parts = []
    for start, names in groups.items():
        part = Source({local: replace(others[name], name=local) for local, name in names.items()})
        parts.append(CheckpointPart(part, names, bool(start and rules_for(part.shapes).embedding)))
    if any(part.may_be_packed for part in parts):
        layers = [part.names[name] for part in parts if part.may_be_packed
                  for name in rules_for(part.source.shapes).row_names(
                      part.source.shapes, ANY_FORMAT["format"])]
        read = _read_packed(config, {name: others[name] for name in encoders}, layers)
        parts = [replace(part, may_be_packed=part.may_be_packed and not read.isdisjoint(
            part.names.values())) for part in parts]
    return replace(source, weights={**source.weights, **others}, parts=parts)


def _read_packed(config, weights: Mapping[str, Weight], layers: Iterable[str]) -> set[str]:
    """Returns the names of the weights of text encoders that the host reads packed.

    Args:
        config: the host's, of the checkpoint's model.
        weights: name in the file -> weight of a text encoder.
        layers: names of the weights that are asked about.

    Raises:
        SaveError: where the host reads no text encoders from checkpoints of this model.
    """
    state_dict = {name: torch.empty(weight.shape, dtype=torch.float16, device="meta")
                  for name, weight in weights.items()}
    places = {id(tensor): name for name, tensor in state_dict.items()}
    marks = {f"{name.removesuffix('.weight')}{MARK}": mark_of(ANY_FORMAT) for name in layers}
    target = config.clip_target(state_dict=state_dict | marks)
    if target is None:
        raise SaveError(
            "ComfyUI reads no text encoders from a checkpoint of this model. Save them in files of"
            " their own: disconnect vae, or leave out --checkpoint.")
    encoders = target.clip(**target.params, device=torch.device("meta"), dtype=torch.float16,
                           model_options={})
    modules = dict(encoders.named_modules())
    read = set()
    for name, tensor in config.process_clip_state_dict(dict(state_dict)).items():
        layer = modules.get(name.removesuffix(".weight"))
        is_plain = layer is None or isinstance(layer, comfy.ops.disable_weight_init.Linear)
        if id(tensor) in places and not is_plain:
            read.add(places[id(tensor)])
    return read.intersection(layers)
