"""LoRA files: the tensors they hold, which layers those make, and what is damaged in them."""
import collections
import re
from collections.abc import Iterable

import comfy.utils
import torch
from safetensors import SafetensorError

from ..files.container import WeightFileError, first_line, map_file, safe_repr
from ..files.wrong_format import LFS_POINTER
from ..out_of_memory import is_out_of_memory
from .families import recognise
from .gguf_adapter import read_gguf_adapter
from .torch_file import read_torch_file

# Two tensors of which a layer needs both, by the end of their names. All the spellings the host
# reads.
PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
    (".hada_w1_a", ".hada_w1_b"),
    (".hada_w2_a", ".hada_w2_b"),
    (".hada_t1", ".hada_t2"),
    (".lokr_w1_a", ".lokr_w1_b"),
    (".lokr_w2_a", ".lokr_w2_b"),
    (".a1.weight", ".a2.weight"),
    (".b1.weight", ".b2.weight"),
)
# Sides of which one form of each is needed.
SIDES = (("hada_w1_a", "hada_w2_a"), ("a1.weight", "b1.weight"))
PARTNER = {name: other for pair in PAIRS for name, other in (pair, pair[::-1])}
WHOLE = (
    ".lokr_w1",
    ".lokr_w2",
    ".oft_blocks",
    ".diff",
    ".diff_b",
    ".set_weight",
    ".w_norm",
    ".b_norm",
)
BESIDE = (".alpha", ".dora_scale", ".lora_mid.weight", ".lokr_t2", ".rescale", ".reshape_weight")
MAGNITUDE = ".lora_magnitude_vector"
ENDS = sorted((*PARTNER, *WHOLE, *BESIDE), key=len, reverse=True)

# What else people pick in the place of a LoRA: a tensor name, what the file is, and what to do with
# it.
OTHER_FILES = ((
    r"^(control_model|controlnet_|input_hint_block|zero_convs)", "a ControlNet",
    "Load it with Load ControlNet Model."
), (
    r"^(emb_params|string_to_param|clip_[lg]$)", "an embedding (textual inversion)",
    "Put it into models/embeddings and write embedding:its-name into the prompt."
), (
    r"^(model\.diffusion_model|cond_stage_model|conditioner)\.", "a whole checkpoint",
    "Load it with a checkpoint loader."
), (r"text_model\.encoder\.|^encoder\.block\.\d|^model\.layers\.\d+\.self_attn|^(enc\.)?blk\.\d|^token_embd",
    "a text encoder", "Load it with a text encoder loader (CLIP)."),
               (r"^(first_stage_model\.)?(decoder|encoder)\.(conv_in|mid)", "a VAE",
                "Load it with Load VAE."))
# What the readers of safetensors raise for bytes that are not theirs.
UNREADABLE = (ValueError, TypeError, RuntimeError, OSError, EOFError, KeyError, SafetensorError)


def load_lora_file(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a LoRA: (name -> tensor, metadata). Raises WeightFileError, one plain sentence, for what
    is not one.

    Safetensors files as the host reads them, torch files without what is no tensor (`torch_file`);
    GGUF adapters dequantised to float32 under names the host reads. A file in which some layers are
    damaged is returned as it is (`check_lora` names them); one without a sound layer is refused.
    """
    head = bytes(map_file(path)[:512])
    name = re.split(r"[\\/]", str(path))[-1]
    if head.startswith(b"GGUF"):
        state_dict, metadata = read_gguf_adapter(path)
    elif not str(path).lower().endswith((".safetensors", ".sft")):
        state_dict, metadata = read_torch_file(path), {}
    else:
        try:
            state_dict, metadata = comfy.utils.load_torch_file(str(path), safe_load=True,
                                                               return_metadata=True)
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            raise WeightFileError(
                f"{name} cannot be read as a LoRA: {_unreadable(head, error)}") from error
    state_dict = {
        key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)
    }
    stems = layer_names(state_dict)
    if not stems:
        raise WeightFileError(f"{name} {_not_a_lora(state_dict)}")
    damaged = damaged_layers(stems, state_dict)
    if len(damaged) == len(stems):
        stem, reason = next(iter(damaged.items()))
        raise WeightFileError(
            f"{name} has no layer that can be used: {safe_repr(stem)} has {reason}"
            f"{f', and all {len(stems)} layers are damaged' if len(stems) > 1 else ''}."
            " Download it again, or report it where you got it.")
    return state_dict, dict(metadata or {})


def layer_names(state_dict: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    """Layer name as in the file -> ends of its tensors' names; layers that change something
    only."""
    stems = collections.defaultdict(set)
    for key in state_dict:
        end = next((end for end in ENDS if key.endswith(end)), None)
        if end is not None:
            stems[key.removesuffix(end)].add(end)
    return {stem: ends for stem, ends in stems.items() if not ends <= set(BESIDE)}


def damaged_layers(stems: dict[str, set[str]], state_dict: dict[str,
                                                                torch.Tensor]) -> dict[str, str]:
    """Layers that no model could use -> what they have instead of sound factors."""
    damaged = {}
    for stem, ends in stems.items():
        missing = next(
            (PARTNER[end] for end in ends if end in PARTNER and PARTNER[end] not in ends), None)
        missing = missing or next((f".{b}" if f".{a}" in ends else f".{a}" for a, b in SIDES
                                   if (f".{a}" in ends) != (f".{b}" in ends)), None)
        tensors = [state_dict[stem + end] for end in ends if end != ".reshape_weight"]
        if missing is not None:
            damaged[stem] = f"half a pair ({safe_repr(stem + missing)} is missing from the file)"
        elif any(0 in tensor.shape for tensor in tensors):
            damaged[stem] = "rank 0"
        elif ".alpha" in ends and state_dict[f"{stem}.alpha"].numel() != 1:
            damaged[stem] = f"an alpha of {state_dict[f'{stem}.alpha'].numel()} numbers"
        elif not all(
            torch.isfinite(tensor.float()).all() for tensor in tensors if tensor.is_floating_point()
        ):
            damaged[stem] = "NaN or infinite values"
        else:
            ranks = next(((up, down) for up, down in PAIRS[:7] if up in ends), None)
            if ranks and (
                state_dict[stem + ranks[0]].ndim < 2
                or state_dict[stem + ranks[1]].ndim < 2
                or state_dict[stem + ranks[0]].shape[1] != state_dict[stem + ranks[1]].shape[0]
            ):
                damaged[stem] = (
                    f"halves that do not belong together"
                    f" ({list(state_dict[stem + ranks[0]].shape)} and"
                    f" {list(state_dict[stem + ranks[1]].shape)})")
    return damaged


def peft_dora_layers(stems: dict[str, set[str]], unread: Iterable[str]) -> dict[str, str]:
    """Layers of a DoRA as PEFT saves it -> that they are none of the host's. unread: names of
    tensors of no known kind.

    PEFT divides by the norm of each row of the changed weight, the host
    (comfy/weight_adapter/base.py, weight_decompose) by that of the old one.
    """
    found = (key.partition(MAGNITUDE)[0] for key in unread if MAGNITUDE in key)
    return {
        stem: "DoRA as PEFT computes it, which this ComfyUI does in another way" for stem in found
        if stem in stems
    }


def weight_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Weight's name -> (rows, columns), further dimensions flattened; what `recognise` takes."""
    return {key.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1:].numel())
            for key, tensor in tensors.items() if tensor.ndim > 1}


def _unreadable(head: bytes, error: Exception) -> str:
    if head.startswith(b"version https://git-lfs"):
        return LFS_POINTER
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "it is a web page, not the LoRA; the site may want you to log in first. Download the LoRA itself."
    return f"the file is damaged or incomplete ({first_line(error)}). Download it again."


def _not_a_lora(state_dict: dict[str, torch.Tensor]) -> str:
    if not state_dict:
        return "holds no tensors, expected a LoRA. Download it again."
    for pattern, kind, advice in OTHER_FILES:
        found = next((key for key in state_dict if re.search(pattern, key)), None)
        if found is not None:
            return f"is {kind} (it has {safe_repr(found)}), expected a LoRA. {advice}"
    family = recognise(weight_shapes(state_dict))
    if family is not None:
        return f"is a whole diffusion model ({family}), expected a LoRA. Load it with Load Diffusion Model."
    return (
        f"has no LoRA in it ({len(state_dict)} tensors, first"
        f" {safe_repr(next(iter(state_dict)))}), expected pairs such as lora_up and lora_down."
        " Pick another file.")
