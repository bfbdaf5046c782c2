"""LoRAs through the real server: two stacked ones change the picture, a check shows a report, one
of another model is refused."""
import io

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from devtools import demo
from devtools.files import tiny_models
from devtools.host.server import ServerError


@pytest.fixture(scope="module")
def plain(server):
    return server.pixels(demo.run_workflow(server)[0])


def test_the_workflow_with_two_loras_changes_the_picture(server, plain):
    run, prompt = demo.run_workflow(server, workflow=demo.LORA_WORKFLOW)
    both = server.pixels(run)
    assert both.shape == plain.shape and np.abs(both - plain).mean() > 2

    check = next(node for node, spec in prompt.items()
                 if spec["class_type"] == "FeatherweightCheckLora")
    text, picture = run.outputs[check]["text"][0], run.outputs[check]["images"][0]
    assert text.startswith("This LoRA for Flux.1 fits: all 20 layers match the model.")
    assert run.texts[check][-1] == text  # what the editor shows on the node
    assert Image.open(io.BytesIO(server.image(picture))).size[0] > 600

    # Each of the two does something of its own.
    loaders = {
        spec["class_type"]: node for node, spec in prompt.items() if "lora_name" in spec["inputs"]
    }
    for loader in ("LoraLoaderModelOnly", "FeatherweightApplyLora"):
        prompt[loaders[loader]]["inputs"]["strength_model"] = 0.0
        assert np.abs(server.pixels(server.queue(prompt)) - both).mean() > 1
        prompt[loaders[loader]]["inputs"]["strength_model"] = 1.0
    assert "lora key not loaded" not in server.log()


def test_a_lora_of_another_model_is_refused_and_the_server_goes_on(server, plain):
    path = server.base / "models" / "loras" / "too wide.safetensors"
    lora = tiny_models.flux_lora(0, "double_blocks", "lora_unet_{flat}", ".lora_down.weight",
                                 ".lora_up.weight", hidden=512)
    save_file(lora, path)
    sentence = r"made for .*\(512 wide\); the model is Flux.1 \(256 wide\): it cannot be used"
    with pytest.raises(ServerError, match=sentence) as error:
        server.queue({
            "1": {"class_type": demo.LOADER, "inputs": {"model_name": demo.MODEL_NAME}},
            "2": {"class_type": "FeatherweightApplyLora",
                  "inputs": {"model": ["1", 0], "lora_name": path.name, "strength_model": 1.0,
                             "strength_clip": 1.0, "block_weights": "", "misfits": "skip"}},
            "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}}})
    assert "\n" not in str(error.value)
    assert np.array_equal(server.pixels(demo.run_workflow(server)[0]), plain)
