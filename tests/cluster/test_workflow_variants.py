"""Run on Ray's variants of a workflow and numbers of workers, without Ray."""
import pytest

from devtools.files import demo_files
from featherweight.cluster.actor_pool import Share
from featherweight.cluster.comfyui_install import worker_arguments
from featherweight.cluster.run_server import plan_workers
from featherweight.cluster.workflow_graph import GraphError, with_result
from featherweight.cluster.workflow_variants import make_variants


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
    with pytest.raises(GraphError, match="texts of 100 million characters"):
        make_variants(SAMPLED, 1000, "x" * 100_000)
    seeds = part(**{f"sampler{number}": ("KSampler", {"seed": 7}) for number in range(1000)})
    with pytest.raises(GraphError, match="texts of 3.. million characters"):
        make_variants(seeds, 10_000)


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
    graph, name = with_result(part(result=("Load", {}), result0=("Load", {})), ["result", 0])
    assert [graph[other]["class_type"] for other in ("result", "result0")] == ["Load"] * 2
    assert name == "result00" and len(graph) == 3


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
