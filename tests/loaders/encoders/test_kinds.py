"""Text encoders and the types of models they are picked for: what is refused, and in which
words."""
import comfy.sd
import pytest
import torch
from pack_api import WeightFileError

import nodes as host_nodes
from featherweight.loaders.encoders.encoder_sets import (
    ENCODER_SETS,
    SINGLE_ENCODERS,
    TITLES,
    encoder_family,
    reject_wrong_encoders,
)
from featherweight.nodes.combo_options import combo_options


def types_of(node_id: str) -> list[str]:
    return combo_options(host_nodes.NODE_CLASS_MAPPINGS[node_id], "type")


def test_every_encoder_the_host_knows_has_a_title():
    assert {model.name for model in comfy.sd.TEModel} <= TITLES.keys()


def test_every_type_in_the_tables_is_one_of_the_hosts():
    assert SINGLE_ENCODERS.keys() <= set(types_of("CLIPLoader"))
    assert ENCODER_SETS[2].keys() <= set(types_of("DualCLIPLoader"))
    kinds = set().union(
        *SINGLE_ENCODERS.values(),
        *(group for sets in ENCODER_SETS.values() for groups in sets.values() for group in groups))
    assert kinds <= TITLES.keys()


def test_umt5_is_told_from_t5_by_its_vocabulary():
    assert encoder_family("T5_XXL", {"shared.weight": torch.empty(32128, 1)}) == "T5_XXL"
    assert (
        encoder_family("T5_XXL", {"shared.weight": torch.empty(256384, 1, device="meta")})
        == "UMT5_XXL"
    )
    assert encoder_family("CLIP_L", {}) == "CLIP_L"


@pytest.mark.parametrize("clip_type", SINGLE_ENCODERS)
def test_every_encoder_of_a_type_is_taken(clip_type):
    for kind in SINGLE_ENCODERS[clip_type]:
        assert reject_wrong_encoders(["file.gguf"], [kind], clip_type) == ""


@pytest.mark.parametrize(
    ("count", "clip_type"),
    [(count, clip_type) for count, sets in ENCODER_SETS.items() for clip_type in sets],
)
def test_every_set_of_a_type_is_taken_in_any_order(count, clip_type):
    kinds = []
    for group in ENCODER_SETS[count][clip_type]:
        kinds.append(sorted(group.difference(kinds))[0])
    names = [f"{kind}.gguf" for kind in kinds]
    assert reject_wrong_encoders(names, kinds, clip_type) == ""
    assert reject_wrong_encoders(names[::-1], kinds[::-1], clip_type) == ""


REFUSED = {
    "a language model for Flux": (["l.gguf", "qwen.gguf"], ["CLIP_L", "QWEN25_7B"], "flux",
                                  "qwen.gguf is Qwen2.5 7B; flux wants CLIP-L and T5-XXL."),
    "UMT5 for Flux": (["l.gguf", "umt5.gguf"], ["CLIP_L",
                                                "UMT5_XXL"], "flux", "umt5.gguf is UMT5-XXL"),
    "T5 for Wan": (["t5.gguf"], ["T5_XXL"], "wan", "t5.gguf is T5-XXL; wan wants UMT5-XXL."),
    "CLIP for a type of language models": (["l.gguf"], ["CLIP_L"], "qwen_image",
                                           "wants Qwen2.5 7B"),
    "no encoder beside one": (["l.gguf", "vae.safetensors"], ["CLIP_L", None], "flux",
                              "vae.safetensors is not a text encoder"),
    "the same twice": (["a.gguf",
                        "b.gguf"], ["CLIP_L",
                                    "CLIP_L"], "flux", "a.gguf and b.gguf are both CLIP-L"),
    "Llama in three": (["l", "g", "llama.gguf"], ["CLIP_L", "CLIP_G",
                                                  "LLAMA3_8"], "sd3", "llama.gguf is Llama 3 8B")
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_misfit_is_one_sentence_with_the_file_and_what_is_wanted(case):
    names, kinds, clip_type, message = REFUSED[case]
    with pytest.raises(WeightFileError) as error:
        reject_wrong_encoders(names, kinds, clip_type)
    assert message in str(error.value) and "Pick" in str(error.value)


def test_the_advice_names_the_types_an_encoder_is_for():
    with pytest.raises(WeightFileError, match=r"for: wan\.$"):
        reject_wrong_encoders(["umt5.gguf"], ["UMT5_XXL"], "chroma")
    with pytest.raises(WeightFileError, match=r"a type it is for: .*\bstable_diffusion\b, "):
        reject_wrong_encoders(["l.gguf"], ["CLIP_L"], "qwen_image")


def test_a_language_model_under_another_type_of_language_models_is_only_warned_of():
    assert reject_wrong_encoders(
        ["z.gguf"], ["QWEN3_4B"], "qwen_image"
    ) == "z.gguf is Qwen3 4B; qwen_image wants Qwen2.5 7B."
    assert reject_wrong_encoders(["z.gguf"], ["QWEN3_4B"], "stable_diffusion") == ""


@pytest.mark.parametrize("kind", ["GEMMA_2_2B", "QWEN3_4B", "CLIP_H", "T5_XXL_OLD"])
def test_what_the_host_takes_for_what_it_is_under_any_type_is_only_warned_of(kind):
    assert (
        reject_wrong_encoders(["file.gguf"], [kind], "wan")
        == f"file.gguf is {TITLES[kind]}; wan wants UMT5-XXL."
    )


def test_types_nobody_wrote_down_are_left_to_the_host():
    assert (
        reject_wrong_encoders(["l.gguf", "x.gguf"], ["CLIP_L", "QWEN3_4B"], "a_type_of_next_year")
        == ""
    )
