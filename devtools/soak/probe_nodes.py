"""Nodes for the server of a soak, planted beside the pack: what a picture is, and quiet.

The tokenizer of CLIP is made once: each one that ComfyUI makes leaves some 10 MB behind, whatever
loads the encoder, and beside that nothing of ours could be seen.
"""
import functools
import gc
import hashlib

from transformers import CLIPTokenizer

CLIPTokenizer.from_pretrained = functools.lru_cache(CLIPTokenizer.from_pretrained)


class SoakAgain:
    """The same conditioning. turn: read by nobody; another one has the picture drawn again."""

    CATEGORY, FUNCTION, RETURN_TYPES = "soak", "give", ("CONDITIONING",)
    INPUTS = {"conditioning": ("CONDITIONING",), "turn": ("INT", {"max": 1 << 62})}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": cls.INPUTS}

    def give(self, conditioning, turn):
        return (conditioning,)


class SoakDigest(SoakAgain):
    """The digest of a picture's values."""

    FUNCTION, RETURN_TYPES, OUTPUT_NODE = "show", (), True
    INPUTS = {"image": ("IMAGE",)}

    def show(self, image):
        return {"ui": {"text": [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()]}}


class SoakQuiet(SoakAgain):
    """Collects what nothing refers to any more."""

    FUNCTION, RETURN_TYPES, OUTPUT_NODE = "show", (), True
    INPUTS = {"turn": ("INT", {"max": 1 << 62})}

    def show(self, turn):
        while gc.collect():
            pass
        return {}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (SoakAgain, SoakDigest, SoakQuiet)}
