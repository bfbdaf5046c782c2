"""Text encoders that quantisers of the Hugging Face libraries packed, beside dense ones."""
import functools
import json

import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import hidden_states, host_clip, random_weights, small_towers, text_model
from families import relative_error
from quantizer_writers import awq, gptq, pack_quantized, quantized_state_dict
from safetensors.torch import save_file

from featherweight.loaders.models.text_encoder import load_text_encoder
from featherweight.ops.layers.packed_layers import PackedLayer
from featherweight.ops.tensor.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models")

WRITERS = {
    "gptq": gptq, "awq": functools.partial(awq, symmetric=True),
    "compressed-tensors": functools.partial(pack_quantized, symmetric=False),
}


LINEAR = ("SelfAttention.", "DenseReluDense.", "self_attn.", "mlp.")
OTHER = ("relative_attention", "visual.", "vision_model.")


def keeps(name):
    return not any(part in name for part in LINEAR) or any(part in name for part in OTHER)


@pytest.mark.parametrize("quantizer", WRITERS)
@pytest.mark.parametrize("name", ["t5-xxl", "qwen2.5-vl-7b", "gemma-3-12b", "llama-3-8b"])
def test_an_encoder_gives_the_hidden_states_of_its_dense_values(name, quantizer, tmp_path):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        markers = {name: torch.zeros(shape) for name, shape in encoder.markers.items()}
        stored, values = quantized_state_dict(random_weights(encoder), WRITERS[quantizer], keeps)
        save_file(markers | stored | dict(encoder.extra), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(
            {"quantization_config": {"quant_method": quantizer}}))
        packed = load_text_encoder([str(tmp_path)], encoder.clip_type,
                                   model_options=encoder.model_options)
        layers = [module for module in text_model(packed).transformer.modules()
                  if isinstance(module, PackedLayer) and is_packed(module.weight)]
        assert len(layers) >= 10
        expected = hidden_states(host_clip(encoder, values))
        assert relative_error(hidden_states(packed), expected) < 1e-4
