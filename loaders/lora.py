"""LoRA files: read, checked against a model before anything runs, and applied through the host's own patchers.

Names are mapped by the host (`comfy.lora`), so what the host can read is what is read here.
"""
import collections
import logging
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from safetensors import SafetensorError

from ..ops import product
from ..ops.tensor import is_packed
from .container import LFS_POINTER, WeightFileError, map_file, shown
from .lora_blocks import MODEL_PREFIX, block_of, is_text
from .lora_change import SAMPLED_ROWS, change_norm, kind_of, rank_of, shape_of
from .lora_families import Recognised, hints, recognise
from .lora_gguf import read_gguf_adapter

log = logging.getLogger(__name__)

# Two tensors of which a layer needs both, by the end of their names. All the spellings the host reads.
PAIRS = (
    (".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"), ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"), (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"), (".lora_B", ".lora_A"),
    (".hada_w1_a", ".hada_w1_b"), (".hada_w2_a", ".hada_w2_b"), (".hada_t1", ".hada_t2"),
    (".lokr_w1_a", ".lokr_w1_b"), (".lokr_w2_a", ".lokr_w2_b"), (".a1.weight", ".a2.weight"), (".b1.weight", ".b2.weight"),
)
# Sides of which one form of each is needed.
SIDES = (("hada_w1_a", "hada_w2_a"), ("a1.weight", "b1.weight"))
PARTNER = {name: other for pair in PAIRS for name, other in (pair, pair[::-1])}
WHOLE = (".lokr_w1", ".lokr_w2", ".oft_blocks", ".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm")
BESIDE = (".alpha", ".dora_scale", ".lora_mid.weight", ".lokr_t2", ".rescale", ".reshape_weight")
ENDS = sorted((*PARTNER, *WHOLE, *BESIDE), key=len, reverse=True)

TEXT_STEM = re.compile(r"^(lora_te|lora_prior_te|text_encoder|te\d?[._]|lycoris_te)")
XLABS = re.compile(r"\.processor\.(qkv|proj)_lora[12]?\.(up|down)\.weight$")
# What else people pick in the place of a LoRA: a tensor name, what the file is, and what to do with it.
OTHER_FILES = (
    (r"^(control_model|controlnet_|input_hint_block|zero_convs)", "a ControlNet", "Load it with Load ControlNet Model."),
    (r"^(emb_params|string_to_param|clip_[lg]$)", "an embedding (textual inversion)",
     "Put it into models/embeddings and write embedding:its-name into the prompt."),
    (r"^(model\.diffusion_model|cond_stage_model|conditioner)\.", "a whole checkpoint", "Load it with a checkpoint loader."),
    (r"text_model\.encoder\.|^encoder\.block\.\d|^model\.layers\.\d+\.self_attn|^(enc\.)?blk\.\d|^token_embd",
     "a text encoder", "Load it with a text encoder loader (CLIP)."),
    (r"^(first_stage_model\.)?(decoder|encoder)\.(conv_in|mid)", "a VAE", "Load it with Load VAE."),
)
MISSING = "missing in the model"
# What the readers of torch and safetensors raise for bytes that are not theirs.
UNREADABLE = (ValueError, TypeError, RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


def load_lora_file(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a LoRA: (name -> tensor, metadata). Raises WeightFileError, one plain sentence, for what is not one.

    Safetensors and torch files as the host reads them; GGUF adapters unpacked to float32 under names the host reads. A file
    in which some layers are damaged is returned as it is (`check_lora` names them); one without a sound layer is refused.
    """
    head = bytes(map_file(path)[:512])
    name = re.split(r"[\\/]", str(path))[-1]
    if head.startswith(b"GGUF"):
        state_dict, metadata = read_gguf_adapter(path)
    else:
        try:
            state_dict, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        except UNREADABLE as error:
            raise WeightFileError(f"{name} cannot be read as a LoRA: {_unreadable(head, error)}") from error
    state_dict = {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    stems = _stems(state_dict)
    if not stems:
        raise WeightFileError(f"{name} {_not_a_lora(state_dict)}")
    damaged = _damaged(stems, state_dict)
    if len(damaged) == len(stems):
        stem, reason = next(iter(damaged.items()))
        raise WeightFileError(f"{name} has no layer that can be used: {shown(stem)} has {reason}"
                              f"{f', and all {len(stems)} layers are damaged' if len(stems) > 1 else ''}."
                              " Download it again, or report it where you got it.")
    return state_dict, dict(metadata or {})


def _unreadable(head: bytes, error: Exception) -> str:
    if head.startswith(b"version https://git-lfs"):
        return LFS_POINTER
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "it is a web page, not the LoRA; the site may want you to log in first. Download the LoRA itself."
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return f"the file is damaged or incomplete ({reason}). Download it again."


def _not_a_lora(state_dict: dict[str, torch.Tensor]) -> str:
    if not state_dict:
        return "holds no tensors, expected a LoRA. Download it again."
    for pattern, kind, advice in OTHER_FILES:
        found = next((key for key in state_dict if re.search(pattern, key)), None)
        if found is not None:
            return f"is {kind} (it has {shown(found)}), expected a LoRA. {advice}"
    family = recognise(_weight_shapes(state_dict))
    if family is not None:
        return f"is a whole diffusion model ({family}), expected a LoRA. Load it with Load Diffusion Model."
    return (f"has no LoRA in it ({len(state_dict)} tensors, first {shown(next(iter(state_dict)))}), expected pairs such as"
            " lora_up and lora_down. Pick another file.")


def _weight_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    return {key.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1:].numel())
            for key, tensor in tensors.items() if tensor.ndim > 1}


def _stems(state_dict: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    """Layer name as in the file -> ends of its tensors' names; layers that change something only."""
    stems = collections.defaultdict(set)
    for key in state_dict:
        end = next((end for end in ENDS if key.endswith(end)), None)
        if end is not None:
            stems[key.removesuffix(end)].add(end)
    return {stem: ends for stem, ends in stems.items() if not ends <= set(BESIDE)}


def _damaged(stems: dict[str, set[str]], state_dict: dict[str, torch.Tensor]) -> dict[str, str]:
    """Layers that no model could use -> what they have instead of sound factors."""
    damaged = {}
    for stem, ends in stems.items():
        missing = next((PARTNER[end] for end in ends if end in PARTNER and PARTNER[end] not in ends), None)
        missing = missing or next((f".{b}" if f".{a}" in ends else f".{a}" for a, b in SIDES
                                   if (f".{a}" in ends) != (f".{b}" in ends)), None)
        tensors = [state_dict[stem + end] for end in ends if end != ".reshape_weight"]
        if missing is not None:
            damaged[stem] = f"half a pair ({shown(stem + missing)} is missing from the file)"
        elif any(0 in tensor.shape for tensor in tensors):
            damaged[stem] = "rank 0"
        elif not all(torch.isfinite(tensor.float()).all() for tensor in tensors if tensor.is_floating_point()):
            damaged[stem] = "NaN or infinite values"
        else:
            ranks = next(((up, down) for up, down in PAIRS[:7] if up in ends), None)
            if ranks and (state_dict[stem + ranks[0]].ndim < 2 or state_dict[stem + ranks[1]].ndim < 2
                          or state_dict[stem + ranks[0]].shape[1] != state_dict[stem + ranks[1]].shape[0]):
                damaged[stem] = (f"halves that do not belong together ({list(state_dict[stem + ranks[0]].shape)} and"
                                 f" {list(state_dict[stem + ranks[1]].shape)})")
    return damaged


@dataclass
class LoraReport:
    """How a LoRA fits a model (and its text encoder).

    patches: what fits, as the host's `add_patches` takes it. layers, matched: layers meant for what is connected, and those
    of them that fit. misfits: layer -> why it does not. unconnected: text encoder layers without a text encoder. unread:
    tensors nobody knows. kinds: kind -> layers. ranks: of all layers, sorted. family, model_family: what each looks like.
    said: what the file says it is for. blocks: block -> (norm of the change at strength 1, norm of its weights); the first is
    None where it is not known cheaply, the second where the model has no values.
    """

    patches: dict
    layers: int
    matched: int
    misfits: dict[str, str]
    unconnected: int
    unread: list[str]
    kinds: collections.Counter
    ranks: list[int]
    family: Recognised | None
    model_family: Recognised | None
    said: str
    metadata: dict[str, str]
    blocks: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def related(self) -> bool:
        """Whether nothing speaks against the LoRA being made for this family of models."""
        return not self.family or not self.model_family or self.family.shared(self.model_family) is not None

    @property
    def fits(self) -> str:
        """"yes": every layer; "partly": some; "no": none, or the few layers that another family happens to have too."""
        if not self.patches or not self.related and self.matched * 2 < self.layers:
            return "no"
        return "partly" if self.misfits else "yes"

    @property
    def verdict(self) -> str:
        """One sentence on whether this LoRA can be used with this model."""
        if not self.layers:
            return f"This LoRA changes only a text encoder ({self.unconnected} layers), and none is connected."
        if not self.related:
            made = f"This LoRA is made for {self.family}; the model is {self.model_family}"
            if self.fits == "no":
                same = f", though {self.matched} of its {self.layers} layers have the same shape" if self.matched else ""
                return f"{made}: it cannot be used{same}."
            return f"{made}: only {self.matched} of its {self.layers} layers match, which is not what it was trained for."
        made = self.family.shared(self.model_family) if self.family else None
        name = f" for {' or '.join(made.names)}" if made else ""
        if self.fits == "yes":
            return f"This LoRA{name} fits: all {self.layers} layers match the model."
        if self.fits == "partly":
            return f"This LoRA{name} fits in part: {self.matched} of {self.layers} layers match the model."
        layer, reason = next(iter(self.misfits.items()))
        return (f"None of the {self.layers} layers of this LoRA{name} matches the model ({self.model_family or 'unknown'}):"
                f" {layer}: {reason}.")


def check_lora(model, clip, state_dict: dict[str, torch.Tensor], metadata: dict[str, str] | None = None,
               measure: bool = True) -> LoraReport:
    """Compare a LoRA, as `load_lora_file` gives it, with a model patcher and a CLIP (or None). Changes neither.

    measure: also work out how much each block is changed, which reads all factors and some rows of each weight.
    """
    metadata = metadata or {}
    lora = _renamed(state_dict)
    stems = _stems(lora)
    misfits = _damaged(stems, lora)
    damaged = {stem + end for stem in misfits for end in ENDS}
    sound = {key: value for key, value in lora.items() if key not in damaged}
    # The host's own reader, with names mapped to themselves: what the file holds, whatever the model.
    own = comfy.lora.load_lora(sound, {stem: f"{stem}.weight" for stem in stems}, log_missing=False)
    values = {key: own[key] for stem in stems for key in (f"{stem}.weight", f"{stem}.bias") if key in own}

    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = dict(model.model.named_parameters())
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        weights |= dict(clip.cond_stage_model.named_parameters())
    loaded = comfy.lora.load_lora(sound, key_map, log_missing=False)
    reasons = {target: _misfit(target, value, weights) for target, value in loaded.items()}
    patches = {target: value for target, value in loaded.items() if reasons[target] is None}

    matched, unconnected = 0, 0
    for stem in stems:
        if stem in misfits:
            continue
        target = key_map.get(stem)
        if target is None and clip is None and TEXT_STEM.match(stem):
            unconnected += 1
        elif target is None:
            misfits[stem] = "missing in the text encoder" if TEXT_STEM.match(stem) else MISSING
        else:
            found = [reasons[key] for key in (target, _bias_of(target)) if key in loaded]
            reason = next(filter(None, found), None) if found else "written in a way that this ComfyUI does not read"
            if reason is None:
                matched += 1
            else:
                misfits[stem] = reason

    shapes = {key.removesuffix(".weight"): shape_of(value) for key, value in values.items()
              if key.endswith(".weight") and not TEXT_STEM.match(key)}
    model_weights = {key: value for key, value in weights.items() if key.startswith(MODEL_PREFIX)}
    known = {stem + end for stem in stems for end in ENDS}
    report = LoraReport(
        patches=patches, layers=len(stems) - unconnected, matched=matched, misfits=misfits, unconnected=unconnected,
        unread=sorted(lora.keys() - known),
        kinds=collections.Counter(kind_of(value) for value in values.values()),
        ranks=sorted({rank for value in values.values() if (rank := rank_of(value)) is not None}),
        family=recognise(shapes, metadata) if shapes else None, model_family=recognise(_weight_shapes(model_weights)),
        said=hints(metadata), metadata=metadata)
    if measure:
        report.blocks = _measured(patches, weights)
    return report


def apply_lora(model, clip, report: LoraReport, strength_model: float, strength_clip: float,
               factor: Callable[[str], float] = lambda key: 1.0):
    """(model, clip) with the fitting layers added by the host's own `add_patches`, on clones.

    factor: key of a weight -> what its strength is multiplied by; 0 leaves the layer out.
    """
    groups = collections.defaultdict(dict)
    for target, value in report.patches.items():
        groups[factor(_key(target)), is_text(_key(target))][target] = value
    model, clip = model.clone(), None if clip is None else clip.clone()
    for (share, text), patches in groups.items():
        patched, strength = (clip, strength_clip) if text else (model, strength_model)
        if share * strength:
            patched.add_patches(patches, share * strength)
    if report.metadata:
        for patcher in (model, clip.patcher if clip is not None else None):
            if patcher is not None:
                patcher.set_attachments("lora_metadata", report.metadata)
    return model, clip


def report_text(report: LoraReport, name: str = "", settings: dict[str, str] | None = None, examples: int = 10) -> str:
    """The report as a short table, the verdict first. name: of the file. settings: further rows, such as the strengths."""
    kinds = ", ".join(f"{kind} ({count})" if len(report.kinds) > 1 else kind for kind, count in report.kinds.items())
    ranks = "" if not report.ranks else f", rank {report.ranks[0]}" + (
        f" to {report.ranks[-1]}" if len(report.ranks) > 1 else "")
    family = report.family and (report.family.shared(report.model_family) or report.family)
    rows = {
        **({"file": name} if name else {}),
        "layers": f"{report.matched} of {report.layers} match",
        "kind": kinds + ranks,
        **(settings or {}),
        "made for": f"{family or 'unknown'}" + (f"; the file says {report.said}" if report.said else ""),
        "model": f"{report.model_family or 'unknown'}",
    }
    shares = ((change / norm, block) for block, (change, norm) in report.blocks.items() if change and norm)
    strongest = sorted(shares, reverse=True)
    if strongest:
        rows["strongest"] = ", ".join(f"{block} {percent(share)}" for share, block in strongest[:3])
    elif report.blocks and not any(change for change, _ in report.blocks.values() if change is not None):
        rows["strongest"] = "nothing: all its values are zero, it has no effect"
    if report.unconnected:
        rows["not used"] = f"{report.unconnected} text encoder layers (no CLIP connected)"
    lines = [report.verdict, "", *(f"{name}: {value}" for name, value in rows.items())]
    missing = sum(reason == MISSING for reason in report.misfits.values())
    missing = f" ({missing} of them {MISSING})" if missing else ""
    for title, entries in (
        (f"{len(report.misfits)} layers do not fit{missing}:", [f"{name}: {why}" for name, why in report.misfits.items()]),
        (f"{len(report.unread)} tensors are of no known kind:", report.unread),
    ):
        if entries:
            lines += ["", title, *(f"  {entry}" for entry in entries[:examples])]
            if entries[examples:]:
                lines.append(f"  … and {len(entries) - examples} more")
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share for people: 12 %, 1.8 %, 0.043 %."""
    value = 100 * share
    return f"{value:.{max(0, min(4, 1 - math.floor(math.log10(value))))}f} %" if value > 0 else "0 %"


def _renamed(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names the host's readers know, by the host's own conversions."""
    if any(XLABS.search(key) for key in state_dict):  # the host converts only those with every block in it
        return comfy.lora_convert.convert_uso_lora(state_dict)
    return comfy.lora_convert.convert_lora(state_dict)


def weight_keys(model, clip=None) -> list[str]:
    """Names of all weights that a LoRA could change, as the host's patches name them."""
    modules = [model.model] if clip is None else [model.model, clip.cond_stage_model]
    return [key for module in modules for key, _ in module.named_parameters()]


def _key(target) -> str:
    return target if isinstance(target, str) else target[0]


def _bias_of(target) -> str:
    return _key(target).removesuffix(".weight") + ".bias"


def _misfit(target, value, weights: dict[str, torch.Tensor]) -> str | None:
    """Why a value cannot be put on its target; None when it can."""
    weight = weights.get(_key(target))
    if weight is None:
        return MISSING
    shape = list(weight.shape)
    if not isinstance(target, str) and len(target) > 1 and target[1] is not None:
        dimension, start, length = target[1]
        if start + length > shape[dimension]:
            return f"made for rows {start} to {start + length}, the layer has {shape[dimension]}"
        shape[dimension] = length
    if getattr(value, "name", "") == "lora" and value.weights[5] is not None:
        shape = value.weights[5]
    found, expected = shape_of(value), (shape[0] if shape else 1, math.prod(shape[1:]))
    if found[0] == expected[0] and found[1] in (None, expected[1]):
        return None
    return f"shape {found[0]} x {'any' if found[1] is None else found[1]} against {expected[0]} x {expected[1]}"


def _measured(patches: dict, weights: dict[str, torch.Tensor]) -> dict[str, tuple[float | None, float | None]]:
    norms = {key: _weight_norm(weights[key]) for key in dict.fromkeys(map(_key, patches))}
    changes, sizes = collections.defaultdict(list), collections.defaultdict(list)
    for target, value in patches.items():
        changes[block_of(_key(target))].append(change_norm(value, norms[_key(target)]))
    for key, norm in norms.items():
        sizes[block_of(key)].append(norm)
    return {block: (_together(changes[block]), _together(sizes[block])) for block in changes}


def _together(norms: list[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.sqrt(sum(norm * norm for norm in known)) if known else None


def _weight_norm(weight: torch.Tensor) -> float | None:
    """Frobenius norm of a weight, estimated from some of its rows; None for a weight without values."""
    if weight.is_meta or not weight.ndim:
        return None
    rows = torch.linspace(0, weight.shape[0] - 1, min(SAMPLED_ROWS, weight.shape[0]), device=weight.device).long()
    if not is_packed(weight):
        values = weight[rows]
    elif weight.ndim == 2:
        values = product.embedding(rows, weight, torch.float32)
    else:
        values = product.unpack(weight, torch.float32)[rows]
    return values.float().norm().item() * math.sqrt(weight.shape[0] / len(rows))
