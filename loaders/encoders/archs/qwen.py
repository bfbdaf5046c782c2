"""Qwen2.5 and Qwen3, for text alone or with the vision towers of Qwen2.5-VL and Qwen3-VL."""
import re

from ..arch import Arch, Weights, rename_keys
from ..missing_towers import placeholder
from . import qwen_vl
from ._decoder import DECODER_NAMES


def _width(weights) -> int:
    return weights["token_embd.weight"].shape[1]


class Qwen25(Arch):
    """Qwen2.5 3B, for which the host has no vision tower."""

    follows = "llama.cpp 0.5.0, conversion/qwen.py"
    names = DECODER_NAMES
    width, keys = 2048, 256

    @classmethod
    def recognises(cls, weights):
        keys = weights.get("blk.0.attn_k.bias")
        return keys is not None and len(keys) == cls.keys and _width(weights) == cls.width


class Qwen25VL(Qwen25):
    """Qwen2.5 7B, whose text model and Qwen2.5-VL's are of one shape."""

    width, keys = 3584, 512
    sees = True

    @classmethod
    def convert(cls, weights, metadata):
        text, vision = qwen_vl.split_vision(weights)
        return rename_keys(text, cls.names) | (
            qwen_vl.tower(vision, qwen_vl.QWEN25_VISION_NAMES) if vision else {}
        )

    @classmethod
    def vision_width(cls, weights, vision):
        return (
            (_width(weights), qwen_vl.width_given(vision))
            if qwen_vl.is_qwen25_tower(vision)
            else None
        )


class Qwen3(Arch):
    """Qwen3 0.6B and 2B, for which the host has no vision tower."""

    follows = "llama.cpp 0.5.0, conversion/qwen.py"
    names = {
        **DECODER_NAMES,
        "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
        "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    }
    widths = (1024, 2048)

    @classmethod
    def recognises(cls, weights):
        return (
            {
                "blk.0.attn_q_norm.weight",
                "blk.0.attn_q.weight",
                "blk.0.ffn_gate.weight",
                "blk.0.ffn_norm.weight",
            }
            <= weights.keys()
            and "blk.0.post_attention_norm.weight" not in weights
            and _width(weights) in cls.widths
        )


class Qwen3VL(Qwen3):
    """Qwen3 4B and 8B, whose text models and Qwen3-VL's are of one shape. The host takes one with a
    tower for Qwen3-VL."""

    widths = (2560, 4096)
    sees = True
    tower = "model.visual"

    @classmethod
    def convert(cls, weights, metadata):
        text, vision = qwen_vl.split_vision(weights)
        out = rename_keys(text, cls.names)
        if vision:
            visual = qwen_vl.tower(vision, qwen_vl.QWEN3_VISION_NAMES)
            return out | {
                name.replace("visual", cls.tower, 1): tensor for name, tensor in visual.items()
            }
        return out | cls._marks(_width(weights)) if cls._is_qwen3_vl(metadata) else out

    @classmethod
    def vision_width(cls, weights, vision):
        return (
            (_width(weights), qwen_vl.width_given(vision))
            if qwen_vl.is_qwen3_tower(vision, deepstack=True)
            else None
        )

    @classmethod
    def wants_vision(cls, metadata):
        """No where a file says that it is Qwen3: with the tower of a Qwen3-VL beside it, the host
        would take it for one."""
        return not any(key.startswith("qwen3.") for key in metadata)

    @classmethod
    def _is_qwen3_vl(cls, metadata) -> bool:
        """Whether a file without a tower is of Qwen3-VL by its metadata. The host turns its
        positions at a speed of its own."""
        return any(key.endswith(".n_deepstack_layers") for key in metadata)

    @classmethod
    def _marks(cls, width: int) -> Weights:
        """What the host tells Qwen3-VL by, without memory: tensors of a tower that is not there."""
        merged = 4 * (1024 if width == 2560 else 1152)
        return {f"{cls.tower}.deepstack_merger_list.0.norm.weight": placeholder(merged),
                f"{cls.tower}.merger.linear_fc2.weight": placeholder(width, merged)}


class Qwen3VL32B(Qwen3VL):
    """Qwen3-VL 32B, of which the host runs the first 50 layers. It would take one without a tower
    for a Mistral."""

    widths = (5120,)
    tower = "visual"
    layers = 50

    @classmethod
    def recognises(cls, weights):
        return super().recognises(weights) and f"blk.{cls.layers - 1}.attn_q.weight" in weights

    @classmethod
    def convert(cls, weights, metadata):
        def runs(name: str) -> bool:
            layer = re.match(r"blk\.(\d+)\.", name)
            return int(layer[1]) < cls.layers if layer else not name.startswith("output.")

        return super().convert({name: tensor for name, tensor in weights.items() if runs(name)},
                               metadata)

    @classmethod
    def _is_qwen3_vl(cls, metadata):
        return True
