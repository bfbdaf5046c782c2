"""What a VAE on a CPU computes in."""
import random

import comfy.cli_args
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

from demo_model import scenes
from devtools.files import demo_files
from featherweight.loaders.checkpoint import load_checkpoint
from featherweight.loaders.compute_choice import BFLOAT16_VAES, VAE_DTYPE_FLAGS, vae_dtype
from featherweight.loaders.vae import load_vae
from featherweight.ops import cpu_features

CPU = torch.device("cpu")
PICTURES = 8
LEAST_DECIBELS = 45
AUTOENCODER = {
    "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0
}


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """ComfyUI as it is started without flags for VAEs, on a CPU that multiplies bfloat16."""
    for flag in VAE_DTYPE_FLAGS:
        monkeypatch.setattr(comfy.cli_args.args, flag, False)
    monkeypatch.setattr(cpu_features, "multiplies_bfloat16", lambda: True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A file of the demo's autoencoder: of TAESD's layers, and trained."""
    path = tmp_path_factory.mktemp("vae") / demo_files.VAE_NAME
    save_file(demo_files.vae(), path)
    return str(path)


def drawings() -> torch.Tensor:
    """Pictures that the autoencoder was trained for: (PICTURES, height, width, 3) in 0 to 1."""
    training, other = scenes.all_scenes()
    every = (training + other)[::len(training + other) // PICTURES][:PICTURES]
    images = np.stack([scenes.draw(scene, random.Random(1)) for scene in every])
    return torch.from_numpy(images) / 255


def decibels(picture, exact):
    return -10 * (picture - exact).square().mean().log10().item()


def test_each_picture_in_bfloat16_is_within_45_decibels_of_float32(trained):
    vae, of_the_host = load_vae(trained), comfy.sd.VAE(sd=demo_files.vae())
    assert {type(vae.first_stage_model)} == set(BFLOAT16_VAES)
    assert vae.vae_dtype == torch.bfloat16 and of_the_host.vae_dtype == torch.float32
    pictures = drawings()
    latent = of_the_host.encode(pictures)
    exact = of_the_host.decode(latent)
    assert decibels(exact, pictures) > 25  # it does what it was trained for
    for encoded in (latent, vae.encode(pictures)):
        decoded = vae.decode(encoded)
        assert decoded.dtype == exact.dtype
        assert all(LEAST_DECIBELS < decibels(*pair) < 70 for pair in zip(decoded, exact))


def test_its_weights_take_16_bits(trained):
    vae = load_vae(trained)
    assert {weight.dtype for weight in vae.first_stage_model.parameters()} == {torch.bfloat16}
    count = sum(weight.numel() for weight in vae.first_stage_model.parameters())
    assert vae.model_size() == vae.patcher.model_size() == 2 * count
    assert vae.memory_used_decode((1, 16, 32, 32), vae.vae_dtype) == (
        vae.memory_used_decode((1, 16, 32, 32), torch.float32) / 2)


def test_a_checkpoint_with_compute_float32_keeps_the_hosts_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="it writes the file")
    path = str(demo_files.make_checkpoint(tmp_path))
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = comfy.sd.VAE(sd=demo_files.vae()).decode(latent)
    for compute, dtype in (("float32", torch.float32), ("exact", torch.bfloat16)):
        *_, vae = load_checkpoint(path, output_clip=False, compute=compute)
        assert vae.vae_dtype == dtype
        assert torch.equal(vae.decode(latent), exact) == (compute == "float32")
        again = vae.patcher.cached_patcher_init[0]().model
        dtypes = {weight.dtype for weight in again.parameters()}
        assert (dtypes == {torch.bfloat16}) == (compute == "exact")


@pytest.mark.parametrize("flag", VAE_DTYPE_FLAGS)
def test_a_flag_of_comfyui_goes_first(flag, trained, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, flag, True)
    assert vae_dtype(TAESD(), CPU, "exact") is None
    assert load_vae(trained).vae_dtype == comfy.sd.VAE(sd=demo_files.vae()).vae_dtype


def test_a_cpu_without_bfloat16_and_another_device_keep_the_hosts_choice(monkeypatch):
    model = TAESD()
    assert vae_dtype(model, CPU, "exact") == torch.bfloat16
    assert vae_dtype(model, torch.device("cuda:0"), "exact") is None
    monkeypatch.setattr(cpu_features, "multiplies_bfloat16", lambda: False)
    assert vae_dtype(model, CPU, "exact") is None


def test_a_vae_that_was_not_measured_keeps_the_hosts_choice():
    model = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4)
    assert vae_dtype(model, CPU, "exact") is None
