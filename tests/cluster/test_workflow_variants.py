"""Run on Ray's variants of a workflow, numbers of workers and collected images, without Ray."""
import types

import numpy
import psutil
import pytest

from devtools.files import demo_files
from featherweight.cluster.actor_pool import Share
from featherweight.cluster.comfyui_install import MachineError, worker_arguments
from featherweight.cluster.image_collector import ImageCollector
from featherweight.cluster.ray_driver import plan_workers
from featherweight.cluster.workflow_graph import GraphError, with_result
from featherweight.cluster.workflow_variants import make_variants, nodes_affected


def part(**nodes) -> dict:
    return {name: {"class_type": class_type, "inputs": inputs}
            for name, (class_type, inputs) in nodes.items()}


SAMPLED = part(
    model=("Load", {"model_name": demo_files.MODELS["Q4_K"]}),
    good=("CLIPTextEncode", {"text": "a house"}), bad=("CLIPTextEncode", {"text": "a blur"}),
    control=("ControlNetApply", {"positive": ["good", 0], "negative": ["bad", 0]}),
    sampler=("KSampler", {
        "seed": 7, "model": ["model", 0], "positive": ["control", 0], "negative": ["control", 1]}),
    decode=("VAEDecode", {"samples": ["sampler", 0]}))


def test_seeds_count_up_and_begin_again_behind_the_largest():
    assert make_variants(SAMPLED, 3) == [{"sampler.seed": 7 + index} for index in range(3)]
    noise = part(noise=("RandomNoise", {"noise_seed": (1 << 64) - 1}))
    assert make_variants(noise, 2) == [{"noise.noise_seed": (1 << 64) - 1}, {"noise.noise_seed": 0}]


def test_a_seed_that_two_samplers_take_from_a_number_counts_up_once():
    linked = part(number=("PrimitiveInt", {"value": 5}), one=("KSampler", {"seed": ["number", 0]}),
                  two=("KSampler", {"seed": ["number", 0]}))
    assert make_variants(linked, 2) == [{"number.value": 5}, {"number.value": 6}]
    assert nodes_affected(linked, make_variants(linked, 2)) == {"number", "one", "two"}


def test_lines_go_to_the_prompt_and_never_to_the_negative_one():
    assert make_variants(SAMPLED, 3, "a tree\n\n a palm \n") == [
        {"sampler.seed": 7, "good.text": "a tree"}, {"sampler.seed": 8, "good.text": "a palm"},
        {"sampler.seed": 9, "good.text": "a tree"}]
    shared = SAMPLED | part(
        control=("ControlNetApply", {"positive": ["good", 0], "negative": ["good", 0]})
    )
    del shared["bad"]
    assert make_variants(shared, 1, "a tree")[0]["good.text"] == "a tree"


def test_texts_that_lines_multiply_are_bounded_before_they_are_made():
    marked = SAMPLED | part(bad=("CLIPTextEncode", {"text": "%text%" * 10_000}))
    with pytest.raises(GraphError, match="texts of 6000.. million characters, expected at most 10"):
        make_variants(marked, 1000, "x" * 60_000)
    make_variants(marked, 10, "x" * 90)


def test_lines_go_where_the_mark_is_if_it_is_anywhere():
    marked = SAMPLED | part(bad=("CLIPTextEncode", {"text": "no %text%, no %text%"}))
    assert make_variants(marked, 1, "tree") == [{"sampler.seed": 7, "bad.text": "no tree, no tree"}]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (part(other=("CLIPTextEncode", {"text": "b"})), "2 nodes"),
        (part(good=("Load", {}), bad=("Load", {})), "no nodes"),
    ],
)
def test_lines_that_have_no_place_or_several_are_refused(more, message):
    with pytest.raises(GraphError, match=f"{message} before it have a prompt: write %text%"):
        make_variants(SAMPLED | more, 2, "a tree")


def test_what_varies_is_what_the_changes_reach():
    assert nodes_affected(SAMPLED, make_variants(SAMPLED, 2)) == {"sampler", "decode"}
    assert nodes_affected(SAMPLED, make_variants(SAMPLED, 2, "a\nb")) == {
        "good",
        "control",
        "sampler",
        "decode",
    }
    assert nodes_affected(SAMPLED, make_variants(SAMPLED, 1)) == set(SAMPLED)


@pytest.mark.parametrize(("machines", "workers", "on_cpu", "count", "share"), [
    ([{"CPU": 16, "GPU": 2}], 0, False, 2, Share(8, 1)),
    ([{"CPU": 16, "GPU": 2}, {"CPU": 6, "GPU": 1}, {"CPU": 64}], 0, False, 3, Share(6, 1)),
    ([{"CPU": 2, "GPU": 4}], 3, False, 3, Share(0.5, 1)),
    ([{"CPU": 2, "GPU": 4}], 10_000, False, 4, Share(0.5, 1)),
    ([{"CPU": 16, "GPU": 2}], 0, True, 1, Share(16)),
    ([{"CPU": 8}, {"CPU": 4}, {}], 0, False, 2, Share(4)),
    ([{"CPU": 8}, {"CPU": 4}], 3, False, 3, Share(2)),
    ([{"CPU": 8}], 10_000, False, 8, Share(1)),
    ([{"GPU": 2}], 0, False, 2, Share(0, 1)),
    ([{}], 2, False, 0, Share(1))])
def test_a_worker_for_each_gpu_or_else_for_each_machine(machines, workers, on_cpu, count, share):
    assert plan_workers(machines, workers, on_cpu) == (count, share)


def test_the_node_for_the_result_takes_no_other_nodes_place():
    graph = with_result(part(result=("Load", {}), result_=("Load", {})), ["result", 0])
    assert (
        graph["result"]["class_type"] == graph["result_"]["class_type"] == "Load"
        and len(graph) == 3
    )


def test_workers_of_this_machine_have_its_arguments_without_the_servers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--listen", "--port", "8188", "--base-directory", "base", "--cuda-device", "1", "--lowvram",
        "--reserve-vram", "2", "--extra-model-paths-config", "a.yaml", "/b.yaml",
        "--extra-model-paths-config", "c.yaml", "--output-directory", "out", "--verbose", "DEBUG",
        "--fast", "fp16_accumulation"
    ]
    assert worker_arguments(arguments) == [
        "--base-directory",
        str(tmp_path / "base"),
        "--extra-model-paths-config",
        str(tmp_path / "a.yaml"),
        "/b.yaml",
        str(tmp_path / "c.yaml"),
        "--lowvram",
        "--reserve-vram",
        "2",
        "--fast",
        "fp16_accumulation",
    ]


def receive(collector, item, event, value=None):
    collector.receive({"item": item, "event": event, "value": value}, b"")


def receive_images(collector, item, pictures):
    for index, image in enumerate(pictures):
        header = {"item": item, "event": "image", "index": index, "of": len(pictures),
                  "shape": list(image.shape)}
        collector.receive(header, image.tobytes())


def pictures(value=0.0, width=4, height=2, count=1):
    return numpy.full((count, height, width, 3), value, numpy.float32)


def test_the_bar_counts_the_steps_of_all_items():
    collector = ImageCollector(3, {"sampler"})
    receive(collector, 0, "begins", "desk")
    receive(collector, 0, "progress", ("model", 300, 600))  # loading, which the others need not do
    receive(collector, 0, "progress", ("sampler", 1, 10))
    assert collector.progress() == (1, 30)
    receive(collector, 1, "progress", ("sampler", 4, 10))
    receive_images(collector, 0, pictures())
    assert collector.progress() == (14, 30)
    receive(collector, 1, "lost")
    assert collector.progress() == (10, 30)
    collector.started -= 60
    assert collector.status_text() == "1 of 3 done, 0 running, 2 min left\non desk"
    receive_images(collector, 1, pictures())
    receive_images(collector, 2, pictures())
    assert collector.status_text() == "3 of 3 done, 0 running\non desk"


def test_pictures_lie_in_the_order_of_their_items_in_one_array():
    collector = ImageCollector(3, ())
    for item in (2, 0, 1):
        receive_images(collector, item, pictures(item, count=2))
    assert collector.all_images() is collector.images
    assert collector.all_images()[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_pictures_of_a_lost_item_are_replaced_by_those_of_the_next_attempt():
    collector = ImageCollector(2, ())
    receive_images(collector, 0, pictures(1, count=2))
    header = {"item": 1, "event": "image", "index": 0, "of": 2, "shape": [2, 4, 3]}
    collector.receive(header, pictures(5)[0].tobytes())
    receive(collector, 1, "lost")
    with pytest.raises(GraphError, match="Job 2 of 2 gave no image"):
        collector.all_images()
    receive_images(collector, 1, pictures(2, count=2))
    assert collector.all_images()[:, 0, 0, 0].tolist() == [1, 1, 2, 2]


def test_items_with_other_numbers_of_pictures_keep_their_order():
    collector = ImageCollector(3, ())
    for item, count in ((1, 2), (2, 1), (0, 3)):
        receive_images(collector, item, pictures(item, count=count))
    assert collector.all_images()[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 2]


def test_more_pictures_than_memory_are_refused_at_the_first(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory",
                        lambda: types.SimpleNamespace(available=1_000_000_000))
    with pytest.raises(
            GraphError,
            match="10000 jobs of 256 x 512 take 15.7 GB of memory here, and 1.0 GB are free"):
        receive_images(ImageCollector(10_000, ()), 0, pictures(width=256, height=512))


def test_pictures_of_other_sizes_are_refused_in_a_sentence():
    collector = ImageCollector(3, ())
    receive_images(collector, 1, pictures())
    with pytest.raises(
            GraphError,
            match="Job 3 of 3 is 5 x 2, job 2 is 4 x 2: images of one run have one size"):
        receive_images(collector, 2, pictures(width=5))


@pytest.mark.parametrize(("event", "value", "error", "message"), [
    ("failed", "node 7 (KSampler) has no such sampler.", GraphError, "Job 2 of 3 failed: node 7"),
    ("unusable", "attic: has no file 'x.gguf'.", MachineError,
     "Job 2 of 3 cannot run on attic: has no file")])
def test_what_an_item_or_a_machine_lacks_is_said_with_its_name(event, value, error, message):
    with pytest.raises(error, match=message):
        receive(ImageCollector(3, ()), 1, event, value)


IMAGE = {"event": "image", "item": 0, "index": 0, "of": 1, "shape": [2, 4, 3]}


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"event": "lost"},
        {"event": "lost", "item": 3},
        {"event": "lost", "item": -1},
        {"event": "begins", "item": 0},
        {"event": "unknown", "item": 0},
        {"event": "workers", "value": "x"},
        {"event": "progress", "item": 0, "value": ["n", 1]},
        {"event": "progress", "item": 0, "value": ["n", float("nan"), 2]},
        {"event": "progress", "item": 0, "value": [["n"], 1, 2]},
        {**IMAGE, "index": 1},
        {**IMAGE, "of": 0},
        {**IMAGE, "shape": [2, 4]},
        {**IMAGE, "shape": [2, 5, 3]},
        {**IMAGE, "shape": [-2, -4, 3]},
        {**IMAGE, "shape": [2.0, 4, 3]},
    ],
)
def test_what_is_no_event_is_one_sentence(header):
    collector = ImageCollector(3, {"n"})
    collector.receive(IMAGE, bytes(96))
    with pytest.raises(MachineError,
                       match="Ray's driver sent an event that cannot be read: .* Run again"):
        collector.receive(header, bytes(96))
    assert collector.progress() == (1, 3) and collector.done == {0}
