"""One file whose layers are in many of ComfyUI's formats, drawn for each layer."""
import random

import comfy.sd
import pytest
import torch
from host_formats import ASYMMETRIC
from pack_api import AUTOMATIC, EXACT, FAST, load_diffusion_model, load_notes
from patched_models import LIMIT, error_by_effect, lora_for, patched, relative, run, tiny_flux
from published_files import save
from published_forms import Encoded, int8_convrot, joined, marked, plain

from featherweight.loaders.comfyui.compute import FOLLOW_COMPUTE

pytestmark = pytest.mark.usefixtures("small_models")

FORMATS = ("nvfp4", "mxfp8", "float8_e4m3fn", "float8_e5m2", "int8_tensorwise", ASYMMETRIC)
# each of which draws where its marks stand, and what is not in its formats
ENCODERS = (marked(*FORMATS, mixed=True), int8_convrot, plain(torch.float16))


def drawn(draw: random.Random) -> Encoded:
    """A small Flux, an encoder and a format drawn for each of its weights."""
    shares = [{} for _ in ENCODERS]
    for name, value in tiny_flux(draw.randrange(100)).items():
        draw.choices(shares, (6, 3, 1))[0][name] = value
    return joined(*(encode(share, draw) for encode, share in zip(ENCODERS, shares)))


@pytest.mark.parametrize("seed", range(6))
def test_each_layer_is_computed_by_its_own_format(seed, tmp_path):
    draw = random.Random(random.randrange(1 << 30))
    encoded = drawn(draw)
    path, values = str(save(tmp_path / "model.safetensors", encoded)), encoded.values
    dense = comfy.sd.load_diffusion_model_state_dict(dict(values))
    lora = (lora_for(values, draw.choice(["lora", "dora", "loha", "lokr"])), 0.8)
    without, expected = run(dense), run(patched(dense, lora))
    for compute in (EXACT, AUTOMATIC, FAST):
        model = load_diffusion_model(path, compute=compute, host_formats=FOLLOW_COMPUTE)
        assert not load_notes(model)
        assert relative(run(model), without) < (1e-4 if compute != FAST else 0.1), compute
        assert error_by_effect(run(patched(model, lora)), expected, without) < LIMIT, compute
