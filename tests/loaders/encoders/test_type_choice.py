"""The type automatic: which model text encoders are for, by their files."""
import dataclasses
import itertools

import comfy.sd
import pytest
import torch
from built_clips import built_clip
from encoders import ENCODERS
from encoders.encoder import shapes_of, small_towers, write_encoder
from pack_api import WeightFileError, load_text_encoder
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_random_gguf
from featherweight.loaders.encoders import type_choice
from featherweight.loaders.encoders.encoder_sets import (
    ENCODER_SETS,
    SINGLE_ENCODERS,
    TITLES,
    encoder_family,
    reject_wrong_encoders,
)
from featherweight.loaders.encoders.type_choice import ANY
from featherweight.loaders.families import MODELS
from featherweight.loaders.models import text_encoder
from featherweight.loaders.models.text_encoder import AUTOMATIC_TYPE

pytestmark = pytest.mark.usefixtures("small_models")


def choose_type(names, families, known=None):
    return type_choice.choose_type(names, families, KNOWN if known is None else known)


def types_of_sets() -> dict[frozenset[str], set[str]]:
    """Returns encoders that go together -> the types of the models that take exactly them."""
    types = {}
    for model in MODELS:
        groups = model.encoder_groups
        sets = [*map(frozenset, itertools.product(*groups))] if groups else []
        for families in [*sets, *(frozenset([family]) for family in model.also)]:
            types.setdefault(families, set()).add(model.clip_type or ANY)
    return types


SETS = types_of_sets()
KNOWN = {clip_type.name.lower() for clip_type in comfy.sd.CLIPType}
# Of these, several types fit, and ComfyUI builds another CLIP for each; a user has to choose.
AMBIGUOUS = {
    ("QWEN3_4B",): "flux2 (Flux.2 Klein 4B) or lumina2 (Z-Image)",
    ("QWEN3_8B",): "flux2 (Flux.2 Klein 9B) or ideogram4 (Ideogram 4)",
    ("QWEN3VL_4B",): "flux2 (Flux.2 Klein 4B), krea2 (Krea 2) or mage (Mage-Flow)",
    ("QWEN3VL_8B",): "flux2 (Flux.2 Klein 9B), ideogram4 (Ideogram 4), boogu (Boogu) or joyimage"
                     " (JoyAI-Image)",
    ("QWEN25_7B",): "hunyuan_image (HunyuanImage 2.1), qwen_image (Qwen-Image) or longcat_image"
                    " (LongCat-Image)",
    ("GEMMA_2_2B",): "lumina2 (Lumina 2) or pixeldit (PixelDiT)",
    ("T5_XXL",): "chroma (Chroma), ltxv (LTX-Video 2B), pixart (PixArt), cogvideox (CogVideoX) or"
                 " mochi (Mochi)",
    ("CLIP_G",): "stable_diffusion (SDXL Refiner) or stable_cascade (Stable Cascade)",
    ("BYT5_SMALL_GLYPH", "QWEN25_7B"): "hunyuan_image (HunyuanImage 2.1) or hunyuan_video_15"
                                       " (HunyuanVideo 1.5)",
    ("CLIP_L", "QWEN25_7B"): "kandinsky5 (Kandinsky 5 Lite) or kandinsky5_image (Kandinsky 5"
                             " Image)",
}


@pytest.mark.parametrize("families", sorted(SETS, key=sorted),
                         ids=lambda families: " ".join(sorted(families)))
def test_the_type_follows_the_encoders_or_is_asked_for_where_the_clips_differ(families):
    families, names = sorted(families), [f"{family}.gguf" for family in sorted(families)]
    fitting = SETS[frozenset(families)] & {"sdxl", *KNOWN}
    clips = {kind: built_clip(families, kind) for kind in fitting}
    if len(set(clips.values())) > 1:
        with pytest.raises(WeightFileError) as error:
            choose_type(names, families)
        for kind in fitting:
            assert f"{kind} (" in str(error.value)
        if fitting == SETS[frozenset(families)]:  # this ComfyUI knows all of them
            assert f"Choose the type of yours: {AMBIGUOUS[tuple(families)]}." in str(error.value)
    else:
        chosen = choose_type(names, families)
        assert chosen in fitting and reject_wrong_encoders(names, families, chosen) == ""
        assert choose_type(names[::-1], families[::-1]) == chosen


def test_every_encoder_of_every_type_has_an_answer():
    """The tables that the type is checked by."""
    single = {(family,) for families in SINGLE_ENCODERS.values() for family in families}
    sets = {kinds for types in ENCODER_SETS.values() for groups in types.values()
            for kinds in itertools.product(*groups) if len({*kinds}) == len(kinds)}
    for families in single | sets:
        names = [f"{family}.gguf" for family in families]
        try:
            chosen = choose_type(names, families)
        except WeightFileError as error:
            assert "which several models use in different ways" in str(error)
        else:
            assert reject_wrong_encoders(names, families, chosen) == ""


@pytest.mark.parametrize("family", sorted(TITLES.keys() - {family for kinds in SETS
                                                           for family in kinds}))
def test_an_encoder_of_no_model_is_built_by_its_weights(family):
    """Such as one that writes text."""
    chosen = choose_type(["a.gguf"], [family])
    expected = "hidream" if family == "LLAMA3_8" else ANY  # HiDream works with it alone
    assert chosen == expected
    if family not in ("JINA_CLIP_2", "BYT5_SMALL_GLYPH"):
        assert len({built_clip([family], kind) for kind in (chosen, "flux2", "lumina2")}) == 1


@pytest.mark.parametrize(("families", "chosen"), [
    (["GEMMA_3_12B", None], "ltxv"),  # the projection of LTX-2
    ([None, "GEMMA_3_12B"], "ltxv"),
    (["CLIP_L", "CLIP_G"], "sdxl"),
    (["T5_XXL", "CLIP_L"], "flux"),
    (["LLAMA3_8", "T5_XXL"], "hidream"),
    (["CLIP_L"], ANY),
    ([None], ANY),  # `_check_encoders` says what is wrong with it
])
def test_other_files_and_parts_of_a_set(families, chosen):
    assert choose_type([f"{number}.gguf" for number in range(len(families))], families) == chosen


@pytest.mark.parametrize(("families", "message"), [
    (["CLIP_L", "CLIP_L"], "0.gguf and 1.gguf are both CLIP-L"),
    (["CLIP_L", "QWEN3_4B"], "0.gguf and 1.gguf are CLIP-L and Qwen3 4B, and no model is known that"
                             " takes them together. Pick other files"),
    (["T5_XXL", None], "are T5-XXL and no text encoder, and no model is known"),
    (["QWEN3_4B"], "0.gguf is Qwen3 4B, which several models use in different ways."),
    (["CLIP_G", "T5_XXL"], r"Choose the type of yours: sd3 (SD3 or SD3.5 Medium) or hidream"
                           " (HiDream)."),
])
def test_what_cannot_be_told_is_one_sentence(families, message):
    with pytest.raises(WeightFileError) as error:
        choose_type([f"{number}.gguf" for number in range(len(families))], families)
    assert message in str(error.value)


def test_a_type_that_this_comfyui_does_not_know_is_not_named():
    assert choose_type(["a.gguf"], ["GEMMA_2_2B"], KNOWN - {"pixeldit"}) == "lumina2"


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_known_by_its_file_without_its_values(name, tmp_path, monkeypatch):
    encoder, found = ENCODERS[name], []
    if name.startswith("qwen3-vl"):  # published files say so
        encoder = dataclasses.replace(encoder, metadata={
            **encoder.metadata, "qwen3vl.n_deepstack_layers": 3})
    with small_towers(encoder):
        weights = {name: torch.zeros(shape) for name, shape in shapes_of(encoder).items()}
    write_encoder(tmp_path / "encoder.gguf", encoder, weights, "F32")
    monkeypatch.setattr(text_encoder, "choose_type",
                        lambda names, families, known: found.append((names, families)) or "flux")
    text_encoder._type_of_files([str(tmp_path / "encoder.gguf")])
    (names, (family,)), = found
    assert names == ["encoder.gguf"]
    assert family == encoder_family(encoder.te_model, weights)


@pytest.mark.parametrize("plain", [True, False])
def test_automatic_loads_what_the_type_loads(plain, tmp_path):
    shapes = tiny_models.clip_l_shapes()
    if plain:
        path = tmp_path / "clip_l.safetensors"
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    else:
        path = tmp_path / "clip_l.gguf"
        write_random_gguf(path, shapes, "Q8_0")
    automatic, chosen = (load_text_encoder([str(path)], kind, pack_to=None if plain else "Q8_0")
                         for kind in (AUTOMATIC_TYPE, ANY))
    assert type(automatic.cond_stage_model) is type(chosen.cond_stage_model)
    assert type(automatic.tokenizer) is type(chosen.tokenizer)
    if not plain:  # a recipe has the type that was chosen
        assert automatic.patcher.cached_patcher_init[0].options["clip_type"] == ANY


def test_a_diffusion_model_is_named_before_a_type_is_looked_for(tmp_path):
    write_random_gguf(tmp_path / "flux.gguf", tiny_models.flux_shapes(hidden=128), "Q8_0")
    with pytest.raises(WeightFileError, match="flux.gguf is a diffusion model, expected a text"):
        load_text_encoder([str(tmp_path / "flux.gguf")], AUTOMATIC_TYPE)
