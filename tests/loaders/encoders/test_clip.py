"""CLIP's text part as programs write it: open_clip, stable-diffusion.cpp, and the places inside of
larger files."""
import dataclasses
import itertools

import pytest
import torch
from encoders import ENCODERS
from encoders.clip import CLIP_SMALL, fused, of_open_clip
from encoders.encoder import (
    TOKENS,
    as_it_is,
    host_clip,
    load_encoder,
    random_weights,
    rounded,
    text_model,
)
from families import relative_error
from pack_api import is_packed, open_weights

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.encoders.arch import ARCHS, strip_prefix

pytestmark = pytest.mark.usefixtures("small_models")


def of_stable_diffusion_cpp(weights):
    """src/name_conversion.cpp of stable-diffusion.cpp 2026-08 moves the projection and drops what
    its name ends in."""
    return {
        name.replace("text_projection.weight", "text_model.text_projection"): tensor
        for name, tensor in weights.items()
    }


FORMS = {
    "transformers": as_it_is,
    "open_clip": of_open_clip,
    "stable-diffusion.cpp, from transformers": of_stable_diffusion_cpp,
    "stable-diffusion.cpp, from open_clip": lambda weights: of_stable_diffusion_cpp(fused(weights)),
}
PREFIXES = [
    "cond_stage_model.transformer.", "cond_stage_model.1.transformer.", "cond_stage_model.model.",
    "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.",
    "text_encoders.clip_l.transformer.", "te.", "te.1.", "te1.", "te2.", "text_encoder.",
    "text_encoder_2.", "clip_l.", "clip_g.transformer.", "te3.", "text_encoders.t5xxl.transformer.",
    "t5xxl."
]


def states(clip, tokens=TOKENS):
    """The hidden states and what is pooled of them."""
    model = text_model(clip)
    model.layer, model.layer_idx = "last", None
    with torch.inference_mode():
        return model([tokens])


def markers(encoder, weights):
    return {
        name: torch.zeros(shape) for name, shape in encoder.markers.items() if name not in weights
    }


def write(path, encoder, weights, form=as_it_is, prefix="", packed_type="Q8_0"):
    """Everything that has whole blocks is packed, norms and biases too: a converter may well do
    so."""
    stored = form(weights | markers(encoder, weights))
    write_gguf(path, {prefix + name: value for name, value in stored.items()},
               lambda name, values: packed_type, None)
    return str(path)


def exact(encoder):
    """Seeded weights that do not change when all of them are packed as Q8_0."""
    return {name: rounded(values) for name, values in random_weights(encoder).items()}


@pytest.mark.parametrize("name", ["clip-l", "clip-h", "clip-g"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_the_dense_model_gives(name, form, tmp_path):
    encoder = ENCODERS[name]
    weights = exact(encoder)
    if "open_clip" in form:
        weights["text_projection.weight"] = rounded(weights["text_projection.weight"].t()).t()
    clip = load_encoder(write(tmp_path / "clip.gguf", encoder, weights, FORMS[form]), encoder)
    for found, expected in zip(states(clip), states(host_clip(encoder, weights))):
        assert relative_error(found, expected) < 1e-4
    matrices = {
        name for name, value in text_model(clip).transformer.state_dict().items() if value.ndim == 2
    }
    plain = {"text_model.embeddings.position_embedding.weight"}  # a table that ComfyUI reads
    plain |= {"text_projection.weight"} if "open_clip" in form else set()  # transposed
    assert {
        name for name in matrices if not is_packed(text_model(clip).transformer.get_parameter(name))
    } == plain


def test_query_key_and_value_are_rows_of_the_packed_weight(tmp_path):
    """The host's own conversion of the values, in a format whose blocks are as long as a row."""
    encoder = dataclasses.replace(
        ENCODERS["clip-g"], config={**CLIP_SMALL, "hidden_size": 256, "intermediate_size": 256})
    stored = of_open_clip(random_weights(encoder) | markers(encoder, {}))
    seen = write_gguf(tmp_path / "clip.gguf", stored, lambda name, values: "Q4_K"
                      if values.ndim == 2 else "F32", "pig")
    expected = host_clip(encoder, {name: torch.from_numpy(values) for name, values in seen.items()})
    clip = load_encoder(tmp_path / "clip.gguf", encoder)
    for found, state in zip(states(clip), states(expected)):
        assert relative_error(found, state) < 1e-4


@pytest.mark.parametrize(("prefix", "form"), [*zip(
    PREFIXES, itertools.cycle(["transformers", "open_clip"]))])
def test_the_place_in_a_larger_file_is_taken_off_the_names(form, prefix, tmp_path):
    encoder, weights = (
        ENCODERS["clip-l"],
        {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(32, 32)},
    )
    path = write(tmp_path / "clip.gguf", encoder, weights, FORMS[form], prefix)
    assert set(strip_prefix(open_weights(path).state_dict())) == set(FORMS[form](weights))


def test_several_encoders_in_a_file_are_not_mixed():
    weights = {
        f"conditioner.embedders.{place}.transformer.text_model.x": torch.zeros(1)
        for place in (0, 1)
    }
    assert strip_prefix(weights) == weights


def test_long_clip_takes_long_prompts(tmp_path):
    encoder = dataclasses.replace(ENCODERS["clip-l"],
                                  config={**CLIP_SMALL, "max_position_embeddings": 248})
    weights = exact(encoder)
    clips = (
        load_encoder(write(tmp_path / "clip.gguf", encoder, weights), encoder),
        host_clip(encoder, weights),
    )
    prompt = "a (red:1.3) fox " * 50
    (found, pooled), (expected, expected_pooled) = (
        clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True) for clip in clips)
    assert found.shape[1] == 248 and relative_error(found, expected) < 1e-4
    assert relative_error(pooled, expected_pooled) < 1e-4


@pytest.mark.parametrize("name", [name for name in ENCODERS if name.startswith("clip")])
@pytest.mark.parametrize("form", FORMS)
def test_one_family_knows_them(name, form):
    encoder = ENCODERS[name]
    weights = FORMS[form](markers(encoder, {}) |
                          {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(32, 32)})
    assert [arch.__name__ for arch in ARCHS if arch.recognises(weights)] == ["Clip"]
