"""The real server on fake GPUs, where copies come late: whatever lies where, pictures are those of the CPU byte for byte."""
import copy
import json

import pytest

from devtools import demo, fakegpu
from devtools.files import demo_files
from devtools.host.server import Server
from devtools.workflows.api_format import to_api

pytestmark = [pytest.mark.heavy, pytest.mark.not_on_fake_gpus(reason="these servers choose their devices themselves")]

# The same arithmetic on the CPU and on GPUs, which the host would run in other dtypes.
SAME = ("--fp32-unet", "--fp32-vae", "--fp32-text-enc", "--use-pytorch-cross-attention")
ENV = {"FEATHERWEIGHT_KERNELS": "torch", "OMP_NUM_THREADS": "1"}
GPUS = {  # name -> (GiB of each of two devices, arguments). Of 1.25 GiB the host keeps nearly all for activations
    "static": (4, ["--disable-dynamic-vram"]),
    "dynamic": (4, []),
    "static, little memory": (1.25, ["--disable-dynamic-vram"]),
    "dynamic, little memory": (0.2, []),
    "static, no room for weights": (4, ["--disable-dynamic-vram", "--novram"]),
}
WORKFLOWS = {"plain": demo.WORKFLOW, "two LoRAs": demo.LORA_WORKFLOW, "NF4 checkpoint": demo.NF4_WORKFLOW,
             "side by side": demo.SIDE_BY_SIDE}
DEVICES = {  # name -> nodes between the model and the sampler of the plain workflow
    "on the second GPU": [("SelectModelDevice", {"device": "gpu:1"})],
    "on the CPU": [("SelectModelDevice", {"device": "cpu"})],
    "on both": [("MultiGPU_WorkUnits", {"max_gpus": 2})],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    if fakegpu.why_not():
        pytest.skip(fakegpu.why_not())
    base = tmp_path_factory.mktemp("fake_gpus")
    types = [name for name in demo_files.MODELS if name != "NF4" or demo_files.has_bitsandbytes()]
    demo_files.make_models(base, types)
    if demo_files.has_bitsandbytes():
        demo_files.make_checkpoint(base)
    return base


def graphs(server) -> dict[str, dict]:
    """Name -> a workflow as the server takes it."""
    info = server.object_info()
    found = {name: to_api(json.loads(path.read_text(encoding="utf-8")), info) for name, path in WORKFLOWS.items()}
    if not demo_files.has_bitsandbytes():
        del found["NF4 checkpoint"]
        found["side by side"] = demo.without(found["side by side"], {}, demo_files.MODELS["NF4"])[0]
    found["plain with cfg 2"] = copy.deepcopy(found["plain"])
    sampler = next(node for node in found["plain with cfg 2"].values() if node["class_type"] == "KSampler")
    sampler["inputs"]["cfg"] = 2.0
    for node in (node for graph in found.values() for node in graph.values() if node["class_type"] == "KSampler"):
        node["inputs"]["steps"] = 3
    return found


def pictures(server, graph) -> dict[str, bytes]:
    """Node -> its picture. Where ComfyUI itself applies LoRAs to dense weights, it computes in another dtype on a GPU."""
    run = server.queue(graph)
    return {node: server.image(output["images"][0]) for node, output in run.outputs.items() if "images" in output
            and not {"UNETLoader", "LoraLoaderModelOnly"} <= classes_before(graph, node)}


def classes_before(graph, node) -> set[str]:
    """The kinds of nodes that lead to this one, its text encoder and VAE left out."""
    spec = graph[node]
    names = ("images", "samples", "model")
    before = [classes_before(graph, spec["inputs"][name][0]) for name in names if name in spec["inputs"]]
    return {spec["class_type"]}.union(*before)


@pytest.fixture(scope="module")
def expected(base):
    """What the CPU draws, by the names of `graphs`."""
    with Server(base, arguments=SAME, env=ENV) as server:
        return {name: pictures(server, graph) for name, graph in graphs(server).items()}


@pytest.fixture(scope="module", params=GPUS)
def server(request, base, expected):
    gib, arguments = GPUS[request.param]
    env = {**fakegpu.environment(2, gib, late=True), **ENV}
    with Server(base, cpu=False, arguments=(*SAME, *arguments), env=env) as server:
        server.dynamic = "--disable-dynamic-vram" not in arguments
        yield server
        log = server.log()
        assert "Fake GPU 1" in log and ("DynamicVRAM support detected and enabled" in log) == server.dynamic
        assert "Pin error" not in log and "Traceback" not in log


def test_pictures_are_those_of_the_cpu(server, expected):
    for _ in range(2):
        for name, graph in graphs(server).items():
            assert pictures(server, graph) == expected[name], name
        server.post("/free", {"unload_models": True, "free_memory": True})


@pytest.mark.parametrize("where", DEVICES)
def test_devices_draw_the_same(server, expected, where):
    graph = graphs(server)["plain with cfg 2"]
    sampler = next(node for node in graph.values() if node["class_type"] == "KSampler")
    for index, (class_type, inputs) in enumerate(DEVICES[where]):
        graph[f"device {index}"] = {"class_type": class_type, "inputs": {"model": sampler["inputs"]["model"], **inputs}}
        sampler["inputs"]["model"] = [f"device {index}", 0]
    assert pictures(server, graph) == expected["plain with cfg 2"]
