"""Text encoders: from files to the host's own CLIP."""
import pytest
from encoders import ENCODERS
from encoders.encoder import hidden_states, host_clip, random_weights, small_towers, text_model, write_encoder
from families import relative_error
from featherweight.loaders.text_encoder import load_text_encoder
from featherweight.ops.linear import PackedLayer
from featherweight.ops.tensor import is_packed

pytestmark = pytest.mark.usefixtures("small_models", "shared_tokenizers")


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_of_llama_cpp_gives_the_hidden_states_of_the_dense_model(name, tmp_path):
    encoder = ENCODERS[name]
    if encoder.unusable:
        pytest.skip(encoder.unusable)
    with small_towers(encoder):
        weights = random_weights(encoder)
        path = tmp_path / "encoder.gguf"
        write_encoder(path, encoder, weights)
        clip = load_text_encoder([str(path)], encoder.clip_type, model_options=encoder.model_options)
        packed = hidden_states(clip)
        layers = [module for module in text_model(clip).transformer.modules() if isinstance(module, PackedLayer)]
        assert layers and all(is_packed(layer.weight) for layer in layers if layer.weight.shape[-1] % 32 == 0)
        assert relative_error(packed, hidden_states(host_clip(encoder, weights))) < 1e-4
