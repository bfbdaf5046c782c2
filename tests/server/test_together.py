"""What happens at the same time: prompts of two users, servers with one cache, cancels at any
moment, files that change."""
import copy
import json
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.torch import save_file

from devtools import demo
from devtools.files import demo_files
from devtools.host import server as servers
from devtools.host.server import ServerError
from devtools.workflows.api_format import to_api

pytestmark = pytest.mark.not_on_fake_gpus(reason="the CPU's memory and files are what is at stake")


@pytest.fixture(scope="module")
def graph(server) -> dict:
    """The demo's workflow, whose picture is not kept."""
    graph = to_api(json.loads(demo.WORKFLOW.read_text(encoding="utf-8")), server.object_info())
    for node in graph.values():
        if node["class_type"] == "SaveImage":
            node["class_type"] = "PreviewImage"
            del node["inputs"]["filename_prefix"]
    return graph


def changed(graph: dict, **values) -> dict:
    """The graph with other values of the inputs of these names."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        node["inputs"] |= {name: value for name, value in values.items() if name in node["inputs"]}
    return graph


def loading(graph: dict, name: str, **inputs) -> dict:
    graph = changed(graph, model_name=name)
    next(node for node in graph.values() if node["class_type"] == demo.LOADER)["inputs"] |= inputs
    return graph


def picture(server, graph: dict) -> bytes:
    """The values of its pixels."""
    return server.pixels(server.queue(graph)).tobytes()


def is_same(drawn: bytes, expected: bytes) -> bool:
    """Whether two pictures are of the same weights: a kernel, used from the load on that follows
    its validation, sums in another order."""
    drawn, expected = (np.frombuffer(pixels, dtype=np.float32) for pixels in (drawn, expected))
    return np.abs(drawn - expected).max() <= 2  # of 255


def refusal(server, graph: dict, on_progress=None) -> str:
    with pytest.raises(ServerError) as error:
        server.queue(graph, on_progress)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_two_users_of_one_server_and_two_servers_with_one_cache_get_the_pictures_of_one_alone(
        server, graph, tmp_path):
    path = server.base / "models" / "diffusion_models" / "dense to pack.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in demo_files.flux().items()}, path)
    packed = [changed(loading(graph, path.name, pack_to="Q8_0"), seed=seed) for seed in (1, 2)]
    # kernels that multiply are used from the load on that follows their validation
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "FEATHERWEIGHT_KERNELS": "torch"}
    for name in "abc":
        (tmp_path / name).mkdir()
        servers.link_or_copy(server.base / "models", tmp_path / name / "models")
    with servers.Server(tmp_path / "c", env=env) as third:
        alone = [picture(third, graph) for graph in packed]
    assert alone[0] != alone[1]
    env["FEATHERWEIGHT_PACKED_CACHE"] = str(tmp_path / "packed")
    with servers.Server(tmp_path / "a", arguments=["--multi-user"], env=env) as first, \
            servers.Server(tmp_path / "b", env=env) as second, ThreadPoolExecutor(4) as pool:
        users = [first.another_client(), first.another_client(), second, second.another_client()]
        drawn = list(pool.map(lambda user, graph: picture(user, graph), users, packed * 2))
        assert drawn == alone * 2
    # beside the one entry lies when it was read, where one server was done before the other began;
    # where a system makes no links, each server has a file of its own
    entries = 1 if (tmp_path / "a" / "models").is_symlink() else 2
    assert len(list((tmp_path / "packed").glob("featherweight-*.gguf"))) == entries
    assert not list((tmp_path / "packed").glob("*.part"))


@pytest.mark.heavy
@pytest.mark.parametrize("cancels", [5, 50])
def test_a_cancel_at_any_moment_ends_the_prompt_or_comes_too_late_and_changes_no_other(
        server, graph, cancels):
    started = time.monotonic()
    expected = picture(server, graph)
    took, dice = time.monotonic() - started, random.Random(cancels)
    for number in range(cancels):
        server.post("/free", {"unload_models": True, "free_memory": True})
        timer = threading.Timer(dice.uniform(0, took), server.post, ("/interrupt", {}))
        timer.start()
        try:
            picture(server, changed(graph, seed=100 + number))
        except ServerError as error:
            assert str(error).endswith("was interrupted.")
        timer.join()
    assert picture(server, changed(graph, seed=99)) != expected
    assert picture(server, graph) == expected


def own_file(server, graph, name: str) -> tuple:
    """A model file of its own, and a graph that loads it."""
    path = server.base / "models" / "diffusion_models" / name
    shutil.copyfile(path.with_name(demo.MODEL_NAME), path)
    return path, loading(graph, name)


def test_a_file_that_is_replaced_or_cut_short_between_two_prompts_is_loaded_anew(server, graph):
    expected = picture(server, graph)
    path, graph = own_file(server, graph, "comes and goes.gguf")
    whole = path.read_bytes()
    assert is_same(picture(server, graph), expected)
    os.truncate(path, len(whole) // 2)
    assert "comes and goes.gguf" in refusal(server, changed(graph, seed=2))
    demo_files.write_model(path.with_suffix(".new"), "Q2_K")
    path.with_suffix(".new").replace(path)
    assert not is_same(picture(server, graph), expected)
    path.write_bytes(whole)
    assert is_same(picture(server, graph), expected)


def test_a_file_that_is_written_to_while_it_is_in_use_stops_the_run_and_the_next_one_is_right(
        server, graph):
    expected = picture(server, graph)
    path, graph = own_file(server, graph, "written to.gguf")
    size = path.stat().st_size
    sampler = next(node for node, spec in graph.items() if spec["class_type"] == "KSampler")

    def write(node, value, maximum):
        if node == sampler and value == 1:
            # cut short, it could end the server before the next step looks at it
            with open(path, "ab") as file:
                file.write(b"more")

    said = refusal(server, changed(graph, steps=200, seed=2), write)
    assert (
        f"written to.gguf was written to after it was loaded ({size} bytes then, {size + 4} now)"
        in said
    )
    assert picture(server, graph) == expected
