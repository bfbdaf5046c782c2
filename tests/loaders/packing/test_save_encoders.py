"""A saved text encoder is a file that loads again, with the tokenizer that the encoder came
with."""
import pytest
import torch
from comfy.sd import CLIPType, load_text_encoder_state_dicts
from encoders import ENCODERS
from encoders.encoder import (
    hidden_states,
    load_encoder,
    random_weights,
    small_towers,
    write_encoder,
)
from encoders.t5 import spiece_model
from families import relative_error
from saving import SIBLINGS, save, with_markers

from featherweight.loaders.packing.source import source_of_encoders

pytestmark = pytest.mark.usefixtures("small_models")

TEXT = "ab ba, the red fox über 12 dogs"
LOADED_AGAIN = [
    pytest.param(name, "Q8_0", marks=pytest.mark.heavy if name in SIBLINGS else ())
    for name in ENCODERS
] + [
    ("gemma-2-2b", "NF4"),
    ("gpt-oss-20b", "NF4"),
    ("mistral-3-24b", "NF4"),
]


@pytest.mark.parametrize(("name", "kind"), LOADED_AGAIN)
def test_a_saved_encoder_loads_again_and_takes_a_text_apart_as_before(name, kind, tmp_path):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        path, saved = (
            tmp_path / "encoder.gguf",
            tmp_path / f"saved.{'safetensors' if kind == 'NF4' else 'gguf'}",
        )
        weights = random_weights(encoder)
        write_encoder(path, encoder, weights)
        clip = load_encoder(path, encoder)
        (source,) = source_of_encoders(clip).values()
        save(with_markers(source, encoder, weights), saved, kind)
        again = load_encoder(saved, encoder, mmproj=None)
        assert type(again.tokenizer).__name__ == type(clip.tokenizer).__name__
        assert again.tokenize(TEXT) == clip.tokenize(TEXT)
        if kind == "Q8_0":
            assert relative_error(hidden_states(again), hidden_states(clip)) < 0.01


def test_of_two_encoders_each_is_saved_with_its_own_tokenizer():
    small = {
        "num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 64,
        "num_attention_heads": 4, "vocab_size": 256
    }
    gemma, jina = ENCODERS["gemma-3-4b"], {"model.encoder.layers.0.mixer.Wqkv.weight": (768, 256)}
    markers = [{name: torch.zeros(shape) for name, shape in shapes.items()}
               for shapes in (gemma.markers, jina)]
    clip = load_text_encoder_state_dicts(
        [markers[0] | dict(gemma.extra), markers[1] | {"spiece_model": spiece_model()}],
        clip_type=CLIPType.NEWBIE, model_options={"_model_config": small, "dtype": torch.float32})
    found = {
        part: source.weights["spiece_model"].tensor
        for part, source in source_of_encoders(clip).items()
    }
    assert found.keys() == {"gemma", "jina"}
    assert torch.equal(found["gemma"], gemma.extra["spiece_model"]) and torch.equal(
        found["jina"], spiece_model()
    )
