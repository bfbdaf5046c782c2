"""A real ComfyUI server without this pack opens the files that Save Packed Model writes in
ComfyUI's own types."""
import numpy as np
import pytest
from checkpoint_parts import MODEL, stable_diffusion
from pack_api import HOST_TYPES, source_of_file
from safetensors.torch import save_file
from saving import save

from devtools.host.server import PACK, Server
from featherweight.loaders.packing.checkpoint_source import source_of_checkpoint_file

EXACT = "exact.safetensors"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The server, with a model alone and a whole checkpoint of each type."""
    base = tmp_path_factory.mktemp("alone")
    models, checkpoints = (base / "models" / name for name in ("diffusion_models", "checkpoints"))
    for folder in (models, checkpoints):
        folder.mkdir(parents=True)
    tensors = stable_diffusion()
    save_file(tensors, checkpoints / EXACT)
    save_file({name: values for name, values in tensors.items() if name.startswith(MODEL)},
              models / EXACT)
    for kind in HOST_TYPES:
        save(source_of_checkpoint_file(checkpoints / EXACT), checkpoints / f"{kind}.safetensors",
             kind)
        save(source_of_file(models / EXACT), models / f"{kind}.safetensors", kind)
    with Server(base, with_pack=False) as server:
        yield server


def drawn(server, checkpoint: str, model: str | None = None, seed: int = 1) -> np.ndarray:
    """A picture by a checkpoint, or by another model with its text encoder and VAE."""
    nodes = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a feather"}},
        "3": {"class_type": "EmptyLatentImage",
              "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0],
            "latent_image": ["3", 0], "seed": seed, "steps": 2, "cfg": 1.0,
            "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }
    if model is not None:
        nodes["7"] = {"class_type": "UNETLoader",
                      "inputs": {"unet_name": model, "weight_dtype": "default"}}
        nodes["4"]["inputs"]["model"] = ["7", 0]
    return server.pixels(server.queue(nodes))


@pytest.mark.parametrize("kind", HOST_TYPES)
def test_the_server_draws_with_a_model_and_a_checkpoint_of_each_type(alone, kind):
    whole = drawn(alone, f"{kind}.safetensors")
    assert np.array_equal(drawn(alone, EXACT, f"{kind}.safetensors"), whole)
    exact, other = drawn(alone, EXACT), drawn(alone, EXACT, seed=2)
    assert abs(whole - exact).mean() < 0.5 * abs(other - exact).mean()
    assert not any(PACK in node["python_module"] for node in alone.object_info().values())
