"""What only the real server can show: the pack imports, nodes and help pages are there, the demo
makes a picture."""
import json
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from pack_nodes import current_nodes, ids_in_source
from safetensors.torch import save_file

from devtools import demo, llms_text
from devtools.files import demo_files
from devtools.host.server import PACK
from featherweight.ops.layers import fast_on_cpu


def test_every_pack_imports(server):
    assert "IMPORT FAILED" not in server.log()


def test_every_node_is_registered(server):
    info = server.object_info()
    registered = {
        name for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACK}"
    }
    assert demo.LOADER in registered
    assert registered == set(ids_in_source())


# what the prompts of llms.txt name -> what the demo has
DEMO = {
    "z_image_turbo-Q4_K_M.gguf": demo.MODEL_NAME,
    "z_image_turbo_bf16.safetensors": "dense.safetensors",
    "qwen_3_4b.safetensors": demo_files.ENCODER_NAME, "ae.safetensors": demo_files.VAE_NAME,
    "lora.safetensors": demo_files.LORAS["ink"]
}


@pytest.fixture(scope="module")
def dense_model(server):
    """Written once: Windows writes over no file that a model maps."""
    save_file({name: tensor.bfloat16() for name, tensor in demo_files.flux().items()},
              server.base / "models" / "diffusion_models" / "dense.safetensors")


@pytest.mark.parametrize("task", llms_text.prompts())
def test_a_prompt_of_llms_txt_runs(task, server, dense_model):
    prompt = llms_text.prompts()[task]
    for node in prompt.values():
        node["inputs"] |= {name: DEMO[value] for name, value in node["inputs"].items()
                           if isinstance(value, str) and value in DEMO}
        node["inputs"] |= {name: 128 for name in ("width", "height") if name in node["inputs"]}
    # CLIP-L alone is of several models, Qwen3 4B of one
    if "2" in prompt and prompt["2"]["class_type"] == "FeatherweightLoadTextEncoder":
        prompt["2"]["inputs"]["type"] = "stable_diffusion"
    run = server.queue(prompt)
    if task == "save a packed model":
        assert "ComfyUI_Q4_K_00001_.gguf" in "".join(run.texts["2"])
    else:
        assert server.pixels(run).std(axis=(0, 1)).min() > 5


@pytest.mark.parametrize("node_id", [node.GET_SCHEMA().node_id for node in current_nodes()])
def test_every_node_has_a_help_page(server, node_id):
    """In English also under its language, which the editor asks for first."""
    page = server.get(f"/extensions/{PACK}/docs/{node_id}.md")
    assert page.strip() and page == server.get(f"/extensions/{PACK}/docs/{node_id}/en.md")


def test_the_editor_gets_no_page_in_its_language_where_it_shall_take_the_english_one(server):
    assert server.get(f"/extensions/{PACK}/docs/{demo.LOADER}/ja.md").strip()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.get(f"/extensions/{PACK}/docs/UnetLoaderGGUF/ja.md")


def test_demo_workflow_makes_a_picture(server):
    # a test before may have drawn the same picture
    server.post("/free", {"unload_models": True, "free_memory": True})
    progress = []
    run, prompt = demo.run_workflow(server, lambda *step: progress.append(step))
    pixels = server.pixels(run)
    assert pixels.shape == (128, 128, 3)
    assert pixels.std(axis=(0, 1)).min() > 5
    sampler = next(node for node, spec in prompt.items() if spec["class_type"] == "KSampler")
    assert (sampler, demo.STEPS, demo.STEPS) in progress

    line = next(line for line in demo.LOADED.finditer(server.log())
                if line["file"] == demo.MODEL_NAME)
    size = (server.base / "models" / "diffusion_models" / demo.MODEL_NAME).stat().st_size
    assert int(line["disk"]) == pytest.approx(size, rel=0.01)  # weights without the file's header
    assert int(line["held"]) == pytest.approx(size, rel=0.01)
    assert run.seconds_per_step(sampler) > 0

    # Both the model and the text encoder are packed, and what is written in the prompt is seen in
    # the picture.
    assert f"{demo_files.ENCODER_NAME}: CLIP-L" in server.log()
    text = next(node for node in prompt.values() if node["class_type"] == "CLIPTextEncode")
    text["inputs"]["text"] = "a blue house at noon"
    assert np.abs(server.pixels(server.queue(prompt)) - pixels).mean() > 10


@pytest.mark.not_on_fake_gpus(reason="they have no units for int8")
@pytest.mark.skipif(
    not fast_on_cpu.multiplies_integers(torch.device("cpu")), reason="the CPU has no units for int8"
)
def test_compute_int8_changes_the_picture_a_little(server):
    run, prompt = demo.run_workflow(server)
    loader = next(node for node in prompt.values() if node["class_type"] == demo.LOADER)
    assert loader["inputs"]["compute"] == "automatic"
    loader["inputs"]["compute"] = "int8"
    change = np.abs(server.pixels(server.queue(prompt)) - server.pixels(run)).mean()
    assert 0 < change < 3


def test_a_model_unloaded_by_hand_is_used_again(server):
    _, prompt = demo.run_workflow(server, lambda *step: None)
    server.post("/free", {"unload_models": True})
    sampler = next(node for node in prompt.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["seed"] += 1
    assert any(output.get("images") for output in server.queue(prompt).outputs.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is mapped where Linux shows it")
@pytest.mark.not_on_fake_gpus(reason="the weights are on the GPU alone")
def test_free_memory_lets_go_of_the_mapped_files(server):
    def is_mapped() -> bool:
        maps = Path(f"/proc/{server.process.pid}/maps").read_text(encoding="utf-8")
        return demo.MODEL_NAME in maps

    demo.run_workflow(server)
    assert is_mapped()
    server.forget()
    assert not is_mapped()


def test_a_prompt_with_measure_speed_runs_and_says_what_to_use_instead(server):
    """Saved with an earlier version, where it may be the only output node."""
    prompt = {
        "1": {"class_type": demo.LOADER, "inputs": {"model_name": demo.MODEL_NAME}},
        "2": {"class_type": "EmptyLatentImage",
              "inputs": {"width": 512, "height": 512, "batch_size": 1}},
        "3": {"class_type": "FeatherweightMeasureSpeed",
              "inputs": {"model": ["1", 0], "latent": ["2", 0]}},
    }
    shown, = server.queue(prompt).texts["3"]
    assert "measures nothing any more" in shown and "ComfyUI's log" in shown
    run = server.queue(prompt | {
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
        "image": {"class_type": "PreviewImage", "inputs": {"images": ["3", 1]}},
        "json": {"class_type": "PreviewAny", "inputs": {"source": ["3", 2]}}})
    assert run.outputs["report"]["text"] == [shown]
    assert json.loads(run.outputs["json"]["text"][0]) == shown
    assert server.pixels(run, "image").shape == (64, 64, 3)
