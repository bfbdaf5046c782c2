"""What encoders of every family see and hear through: the tower of an mmproj file beside them."""
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from encoders import ENCODERS, qwen35, qwen_vl
from encoders.encoder import (
    TOKENS,
    TOWERS,
    Encoder,
    Weights,
    hidden_states,
    host_clip,
    random_weights,
    small_towers,
    text_model,
    write_encoder,
)
from encoders.gemma import GEMMA_3_4B_VISION, gemma3_mmproj
from encoders.gemma4 import gemma4_mmproj, unified_mmproj
from families import relative_error
from pack_api import WeightFileError, is_packed, load_notes, load_text_encoder, open_weights

from devtools.files.gguf_files import write_gguf

pytestmark = pytest.mark.usefixtures("small_models")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PICTURE = {"type": "image", "data": random(1, 96, 144, 3, seed=1).abs() % 1}
SOUND = {"type": "audio", "data": random(1, 40, 128, seed=2)}
SAMPLES = {"type": "audio", "data": random(1, 5, 640, seed=3)}


class Seeing(NamedTuple):
    """An encoder with a tower.

    Attributes:
        encoder: With its tower.
        mmproj_of: Weights of the tower -> tensors of its mmproj file.
        shown: What it sees or hears.
        in_file: What its file without the tower is.
    """

    encoder: Encoder
    mmproj_of: Callable[[Weights], Weights]
    shown: dict[str, Any] = PICTURE
    in_file: Encoder | None = None

    def weights(self) -> tuple[Weights, Weights]:
        """Random weights of the text model and of the tower."""
        if self.encoder.mmproj:
            weights = random_weights(self.encoder)
            tower = {name: value for name, value in weights.items() if name.startswith(TOWERS)}
            return {name: weights[name] for name in weights.keys() - tower.keys()}, tower
        tower = random_weights(self.encoder, towers=True)
        for name, values in tower.items():
            if name.endswith(("_min", "_max")):  # limits that what passes through it reaches
                tower[name] = (1 + values.abs()) * (1 if name.endswith("max") else -1)
            elif name == "vision_model.patch_dense.weight":
                tower[name] = values.sign() * 127 / 8192  # what Q8_0 holds in any order
        return random_weights(self.encoder), tower

    def write(self, folder, text: Weights, **options):
        """Writes the encoder without its tower."""
        encoder = dataclasses.replace(self.in_file or self.encoder, mmproj=None)
        write_encoder(folder / "encoder.gguf", encoder, text, **options)

    def tokens(self, **changed) -> list:
        """Some tokens, and what is shown, changed, between them; the host takes that apart."""
        return [*TOKENS[:3], self.shown | changed, *TOKENS[3:]]

    def load(self, folder, **options):
        return load_text_encoder([str(folder / "encoder.gguf")], self.encoder.clip_type,
                                 model_options=self.encoder.model_options, **options)


def write_mmproj(path, tensors: Weights):
    write_gguf(path, tensors, type_of=lambda name, values: "Q8_0"
               if values.ndim == 2 and name.endswith("weight") else "F32", architecture="clip")


ENCODERS_THAT_SEE = {
    "gemma-3-4b": Seeing(GEMMA_3_4B_VISION, gemma3_mmproj, in_file=ENCODERS["gemma-3-4b"]),
    "gemma-3-12b": Seeing(ENCODERS["gemma-3-12b"], gemma3_mmproj),
    **{name: Seeing(ENCODERS[name], gemma4_mmproj)
       for name in ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-31b")},
    "gemma-4-e4b that hears": Seeing(ENCODERS["gemma-4-e4b"], gemma4_mmproj, SOUND),
    "gemma-4-12b": Seeing(ENCODERS["gemma-4-12b"], unified_mmproj),
    "gemma-4-12b that hears": Seeing(ENCODERS["gemma-4-12b"], unified_mmproj, SAMPLES),
    **{name: Seeing(encoder, encoder.mmproj)
       for name, encoder in {**qwen_vl.ENCODERS, **qwen35.ENCODERS}.items() if encoder.towers},
}
each_encoder = pytest.mark.parametrize("name", ENCODERS_THAT_SEE)


@each_encoder
def test_what_a_tower_lets_an_encoder_perceive_is_that_of_the_dense_model(name, tmp_path):
    seeing = ENCODERS_THAT_SEE[name]
    with small_towers(seeing.encoder):
        text, tower = seeing.weights()
        seeing.write(tmp_path, text)
        write_mmproj(tmp_path / "mmproj-encoder.gguf", seeing.mmproj_of(tower))
        clip = seeing.load(tmp_path)
        states = hidden_states(clip, seeing.tokens())
        expected = hidden_states(host_clip(seeing.encoder, text | tower), seeing.tokens())
        assert states.shape[1] > len(TOKENS) and relative_error(states, expected) < 1e-4
        other = hidden_states(clip, seeing.tokens(data=1 - seeing.shown["data"]))
        assert relative_error(other, states) > 1e-3
    of_tower = [value for part, value in text_model(clip).transformer.named_parameters()
                if part.startswith(TOWERS)]
    assert any(map(is_packed, of_tower))


# of the other one the host has another class without tower
@pytest.mark.parametrize("name", [name for name in ENCODERS_THAT_SEE if name != "gemma-3-4b"])
def test_without_its_mmproj_file_an_encoder_reads_and_says_why_it_cannot_perceive(name, tmp_path):
    seeing = ENCODERS_THAT_SEE[name]
    # by which a file says what it is
    deepstack = {"qwen3vl.n_deepstack_layers": 3} if name.startswith("qwen3-vl") else {}
    with small_towers(seeing.encoder):
        text, tower = seeing.weights()
        seeing.write(tmp_path, text, metadata={**seeing.encoder.metadata, **deepstack})
        blind, dense = seeing.load(tmp_path), host_clip(seeing.encoder, text | tower)
        assert relative_error(hidden_states(blind), hidden_states(dense)) < 1e-4
    model = text_model(blind).transformer
    names = [*model.state_dict(), *(name for name, _ in model.named_parameters())]
    assert not [name for name in names if name.startswith(TOWERS)]
    stored = open_weights(tmp_path / "encoder.gguf").tensor_bytes
    assert blind.patcher.model_size() <= 1.02 * stored
    with pytest.raises(WeightFileError, match="encoder.gguf has no vision or audio part"):
        hidden_states(blind, seeing.tokens())


@pytest.mark.parametrize(("name", "other", "replaced"), [
    ("gemma-3-4b", "gemma-3-4b", {"mm.input_projection.weight": torch.zeros(64, 512)}),
    ("gemma-4-31b", "gemma-4-31b", {"mm.input_projection.weight": torch.zeros(512, 64)}),
    ("qwen3-vl-4b", "qwen3-vl-8b", {}), ("qwen3.5-2b", "qwen3.5-4b", {})])
def test_a_tower_of_another_width_is_told(name, other, replaced, tmp_path):
    seeing, tower_of = ENCODERS_THAT_SEE[name], ENCODERS_THAT_SEE[other]
    with small_towers(tower_of.encoder):
        write_mmproj(tmp_path / "tower.gguf",
                     tower_of.mmproj_of(tower_of.weights()[1]) | replaced)
    with small_towers(seeing.encoder):
        seeing.write(tmp_path, seeing.weights()[0])
        with pytest.raises(WeightFileError, match=(
                r"tower.gguf gives images a width of \d+, encoder.gguf has \d+")):
            seeing.load(tmp_path, mmproj=str(tmp_path / "tower.gguf"))


# what is read of a tower; a file of another model may lack any of it, or have it in another shape
OF_QWEN = ("v.patch_embd.weight", "v.blk.0.ln1.weight", "v.blk.0.ffn_down.weight",
           "v.blk.1.attn_k.weight", "mm.2.weight")


@pytest.mark.parametrize(("name", "lacking", "flat"), [
    ("gemma-3-12b", ("v.blk.0.ln1.weight", "mm.soft_emb_norm.weight"), ()),
    ("gemma-4-12b", ("v.position_embd.weight",), ()),
    ("gemma-4-e2b", ("mm.input_projection.weight",), ()),
    *((name, OF_QWEN, ("mm.2.weight",))
      for name in ("qwen2.5-vl-7b", "qwen3-vl-32b", "qwen3.5-0.8b"))])
def test_mmproj_files_of_other_side_models_an_encoder_are_left_alone(name, lacking, flat,
                                                                      tmp_path, caplog):
    seeing = ENCODERS_THAT_SEE[name]
    with small_towers(seeing.encoder):
        text, tower = seeing.weights()
        own = seeing.mmproj_of(tower)
        seeing.write(tmp_path, text)
        files = [{key: value for key, value in own.items() if key != part}
                 for part in lacking if part in own]
        files += [own | {part: torch.zeros(())} for part in flat]
        assert len(files) > len(lacking + flat) // 2
        for number, stored in enumerate(files):
            write_mmproj(tmp_path / f"mmproj-{number}.gguf", stored)
        with caplog.at_level("INFO"):
            blind = seeing.load(tmp_path)
    assert "has no mmproj file next to it that fits" in caplog.text
    with pytest.raises(WeightFileError, match="has no vision or audio part"):
        hidden_states(blind, seeing.tokens())


@pytest.mark.parametrize("part", ["mm.input_projection.weight", "v.position_embd.weight",
                                  "mm.a.input_projection.weight"])
def test_a_weight_that_an_mmproj_lacks_is_told_on_the_node_or_stops_the_load(part, tmp_path):
    seeing = ENCODERS_THAT_SEE["gemma-4-e4b that hears"]
    with small_towers(seeing.encoder):
        text, tower = seeing.weights()
        seeing.write(tmp_path, text)
        stored = seeing.mmproj_of(tower)
        write_mmproj(tmp_path / "mmproj-encoder.gguf", {
            name: tensor for name, tensor in stored.items() if name != part})
        try:
            notes = load_notes(seeing.load(tmp_path).patcher)
        except WeightFileError as error:
            notes = [str(error)]
    assert any("mmproj-encoder.gguf" in note and ("lacks" in note or "it has no" in note)
               for note in notes)


def test_a_model_that_wants_text_alone_gets_the_encoder_without_the_tower_beside_it(tmp_path):
    seeing, encoder = ENCODERS_THAT_SEE["gemma-3-4b"], ENCODERS["gemma-3-4b"]
    with small_towers(seeing.encoder):
        text, tower = seeing.weights()
        seeing.write(tmp_path, text)
        write_mmproj(tmp_path / "mmproj-encoder.gguf", seeing.mmproj_of(tower))
    clip = load_text_encoder([str(tmp_path / "encoder.gguf")], "lumina2",
                             model_options=encoder.model_options)
    assert relative_error(hidden_states(clip), hidden_states(host_clip(encoder, text))) < 1e-4


def test_the_first_mmproj_files_of_gemma_3_have_two_layers_the_other_way_round(tmp_path):
    seeing, swap = ENCODERS_THAT_SEE["gemma-3-4b"], {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    with small_towers(seeing.encoder):
        text, tower = seeing.weights()
        seeing.write(tmp_path, text)
        write_mmproj(tmp_path / "tower.gguf", {
            ".".join(swap.get(part, part) for part in name.split(".")): values
            for name, values in seeing.mmproj_of(tower).items()})
        clip = seeing.load(tmp_path, mmproj=str(tmp_path / "tower.gguf"))
        expected = hidden_states(host_clip(seeing.encoder, text | tower), seeing.tokens())
        assert relative_error(hidden_states(clip, seeing.tokens()), expected) < 1e-4


def test_a_tower_of_gemma_3_does_not_fit_gemma_4(tmp_path):
    seeing, other = ENCODERS_THAT_SEE["gemma-4-e4b"], ENCODERS_THAT_SEE["gemma-3-4b"]
    with small_towers(other.encoder):
        write_mmproj(tmp_path / "tower.gguf", other.mmproj_of(other.weights()[1]))
    with small_towers(seeing.encoder):
        seeing.write(tmp_path, seeing.weights()[0])
        with pytest.raises(WeightFileError, match="tower.gguf fits none of encoder.gguf"):
            seeing.load(tmp_path, mmproj=str(tmp_path / "tower.gguf"))
