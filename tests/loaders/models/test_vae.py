"""What a VAE on a CPU computes in, and packed weights of VAEs."""
import concurrent.futures
import pickle
import random

import comfy.cli_args
import comfy.memory_management
import comfy.ops
import comfy.sd
import numpy as np
import published_forms
import published_models
import pytest
import torch
from checkpoint_parts import flux as tiny_flux
from checkpoint_parts import with_prefixes
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.wan.vae import WanVAE
from comfy.taesd.taesd import TAESD
from pack_api import PackedLayer, WeightFileError, is_packed, load_checkpoint, load_notes, product
from packed_weights import pack_int8, pack_q8_0, packed_weights, write_packed
from safetensors.torch import save_file

from demo_model import scenes
from devtools.files import demo_files
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.compute import BFLOAT16_VAES, VAE_DTYPE_FLAGS, vae_dtype
from featherweight.loaders.models.vae import build_vae, load_vae, wrap_vae
from featherweight.ops import cpu_features as cpu_features
from featherweight.ops.layers.load_hooks import pack_layers
from featherweight.ops.layers.packed_layers import make_packed

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


def dense_weights(weights):
    return {name: value.dequantize() if is_packed(value) else value
            for name, value in weights.items()}


def random_values(model):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        if value.ndim > 1 else torch.full(value.shape, 0.5) for name, value in
        model.state_dict().items()
    }


def decoder_of_stable_diffusion():
    """Of its names and shapes, an eighth as wide; the host leaves the encoder's values open."""
    with torch.device("meta"):
        model = AutoencoderKL(embed_dim=4, ddconfig={
            **AUTOENCODER, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "ch": 32})
    return {name: value for name, value in random_values(model).items() if "encoder" not in name}


def video():
    """Of Wan's names and shapes, a third as wide."""
    with torch.device("meta"):
        model = WanVAE(dim=32, z_dim=16, dim_mult=[1, 2, 4, 4], attn_scales=[],
                       temperal_downsample=[False, True, True])
    return random_values(model)


VAES = {
    "pictures": (decoder_of_stable_diffusion, (1, 4, 8, 8), "AutoencoderKL"),
    "small": (demo_files.vae, (1, 16, 8, 8), "TAESD"),
    "video": (video, (1, 16, 3, 4, 4), "WanVAE"),
    "frame": (video, (1, 16, 1, 4, 4), "WanVAE")  # the host takes the last of each kernel
}


@pytest.mark.parametrize("merged", [False, True])
def test_a_video_vae_in_gguf_is_the_same_whether_its_kernels_are_merged(merged, tmp_path):
    weights = {name: value.half().float() for name, value in video().items()}
    write_gguf(tmp_path / "vae.gguf", {
        name: value.flatten(0, 1) if merged and value.ndim == 5 else value
        for name, value in weights.items()
    }, lambda name, values: "F16" if values.ndim > 1 else "F32")
    ours = load_vae(str(tmp_path / "vae.gguf"), None)
    latent = torch.randn((1, 16, 2, 4, 4), generator=torch.Generator().manual_seed(1))
    expected = comfy.sd.VAE(sd=weights).decode(latent)
    assert load_notes(ours.patcher) == () and torch.allclose(
        ours.decode(latent), expected, atol=1e-3)


def test_matrices_in_a_format_of_comfyuis_are_read_whatever_it_reads_in_a_vae(tmp_path,
                                                                              monkeypatch):
    """ComfyUI 0.30 takes their codes for the weights."""
    with published_models.small_vae("minimax-h3", monkeypatch):
        encoded = published_forms.int8_convrot(
            published_models.vae_weights("minimax-h3"), random.Random())
        save_file(encoded.tensors, tmp_path / "vae.safetensors", encoded.metadata or None)
        vae = load_vae(str(tmp_path / "vae.safetensors"))
    assert not load_notes(vae.patcher)
    for name, weight in vae.first_stage_model.named_parameters():
        marked = encoded.tensors[name].dtype == torch.int8
        assert is_packed(weight) or not marked
        if marked:
            torch.testing.assert_close(product.dequantize(weight, torch.float32),
                                       encoded.values[name])


def test_a_vae_of_other_sizes_is_a_sentence(tmp_path):
    weights = dict(demo_files.vae())
    name = next(name for name, value in weights.items() if value.ndim == 4)
    weights[name] = torch.zeros(7, *weights[name].shape[1:])
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(WeightFileError, match="vae.safetensors: the names of the weights are"):
        load_vae(str(tmp_path / "vae.safetensors"))


@pytest.mark.parametrize(("pack", "compute"), [(pack_q8_0, "exact"), (pack_int8, "float32")])
@pytest.mark.parametrize("name", VAES)
def test_a_packed_vae_draws_what_its_dequantised_self_draws(name, pack, compute):
    weights, shape, class_name = VAES[name]
    packed = packed_weights(weights(), pack)
    vae = wrap_vae(build_vae(packed, None), compute)
    plain = wrap_vae(build_vae(dense_weights(packed), None), compute)
    assert type(vae.first_stage_model).__name__ == class_name and vae.vae_dtype == plain.vae_dtype
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    picture, expected = vae.decode(latent), plain.decode(latent)
    assert expected.std() > 0.01 and torch.allclose(picture, expected, atol=1e-5)
    if name != "pictures":
        frames = expected.flatten(0, -4)
        assert torch.allclose(vae.encode(frames), plain.encode(frames), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kept", "expected"), [
    (torch.float16, {torch.float16}), (torch.bfloat16, {torch.float16, torch.bfloat16}),
    (torch.float32, {torch.float32})
])
@pytest.mark.parametrize("name", ["pictures", "small", "video"])
def test_a_float32_vae_is_kept_in_16_bits_where_its_values_fit_and_has_the_hosts_bits(
        name, kept, expected):
    weights, shape, _ = VAES[name]
    values = {key: (0.7 * value.float()).to(kept).float() for key, value in weights().items()}
    vae = wrap_vae(build_vae(dict(values), None), "float32")
    of_the_host = comfy.sd.VAE(sd=dict(values))
    assert vae.vae_dtype == of_the_host.vae_dtype == torch.float32
    dtypes = {
        layer.weight.dtype for path, layer in vae.first_stage_model.named_modules()
        if isinstance(layer, comfy.ops.CastWeightBiasOp) and layer.weight.ndim > 1
        and "encoder" not in path
    }
    assert dtypes <= expected and kept in dtypes
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(vae.decode(latent), of_the_host.decode(latent))


def test_a_vae_of_a_packed_file_is_held_as_the_file_has_it_wherever_it_is_loaded_from(tmp_path):
    """Of all that has nodes here: a file of its own, and a checkpoint."""
    packed = packed_weights(demo_files.vae())
    write_packed(tmp_path / "vae.gguf", packed)
    checkpoint = with_prefixes(model=tiny_flux()) | {
        f"vae.{name}": value for name, value in packed.items()}
    write_packed(tmp_path / "checkpoint.gguf", checkpoint)
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = wrap_vae(build_vae(dense_weights(packed), None)).decode(latent)
    for vae in (load_vae(str(tmp_path / "vae.gguf")),
                load_checkpoint(str(tmp_path / "checkpoint.gguf"))[2]):
        weights = dict(vae.first_stage_model.named_parameters())
        assert {name for name, weight in weights.items() if is_packed(weight)} >= {
            name for name, weight in packed.items() if is_packed(weight)}
        count = sum(weight.numel() for weight in weights.values())
        assert vae.model_size() == vae.patcher.model_size() < 1.1 * count
        assert torch.allclose(vae.decode(latent), expected, atol=1e-5)
        again = vae.patcher.cached_patcher_init[0]().model
        assert sum(map(is_packed, again.parameters())) == sum(map(is_packed, weights.values()))


def test_what_another_thread_builds_meanwhile_is_the_hosts():
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(comfy.ops.manual_cast.Linear(4, 4))[0]

    with pack_layers(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert isinstance(build(), PackedLayer)
        assert type(pool.submit(build).result()) is comfy.ops.manual_cast.Linear
    assert type(build()) is comfy.ops.manual_cast.Linear


def test_layers_of_a_packed_vae_can_be_pickled():
    vae = build_vae(packed_weights(video()), None)
    layer = vae.first_stage_model.decoder.middle[0].residual[2]
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer) and is_packed(again.weight)
    input = torch.randn(1, 128, 2, 4, 4)
    assert torch.equal(again(input), layer(input))


def test_a_linear_layer_without_weights_yet_is_packed_too(monkeypatch):
    """As the host builds it with dynamic VRAM."""
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    layer = comfy.ops.disable_weight_init.Linear(64, 8)
    make_packed(layer)
    weight, bias = pack_q8_0(torch.randn(8, 64)), torch.randn(8)
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    assert is_packed(layer.weight)
    input = torch.randn(3, 64)
    expected = torch.nn.functional.linear(input, weight.dequantize(), bias)
    assert torch.allclose(layer(input), expected, atol=1e-5)


@torch.no_grad()
def test_packing_the_demos_vae_to_8_bits_costs_more_than_a_vae_may_lose():
    """So no node packs one; see docs/packing.md."""
    weights, pictures = demo_files.vae(), drawings()
    exact = wrap_vae(build_vae(weights, None), "float32")
    latent = exact.encode(pictures)
    expected = exact.decode(latent)
    for pack in (pack_q8_0, pack_int8):
        vae = wrap_vae(build_vae(packed_weights(weights, pack), None), "float32")
        assert 40 < decibels(vae.decode(latent), expected) < LEAST_DECIBELS
        assert 30 < decibels(vae.decode(vae.encode(pictures)), expected) < 40
