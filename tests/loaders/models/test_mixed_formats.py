"""One file whose layers are in many of ComfyUI's formats, drawn for each layer."""
import json
import random

import comfy.sd
import pytest
import torch
from host_formats import ASYMMETRIC, in_host_format
from patched_models import LIMIT, error_by_effect, lora_for, patched, relative, run, tiny_flux
from published_forms import ROTATION, SETTINGS
from safetensors.torch import save_file

from featherweight.loaders.comfyui.load_check import load_notes
from featherweight.loaders.models.compute_choice import AUTOMATIC, EXACTLY, FAST, MEANINGS
from featherweight.loaders.models.diffusion import load_diffusion_model

pytestmark = pytest.mark.usefixtures("small_models")

FORMATS = ("nvfp4", "mxfp8", "float8_e4m3fn", "float8_e5m2", "int8_tensorwise", ASYMMETRIC)
PLAIN = (torch.bfloat16, torch.float16, torch.float32)


def write(path: str, draw: random.Random) -> dict[str, torch.Tensor]:
    """Writes a small Flux, its marks as tensors, in the metadata or as both; returns its values."""
    tensors, values, layers = {}, {}, {}
    marks = draw.choice(("tensors", "metadata", "both"))
    for name, value in tiny_flux(draw.randrange(100)).items():
        if value.ndim < 2 or value.shape[1] % ROTATION or value.shape[0] % 16 or draw.random() < .2:
            tensors[name] = value.to(draw.choice(PLAIN))
            values[name] = tensors[name].float()
            continue
        format_name, layer = draw.choice(FORMATS), name.removesuffix(".weight")
        is_rotated = format_name == "int8_tensorwise" and draw.random() < 0.6
        settings = {"convrot": True, "convrot_groupsize": ROTATION} if is_rotated else {}
        parts, values[name] = in_host_format(name, value, format_name, **settings)
        mark = parts.pop(f"{layer}.comfy_quant")
        layers[layer] = json.loads(bytes(mark.tolist()))
        tensors |= {key: part.view(torch.uint8) if part.dtype == torch.float8_e8m0fnu else part
                    for key, part in parts.items()}
        if marks != "metadata":
            tensors[f"{layer}.comfy_quant"] = mark
    metadata = {SETTINGS: json.dumps({"format_version": "1.0", "layers": layers})}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path,
              None if marks == "tensors" else metadata)
    return values


@pytest.mark.parametrize("seed", range(6))
def test_each_layer_is_computed_by_its_own_format(seed, tmp_path):
    draw = random.Random(random.randrange(1 << 30))
    path = str(tmp_path / "model.safetensors")
    values = write(path, draw)
    dense = comfy.sd.load_diffusion_model_state_dict(dict(values))
    lora = (lora_for(values, draw.choice(["lora", "dora", "loha", "lokr"])), 0.8)
    without, expected = run(dense), run(patched(dense, lora))
    for compute in (EXACTLY, AUTOMATIC, FAST):
        model = load_diffusion_model(path, MEANINGS[compute].arithmetic,
                                     host_formats=MEANINGS[compute].host_formats)
        assert not load_notes(model)
        assert relative(run(model), without) < (1e-4 if compute != FAST else 0.1), compute
        assert error_by_effect(run(patched(model, lora)), expected, without) < LIMIT, compute
