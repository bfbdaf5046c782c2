"""Folders of transformers: language models inside of one that sees, and the tokenizers beside the
weights."""
import json

import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import (
    error_of,
    hidden_states,
    host_clip,
    load_encoder,
    random_weights,
    small_towers,
)
from encoders.llama import BYTE_LETTERS, SPECIAL
from families import relative_error
from pack_api import WeightFileError
from safetensors.torch import save_file

from devtools.files.bnb_files import write_bnb

pytestmark = pytest.mark.usefixtures("small_models")

GEMMA, MISTRAL = ENCODERS["gemma-3-12b"], ENCODERS["mistral-3-24b"]
FILES = {
    "spiece_model": "tokenizer.model", "tekken_model": "tekken.json",
    "tokenizer_json": "tokenizer.json"
}
# The host's names -> those of `…ForConditionalGeneration` in older and newer files.
WHOLES = {
    "older": {
        "model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
        "vision_model.": "vision_tower.vision_model."
    }, "newer": {
        "model.": "model.language_model.", "vision_model.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector."
    }
}
# Mistral's vocabulary of `encoders.llama` as transformers writes it.
TOKENIZER_JSON = {
    "added_tokens": [{"id": rank, "content": token, "special": True}
                     for rank, token in enumerate(SPECIAL)],
    "model": {
        "type": "BPE", "merges": [["a", "b"]],
        "vocab": {token: rank for rank, token in enumerate([*SPECIAL, *BYTE_LETTERS, "ab"])}
    }
}


def as_a_part(weights, names):
    return {
        next(
            (new + name[len(old) :] for old, new in names.items() if name.startswith(old)), name
        ): tensor
        for name, tensor in weights.items()
    }


def all_weights(encoder):
    """Its weights, those of its tower, and the tensors by which the host knows it."""
    weights = random_weights(encoder) | random_weights(encoder, towers=True)
    return weights | {
        name: torch.zeros(shape) for name, shape in encoder.markers.items() if name not in weights
    }


def write_folder(path, encoder, weights, tokenizer=True, nf4=False):
    path.mkdir()
    if nf4:
        weights = write_bnb(path / "model.safetensors", weights, keep=lambda name, value: (
            value.ndim != 2 or "_proj." not in name or "vision" in name))
    else:
        save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True}} if nf4 else {}))
    for name, value in encoder.extra.items() if tokenizer else ():
        (path / FILES[name]).write_bytes(value.numpy().tobytes())
    return weights


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "NF4"])
@pytest.mark.parametrize("names", WHOLES)
@pytest.mark.parametrize("encoder", [GEMMA, MISTRAL], ids=["gemma-3-12b", "mistral-3-24b"])
def test_a_language_model_inside_of_one_that_sees_is_found(encoder, names, nf4, tmp_path):
    with small_towers(encoder):
        weights = all_weights(encoder)
        wrapped = as_a_part(weights, WHOLES[names])
        seen = write_folder(tmp_path / "text_encoder", encoder, wrapped, nf4=nf4)
        clip = load_encoder(tmp_path / "text_encoder", encoder)
        expected = host_clip(encoder, {own: seen[name] for own, name in zip(weights, wrapped)})
        assert clip.tokenize("ab ba") == expected.tokenize("ab ba")
        assert relative_error(hidden_states(clip), hidden_states(expected)) < 1e-4
        tower = {
            name: value for name, value in clip.cond_stage_model.state_dict().items()
            if ".vision_model." in f".{name}"
        }
        assert all(torch.equal(value.float(), expected.cond_stage_model.state_dict()[name].float())
                   for name, value in tower.items()) and bool(tower) == (encoder is GEMMA)


def test_an_encoder_that_the_host_knows_by_the_names_of_the_whole_keeps_them(tmp_path):
    encoder = ENCODERS["qwen3.5-0.8b"]
    with small_towers(encoder):
        weights = encoder.published(random_weights(encoder))
        write_folder(tmp_path / "text_encoder", encoder, weights)
        clip = load_encoder(tmp_path / "text_encoder", encoder)
        assert any(name.startswith("model.language_model.") for name in weights)
        assert error_of(clip, encoder, random_weights(encoder)) < 1e-4


def test_mistral_takes_a_text_apart_by_its_tokenizer_json_as_by_its_tekken_json(tmp_path):
    write_folder(tmp_path / "text_encoder", MISTRAL, all_weights(MISTRAL))
    before = load_encoder(tmp_path / "text_encoder", MISTRAL)
    (tmp_path / "text_encoder" / "tekken.json").unlink()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON))
    after = load_encoder(tmp_path / "text_encoder", MISTRAL)
    assert after.tokenize("ab ba über") == before.tokenize("ab ba über")


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"added_tokens": [], "model": {"vocab": {"a": 1}, "merges": []}}',
    '{"added_tokens": [{"content": 0, "id": 0}], "model": {"vocab": {}, "merges": []}}'])
def test_a_tokenizer_json_of_which_mistral_can_make_nothing_is_told(content, tmp_path):
    write_folder(tmp_path / "text_encoder", MISTRAL, all_weights(MISTRAL), tokenizer=False)
    (tmp_path / "text_encoder" / "tokenizer.json").write_text(content)
    with pytest.raises(WeightFileError,
                       match="its tokenizer.json cannot be converted to Mistral's tekken.json"):
        load_encoder(tmp_path / "text_encoder", MISTRAL)


@pytest.mark.parametrize("name", [name for name, encoder in ENCODERS.items() if encoder.extra])
def test_the_tokenizer_in_a_folder_is_that_of_a_file_and_is_missed_where_there_is_none(name,
                                                                                       tmp_path):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        weights = encoder.published(all_weights(encoder))
        write_folder(tmp_path / "whole", encoder, weights)
        assert load_encoder(tmp_path / "whole", encoder).tokenize("ab ba") == host_clip(
            encoder, weights
        ).tokenize("ab ba")
        write_folder(tmp_path / "encoder", encoder, weights, tokenizer=False)
        with pytest.raises(
                WeightFileError,
                match=f"encoder is .* without its tokenizer.*{FILES[next(iter(encoder.extra))]}"):
            load_encoder(tmp_path / "encoder", encoder)


def test_a_tokenizer_that_is_overwritten_beside_an_encoder_is_read_again(tmp_path):
    encoder = ENCODERS["umt5-xxl of transformers"]
    write_folder(tmp_path / "text_encoder", encoder, encoder.published(all_weights(encoder)),
                 tokenizer=False)
    (tmp_path / "tokenizer").mkdir()
    for model in (encoder.extra["spiece_model"], GEMMA.extra["spiece_model"]):
        (tmp_path / "tokenizer" / "spiece.model").write_bytes(model.numpy().tobytes())
        clip = load_encoder(tmp_path / "text_encoder", encoder)
        assert bytes(clip.tokenizer.state_dict()["spiece_model"]) == model.numpy().tobytes()
