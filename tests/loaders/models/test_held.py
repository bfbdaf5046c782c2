"""What a model holds in memory is what its file holds, where the host computes in float32 too; and
no value or LoRA suffers."""
import comfy.lora
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import pytest
import torch
from families import (
    FAMILIES,
    full_width_shapes,
    host_model,
    host_patcher,
    random_weights,
    run,
    shrunken_detection,
)
from pack_api import (
    GGML_FORMATS,
    PackedLayer,
    load_checkpoint,
    load_diffusion_model,
    load_text_encoder,
    memory_summary,
    open_weights,
)
from patched_models import adapter, relative
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf, write_zeros_gguf
from devtools.files.tiny_models import clip_l_shapes, flux_shapes

pytestmark = pytest.mark.usefixtures("small_models")

TYPES = ["F32", "F16", "BF16", *(packed.name for packed in GGML_FORMATS.values())]
WIDTHS = {"F16": torch.float16, "BF16": torch.bfloat16}
MODEL, ENCODER, VAE = (
    "model.diffusion_model.",
    "cond_stage_model.transformer.",
    "first_stage_model.",
)
AT_MOST = 1.02
RUN = [name for name, family in FAMILIES.items() if family.latent]
SLOW = ("ace-step", "hidream", "mochi")  # by the size of their tensors
# Animate's encoder of motion is no smaller in a model of few blocks, and made of parameters outside
# of layers.
FULL_WIDTH = [
    name for name, family in FAMILIES.items()
    if (family.fixed or not family.latent) and name not in ("ace-step-1.5", "wan2.2-animate")
]


def storage_bytes(*models: torch.nn.Module) -> int:
    """Bytes of all storages that the parameters of models lie in, each counted once."""
    storages = {}
    for model in models:
        for tensor in model.parameters():
            parts = (
                [tensor._qdata, *filter(None, [tensor._params.scale])]
                if hasattr(tensor, "_qdata")
                else [tensor]
            )
            storages |= {
                part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts
            }
    return sum(storages.values())


def assert_held_as_on_disk(path, patcher):
    on_disk = open_weights(path).tensor_bytes
    assert patcher.model_size() <= AT_MOST * on_disk
    assert storage_bytes(patcher.model) <= AT_MOST * on_disk


@pytest.mark.parametrize(
    ("type_name", "rest"),
    [
        *((type_name, "F16") for type_name in TYPES),
        ("Q4_K", "BF16"),
        ("Q4_K", "F32"),
        ("Q8_0", "F32"),
    ],
)
def test_a_flux_in_every_type_holds_what_its_file_holds(type_name, rest, tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "flux.gguf"
    write_zeros_gguf(path, flux_shapes(3072, 1, 1, 4096), type_name, rest)
    patcher = load_diffusion_model(str(path))
    assert_held_as_on_disk(path, patcher)
    file = open_weights(path)
    sizes = f"{file.tensor_bytes} bytes on disk, {patcher.model_size()} bytes in memory"
    assert sizes in caplog.text
    assert type_name in memory_summary(patcher)
    assert "F32" in (type_name, rest) or "F32" not in memory_summary(patcher)


@pytest.mark.parametrize(("name", "type_name"), [
    pytest.param(name, type_name,
                 marks=() if type_name == "F16" and name not in SLOW else pytest.mark.heavy)
    for name in FULL_WIDTH for type_name in WIDTHS])
def test_each_family_in_16_bits_holds_what_its_file_holds(name, type_name, tmp_path):
    path = tmp_path / "model.gguf"
    write_zeros_gguf(path, full_width_shapes(FAMILIES[name]), type_name, type_name)
    assert_held_as_on_disk(path, load_diffusion_model(str(path)))


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        pytest.param(
            name,
            type_name,
            marks=() if name in ("sd1.5", "flux-schnell", "wan2.1-t2v") else pytest.mark.heavy,
        )
        for name in RUN
        for type_name in WIDTHS
    ],
)
def test_a_model_in_16_bits_gives_every_bit_of_the_dense_one(
    name, type_name, tmp_path, monkeypatch
):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    path = tmp_path / "model.gguf"
    seen = write_gguf(path, random_weights(family), type_of=lambda *_: type_name, architecture=None,
                      metadata=family.metadata)
    packed, dense = (
        run(load_diffusion_model(str(path)), family),
        run(host_patcher(seen, family), family),
    )
    # give some layers inputs that lie in memory in another order, and so sum in another
    if name in ("ace-step", "cosmos", "pixart-sigma", "wan2.1-vace"):
        assert relative(packed, dense) < 1e-6
    else:
        assert torch.equal(packed, dense)


# --- whole checkpoints ---


def sd15_shapes() -> dict[str, tuple]:
    """A whole SD 1.5 of the real size in the names of its checkpoint."""
    family = FAMILIES["sd1.5"]
    config = {
        **family.config, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1
    }
    parts = {
        MODEL: {
            name: value.shape
            for name, value in host_model(family, config, "meta").state_dict().items()
        }, ENCODER: {
            name: shape for name, shape in clip_l_shapes().items()
            if name != "text_projection.weight"
        }, VAE: {name: value.shape for name, value in autoencoder_kl("meta").state_dict().items()}
    }
    return {
        prefix + name: tuple(shape) for prefix, shapes in parts.items()
        for name, shape in shapes.items()
    }


def autoencoder_kl(device: str) -> torch.nn.Module:
    config = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [1, 2, 4,
                               4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0
    }
    with torch.device(device):
        return comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=config, embed_dim=4)


def test_a_whole_sd15_of_stable_diffusion_cpp_holds_what_its_file_holds(tmp_path):
    path = tmp_path / "sd15.gguf"
    write_zeros_gguf(path, sd15_shapes(), "Q8_0", "F16")
    model, clip, vae = load_checkpoint(str(path))
    entries = open_weights(path).entries
    for prefix, patcher in ((MODEL, model), (ENCODER, clip.patcher), (VAE, vae.patcher)):
        on_disk = sum(entry.nbytes for name, entry in entries.items() if name.startswith(prefix))
        assert patcher.model_size() <= AT_MOST * on_disk, prefix
        assert storage_bytes(patcher.model) <= AT_MOST * on_disk, prefix
    assert vae.model_size() == vae.patcher.model_size()


@pytest.mark.parametrize("type_name", [
    "F16", pytest.param("BF16", marks=pytest.mark.heavy)])
def test_a_vae_in_16_bits_gives_every_bit_of_the_dense_one(type_name, tmp_path):
    shapes = {name: value.shape for name, value in autoencoder_kl("meta").state_dict().items()}
    weights = {
        name: (torch.randn(shape) *
               (shape[0] / shape.numel()) ** 0.5 if len(shape) > 1 else 0.1 * torch.randn(shape) +
               ("norm" in name)).to(WIDTHS[type_name]) for name, shape in shapes.items()
    }
    package = tmp_path
    for part, tensors in (("transformer", flux_tensors()), ("vae", weights)):
        (package / part).mkdir()
        (package / part / "config.json").write_text("{}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
                  package / part / "model.safetensors")
    vae = load_checkpoint(str(package))[2]
    dense = comfy.sd.VAE(sd={name: tensor.float() for name, tensor in weights.items()})
    pixels = torch.rand(1, 64, 64, 3)
    latents = vae.encode(pixels)
    assert torch.equal(latents, dense.encode(pixels)) and torch.equal(
        vae.decode(latents), dense.decode(latents)
    )
    assert vae.patcher.model_size() < 0.51 * dense.patcher.model_size()


def flux_tensors() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in flux_shapes(128, 1, 1, 128).items()}


# --- text encoders ---


@pytest.mark.parametrize(("type_name", "dtype"), [
    ("F16", torch.float32), ("BF16", torch.float16), ("Q8_0", torch.float16),
    ("Q4_K", torch.float32)])
def test_a_clip_holds_what_its_file_holds(type_name, dtype, tmp_path):
    """dtype: of the host's text encoder; the host takes float16, or float32 with
    --fp32-text-enc."""
    path = tmp_path / "clip.gguf"
    write_zeros_gguf(path, clip_l_shapes(), type_name, "F16")
    clip = load_text_encoder([str(path)], "stable_diffusion", model_options={"dtype": dtype})
    assert_held_as_on_disk(path, clip.patcher)


# --- LoRA ---


def values_of(path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in open_weights(path).state_dict().items()}


def outputs(patcher, names) -> dict[str, torch.Tensor]:
    """What single layers give for seeded inputs, with the patches that are loaded."""
    comfy.model_management.load_models_gpu([patcher])
    out = {}
    for name in names:
        layer = comfy.utils.get_attr(patcher.model.diffusion_model, name)
        out[name] = layer(input_of(layer)).double()
    return out


def input_of(layer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (
        (16, layer.in_features) if hasattr(layer, "in_features") else (1, layer.in_channels, 9, 9)
    )
    return torch.randn(shape, generator=generator)


def exact_effect(layer, change: torch.Tensor) -> torch.Tensor:
    """What a change of the weight adds to the output, in float64."""
    input = input_of(layer).double()
    if hasattr(layer, "in_features"):
        return torch.nn.functional.linear(input, change)
    return torch.nn.functional.conv2d(input, change, None, layer.stride, layer.padding)


@pytest.mark.parametrize("norm", [0.0005, 0.01])
@pytest.mark.parametrize("type_name", WIDTHS)
def test_a_lora_has_its_full_strength_on_16_bit_layers(type_name, norm, tmp_path):
    path = tmp_path / "unet.gguf"
    write_gguf(path, random_weights(FAMILIES["sd1.5"]), type_of=lambda *_: type_name,
               architecture=None)
    patcher, weights = load_diffusion_model(str(path)), values_of(path)
    layers = {name: module for name, module in patcher.model.diffusion_model.named_modules()
              if isinstance(module, PackedLayer) and hasattr(module, "weight")}
    assert {type(layer).__name__ for layer in layers.values()} == {"Linear", "Conv2d"}
    lora, changes = {}, {}
    for seed, name in enumerate(layers):
        weight = weights[f"{name}.weight"]
        parts = adapter("lora", weight, seed, rank=4, size=norm)
        change = (
            parts["lora_up.weight"].double().flatten(1)
            @ parts["lora_down.weight"].double().flatten(1)
            / 2
        )
        scale = norm * weight.norm() / change.norm()
        parts["lora_up.weight"] *= scale
        changes[name] = (change * scale).view(weight.shape)
        lora |= {f"diffusion_model.{name}.{part}": tensor for part, tensor in parts.items()}
    before = outputs(patcher, layers)
    after = outputs(comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0], layers)
    for name, layer in layers.items():
        exact = exact_effect(layer, changes[name])
        gain = ((after[name] - before[name]) * exact).sum() / exact.square().sum()
        assert gain.item() == pytest.approx(1, abs=0.005), name


@pytest.mark.parametrize("norm", [0.0005, 0.01])
@pytest.mark.parametrize("type_name", WIDTHS)
def test_a_change_of_norms_and_biases_has_its_full_strength(type_name, norm, tmp_path):
    path = tmp_path / "unet.gguf"
    write_gguf(path, random_weights(FAMILIES["sd1.5"]), type_of=lambda *_: type_name,
               architecture=None)
    patcher, weights = load_diffusion_model(str(path)), values_of(path)
    vectors = {name: value for name, value in weights.items() if value.ndim == 1}
    assert any("norm" in name for name in vectors) and any(
        name.endswith("bias") for name in vectors
    )
    changes = {
        name: norm * value.norm() * torch.nn.functional.normalize(torch.randn(value.shape), dim=0)
        for name, value in vectors.items()
    }
    clone = patcher.clone()
    clone.add_patches(
        {f"diffusion_model.{name}": ("diff", (change,)) for name, change in changes.items()})
    comfy.model_management.load_models_gpu([clone])
    for name, change in changes.items():
        realised = (
            comfy.utils.get_attr(clone.model.diffusion_model, name).double()
            - vectors[name].double()
        )
        gain = (realised * change).sum() / change.double().square().sum()
        assert gain.item() == pytest.approx(1, abs=0.005), name
