"""Text encoders that MLX's libraries and mflux quantised, compared with dense ones."""
import json
import re

import pytest
import torch
from conformance.mlx import affine_parts
from encoders import ENCODERS
from encoders.encoder import hidden_states, host_clip, random_weights, small_towers, text_model
from families import relative_error
from mflux_models import LEVEL, VERSION
from quantizer_writers import quantized_state_dict
from safetensors.torch import save_file

from featherweight.loaders.models.text_encoder import load_text_encoder
from featherweight.ops.tensor.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models")

PATCHES = "visual.patch_embed.proj.weight"
LIBRARIES = {"format": "mlx"}
OF_MLX_VLM = ((r"^model\.", "language_model.model."), (r"^visual\.", "vision_tower."))
OF_MFLUX = (
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"t5_blocks.\1.attention.layer_norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.", r"t5_blocks.\1.attention."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.", r"t5_blocks.\1.ff."),
    (r"^encoder\.final_layer_norm\.", "final_layer_norm."),
    (r"^model\.", ""))
# encoder, who saved it -> what is in place of parts of names
CASES = {("qwen3-4b", "mlx-lm"): (), ("gemma-3-12b", "mlx-vlm"): OF_MLX_VLM,
         ("qwen2.5-vl-7b", "mlx-vlm"): OF_MLX_VLM, ("qwen3-vl-4b", "mlx-vlm"): OF_MLX_VLM,
         ("t5-xxl", "mflux"): OF_MFLUX, ("qwen3-4b", "mflux"): OF_MFLUX,
         ("qwen3-8b", "mflux"): OF_MFLUX}


def keeps(name):
    # MLX quantises tables of tokens too, but no vision parts
    return not re.search(r"embed_tokens|shared\.|self_attn\.|SelfAttention\.[qkvo]\.|Dense|mlp\.",
                         name) or "vis" in name


def write(folder, tensors, who, bits, group):
    """Saves an encoder as `who` does."""
    if who == "mflux":
        metadata = {LEVEL: str(bits), VERSION: "0.24.0"}
        save_file(tensors, folder / "0.safetensors", metadata)
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": metadata, "weight_map": dict.fromkeys(tensors, "0.safetensors")}))
        return
    save_file(tensors, folder / "model.safetensors", LIBRARIES)
    settings = {"group_size": group, "bits": bits, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(
        {"quantization": settings, "quantization_config": settings}))


@pytest.mark.parametrize(("name", "who"), CASES)
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_an_encoder_gives_the_hidden_states_of_its_dense_values(name, who, bits, group, tmp_path):
    if who == "mflux":
        group = 64
    encoder = ENCODERS[name]
    with small_towers(encoder):
        stored, values = quantized_state_dict(
            random_weights(encoder), lambda value: affine_parts(value, bits, group), keeps)
        tensors = {key: torch.zeros(shape) for key, shape in encoder.markers.items()}
        tensors |= stored | dict(encoder.extra)
        if PATCHES in tensors and who == "mlx-vlm":
            tensors[PATCHES] = tensors[PATCHES].permute(0, 2, 3, 4, 1).contiguous()
        for pattern, replacement in CASES[name, who]:
            tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
        write(tmp_path, tensors, who, bits, group)
        packed = load_text_encoder([str(tmp_path)], encoder.clip_type,
                                   model_options=encoder.model_options)
        assert sum(map(is_packed, text_model(packed).transformer.parameters())) >= 10
        expected = hidden_states(host_clip(encoder, values))
        assert relative_error(hidden_states(packed), expected) < 1e-4
