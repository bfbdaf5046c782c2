"""Pack Model in a workflow: the model of ComfyUI's loader in two branches, a LoRA that is turned,
and what the node shows."""
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from devtools import demo
from devtools.files import demo_files

NAME = "featherweight_pack_model_bf16.safetensors"
PACKED = "weights of"  # in the log


@pytest.fixture
def prompt(server):
    """The demo's with ComfyUI's loader, a LoRA, Pack Model, and another picture of the model before
    it; "pack" and "lora" are nodes."""
    path = server.base / "models" / "diffusion_models" / NAME
    save_file({name: torch.as_tensor(value).bfloat16()
               for name, value in demo_files.flux().items()}, path)
    _, prompt = demo.run_workflow(server)
    loader, sampler, save = (next(node for node, spec in prompt.items() if spec["class_type"] == of)
                             for of in (demo.LOADER, "KSampler", "SaveImage"))
    lora = next(path.name for path in (server.base / "models" / "loras").iterdir()
                if path.name.startswith("featherweight_demo_lora"))
    decoder = prompt[save]["inputs"]["images"][0]
    prompt[loader] = {"class_type": "UNETLoader",
                      "inputs": {"unet_name": NAME, "weight_dtype": "default"}}
    prompt["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": {
        "model": [loader, 0], "lora_name": lora, "strength_model": 1.0}}
    prompt["pack"] = {"class_type": "FeatherweightPackModel", "inputs": {
        "model": ["lora", 0], "pack_to": "Q8_0", "size_gb": 6.0, "loras": "stay LoRAs (exact)"}}
    prompt["before"] = {**prompt[sampler], "inputs": {**prompt[sampler]["inputs"],
                                                      "model": ["lora", 0]}}
    prompt["decoded"] = {**prompt[decoder], "inputs": {**prompt[decoder]["inputs"],
                                                       "samples": ["before", 0]}}
    prompt["saved"] = {**prompt[save], "inputs": {**prompt[save]["inputs"],
                                                  "images": ["decoded", 0]}}
    prompt[sampler]["inputs"]["model"] = ["pack", 0]
    return prompt


def pictures(server, run) -> list[np.ndarray]:
    return [server.pixels(run, node) for node, output in run.outputs.items()
            if "images" in output]


def test_a_model_is_packed_once_and_is_used_packed_and_unpacked(server, prompt):
    server.forget()
    before = len(server.log())
    run = server.queue(prompt)
    packed, plain = pictures(server, run)
    assert 0 < np.abs(packed - plain).mean() < 3
    assert "Q8_0" in run.texts["pack"][-1] and "packed from BF16 in" in run.texts["pack"][-1]
    assert server.log()[before:].count(PACKED) == 1
    prompt["lora"]["inputs"]["strength_model"] = 0.5
    turned = pictures(server, server.queue(prompt))
    assert np.abs(turned[0] - packed).mean() > 1 and np.abs(turned[0] - turned[1]).mean() < 3
    assert server.log()[before:].count(PACKED) == 1
    prompt["pack"]["inputs"]["loras"] = "round in"
    rounded = pictures(server, server.queue(prompt))
    assert np.abs(rounded[0] - turned[0]).mean() < 3
    assert server.log()[before:].count(PACKED) == 2
