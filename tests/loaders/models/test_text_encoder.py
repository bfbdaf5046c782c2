"""Text encoders: from files to the host's own CLIP."""
import os

import comfy.model_management
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from encoder_tester import EncoderTester
from encoders import ENCODERS
from encoders.encoder import (
    hidden_states,
    host_clip,
    load_encoder,
    random_weights,
    small_towers,
    text_model,
    write_encoder,
)
from families import relative_error
from pack_api import WeightFileError, load_text_encoder
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.inspect import inspect
from featherweight.loaders.models import encoder_file
from featherweight.loaders.progress import Progress

pytestmark = pytest.mark.usefixtures("small_models")

# The host cannot encode with these alone. See test_t5.py and test_clip.py (in pairs), test_gemma.py
# (its decoder).
ELSEWHERE = {"BYT5_SMALL_GLYPH", "JINA_CLIP_2", "GEMMA_3_4B_VISION"}


class TestEncoders(EncoderTester):
    def cases(self, with_loras):
        """All; of those with the same layers a LoRA is tried on the last."""
        last = {encoder.architecture: name for name, encoder in ENCODERS.items()
                if not encoder.unusable}.values()
        for name in self.kinds:
            yield pytest.param(name, "GGUF", id=name, marks=() if not with_loras or name in last
                               else pytest.mark.heavy)


TABLES = ("token_embedding.weight", "embed_tokens.weight", "shared.weight")


def with_other_tables(encoder, weights, rows):
    """rows: of a table, by the number that the model has."""
    return {name: rows(values) if name.endswith(TABLES) else values
            for name, values in weights.items()}


@pytest.mark.parametrize(("name", "suffix"), [
    ("clip-l", "gguf"), ("t5-xxl", "gguf"), ("qwen3-0.6b", "gguf"), ("clip-l", "safetensors"),
    ("qwen3-0.6b", "safetensors")])
def test_rows_of_a_table_that_belong_to_no_token_of_the_model_are_cut(name, suffix, tmp_path):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        weights = random_weights(encoder)
        longer = with_other_tables(encoder, weights, lambda table: torch.cat(
            [table, torch.full((64, table.shape[1]), float("nan"))]))
        assert any(longer[key].shape != weights[key].shape for key in weights)
        path = tmp_path / f"encoder.{suffix}"
        if suffix == "gguf":
            write_encoder(path, encoder, longer)
        else:
            save_file({key: value.contiguous().clone() for key, value in longer.items()}, path)
        clip = load_encoder(path, encoder)
        host = host_clip(encoder, weights)
        assert relative_error(hidden_states(clip), hidden_states(host)) < 1e-4


def test_a_token_that_a_short_table_lacks_is_a_sentence(tmp_path):
    encoder = ENCODERS["clip-l"]
    with small_towers(encoder):
        weights = with_other_tables(encoder, random_weights(encoder), lambda table: table[:3])
        write_encoder(tmp_path / "encoder.gguf", encoder, weights)
        clip = load_encoder(tmp_path / "encoder.gguf", encoder)
        with pytest.raises(ValueError, match=r"vectors of 3 tokens, and the text has token \d+"):
            hidden_states(clip)


def test_every_encoder_of_the_host_is_covered():
    assert {model.name for model in comfy.sd.TEModel} <= {
        encoder.te_model for encoder in ENCODERS.values()
    } | ELSEWHERE


def test_a_second_load_of_the_same_file_makes_no_tokenizer_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        encoder_file, "arch_of",
        lambda weights, arch_of=encoder_file.arch_of: counting(arch_of(weights), made))
    encoder = ENCODERS["umt5-xxl"]
    path = tmp_path / "encoder.gguf"
    write_encoder(path, encoder, random_weights(encoder))
    for _ in range(2):
        load_encoder(path, encoder)
    assert len(made) == 1


def test_few_tokenizers_are_kept(tmp_path):
    encoder = ENCODERS["umt5-xxl"]
    path = tmp_path / "encoder.gguf"
    write_encoder(path, encoder, random_weights(encoder))
    for time in range(encoder_file.TOKENIZERS_KEPT + 1):
        os.utime(path, (time, time))
        load_encoder(path, encoder)
    assert len(encoder_file.TOKENIZERS) == encoder_file.TOKENIZERS_KEPT


def test_a_tokenizer_does_not_keep_its_file_mapped(tmp_path):
    encoder = ENCODERS["umt5-xxl of transformers"]
    markers = {name: torch.zeros(shape) for name, shape in encoder.markers.items()}
    save_file(
        random_weights(encoder) | markers | dict(encoder.extra), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    read = encoder_file.EncoderFile(str(tmp_path), Progress("reading"), None, frozenset())
    mapped, kept = read.weights["spiece_model"], read.convert()["spiece_model"]
    assert torch.equal(kept, mapped) and kept.data_ptr() != mapped.data_ptr()


def counting(arch, made: list):
    """A family that counts the tokenizers it makes."""
    class Counting:
        wants_vision, convert = arch.wants_vision, arch.convert

        @staticmethod
        def tokenizer(*arguments):
            made.append(arguments)
            return arch.tokenizer(*arguments)
    return Counting


def test_a_damaged_mmproj_that_nobody_picked_is_named_and_does_no_harm(tmp_path, caplog):
    encoder = next(encoder for encoder in ENCODERS.values() if encoder.te_model == "QWEN25_7B")
    with small_towers(encoder):
        path = tmp_path / "encoder.gguf"
        write_encoder(path, encoder, random_weights(encoder))
        for other in tmp_path.glob("*mmproj*"):
            other.unlink()
        (tmp_path / "mmproj-encoder.gguf").write_bytes(b"GGUF")
        assert load_encoder(path, encoder)
    assert "mmproj-encoder.gguf" in caplog.text


def test_a_part_of_a_diffusion_model_is_refused_in_a_sentence(tmp_path):
    """The host's detection looks for the rest of it."""
    path = tmp_path / "part of wan.gguf"
    write_gguf(path, {"head.modulation": np.zeros((1, 2, 64), np.float32)},
               lambda name, values: "F16")
    with pytest.raises(WeightFileError,
                       match="part of wan.gguf holds no text encoder that this ComfyUI knows"):
        load_text_encoder([str(path)], "wan")


def test_an_encoder_of_another_size_is_refused_in_a_sentence(tmp_path):
    encoder, path = ENCODERS["t5-xxl"], tmp_path / "t5.gguf"
    weights = random_weights(encoder)
    name = next(name for name in weights if name.endswith("SelfAttention.q.weight"))
    weights[name] = torch.zeros(2 * weights[name].shape[0], weights[name].shape[1])
    write_encoder(path, encoder, weights)
    with pytest.raises(
            WeightFileError,
            match=r"t5.gguf: the names .*, their sizes are not: .*SelfAttention.q.weight.*"
            r" get the size that the workflow is for\.$"):
        load_text_encoder([str(path)], encoder.clip_type)


def test_a_lora_of_the_layer_that_writes_texts_changes_what_is_written(tmp_path):
    """By whose weight ComfyUI multiplies without calling the layer."""
    encoder = ENCODERS["qwen3.5-9b"]
    with small_towers(encoder):
        write_encoder(tmp_path / "encoder.gguf", encoder, random_weights(encoder))
        clip = load_encoder(str(tmp_path / "encoder.gguf"), encoder)
    model = text_model(clip).transformer
    head, key = model.model.lm_head, next(
        key for key in clip.patcher.model_state_dict() if key.endswith("lm_head.weight"))
    rows, columns = head.weight.shape
    up, down, hidden = torch.randn(rows, 4), torch.randn(4, columns), torch.randn(1, 3, columns)
    changed = clip.clone()
    changed.add_patches({key: LoRAAdapter(set(), (up, down, 4.0, None, None, None))}, 0.5)
    comfy.model_management.load_models_gpu([clip.patcher])
    before = model.logits(hidden)
    comfy.model_management.load_models_gpu([changed.patcher])
    expected = before + 0.5 * hidden[:, -1:] @ down.t() @ up.t()
    assert relative_error(model.logits(hidden), expected) < 1e-5
    assert relative_error(head(hidden[:, -1:]), expected) < 1e-5


@pytest.mark.parametrize("prefix", ["conditioner.embedders.0.transformer.", "language_model.",
                                    "model.language_model."])
def test_a_plain_file_under_other_names_loads_as_it_does_packed(prefix, tmp_path):
    encoder = ENCODERS["llama-3-8b"]
    weights = random_weights(encoder)
    markers = {key: torch.zeros(shape) for key, shape in encoder.markers.items()}
    inner = "" if prefix == "model.language_model." else "model."
    save_file({(f"{prefix}{inner}" + name.removeprefix("model.")): value.contiguous()
               for name, value in (markers | weights).items()}, tmp_path / "encoder.safetensors")
    expected = hidden_states(host_clip(encoder, weights))
    for pack_to, limit in ((None, 1e-5), ("Q8_0", 0.05)):
        clip = load_encoder(str(tmp_path / "encoder.safetensors"), encoder, pack_to=pack_to)
        assert relative_error(hidden_states(clip), expected) < limit
    assert "of a family that" not in inspect(str(tmp_path / "encoder.safetensors"))[0].title
