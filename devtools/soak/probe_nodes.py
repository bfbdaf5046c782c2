"""Nodes for the server of a soak, planted beside the pack: a prompt without a text encoder, what a
picture is, and quiet.

The tokenizer of CLIP is made once: each one that ComfyUI makes leaves some 10 MB behind, whatever
loads the encoder, and beside that nothing of ours could be seen.
"""
import functools
import gc
import hashlib

import torch
from transformers import CLIPTokenizer

CLIPTokenizer.from_pretrained = functools.lru_cache(CLIPTokenizer.from_pretrained)


class SoakPrompt:
    """Conditioning that a seed makes. turn: read by nobody; another one has the picture drawn
    again."""

    CATEGORY, FUNCTION, RETURN_TYPES = "soak", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "width": ("INT", {"max": 1 << 16}), "pooled": ("INT", {"max": 1 << 16}),
                "seed": ("INT", {}), "turn": ("INT", {"max": 1 << 62})
            }
        }

    def make(self, width, pooled, seed, turn):
        generator = torch.Generator().manual_seed(seed)
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return ([[torch.randn(1, 7, width, generator=generator), extra]],)


class SoakDigest:
    """The digest of a latent's or a picture's values."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "soak", "show", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"values": ("LATENT,IMAGE",)}}

    def show(self, values):
        values = values["samples"] if isinstance(values, dict) else values
        return {"ui": {"text": [hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()]}}


class SoakQuiet:
    """Collects what nothing refers to any more; shows how many objects and bytes of tensors Python
    still has."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "soak", "show", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"turn": ("INT", {"max": 1 << 62})}}

    def show(self, turn):
        while gc.collect():
            pass
        objects = gc.get_objects()
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in objects
            if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta
        }
        return {"ui": {"text": [str(len(objects)), str(sum(storages.values()))]}}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (SoakPrompt, SoakDigest, SoakQuiet)}
