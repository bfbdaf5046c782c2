"""Place Model and Place Text Encoder: what they show while models run, and what they say to what
cannot be."""
import math
import random
import re

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from gpu_memory import larger_flux, sample, step
from pack_api import load_text_encoder
from patched_models import packed_flux
from prompt_errors import LINK, input_errors

from devtools.files import tiny_models
from devtools.files.gguf_files import write_random_gguf
from featherweight.loaders.models.placement import place, placed_text
from featherweight.nodes import place_model
from featherweight.nodes.legacy import multigpu
from featherweight.nodes.place_model import PlaceModel
from featherweight.nodes.place_text_encoder import PlaceTextEncoder

STATIC = pytest.mark.fake_gpus
DYNAMIC = pytest.mark.fake_gpus(dynamic=True)


@pytest.fixture
def shown(monkeypatch, small_models):
    """The texts that the node shows."""
    texts = []
    monkeypatch.setattr(place_model, "text_sender", lambda: texts.append)
    return texts


def run(patcher) -> torch.Tensor:
    comfy.model_management.load_models_gpu([patcher])
    result = step(patcher)
    patcher.cleanup()
    return result


@STATIC
def test_the_node_says_what_stays_and_what_each_step_costs(shown):
    model = packed_flux("Q8_0")
    expected = run(model)
    placed, = PlaceModel.execute(model, 0.002).args
    assert shown == ["at most 2.0 of 4.0 MB on cuda:0"]
    assert torch.equal(run(placed), expected)
    assert shown[-1] == "1.9 of 4.0 MB on cuda:0\n2.1 MB copied per step; with 0.1 GB here nothing"
    stored, = PlaceModel.execute(model, 0.002, "gpu:1", 0.001).args
    assert torch.equal(run(stored), expected)
    assert shown[-1].startswith(
        "1.9 of 4.0 MB on cuda:0, 918.5 KB on cuda:1\n2.1 MB copied per step")
    stored = place(model, 2e6, [(torch.device("cuda", 1), 1e6), (torch.device("cuda", 2), 5e5)])
    assert torch.equal(run(stored), expected)
    assert placed_text(stored).startswith(
        "1.9 of 4.0 MB on cuda:0, 918.5 KB on cuda:1, 423.9 KB on cuda:2\n2.1 MB copied per step")
    whole, = PlaceModel.execute(model, 4.0).args
    assert torch.equal(run(whole), expected) and shown[-1] == "4.0 of 4.0 MB on cuda:0"


@STATIC
def test_automatic_leaves_it_to_comfyui_and_the_rest_goes_where_it_is_to_be_kept(shown):
    model, _ = larger_flux("Q8_0")
    expected = run(model)
    placed, = PlaceModel.execute(PlaceModel.execute(model, 0.002).args[0]).args
    assert shown[-1] == "as much of 46.6 MB as fits on cuda:0" and placed.placement is None
    assert torch.equal(run(placed), expected) and shown[-1] == "46.6 of 46.6 MB on cuda:0"
    stored, = PlaceModel.execute(model, store="gpu:1").args
    assert shown[-1] == "as much of 46.6 MB as fits on cuda:0, the rest on cuda:1"
    assert torch.equal(run(stored), expected) and shown[-1] == "46.6 of 46.6 MB on cuda:0"
    comfy.model_management.unload_all_models()
    free = comfy.model_management.get_free_memory(stored.load_device)
    comfy.model_management.load_models_gpu([stored], memory_required=free - 30e6)
    on_device, _, on_other = (float(word) for word in re.findall(r"[\d.]+(?= )", shown[-1])[:3])
    assert on_device < 31 and on_device + on_other == pytest.approx(46.6, abs=0.2)
    assert torch.equal(step(stored), expected)


@DYNAMIC
def test_automatic_leaves_dynamic_vram_as_it_is(shown):
    model, _ = larger_flux("Q8_0")
    expected = run(model)
    placed, = PlaceModel.execute(model).args
    assert placed.is_dynamic() and shown == ["as much of 46.6 MB as fits on cuda:0"]
    assert torch.equal(run(placed), expected) and shown[-1].startswith("46.6 of 46.6 MB on cuda:0")


@pytest.mark.parametrize("node", [PlaceModel, PlaceTextEncoder])
def test_a_new_node_places_nothing_by_itself(node):
    inputs = {one.id: getattr(one, "input_override", one) for one in node.define_schema().inputs}
    assert [inputs[name].default for name in ("gpu_weights", "store", "store_gb")] == [
        "automatic", "cpu", "all"]


@pytest.mark.parametrize("node", [PlaceModel, PlaceTextEncoder])
@pytest.mark.parametrize(("name", "words"), [
    ("gpu_weights", {"automatic": (-1, -1.0, "-1"), "all": (1000, 1000.0, "1000.0")}),
    ("store_gb", {"all": (1000, 1000.0, "1000")}),
])
def test_a_size_is_a_number_or_a_word_and_the_numbers_of_earlier_workflows_mean_the_words(
        node, name, words):
    title, accepted = {"gpu_weights": ("GPU weights in GB", place_model.WORDS),
                       "store_gb": ("at most there, in GB", place_model.STORE_WORDS)}[name]

    def meaning(value):
        return place_model.gigabytes(title, value, accepted)

    for word, numbers in words.items():
        assert {meaning(number) for number in numbers} == {meaning(word)}
    size = round(random.uniform(0, 100), 3)
    assert meaning(size) == meaning(str(size)) == size
    node_id = node.GET_SCHEMA().node_id
    for value in (*words, *sum(words.values(), ()), size, str(size), LINK):
        assert name not in input_errors(node_id, **{name: value})
    for value in ("much", "", "nan", math.inf, {}):
        assert f"'{title}' is" in input_errors(node_id, **{name: value})[name]


@DYNAMIC
def test_the_node_says_in_dynamic_vram_what_is_copied(shown):
    model, _ = larger_flux("Q8_0")
    placed, = PlaceModel.execute(model, 0.036).args
    run(placed)
    assert (
        shown[0] == "at most 36.0 of 46.6 MB on cuda:0"
        and " of 46.6 MB on cuda:0\n" in shown[-1]
    )
    assert shown[-1].endswith("copied per step; with 0.1 GB here nothing") and not shown[
        -1
    ].startswith(("0.0", "46"))


@STATIC
def test_a_text_encoder_shows_it_too(shown, tmp_path):
    write_random_gguf(tmp_path / "clip_l.gguf", tiny_models.clip_l_shapes(), "Q8_0")
    clip = load_text_encoder([str(tmp_path / "clip_l.gguf")])
    placed, = PlaceTextEncoder.execute(clip, 0.05).args
    tokens = clip.tokenize("a cloud")
    assert torch.equal(placed.encode_from_tokens(tokens), clip.encode_from_tokens(tokens))
    assert (
        shown[0] == "at most 50.0 of 131.7 MB on cuda:0" and " of 131.7 MB on cuda:0\n" in shown[1]
    )


@DYNAMIC
def test_a_text_encoder_in_dynamic_vram_shows_what_stays_when_it_has_run(shown, tmp_path):
    """Nothing tells when it has."""
    write_random_gguf(tmp_path / "clip_l.gguf", tiny_models.clip_l_shapes(), "Q8_0")
    placed, = PlaceTextEncoder.execute(load_text_encoder([str(tmp_path / "clip_l.gguf")]),
                                       0.05).args
    placed.encode_from_tokens(placed.tokenize("a cloud"))
    assert placed.patcher.memory_report().on_device > 32e6
    assert shown[1] == placed_text(placed.patcher)


@pytest.fixture
def share():
    """The host's node that lets two GPUs share the work of a model."""
    nodes = pytest.importorskip("comfy_extras.nodes_multigpu",
                                reason="this ComfyUI has no nodes that choose devices")
    return lambda model: nodes.MultiGPUCFGSplitNode.execute(model, 2)[0]


@pytest.mark.parametrize(
    "vram", [pytest.param("static", marks=STATIC), pytest.param("dynamic", marks=DYNAMIC)]
)
def test_of_two_gpus_that_share_a_model_each_has_the_budget_and_is_shown(vram, shown, share):
    model, _ = larger_flux("Q8_0")
    expected = sample(model)
    placed, = PlaceModel.execute(model, 0.036).args
    shared = share(placed)
    assert torch.equal(sample(shared), expected)
    on_each = [
        placed_text(patcher)
        for patcher in (shared, *shared.get_additional_models_with_key("multigpu"))
    ]
    assert all(float(text.split()[0]) > 30 for text in on_each) and shown[-1] == "\n".join(
        on_each
    )
    assert " on cuda:0\n" in on_each[0] and " on cuda:1\n" in on_each[1]
    assert torch.equal(sample(placed), expected) and shown[-1] == on_each[0]


@DYNAMIC
@pytest.mark.parametrize("order", ["shared first", "stored first"])
def test_a_model_that_two_gpus_share_gets_a_store(order, shown, share):
    model, _ = larger_flux("Q8_0")
    shared = share(PlaceModel.execute(model, 0.036).args[0])
    expected = sample(shared)  # by which it has its places in dynamic VRAM
    stored, = PlaceModel.execute(shared if order == "shared first" else model, 0.036,
                                 "gpu:1").args
    stored = stored if order == "shared first" else share(stored)
    assert torch.equal(sample(stored), expected)
    there = [
        patcher.memory_report()
        for patcher in (stored, *stored.get_additional_models_with_key("multigpu"))
    ]
    assert [lies.on_device // 1e6 for lies in there] == [35, 35]
    assert [sum(lies.stored.values()) // 1e6 for lies in there] == [10, 0]


@STATIC
@pytest.mark.parametrize(("inputs", "sentence"), [
    ((-2.0,), "GPU weights in GB is -2, which is below 0; it is treated as 0."),
    ((48.0,), "GPU weights in GB is 48, but cuda:0 has 4.3 GB in total; ComfyUI keeps as much"
              " there as fits."),
    ((0.002, "gpu:5"),
     "There is no gpu:5 to keep the rest on; main memory is used."),
    ((0.002, "gpu:0"), "gpu:0 computes, so it does not keep the rest; main memory is used."),
    ((0.002, "gpu:1", -1.0), "At most there, in GB is -1, which is below 0; it is treated as 0."),
])
def test_what_cannot_be_is_said_in_a_sentence_and_the_picture_comes(
    inputs, sentence, shown, caplog
):
    model = packed_flux("Q8_0")
    expected = run(model)
    assert PlaceModel.validate_inputs(*inputs) is True
    placed, = PlaceModel.execute(model, *inputs).args
    assert shown[-1].endswith(f"\n{sentence}") and sentence in caplog.text
    assert torch.equal(run(placed), expected) and shown[-1].endswith(f"\n{sentence}")


@DYNAMIC
def test_a_store_that_dynamic_vram_does_not_allow_is_left_out(shown):
    model = packed_flux("Q8_0")
    expected = run(model)
    model.cached_patcher_init = None
    placed, = PlaceModel.execute(model, 0.002, "gpu:1").args
    assert shown[-1].endswith(
        "What does not stay on the device is kept in main memory.")
    assert placed.is_dynamic() and torch.equal(run(placed), expected)
    notes = []
    placed = multigpu.place_part(model, 1.0, ["cuda:1"], "", notes, "unet_")
    assert notes[-1].startswith("Weights on other GPUs need the model outside dynamic VRAM, so")
    assert placed.is_dynamic() and torch.equal(run(placed), expected)


@pytest.mark.parametrize("whose", ["another pack's loader (OfAnotherPack)", "ComfyUI-MultiGPU"])
def test_what_another_pack_loads_or_places_in_its_own_way_stays_as_it_is(whose, shown):
    class OfAnotherPack(comfy.model_patcher.ModelPatcher):
        # as ComfyUI-GGUF's
        def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
            raise NotImplementedError

    model = packed_flux("Q8_0").clone()
    if whose == "ComfyUI-MultiGPU":
        model.model._distorch_v2_meta = {"full_allocation": "#cuda:0;4.0;cpu"}
    else:
        model.__class__ = OfAnotherPack
    kind = type(model)
    placed, = PlaceModel.execute(model, 0.002).args
    vars(model.model).pop("_distorch_v2_meta", None)
    assert placed is model and type(placed) is kind
    assert shown == [
        f"The place of these weights is set by {whose}, so this node changes nothing. Load the file"
        " with a loader of ComfyUI or of this pack."
    ]


def test_a_model_on_the_cpu_runs_as_it_is(shown):
    model = packed_flux("Q8_0")
    placed, = PlaceModel.execute(model, 0.002).args
    assert shown == [
        "The model computes on the CPU, where all of its weights are: there is nothing to place."
    ]
    comfy.model_management.load_models_gpu([placed])
    assert shown[-1].startswith("4.0 of 4.0 MB on cpu\n")
