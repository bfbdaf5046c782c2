"""LoRAs through the real server: two stacked ones change the picture, a check shows a report, a bad
one is refused."""
import io

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from devtools import demo
from devtools.files import demo_files, tiny_models
from devtools.host.server import ServerError

FIRST, SECOND = demo_files.LORAS.values()
MODEL = {"class_type": demo.LOADER, "inputs": {"model_name": demo.MODEL_NAME}}


def apply_lora(server, **inputs):
    """Queue a LoRA on the demo model and a node that shows what is said about it; returns that."""
    run = server.queue({
        "1": MODEL, "2": {
            "class_type": "FeatherweightApplyLora", "inputs": {
                "model": ["1", 0], "strength_model": 1.0, "strength_clip": 1.0, "block_weights": "",
                "misfits": "skip", **inputs
            }
        }, "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}}
    })
    return run.outputs["3"]["text"][0]


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
        apply_lora(server, lora_name=path.name)
    assert "\n" not in str(error.value)
    assert np.array_equal(server.pixels(demo.run_workflow(server)[0]), plain)


@pytest.mark.parametrize(
    ("case", "message"), [("cut", "damaged or incomplete"), ("model", "a diffusion model")]
)
def test_a_file_that_is_no_lora_is_refused(server, case, message):
    folder = server.base / "models" / "loras"
    good, path = folder / FIRST, folder / f"{case}.safetensors"
    path.write_bytes(good.read_bytes()[:5000])
    if case == "model":
        save_file(
            {
                name: value
                for name, value in tiny_models.flux(hidden=128).items() if value.ndim == 2
            }, path)
    with pytest.raises(ServerError, match=message) as error:
        apply_lora(server, lora_name=path.name)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_a_rule_that_names_nothing_is_refused(server):
    with pytest.raises(ServerError,
                       match="'tripple=1' names nothing in this model. Its blocks are"):
        apply_lora(server, lora_name=SECOND, block_weights="tripple=1")


def test_the_report_is_an_output(server):
    text = apply_lora(server, lora_name=SECOND, strength_model=0.5,
                      block_weights="preset:last-third")
    assert text.splitlines()[0] == "This LoRA for Flux.1 fits: all 20 layers match the model."
    assert "model 0.5" in text and "preset:last-third" in text
