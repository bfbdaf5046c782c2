"""NF4 checkpoints through the real server: a picture with a LoRA, ids of shared workflows, and
plain errors."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from devtools import demo
from devtools.files import demo_files, tiny_models
from devtools.host.server import ServerError

pytest.importorskip("bitsandbytes", reason="it writes the files")

CHECKPOINT_LOADERS = {
    "FeatherweightLoadCheckpoint": "checkpoint_name", "CheckpointLoaderNF4": "ckpt_name"
}
MODEL_LOADERS = {"FeatherweightLoadDiffusionModel": "model_name", "UNETLoaderNF4": "unet_name"}


@pytest.fixture(scope="module")
def checkpoint(server):
    return demo_files.make_checkpoint(server.base)


def load(server, loader, key, name, output=0):
    """Queue one loader and a node that only shows what came out of it."""
    return server.queue({
        "1": {"class_type": loader, "inputs": {key: name}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", output]}},
    })


def test_an_nf4_checkpoint_with_a_lora_makes_a_picture(server, checkpoint):
    run, prompt = demo.run_workflow(server, workflow=demo.NF4_WORKFLOW)
    picture = server.pixels(run)
    assert picture.shape == (128, 128, 3) and picture.std(axis=(0, 1)).min() > 5
    line = next(match for match in demo.LOADED.finditer(server.log())
                if match["file"] == checkpoint.name)
    assert "NF4 32" in line["formats"]
    # the report is of the model, the file has the VAE too
    assert int(line["held"]) < 1.05 * checkpoint.stat().st_size

    lora = next(node for node in prompt.values() if "lora_name" in node["inputs"])
    lora["inputs"]["strength_model"] = 0.0
    plain = server.pixels(server.queue(prompt))
    assert np.abs(plain - picture).mean() > 1

    # The ids of other packs' workflows give the same picture, with the values those workflows have.
    loader = next(node for node in prompt.values()
                  if node["class_type"] == "FeatherweightLoadCheckpoint")
    loader.update(class_type="CheckpointLoaderNF4",
                  inputs={"ckpt_name": checkpoint.name, "bnb_dtype": "nf4"})
    assert np.array_equal(server.pixels(server.queue(prompt)), plain)


def test_a_missing_text_encoder_is_said_where_it_is_used(server, checkpoint):
    with pytest.raises(ServerError, match="does not contain a valid clip or text encoder") as error:
        server.queue({
            "1": {"class_type": "CheckpointLoaderNF4", "inputs": {"ckpt_name": checkpoint.name}},
            "2": {
                "class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a feather"}
            }, "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
        })
    assert str(error.value).startswith("CLIPTextEncode")


def test_a_missing_vae_is_said_where_it_is_used(server, checkpoint):
    path = checkpoint.with_name("model only.safetensors")
    demo_files.make_checkpoint(server.base, path.name, with_vae=False)
    with pytest.raises(ServerError, match="does not contain a valid VAE") as error:
        server.queue({
            "1": {"class_type": "CheckpointLoaderNF4", "inputs": {"ckpt_name": path.name}}, "2": {
                "class_type": "EmptySD3LatentImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 1}
            }, "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 2]}},
            "4": {
                "class_type": "SaveImage",
                "inputs": {"images": ["3", 0], "filename_prefix": "none"}
            }
        })
    assert str(error.value).startswith("VAEDecode")
    assert load(server, "CheckpointLoaderNF4", "ckpt_name", path.name).outputs


@pytest.mark.parametrize(("loader", "key"), (CHECKPOINT_LOADERS | MODEL_LOADERS).items())
def test_a_plain_file_loads_as_what_it_is(server, loader, key):
    folder = (
        server.base
        / "models"
        / ("checkpoints" if loader in CHECKPOINT_LOADERS else "diffusion_models")
    )
    folder.mkdir(exist_ok=True)
    tensors = tiny_models.flux(hidden=128, double_blocks=1, single_blocks=1)
    save_file(
        {
            f"model.diffusion_model.{name}": value.astype(np.float16)
            for name, value in tensors.items()
        }, folder / "plain.safetensors")
    assert load(server, loader, key, "plain.safetensors").outputs


@pytest.mark.parametrize(("loader", "key"), (CHECKPOINT_LOADERS | MODEL_LOADERS).items())
def test_a_damaged_file_is_one_plain_error_and_the_server_goes_on(server, checkpoint, loader, key):
    folder = (
        server.base
        / "models"
        / ("checkpoints" if loader in CHECKPOINT_LOADERS else "diffusion_models")
    )
    path = folder / "damaged nf4.safetensors"
    path.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(ServerError, match="damaged") as error:
        load(server, loader, key, path.name)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    assert load(server, "FeatherweightLoadCheckpoint", "checkpoint_name", checkpoint.name).outputs


def test_a_file_that_is_gone_is_named(server):
    with pytest.raises(ServerError, match="gone.safetensors is in none of the model folders"):
        load(server, "CheckpointLoaderNF4", "ckpt_name", "gone.safetensors")
