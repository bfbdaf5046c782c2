"""The real server on fake GPUs, where copies come late: whatever lies where, pictures are those of
the CPU, pixel for pixel."""
import json
import subprocess
import sys

import pytest
from fake_gpu_server import SAME, SAME_ENV, SAME_PACK, node_of, pictures, with_cfg_2

from devtools import ROOT, demo, fakegpu
from devtools.files import demo_files
from devtools.host.server import Server
from devtools.workflows.api_format import to_api

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.not_on_fake_gpus(reason="these servers choose their devices themselves")
]

# name -> (GiB of each of two devices, arguments). Of 1.25 GiB the host keeps nearly all for
# activations
GPUS = {
    "static": (4, ["--disable-dynamic-vram"]),
    "dynamic": (4, []),
    "static, little memory": (1.25, ["--disable-dynamic-vram"]),
    "dynamic, little memory": (0.2, []),
    "static, no room for weights": (4, ["--disable-dynamic-vram", "--novram"]),
}
WORKFLOWS = {
    "plain": demo.WORKFLOW, "two LoRAs": demo.LORA_WORKFLOW, "NF4 checkpoint": demo.NF4_WORKFLOW,
    "side by side": demo.SIDE_BY_SIDE
}
DEVICES = {  # name -> nodes between the model with its LoRAs and the sampler
    "on the second GPU": [("SelectModelDevice", {"device": "gpu:1"})],
    "on the CPU": [("SelectModelDevice", {"device": "cpu"})],
    "on both": [("MultiGPU_WorkUnits", {"max_gpus": 2})],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    if fakegpu.why_not():
        pytest.skip(fakegpu.why_not())
    base = tmp_path_factory.mktemp("fake_gpus")
    demo_files.make_models(base, demo_files.recipes())
    if demo_files.has_bitsandbytes():
        demo_files.make_checkpoint(base)
    return base


def graphs(server) -> dict[str, dict]:
    """Name -> a workflow as the server takes it."""
    info = server.object_info()
    found = {
        name: to_api(json.loads(path.read_text(encoding="utf-8")), info)
        for name, path in WORKFLOWS.items()
    }
    if not demo_files.has_bitsandbytes():
        del found["NF4 checkpoint"]
    for name in demo_files.MODELS.keys() - demo_files.recipes():
        found["side by side"] = demo.without(found["side by side"], {}, demo_files.MODELS[name])[0]
    for name in ("plain", "two LoRAs", "NF4 checkpoint"):
        if name in found:
            found[f"{name} with cfg 2"] = with_cfg_2(found[name])
    for node in (node for graph in found.values() for node in graph.values()
                 if node["class_type"] == "KSampler"):
        node["inputs"]["steps"] = 3
    return found


@pytest.fixture(scope="module")
def expected(base):
    """What the CPU draws, by the names of `graphs`."""
    with Server(base, arguments=SAME, env=SAME_ENV, extra_custom_nodes=SAME_PACK) as server:
        return {
            name: pictures(server, server.queue(graph)) for name, graph in graphs(server).items()
        }


@pytest.fixture(scope="module", params=GPUS)
def server(request, base, expected):
    gib, arguments = GPUS[request.param]
    env = {**fakegpu.environment(2, gib, late=True), **SAME_ENV}
    with Server(base, cpu=False, arguments=(*SAME, *arguments), env=env,
                extra_custom_nodes=SAME_PACK) as server:
        server.dynamic = "--disable-dynamic-vram" not in arguments
        yield server
        log = server.log()
        assert (
            "Fake GPU 1" in log
            and ("DynamicVRAM support detected and enabled" in log) == server.dynamic
        )
        assert "Pin error" not in log and "Traceback" not in log


def test_pictures_are_those_of_the_cpu(server, expected):
    for _ in range(2):
        for name, graph in graphs(server).items():
            assert pictures(server, server.queue(graph)) == expected[name], name
        server.post("/free", {"unload_models": True, "free_memory": True})


@pytest.mark.parametrize("where", DEVICES)
def test_devices_draw_the_same(server, expected, where):
    for name, graph in graphs(server).items():
        if not name.endswith("with cfg 2"):
            continue
        sampler = node_of(graph, "KSampler")
        for index, (class_type, inputs) in enumerate(DEVICES[where]):
            graph[f"device {index}"] = {
                "class_type": class_type, "inputs": {"model": sampler["inputs"]["model"], **inputs}
            }
            sampler["inputs"]["model"] = [f"device {index}", 0]
        assert pictures(server, server.queue(graph)) == expected[name], name


@pytest.mark.parametrize("vram", ["late", "late-dynamic"])
def test_the_tests_of_servers_pass_on_fake_gpus(vram):
    if fakegpu.why_not():
        pytest.skip(fakegpu.why_not())
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/server", "--fake-gpus",
        f"2x4-{vram}"
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    assert done.returncode == 0, done.stdout[-6000:]
