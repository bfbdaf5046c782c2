"""Loaders on the real server: a bar while they load, what they hold as a text afterwards, and an
end when cancelled."""
import re

import numpy as np
import pytest
from safetensors.torch import save_file

from devtools import demo
from devtools.files import demo_files, tiny_models
from devtools.files.gguf_files import write_random_gguf
from devtools.host.server import ServerError

LOADERS = {
    "FeatherweightLoadDiffusionModel": {"model_name": demo.MODEL_NAME},
    "UnetLoaderGGUF": {"unet_name": demo.MODEL_NAME},
    "UnetLoaderGGUFAdvanced": {"unet_name": demo.MODEL_NAME},
    "UNETLoaderNF4": {"unet_name": demo.MODEL_NAME}, "FeatherweightLoadTextEncoder": {
        "text_encoder_1": demo_files.ENCODER_NAME, "type": "stable_diffusion"
    }, "CLIPLoaderGGUF": {"clip_name": demo_files.ENCODER_NAME, "type": "stable_diffusion"}
}


def load(server, loader, inputs, on_progress=None):
    """Queue one loader, as node 1, and a node that only shows what came out of it. The host has
    kept nothing of it before."""
    server.forget()
    return server.queue({
        "1": {"class_type": loader, "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }, on_progress)


@pytest.fixture
def computes_in() -> str:
    """What a loader of a model says of its arithmetic."""
    return (r", computes exactly in b?float(?:16|32)"
            r"(?:(?<=bfloat16), to which F16 weights are rounded)?")


@pytest.mark.parametrize(("loader", "inputs"), LOADERS.items())
def test_a_loader_shows_a_bar_and_then_what_it_holds(server, loader, inputs, computes_in):
    seen = []
    run = load(server, loader, inputs, lambda node, value, maximum: seen.append(
        (node, value, maximum)))
    bar = [(value, maximum) for node, value, maximum in seen if node == "1" and maximum]
    assert bar[0][0] == 0 and bar[-1][0] == bar[-1][1] > 0
    *progress, text = run.texts["1"]
    stages = list(dict.fromkeys(line.partition(":")[0] for line in progress))
    converting = ["converting"] if "converting" in stages else []
    assert stages == ["reading", *converting, "building the model"]
    found = re.fullmatch(
        r"Q8_0((?: \+ B?F(?:16|32))*), ([\d.]+) MB in memory, dequantized by"
        r" (?:CPU kernels|torch)(.*)", text)
    is_encoder = "clip" in loader.lower() or "TextEncoder" in loader
    assert re.fullmatch(", computes exactly" if is_encoder else computes_in, found[3])
    held = [
        line for line in re.findall(r"Featherweight\] (.*) bytes in memory", server.log())
        if line.startswith((demo.MODEL_NAME, demo_files.ENCODER_NAME))
        and line.split()[0].strip(":") in inputs.values()
    ]
    assert float(found[2]) == pytest.approx(int(held[-1].split()[-1]) / 1e6, rel=0.01)


def test_a_cached_run_and_the_history_have_the_text_and_the_list_of_jobs_has_no_preview_of_it(
        server):
    loader = "UnetLoaderGGUF"
    prompt = {"1": {"class_type": loader, "inputs": LOADERS[loader]},
              "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    server.forget()
    text = server.queue(prompt).texts["1"][-1]
    again = server.queue(prompt)
    assert again.texts["1"] == [text]  # nothing else is shown: it was not loaded
    assert again.outputs["1"] == {"featherweight_text": [[text]]}
    job = server.get_json(f"/api/jobs/{again.prompt_id}")
    assert job["preview_output"]["nodeId"] == "2"
    assert job["outputs_count"] <= 1  # ComfyUI 0.24 counts a text that is previewed


def test_a_checkpoint_shows_what_each_part_holds(server, computes_in):
    pytest.importorskip("bitsandbytes", reason="it writes the file")
    path = demo_files.make_checkpoint(server.base)
    for loader, key in (
        ("FeatherweightLoadCheckpoint", "checkpoint_name"),
        ("CheckpointLoaderNF4", "ckpt_name"),
    ):
        text = load(server, loader, {key: path.name}).texts["1"][-1]
        assert re.fullmatch(
            r"Model: NF4[^\n]*, [\d.]+ MB in memory, dequantized by (?:CPU kernels|torch)"
            rf"{computes_in}"
            r"\nVAE: B?F\w+, [\d.]+ MB in memory",
            text)


def test_a_model_in_bf16_is_packed_while_it_loads_and_draws_what_the_packed_file_draws(
        server, computes_in):
    path = server.base / "models" / "diffusion_models" / "dense.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in demo_files.flux().items()}, path)
    run, prompt = demo.run_workflow(server)
    expected = server.pixels(run)
    loader = next(node for node in prompt.values() if node["class_type"] == demo.LOADER)
    loader["inputs"] |= {"model_name": path.name, "pack_to": "Q4_K"}
    run = server.queue(prompt)
    [text] = (text for texts in run.texts.values() for text in texts if "packed from" in text)
    assert re.fullmatch(
        r"Q4_K \+ [^,]*, [\d.]+ MB in memory, packed from BF16 in \d+ s,"
        r" loss: small \([\d.]+ % of the weights\), dequantized by"
        rf" (?:CPU kernels|torch){computes_in}", text)
    assert float(text.split(", ")[1].split()[0]) < path.stat().st_size / 1e6 * 0.6
    assert np.abs(server.pixels(run) - expected).mean() < 0.5 * expected.std()


def test_a_load_that_is_cancelled_ends_in_the_loader_and_can_be_run_again(server):
    path = server.base / "models" / "diffusion_models" / "many layers.gguf"
    write_random_gguf(path, tiny_models.flux_shapes(128, 40, 80), "Q8_0")
    inputs = {"model_name": path.name}

    def cancel(node, value, maximum):
        if node == "1" and maximum and value == 0:
            server.post("/interrupt", {})

    with pytest.raises(ServerError, match="FeatherweightLoadDiffusionModel was interrupted"):
        load(server, "FeatherweightLoadDiffusionModel", inputs, cancel)
    assert load(server, "FeatherweightLoadDiffusionModel", inputs).texts["1"]
