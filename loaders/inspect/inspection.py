"""What is found out about a model: kind, family, what else it needs, which cards it fits."""
import collections
import math
import re
from dataclasses import dataclass, field
from typing import Any

import comfy.model_detection
import comfy.sd
import torch

from ..comfy_keys import to_comfy_keys
from ..detection import try_detect
from ..encoders.encoder_sets import TITLES, encoder_family
from ..files.container import safe_repr
from ..lora.families import recognise
from ..lora.lora_file import OTHER_FILES, PAIRS, layer_names, weight_shapes
from ..packing.planning.plan import Plan, PlanError
from .contents import Contents, encoder_comfy_keys, shapes_only
from .requirements import Card, fit_cards, fit_encoder_cards, required_models

MODEL, CHECKPOINT, ENCODER, LORA = "diffusion model", "checkpoint", "text encoder", "LoRA"
PLAN_KEYS = ("featherweight.plan", "featherweight.recipe", "featherweight.sensitivity")
MMPROJ = re.compile(r"^(v\.blk|mm|a\.blk)\.")
ENCODER_SIGNS = re.compile(
    r"^(enc\.)?blk\.\d|^token_embd\.|^shared\.weight$|(^|\.)embed_tokens\.|text_model\.encoder\.")
VAE = re.compile(
    r"^(first_stage_model\.|vae\.)?("
    r"(taesd_)?(decoder|encoder)\.(conv_?in|conv1|mid|down|up|\d+|layers\.\d+\.block)\b|post_quant_conv\.)"
)
PREFIXES_OF_PARTS = {"VAE": ("first_stage_model.", "vae."),
                     "text encoder": ("cond_stage_model.", "conditioner.", "text_encoders.")}


@dataclass
class Inspection:
    """model_type: MODEL, CHECKPOINT ..., "" for what cannot be read, which `problem` says. family: what
    people call the model; host: the host's name of it. types: type -> (tensors, bytes). blocks:
    block -> type -> bytes. parts: of a checkpoint -> bytes.
    needs: what goes with it -> which. cards: which memory it fits. plan: what a file made here says
    about itself. errors: name -> relative error against `reference`; no_errors: why there are none.
    """

    name: str
    model_type: str = ""
    family: str = ""
    host: str = ""
    problem: str = ""
    declared_type: str = ""
    parameters: int = 0
    nbytes: int = 0
    memory_bytes: int = 0
    patches: int = 0
    types: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    cards: list[Card] = field(default_factory=list)
    resolution: str = ""  # what the memory is counted for: "1024²"
    plan: dict[str, str] = field(default_factory=dict)
    reference: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    no_errors: str = ""

    @property
    def title(self) -> str:
        """One sentence on what it is."""
        if self.problem:
            return self.problem
        what = f"{'an' if self.model_type[:1] in 'aeiou' else 'a'} {self.model_type}"
        return f"{self.name} is {what}{f': {self.family}' if self.family else ''}."


def identify(contents: Contents) -> Inspection:
    """Everything that names, shapes and metadata say; no values are read."""
    sizes, counts, blocks = collections.Counter(), collections.Counter(), {}
    for name, tensor in contents.tensors.items():
        kind = contents.formats[name]
        sizes[kind] += tensor.nbytes
        counts[kind] += 1
        of_block = blocks.setdefault(block_name(name), {})
        of_block[kind] = of_block.get(kind, 0) + tensor.nbytes
    found = Inspection(contents.name, declared_type=contents.declared_type, nbytes=contents.nbytes,
                       memory_bytes=contents.memory_bytes, patches=contents.patches,
                       parameters=sum(map(math.prod, contents.shapes.values())),
                       types={kind: (counts[kind], size) for kind, size in sizes.most_common()},
                       blocks=in_model_order(blocks), plan=_plan(contents.metadata))
    for told in (_lora, _mmproj, _diffusion_model, _encoder, _other):
        if told(contents, found):
            break
    return found


def _lora(contents: Contents, found: Inspection) -> bool:
    stems = layer_names(contents.tensors)
    if not stems or (len(stems) * 4 < len(contents.tensors) and contents.declared_type != "adapter"):
        return False
    found.model_type, found.family = LORA, f"{len(stems)} layers"
    family = recognise({stem: _factors(contents, stem, ends) for stem, ends in stems.items()},
                       contents.metadata)
    if family:
        found.family += f", for {' or '.join(family.names)}"
    found.needs = {
        "model": "the one it was trained for. Check LoRA (Featherweight) holds it against a loaded"
                 " model."
    }
    return True


def _factors(contents: Contents, stem: str, ends: set[str]) -> tuple[int | None, int | None]:
    """(rows, columns) of the weight that a layer of a LoRA changes, None where its kind does not
    say it at once."""
    for up, down in PAIRS:
        if {up, down} <= ends:
            rows, columns = (contents.tensors[stem + end].shape for end in (up, down))
            return (rows[0], columns[1:].numel()) if rows and columns else (None, None)
    return None, None


def _mmproj(contents: Contents, found: Inspection) -> bool:
    if not any(map(MMPROJ.match, contents.tensors)):
        return False
    found.model_type = "vision part (mmproj) of a text encoder"
    found.needs = {
        "text encoder": "the one it was published with, in Load Text Encoder (Featherweight)"
    }
    return True


def _diffusion_model(contents: Contents, found: Inspection) -> bool:
    tensors = to_comfy_keys(shapes_only(contents.tensors))
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    whole = sum(name.startswith(prefix) for name in tensors) > 5
    config = contents.config or _config(tensors, prefix if whole else "", contents.metadata)
    if config is None:
        return False
    inside = [name for name in contents.tensors if not whole or name.startswith(prefix)]
    rest = len(contents.tensors) - len(inside)
    found.model_type = CHECKPOINT if rest else MODEL
    found.host = type(config).__name__
    shapes = {
        name.removeprefix(prefix if whole else ""): tuple(tensor.shape)
        for name, tensor in tensors.items() if not whole or name.startswith(prefix)
    }
    marks = {
        name: torch.empty(shape, dtype=torch.float32, device="meta")
        for name, shape in shapes.items()
    }
    family = recognise(weight_shapes(marks))
    found.family = " or ".join(family.names) if family else found.host
    if rest:
        found.parts = _parts(contents, prefix)
    found.needs = {name: what for name, what in required_models(config).items() if name not in found.parts}
    memory_bytes = sum(contents.tensors[name].nbytes for name in inside)
    packed = any(contents.formats[name] not in ("F32", "F16", "BF16") for name in inside)
    found.resolution, found.cards = fit_cards(config, shapes, memory_bytes, packed)
    return True


def _config(tensors: dict[str, torch.Tensor], prefix: str, metadata) -> Any:
    """The host's configuration of a diffusion model among tensors without values, None where there
    is none."""
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return try_detect(comfy.model_detection.model_config_from_unet, tensors, prefix, metadata=texts)


def _parts(contents: Contents, prefix: str) -> dict[str, int]:
    sizes = collections.Counter()
    for name, tensor in contents.tensors.items():
        part = (
            MODEL
            if name.startswith(prefix)
            else next(
                (part for part, starts in PREFIXES_OF_PARTS.items() if name.startswith(starts)),
                "other",
            )
        )
        sizes[part] += tensor.nbytes
    return dict(sizes)


def _encoder(contents: Contents, found: Inspection) -> bool:
    tensors, arch = encoder_comfy_keys(contents)
    try:
        kind = comfy.sd.detect_te_model(tensors)
    except (LookupError, AttributeError):
        kind = None
    if kind is None and not arch and not any(map(ENCODER_SIGNS.search, contents.tensors)):
        return False
    found.model_type = ENCODER
    if kind is not None:
        name = encoder_family(kind.name, tensors)
        found.family, found.host = TITLES.get(name, name), kind.name
    else:
        found.family = (
            f"{arch}, of a size that this ComfyUI does not know"
            if arch
            else "none that this ComfyUI knows"
        )
    found.cards = fit_encoder_cards(contents.memory_bytes,
                                {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return True


def _other(contents: Contents, found: Inspection) -> bool:
    for pattern, kind, advice in (*OTHER_FILES, (VAE, "a VAE", "Load it with Load VAE.")):
        if any(re.search(pattern, name) for name in contents.tensors):
            found.model_type, found.needs = kind.removeprefix("an ").removeprefix("a "), {"use": advice}
            return True
    found.model_type = "weight file of no kind that is known here"
    found.family = f"first tensor {safe_repr(next(iter(contents.tensors), 'none'))}"
    return True


def _plan(metadata) -> dict[str, str]:
    """What a file that was made here says about how: lines for people."""
    said = {}
    for key in (key for key in metadata if str(key).startswith("featherweight.")):
        text = str(metadata[key])
        if key == PLAN_KEYS[0]:
            try:
                counts = collections.Counter(Plan.from_json(text).types.values())
                text = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
            except PlanError:
                pass
        said[key.removeprefix("featherweight.")] = text if len(text) <= 200 else text[:197] + "..."
    return said


NUMBERED = re.compile(r"(?:^|\.)((?:\w*_)?(?:blocks?|layers?|blk|refiner|resblocks))\.(\d+)\.")
OUTSIDE = ("model", "encoder", "diffusion_model", "transformer", "text_model", "language_model")


def block_name(name: str) -> str:
    """The block a tensor belongs to, whatever the file is: `double_blocks.3`, `layers.7`,
    `img_in`."""
    found = NUMBERED.search(name)
    if found is None:
        words = [word for word in name.split(".")[:-1] if word not in OUTSIDE]
        return words[0] if words else name
    before = [word for word in name[:found.start()].split(".") if word and word not in OUTSIDE]
    return ".".join([*before[-1:], found[1], found[2]])


def in_model_order(blocks: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Blocks of one kind one after the other, by their numbers; kinds in the order of the file."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+$", "", block) for block in blocks))

    def place(block: str):
        number = re.search(r"\.(\d+)$", block)
        return kinds.index(re.sub(r"\.\d+$", "", block)), int(number[1]) if number else -1
    return {block: blocks[block] for block in sorted(blocks, key=place)}
