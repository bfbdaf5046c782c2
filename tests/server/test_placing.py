"""Place Model and Place Text Encoder in the real server, on two fake GPUs: every picture is the
CPU's, and the nodes say what lies where.

`Server.queue` runs each prompt on the CPU too and compares.
"""
import copy
import itertools
import json
import re
import time

import pytest
import torch
from fake_gpu_server import FakeGpuServer, Size, node_of, with_cfg_2
from safetensors.torch import save_file

from devtools import demo, fakegpu
from devtools.files import demo_files, tiny_models
from devtools.host.server import ServerError
from devtools.workflows.api_format import to_api

pytestmark = pytest.mark.not_on_fake_gpus(reason="these servers choose their devices themselves")

MODEL = "larger_flux.gguf"  # than a page of dynamic VRAM
SIZES = {"hidden": 512, "double_blocks": 2, "single_blocks": 6, "context": 768}
# MB of the model, of the text encoder, and of the largest layer
SIZE, TEXT_SIZE, LARGEST = 48.2, 131.9, 4.0


@pytest.fixture(scope="module", params=["dynamic", pytest.param("static", marks=pytest.mark.heavy)])
def server(request, tmp_path_factory):
    if fakegpu.why_not():
        pytest.skip(fakegpu.why_not())
    base = tmp_path_factory.mktemp(request.param)
    demo_files.make_models(base, ())
    flux = {name: torch.from_numpy(values) for name, values in tiny_models.flux(0, **SIZES).items()}
    demo_files.write_model(base / "models" / "diffusion_models" / MODEL, "Q8_0", flux)
    for seed, name in enumerate(demo_files.LORAS.values(), 1):
        lora = tiny_models.flux_lora(seed, "blocks", "diffusion_model.{name}", ".lora_A.weight",
                                     ".lora_B.weight", strength=0.3, **SIZES)
        save_file({key: torch.from_numpy(values) for key, values in lora.items()},
                  base / "models" / "loras" / name)

    class TwoGpus(FakeGpuServer):
        size = Size(devices=2, gib=4, late=True, dynamic=request.param == "dynamic")

    with TwoGpus(base) as server:
        yield server
        assert "Traceback" not in server.log() and "lora key not loaded" not in server.log()


SEEDS = itertools.count(1)  # the host computes nothing twice


@pytest.fixture
def graph(server) -> dict:
    """A workflow with two LoRAs, as the server takes it."""
    graph = to_api(json.loads(demo.LORA_WORKFLOW.read_text(encoding="utf-8")), server.object_info())
    graph = {
        node: spec for node, spec in graph.items() if spec["class_type"] != "FeatherweightCheckLora"
    }
    node_of(graph, demo.LOADER)["inputs"]["model_name"] = MODEL
    node_of(graph, "KSampler")["inputs"] |= {"steps": 2, "seed": next(SEEDS)}
    return graph


def before(graph: dict, class_type: str, name: str, node: str, new: str, **inputs) -> dict:
    """The graph with another node in front of an input of each node of a type. node: its id. new:
    its type."""
    graph = copy.deepcopy(graph)
    for spec in [spec for spec in graph.values() if spec["class_type"] == class_type]:
        graph.setdefault(node,
                         {"class_type": new, "inputs": {name: spec["inputs"][name], **inputs}})
        spec["inputs"][name] = [node, 0]
    return graph


def place_model(graph: dict, node: str = "place", **inputs) -> dict:
    return before(graph, "KSampler", "model", node, "FeatherweightPlaceModel", **inputs)


def place_text_encoder(graph: dict, **inputs) -> dict:
    return before(graph, "CLIPTextEncode", "clip", "place text", "FeatherweightPlaceTextEncoder",
                  **inputs)


def lies(text: str) -> tuple[float, ...]:
    """MB of a model that a node shows on cuda:0, in the store, and copied in each step."""
    here, stored, copied = (re.search(pattern, text)
                            for pattern in (r"^([\d.]+) of [\d.]+ MB on cuda:0",
                                            r", ([\d.]+) MB on cuda:1",
                                            r"\n([\d.]+) MB copied per step"))
    return float(here[1]), float(stored[1]) if stored else 0, float(copied[1]) if copied else 0


def free(server):
    """As *Unload Models* does. What then lies on the GPUs is what the host's two streams copy into,
    which it frees in dynamic VRAM only.
    """
    server.post("/free", {"unload_models": True, "free_memory": True})
    end, left = time.monotonic() + 60, None
    while left is None or left > (0.1e6 if server.size.dynamic else 2 * LARGEST * 1e6):
        assert time.monotonic() < end, f"{left} bytes are left"
        time.sleep(0.1)
        left = max(device["vram_total"] - device["vram_free"]
                   for device in server.system_stats()["devices"])


@pytest.mark.parametrize(
    ("gigabytes", "least"),
    [
        (0.04, 32),
        pytest.param(0.0, 0, marks=pytest.mark.heavy),
        pytest.param(4.0, TEXT_SIZE, marks=pytest.mark.heavy),
    ],
)
def test_with_a_budget_pictures_are_the_same_and_the_nodes_say_what_stays(
    gigabytes, least, server, graph
):
    graph = place_text_encoder(place_model(graph, gpu_weights=gigabytes), gpu_weights=gigabytes)
    texts = server.queue(graph).texts
    for node, size in {"place": SIZE, "place text": TEXT_SIZE}.items():
        asked = min(gigabytes * 1000, size)
        assert texts[node][0] == (
            f"at most {asked:.1f} of {size} MB on cuda:0"
            if asked < size
            else f"{size} MB on cuda:0"
        )
        here, _, copied = lies(texts[node][-1])
        assert min(least, size) <= here <= asked + 0.2 and (copied > 0) == (asked < size)
    assert sum(lies(texts["place"][-1])) == pytest.approx(SIZE, abs=0.2)


@pytest.mark.heavy
def test_a_store_holds_what_does_not_stay(server, graph):
    run = server.queue(
        place_text_encoder(place_model(graph, gpu_weights=0.02, store="gpu:1"), gpu_weights=0.02,
                           store="gpu:1"))
    here, stored, copied = lies(run.texts["place"][-1])
    assert 14 < here <= 20 and stored == copied == pytest.approx(SIZE - here, abs=0.2)
    here, stored, _ = lies(run.texts["place text"][-1])
    assert 18 < here <= 20 and stored == pytest.approx(TEXT_SIZE - here, abs=0.2)
    run = server.queue(place_model(graph, gpu_weights=0.02, store="gpu:1", store_gb=0.01))
    assert 6 < lies(run.texts["place"][-1])[1] <= 10
    free(server)


def share(graph: dict) -> dict:
    return before(graph, "KSampler", "model", "share", "MultiGPU_WorkUnits", max_gpus=2)


@pytest.mark.heavy
def test_each_of_two_gpus_that_share_a_model_has_the_budget(server, graph):
    graph, stored = with_cfg_2(graph), {"store": "gpu:1"}
    for placed in (place_model(share(graph), gpu_weights=0.04),
                   place_model(share(graph), gpu_weights=0.04,
                               **stored), share(place_model(graph, gpu_weights=0.04)),
                   share(place_model(graph, gpu_weights=0.04, **stored))):
        node_of(placed, "KSampler")["inputs"]["seed"] = next(SEEDS)
        first, _, second, _ = server.queue(placed).texts["place"][-1].splitlines()
        assert (
            32 <= lies(first)[0] <= 40 and 32 <= lies(second.replace("cuda:1", "cuda:0"))[0] <= 40
        )
        assert (lies(first)[1] > 0) == ("store" in placed["place"]["inputs"])
        # or MultiGPU_WorkUnits may find a model of which only a cycle is left, and fail
        free(server)


@pytest.mark.heavy
def test_prompts_after_one_another_each_have_their_own_budget(server, graph):
    def run(graph: dict, **inputs) -> list[str]:
        graph = copy.deepcopy(graph)
        node_of(graph, "KSampler")["inputs"] |= {"seed": next(SEEDS), **inputs}
        return server.queue(graph, **options).texts.get("place", [""])[-1]

    options = {}
    part, none = (place_model(graph, gpu_weights=gigabytes) for gigabytes in (0.04, 0.0))
    for _ in range(2):
        assert lies(run(part))[0] >= 32
        assert lies(run(none))[0] < 0.1
        run(graph)
        free(server)
        assert lies(run(none))[0] < 0.1
        assert lies(run(part))[0] >= 32
        options = {
            "on_progress": lambda node, value, maximum: value == 2 and server.post(
                "/interrupt", {})
        }
        with pytest.raises(ServerError, match="was interrupted"):
            run(part, steps=9)
        options = {}
        assert lies(run(part))[0] >= 32
        run(graph)
    free(server)
