"""ControlNets, model patches and CLIP vision models are packed from their files, and load again."""
import math

import controlnets
import model_patches
import pytest
import torch
import vision_models
from families import relative_error
from pack_api import open_weights, plan_file, source_of_file
from safetensors.torch import save_file

from featherweight.loaders.models.clip_vision import load_clip_vision
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.models.model_patch import load_model_patch
from featherweight.loaders.packing.save import save

pytestmark = pytest.mark.usefixtures("small_models")

# name -> (weights of a file, metadata, loader, least share of the values that Q8_0 packs)
FILES = {
    "Z-Image Fun": (model_patches.z_image_fun, {}, load_model_patch, 0.9),
    "Qwen DiffSynth": (model_patches.qwen, {}, load_model_patch, 0.8),
    "Uni3C": (model_patches.uni3c, {}, load_model_patch, 0.5),
    "SUPIR": (model_patches.supir, {}, load_model_patch, 0.3),
    "LLLite": (model_patches.lllite, {"lllite.inpaint_masked_input": "true"}, load_model_patch, 0),
    "CLIP H": (vision_models.VISION_MODELS["CLIP H"], {}, load_clip_vision, 0.6),
    "SigLIP": (vision_models.VISION_MODELS["SigLIP"], {}, load_clip_vision, 0.8),
    "DINOv2": (vision_models.VISION_MODELS["DINOv2 large"], {}, load_clip_vision, 0.6),
    "Flux ControlNet of diffusers": (controlnets.flux_diffusers, {}, load_controlnet, 0.6),
}


@pytest.mark.parametrize("name", FILES)
def test_a_side_model_is_packed_under_its_own_names_and_loads(name, tmp_path, monkeypatch):
    model_patches.shrink(monkeypatch)
    vision_models.shrink(monkeypatch)
    weights, metadata, load, share = FILES[name]
    save_file(dict(weights()), tmp_path / "model.safetensors", metadata=metadata)
    source = source_of_file(tmp_path / "model.safetensors")
    save(plan_file(source, str(tmp_path / "a.gguf"), "Q8_0"))
    file = open_weights(tmp_path / "a.gguf")
    stored = file.state_dict()
    assert file.entries.keys() == weights().keys()
    assert metadata.items() <= file.text_metadata.items()
    packed = [key for key, entry in file.entries.items() if entry.format == "Q8_0"]
    values = {key: math.prod(value.shape) for key, value in weights().items()}
    assert sum(values[key] for key in packed) >= share * sum(values.values())
    for key in packed:
        assert relative_error(stored[key].dequantize(), weights()[key]) < 0.01
    loaded = load(str(tmp_path / "a.gguf"))
    if name == "LLLite":
        assert loaded.model.inpaint_masked_input and isinstance(loaded.model, torch.nn.Module)
