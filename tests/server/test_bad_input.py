"""Files that cannot be loaded: the node says why in plain words, nothing else changes, and the
server goes on serving."""
import json
import urllib.error

import pytest

from devtools import demo
from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from devtools.host.server import ServerError

# name -> (the file's bytes made from a good file's, what the message must say beside the file's
# name)
DAMAGED = {
    "empty": (lambda good: b"", "empty"),
    "web page": (lambda good: b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "data cut": (lambda good: good[:-1000], "incomplete"),
}


def load(server, name, loader=demo.LOADER, key="model_name"):
    """Queue one loader and a node that only shows what came out of it."""
    return server.queue({
        "1": {"class_type": loader, "inputs": {key: name}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    })


def models(server):
    return server.base / "models" / "diffusion_models"


def assert_still_serving(server):
    run, _ = demo.run_workflow(server)
    assert any("images" in output for output in run.outputs.values())


@pytest.mark.parametrize(("case", "loader", "key"), [
    ("empty", demo.LOADER, "model_name"), ("web page", "UnetLoaderGGUF", "unet_name"),
    ("data cut", demo.LOADER, "model_name")])
def test_a_damaged_file_is_one_plain_error(server, case, loader, key):
    damage, message = DAMAGED[case]
    path = models(server) / f"damaged {case}.gguf"
    path.write_bytes(damage((models(server) / demo.MODEL_NAME).read_bytes()))
    with pytest.raises(ServerError) as error:
        load(server, path.name, loader, key)
    assert path.name in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_told_once_each_at_inputs_that_are_wrong(server):
    """All of a node's in one sentence; nothing stands at its other inputs."""
    loaders = {
        "1": {"class_type": demo.LOADER, "inputs": {
            "model_name": demo.MODEL_NAME, "module_name": "no module.gguf"}},
        "2": {"class_type": "DualCLIPLoaderGGUF", "inputs": {
            "clip_name1": "no clip.gguf", "clip_name2": "no t5.gguf", "type": "flux"}},
    }
    shown = {f"{node} shown": {"class_type": "PreviewAny", "inputs": {"source": [node, 0]}}
             for node in loaders}
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/prompt", {"prompt": loaders | shown})
    errors = {
        node: [(error["extra_info"]["input_name"], error["details"]) for error in entry["errors"]]
        for node, entry in json.loads(refused.value.read())["node_errors"].items()}
    (module, message), = errors["1"]
    assert module == "module_name" and "no module.gguf" in message
    assert {name: "not in" in message for name, message in errors["2"]} == {
        "clip_name1": True, "clip_name2": True}


def test_the_details_of_an_error_begin_with_a_short_name(server):
    """ComfyUI shows the exception's full name, twice, before its message."""
    (models(server) / "nothing.gguf").write_bytes(b"")
    with pytest.raises(ServerError):
        load(server, "nothing.gguf")
    latest, = json.loads(server.get("/history?max_items=1")).values()
    error, = (data for event, data in latest["status"]["messages"] if event == "execution_error")
    assert error["exception_type"] == "featherweight_errors.WeightFileError"


def test_a_missing_file_of_a_second_stage_is_told_before_the_first_draws(server):
    _, prompt = demo.run_workflow(server)
    sampler = next(node for node, spec in prompt.items() if spec["class_type"] == "KSampler")
    inputs = prompt[sampler]["inputs"]
    inputs["seed"] += 1
    prompt |= {
        "second": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "wan\\low noise.gguf"}},
        "again": {
            "class_type": "KSampler",
            "inputs": inputs | {"model": ["second", 0], "latent_image": [sampler, 0]}
        }
    }
    decoder = next(spec for spec in prompt.values() if spec["class_type"] == "VAEDecode")
    decoder["inputs"]["samples"] = ["again", 0]
    seen = []
    with pytest.raises(ServerError, match="low noise.gguf' not in"):
        server.queue(prompt, lambda *progress: seen.append(progress))
    assert not seen


@pytest.mark.parametrize("name", [None, ""])
def test_no_file_is_one_plain_error(server, name):
    said = "No file is picked. Pick one" if name is None else "unet_name: '' not in"
    with pytest.raises(ServerError, match=said):
        load(server, name, "UnetLoaderGGUF", "unet_name")


def test_the_server_goes_on_serving_after_all_of_it(server):
    assert_still_serving(server)
    assert "Traceback" not in server.log().split("got prompt")[-1]


def test_backslash_paths_of_shared_workflows_run(server):
    folder = models(server) / "flux"
    folder.mkdir(exist_ok=True)
    write_gguf(folder / "sub.gguf", tiny_models.flux(hidden=128, double_blocks=1, single_blocks=1),
               lambda name, values: "Q8_0")
    assert load(server, "flux\\sub.gguf", "UnetLoaderGGUF", "unet_name").outputs
    assert load(server, "flux\\sub.gguf", "UnetLoaderGGUFAdvanced", "unet_name").outputs
