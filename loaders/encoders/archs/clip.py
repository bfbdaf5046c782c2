"""The text part of CLIP L, H and bigG, with the names of open_clip or of transformers and the host.
"""
from ....ops.tensor.row_slicing import dense, take_rows
from ..arch import Arch, rename_keys

LAYER = "text_model.encoder.layers.{}"
FUSED = ".self_attn.in_proj."


class Clip(Arch):
    """CLIP's text encoder.

    open_clip fuses query, key and value in one weight and stores the projection transposed.
    stable-diffusion.cpp renames both and changes neither, so a fused weight tells that the
    projection is transposed too.
    """

    follows = (
        "ComfyUI 0.30, comfy.utils.clip_text_transformers_convert;"
        " stable-diffusion.cpp 2026-08, src/name_conversion.cpp"
    )
    names = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "transformer.resblocks.{}.ln_1": f"{LAYER}.layer_norm1",
        "transformer.resblocks.{}.ln_2": f"{LAYER}.layer_norm2",
        "transformer.resblocks.{}.attn.in_proj_weight": f"{LAYER}{FUSED}weight",
        "transformer.resblocks.{}.attn.in_proj_bias": f"{LAYER}{FUSED}bias",
        "transformer.resblocks.{}.attn.out_proj": f"{LAYER}.self_attn.out_proj",
        "transformer.resblocks.{}.mlp.c_fc": f"{LAYER}.mlp.fc1",
        "transformer.resblocks.{}.mlp.c_proj": f"{LAYER}.mlp.fc2",
        "ln_final": "text_model.final_layer_norm",
    }

    @classmethod
    def recognises(cls, weights):
        return any(f"{layer}.weight" in weights
                   for layer in ("transformer.resblocks.0.mlp.c_fc", f"{LAYER}.mlp.fc1".format(0)))

    @classmethod
    def convert(cls, weights, metadata):
        weights = rename_keys(weights, cls.names)
        fused = [name for name in weights if FUSED in name]
        for name in fused:
            tensor = weights.pop(name)
            rows = len(tensor) // 3
            for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
                part_rows = slice(index * rows, (index + 1) * rows)
                weights[name.replace("in_proj", part)] = take_rows(tensor, part_rows)
        transposed = weights.pop("text_projection", None)
        converted = weights.pop("text_model.text_projection", None)
        if converted is not None and fused:
            transposed = converted
        elif converted is not None:
            weights["text_projection.weight"] = converted
        if transposed is not None:
            weights["text_projection.weight"] = dense(transposed).t().contiguous()
        return weights
