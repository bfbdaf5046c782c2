"""Identifies a model by names, shapes and metadata: type, family, what it needs, which GPUs fit."""
import collections
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.sd
import torch

from ..comfyui.contents import Contents, diffusion_comfy_keys, encoder_comfy_keys
from ..comfyui.model_summary import title_of
from ..container.weight_file import safe_repr
from ..encoders.encoder_sets import TITLES, encoder_family
from ..lora.family_match import match_family
from ..lora.lora_file import OTHER_FILES, weight_shapes
from ..lora.tensor_names import PAIRS, layer_names
from ..packing.planning.for_device import Weights
from ..packing.planning.plan import Plan, PlanError
from ..quantizers.registry import quantizer_of
from ..refusals.wrong_kind import (
    SIDE_LOADERS,
    SIDE_MODELS,
    VAE_PREFIXES,
    find_other_part,
    first_match,
)
from .quality_warnings import shape_warnings, weight_warnings
from .requirements import Card, fit_cards, fit_encoder_cards, required_models

MODEL, CHECKPOINT, ENCODER, LORA = "diffusion model", "checkpoint", "text encoder", "LoRA"
PLAN_KEY = "featherweight.plan"
MMPROJ = re.compile(r"^(v\.blk|mm|a\.blk)\.")
ENCODER_NAMES = re.compile(
    r"^(enc\.)?blk\.\d|^token_embd\.|^shared\.weight$|(^|\.)embed_tokens\.|text_model\.encoder\.")
PART_PREFIXES = {
    "VAE": VAE_PREFIXES,
    "text encoder": ("cond_stage_model.", "conditioner.", "text_encoders."),
}
NUMBERED_BLOCK = re.compile(
    r"(?:^|\.)((?:\w*_)?(?:blocks?|layers?|blk|refiner|resblocks))\.(\d+)\.")
# Parts of a name that do not belong to the name of a block.
WRAPPERS = ("model", "encoder", "diffusion_model", "transformer", "text_model", "language_model")


@dataclass
class Inspection:
    """What a model is and needs.

    Attributes:
        name: name of the file or folder.
        model_type: MODEL, CHECKPOINT ..., "" if it cannot be read.
        family: the model's common name.
        host: ComfyUI's class name of the model.
        problem: why it cannot be read.
        declared_type: the type of model that the file declares.
        quantizer: who packed its weights, as far as `quantizers.registry` knows, "" for nobody.
        parameters: number of values.
        nbytes: bytes on disk.
        memory_bytes: bytes of the weights in memory.
        patches: number of weights that LoRAs or merges change.
        kernels: what dequantises and multiplies in a model that is loaded, or which kernels a file
            lacks on this computer.
        types: type -> (number of tensors, bytes).
        blocks: block -> type -> bytes.
        parts: part of a checkpoint -> bytes.
        needs: what goes with it, such as "VAE" -> which.
        cards: how it fits each size of graphics card.
        resolution: what the memory of a step is estimated for, such as "1024 × 1024".
        warnings: sentences on why it draws badly, and what to take instead.
        plan: metadata that a file packed by Featherweight has about its packing.
        reference: name of the file that it was compared with.
        errors: name -> relative error against the reference.
        no_errors: why there are none.
    """

    name: str
    model_type: str = ""
    family: str = ""
    host: str = ""
    problem: str = ""
    declared_type: str = ""
    quantizer: str = ""
    parameters: int = 0
    nbytes: int = 0
    memory_bytes: int = 0
    patches: int = 0
    kernels: str = ""
    types: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    cards: list[Card] = field(default_factory=list)
    resolution: str = ""
    warnings: list[str] = field(default_factory=list)
    plan: dict[str, str] = field(default_factory=dict)
    reference: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    no_errors: str = ""

    @property
    def title(self) -> str:
        """What it is, in one sentence."""
        if self.problem:
            return self.problem
        article = "an" if self.model_type[:1] in "aeiou" else "a"
        family = f": {self.family}" if self.family else ""
        return f"{self.name} is {article} {self.model_type}{family}."


def identify(contents: Contents) -> Inspection:
    """Identifies a model by names, shapes and metadata, without reading values."""
    sizes, counts = collections.Counter(), collections.Counter()
    blocks: dict[str, dict[str, int]] = {}
    for name, tensor in contents.tensors.items():
        type_name = title_of(contents.formats[name])
        sizes[type_name] += tensor.nbytes
        counts[type_name] += 1
        block_sizes = blocks.setdefault(weight_block(name), {})
        block_sizes[type_name] = block_sizes.get(type_name, 0) + tensor.nbytes
    inspection = Inspection(
        contents.name, declared_type=contents.declared_type, nbytes=contents.nbytes,
        quantizer=quantizer_of(contents.file)
        if contents.file and not contents.file.judgement.has_lost_marks else "",
        memory_bytes=contents.memory_bytes, patches=contents.patches,
        kernels=contents.kernels,
        parameters=sum(tensor.numel() for tensor in contents.tensors.values()),
        types={name: (counts[name], size) for name, size in sizes.most_common()},
        blocks=sort_blocks(blocks), plan=_plan_texts(contents.metadata))
    # Each one returns whether the model is of its type, and fills in the inspection if it is.
    for identify_as in (_identify_lora, _identify_mmproj, _identify_side_model,
                        _identify_diffusion_model, _identify_encoder, _identify_other):
        if identify_as(contents, inspection):
            break
    if inspection.model_type != LORA:
        inspection.warnings += weight_warnings(contents)
    return inspection


def _identify_lora(contents: Contents, inspection: Inspection) -> bool:
    stems = layer_names(contents.tensors)
    is_adapter = contents.declared_type == "adapter"
    if not stems or (len(stems) * 4 < len(contents.tensors) and not is_adapter):
        return False
    inspection.model_type = LORA
    inspection.family = f"{len(stems)} layers"
    family = match_family({stem: _factors(contents, stem, ends) for stem, ends in stems.items()},
                       contents.metadata)
    if family:
        inspection.family += f", for {' or '.join(family.names)}"
    inspection.needs = {
        "model": "the one it was trained for. Check LoRA (Featherweight) compares it with a loaded"
                 " model."
    }
    return True


def _factors(contents: Contents, stem: str, ends: set[str]) -> tuple[int | None, int | None]:
    """Returns (rows, columns) of the weight that a LoRA's layer changes, None where not known."""
    for up, down in PAIRS:
        if {up, down} <= ends:
            rows, columns = (contents.tensors[stem + end].shape for end in (up, down))
            return (rows[0], columns[1:].numel()) if rows and columns else (None, None)
    return None, None


def _identify_mmproj(contents: Contents, inspection: Inspection) -> bool:
    if not any(map(MMPROJ.match, contents.tensors)):
        return False
    inspection.model_type = "vision part (mmproj) of a text encoder"
    inspection.needs = {
        "text encoder": "the one it was published with, in Load Text Encoder (GGUF, Featherweight)"
    }
    return True


def _identify_side_model(contents: Contents, inspection: Inspection) -> bool:
    match = first_match(contents.tensors, SIDE_MODELS)
    if match is None or any(map(ENCODER_NAMES.search, contents.tensors)):  # of a whole CLIP
        return False
    inspection.model_type, inspection.family, _ = match
    inspection.needs = {"use": f"Load it with {SIDE_LOADERS[match[0]]}."}
    return True


def _identify_diffusion_model(contents: Contents, inspection: Inspection) -> bool:
    tensors, prefix, config = diffusion_comfy_keys(contents)
    if config is None:
        return False
    names = [name for name in contents.tensors if name.startswith(prefix)]
    is_checkpoint = len(names) < len(contents.tensors)
    inspection.model_type = CHECKPOINT if is_checkpoint else MODEL
    inspection.host = type(config).__name__
    shapes = {
        name.removeprefix(prefix): tuple(tensor.shape)
        for name, tensor in tensors.items() if name.startswith(prefix)
    }
    empty_tensors = {
        name: torch.empty(shape, dtype=torch.float32, device="meta")
        for name, shape in shapes.items()
    }
    family = match_family(weight_shapes(empty_tensors))
    inspection.family = " or ".join(family.names) if family else inspection.host
    if is_checkpoint:
        inspection.parts = _part_sizes(contents, prefix)
    inspection.needs = {
        part: which for part, which in required_models(config).items()
        if part not in inspection.parts
    }
    stored = {name.removeprefix(prefix): contents.tensors[name] for name in names}
    packed = any(contents.formats[name] not in ("F32", "F16", "BF16") for name in names)
    inspection.resolution, inspection.cards = fit_cards(
        config, Weights.of(shapes, stored), packed)
    inspection.warnings += shape_warnings(config, empty_tensors)
    return True


def _part_sizes(contents: Contents, prefix: str) -> dict[str, int]:
    """Returns part of a checkpoint -> bytes; prefix: of the diffusion model."""
    prefixes = {MODEL: prefix, **PART_PREFIXES}
    sizes = collections.Counter()
    for name, tensor in contents.tensors.items():
        part = next((part for part, start in prefixes.items() if name.startswith(start)), "other")
        sizes[part] += tensor.nbytes
    return dict(sizes)


def _identify_encoder(contents: Contents, inspection: Inspection) -> bool:
    tensors, arch = encoder_comfy_keys(contents)
    try:
        te_model = comfy.sd.detect_te_model(tensors)
    except (LookupError, AttributeError):
        te_model = None
    if te_model is None and not arch and not any(map(ENCODER_NAMES.search, contents.tensors)):
        return False
    inspection.model_type = ENCODER
    if te_model is not None:
        name = encoder_family(te_model.name, tensors)
        inspection.family = TITLES.get(name, name)
        inspection.host = te_model.name
    elif arch:
        inspection.family = f"{arch}, of a size that this ComfyUI does not know"
    else:
        inspection.family = "of a family that this ComfyUI does not know"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    inspection.cards = fit_encoder_cards(contents.memory_bytes, shapes)
    return True


def _identify_other(contents: Contents, inspection: Inspection) -> bool:
    if match := (find_other_part(contents.tensors)
                 or first_match(contents.tensors, OTHER_FILES)):
        inspection.model_type = match[0].removeprefix("an ").removeprefix("a ")
        inspection.needs = {"use": match[1]}
        return True
    inspection.model_type = "weight file of an unknown type"
    inspection.family = f"first tensor {safe_repr(next(iter(contents.tensors), 'none'))}"
    return True


def _plan_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata that a file packed by Featherweight has about its packing, as text."""
    texts = {}
    for key in (key for key in metadata if str(key).startswith("featherweight.")):
        text = str(metadata[key])
        if key == PLAN_KEY:
            try:
                counts = collections.Counter(Plan.from_json(text).types.values())
                text = ", ".join(f"{name} {count}" for name, count in counts.most_common())
            except PlanError:
                pass
        texts[key.removeprefix("featherweight.")] = text if len(text) <= 200 else text[:197] + "..."
    return texts


def weight_block(name: str) -> str:
    """Returns the block that a tensor belongs to: `double_blocks.3`, `layers.7`, `img_in`."""
    match = NUMBERED_BLOCK.search(name)
    if match is None:
        words = [word for word in name.split(".")[:-1] if word not in WRAPPERS]
        return words[0] if words else name
    parents = [word for word in name[:match.start()].split(".") if word and word not in WRAPPERS]
    return ".".join([*parents[-1:], match[1], match[2]])


def sort_blocks(blocks: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Sorts blocks by their numbers within each stem, stems in the order of the file."""
    stems = list(dict.fromkeys(re.sub(r"\.\d+$", "", block) for block in blocks))

    def position(block: str) -> tuple[int, int]:
        number = re.search(r"\.(\d+)$", block)
        return stems.index(re.sub(r"\.\d+$", "", block)), int(number[1]) if number else -1

    return {block: blocks[block] for block in sorted(blocks, key=position)}
