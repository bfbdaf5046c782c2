"""Qwen2.5 and Qwen3, alone or with the vision towers of Qwen2.5-VL and Qwen3-VL."""
import re

from ..arch import Arch, Weights, rename_keys
from ..missing_towers import placeholder
from . import qwen_vl
from ._decoder import DECODER_NAMES, width_of


class Qwen25(Arch):
    """Qwen2.5 3B, for which the host has no vision tower."""

    follows = "llama.cpp 0.5.0, conversion/qwen.py"
    names = DECODER_NAMES
    width, keys = 2048, 256

    @classmethod
    def recognises(cls, weights):
        keys = weights.get("blk.0.attn_k.bias")
        return keys is not None and len(keys) == cls.keys and width_of(weights) == cls.width


class Qwen25VL(Qwen25):
    """Qwen2.5 7B and Qwen2.5-VL 7B, whose text models have the same shapes."""

    width, keys = 3584, 512
    sees = True

    @classmethod
    def convert(cls, weights, metadata):
        text, vision = qwen_vl.split_vision(weights)
        weights = rename_keys(text, cls.names)
        if vision:
            weights |= qwen_vl.convert_tower(vision, qwen_vl.QWEN25_VISION_NAMES)
        return weights

    @classmethod
    def vision_width(cls, weights, vision):
        if not qwen_vl.is_qwen25_tower(vision):
            return None
        return width_of(weights), qwen_vl.output_width(vision)


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
        required = {
            f"blk.0.{name}.weight" for name in ("attn_q_norm", "attn_q", "ffn_gate", "ffn_norm")
        }
        return (
            required <= weights.keys()
            and "blk.0.post_attention_norm.weight" not in weights
            and width_of(weights) in cls.widths
        )


class Qwen3VL(Qwen3):
    """Qwen3 and Qwen3-VL 4B and 8B, whose text models have the same shapes.

    The host takes one with a tower for Qwen3-VL.
    """

    widths = (2560, 4096)
    sees = True
    tower = "model.visual"

    @classmethod
    def convert(cls, weights, metadata):
        text, vision = qwen_vl.split_vision(weights)
        converted = rename_keys(text, cls.names)
        if vision:
            tower = qwen_vl.convert_tower(vision, qwen_vl.QWEN3_VISION_NAMES)
            return converted | {
                name.replace("visual", cls.tower, 1): tensor for name, tensor in tower.items()
            }
        if cls._is_qwen3_vl(metadata):
            return converted | cls._placeholders(width_of(weights))
        return converted

    @classmethod
    def vision_width(cls, weights, vision):
        if not qwen_vl.is_qwen3_tower(vision, deepstack=True):
            return None
        return width_of(weights), qwen_vl.output_width(vision)

    @classmethod
    def wants_vision(cls, metadata):
        """Returns False for a file that says it is Qwen3.

        With the tower of a Qwen3-VL the host would take it for a Qwen3-VL.
        """
        return not any(key.startswith("qwen3.") for key in metadata)

    @classmethod
    def _is_qwen3_vl(cls, metadata) -> bool:
        """Returns whether the metadata of a file without a tower are of a Qwen3-VL.

        The host gives it another base frequency of rotary embedding than Qwen3.
        """
        return any(key.endswith(".n_deepstack_layers") for key in metadata)

    @classmethod
    def _placeholders(cls, width: int) -> Weights:
        """Returns placeholders for the tensors of the tower by which the host detects Qwen3-VL."""
        merged = 4 * (1024 if width == 2560 else 1152)
        return {
            f"{cls.tower}.deepstack_merger_list.0.norm.weight": placeholder(merged),
            f"{cls.tower}.merger.linear_fc2.weight": placeholder(width, merged),
        }


class Qwen3VL32B(Qwen3VL):
    """Qwen3-VL 32B, cut to the 50 layers that the host runs.

    The host would take one without a tower for a Mistral.
    """

    widths = (5120,)
    tower = "visual"
    layers = 50

    @classmethod
    def recognises(cls, weights):
        return super().recognises(weights) and f"blk.{cls.layers - 1}.attn_q.weight" in weights

    @classmethod
    def convert(cls, weights, metadata):
        def is_used(name: str) -> bool:
            layer = re.match(r"blk\.(\d+)\.", name)
            return int(layer[1]) < cls.layers if layer else not name.startswith("output.")

        used = {name: tensor for name, tensor in weights.items() if is_used(name)}
        return super().convert(used, metadata)

    @classmethod
    def _is_qwen3_vl(cls, metadata):
        return True
