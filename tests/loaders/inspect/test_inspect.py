"""What a file or a model is: kind, family, types, what it needs, and a sentence for whatever cannot
be read."""
import json
import re

from devtools.measure import model_sizes

import comfy.model_detection
import comfy.model_management
import comfy.ops
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import host_clip, random_weights, small_towers, text_model, write_encoder
from families import FAMILIES, full_width_shapes
from pack_api import GGML_FORMATS, load_diffusion_model
from safetensors.torch import save_file
from vision_models import VISION_MODELS

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.contents import Contents
from featherweight.loaders.encoders.encoder_sets import TITLES
from featherweight.loaders.inspect import inspect
from featherweight.loaders.inspect.identify import (
    CHECKPOINT,
    ENCODER,
    LORA,
    MODEL,
    identify,
    sort_blocks,
    weight_block,
)
from featherweight.loaders.inspect.inspection_chart import color_of, inspection_picture
from featherweight.loaders.inspect.inspection_text import inspection_text
from featherweight.loaders.inspect.requirements import CARDS, required_models
from featherweight.loaders.lora.block_chart import BACKGROUND
from featherweight.loaders.packing.planning.for_device import GIB, step_memory

SIZES = {"hidden": 128, "double_blocks": 2, "single_blocks": 3}


def contents_of(shapes, name="model.safetensors", **said):
    """A file whose matrices have no values: whoever reads one fails."""
    tensors = {
        key: torch.zeros(tuple(shape), device="meta" if len(shape) > 1 else "cpu")
        for key, shape in shapes.items()
    }
    return Contents(name, tensors, dict.fromkeys(tensors, "F32"), **said,
                    memory_bytes=sum(tensor.nbytes for tensor in tensors.values()))


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "flux.gguf"
    types = {"img": "Q8_0", "txt": "Q4_0", "lin": "Q5_0"}
    write_gguf(
        path, tiny_models.flux(**SIZES), lambda name, values: next(
            (kind for word, kind in types.items()
             if f".{word}" in name and "blocks." in name and values.ndim > 1), "F32"))
    return path


# not built without values
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "ace-step-1.5"])
def test_a_diffusion_model_is_recognised_without_reading_a_matrix(name):
    found = identify(
        contents_of(full_width_shapes(FAMILIES[name]), metadata=FAMILIES[name].metadata))
    assert found.model_type == MODEL and found.family and found.host
    assert sum(count for count, _ in found.types.values()) == len(full_width_shapes(FAMILIES[name]))
    assert not found.warnings


@pytest.mark.parametrize(
    ("name", "encoder", "vae"),
    [
        ("flux-dev", "CLIP-L and T5-XXL (type flux)", "Flux (ae.safetensors)"),
        ("sd1.5", "CLIP-L (type stable_diffusion)", "SD 1.5"),
        ("sdxl", "CLIP-L and CLIP-G (type sdxl)", "SDXL"),
        ("sd3.5", "CLIP-L and CLIP-G and T5-XXL (type sd3)", "SD3"),
        ("wan2.1-i2v", "UMT5-XXL (type wan)", "Wan 2.1"),
        ("wan2.2-ti2v", "UMT5-XXL (type wan)", "Wan 2.2"),
        ("qwen-image", "Qwen2.5 7B (type qwen_image)", "Qwen-Image"),
        ("z-image", "Qwen3 4B (type lumina2)", "Flux (ae.safetensors)"),
        ("chroma", "T5-XXL (type chroma)", "Flux (ae.safetensors)"),
        ("lumina2", "Gemma 2 2B (type lumina2)", "Flux (ae.safetensors)"),
        ("hunyuan-video", "CLIP-L and Llama 3 8B (type hunyuan_video)", "HunyuanVideo"),
    ],
)
def test_what_else_a_model_needs(name, encoder, vae):
    assert identify(contents_of(full_width_shapes(FAMILIES[name]))).needs == {
        "text encoder": encoder,
        "VAE": vae,
    }


@pytest.mark.parametrize("model", [model for model in model_sizes.MODELS if model.config],
                         ids=lambda model: model.name)
def test_the_memory_of_a_step_is_what_the_host_reserves(model, monkeypatch):
    tensors = {name: torch.empty(shape, device="meta") for name, shape in model.shapes().items()}
    config = comfy.model_detection.model_config_from_unet(tensors, "")
    assert required_models(config)["text encoder"]
    step = step_memory(config)
    if step is None:
        assert model.name in ("LTX-2", "MiniMax-H3 pruned")  # pictures and sound
        return
    nbytes, picture = step
    width, height, frames = (int(number) for number in re.findall(r"\d+", f"{picture}, 1")[:3])
    latents = config.latent_format
    ratio, in_time = latents.spacial_downscale_ratio, latents.temporal_downscale_ratio
    video = [(frames - 1) // in_time + 1] if latents.latent_dimensions == 3 else []
    shape = [1, latents.latent_channels, *video, height // ratio, width // ratio]
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = comfy.ops.disable_weight_init
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)
    needed = config.get_model({}, "", device="meta").memory_required(shape)
    assert nbytes == pytest.approx(max(0.8 * GIB, needed), rel=1e-6)


def test_cards_say_what_fits_what_stays_outside_and_what_fit_chooses(monkeypatch):
    flux = next(model for model in model_sizes.MODELS if model.name.startswith("Flux.1"))
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: 32 * GIB)
    found = identify(contents_of(flux.shapes()))
    step, _ = step_memory(flux.config())
    assert [card.gib for card in found.cards] == list(CARDS)
    assert [card.fit for card in found.cards] == [
        "as good as Q4_K, loss: small (7 % of the weights), 3.0 GB copied in each step",
        "as good as Q4_K, loss: small (7 % of the weights), 946.4 MB copied in each step",
        "as good as Q6_K, loss: very small (1.7 % of the weights)",
        *["as good as Q8_0, loss: very small (0.54 % of the weights)"] * 2]
    for card in found.cards:
        room = card.gib * GIB * 23 / 24 - step - 1.1 * GIB
        in_16_bits = found.memory_bytes / 2
        assert card.missing == pytest.approx(max(0, in_16_bits - room), abs=2)
    text = inspection_text(found)
    assert "card of 6" in text and "stay in the computer's memory" in text
    assert "; fit this GPU, without int8: as good as Q6_K, loss: very small (1.7 % of" in text
    assert "text encoders and VAE not counted:" in text


@pytest.mark.parametrize(
    "name", ["t5-xxl", "umt5-xxl", "clip-l", "clip-g", "qwen3-4b", "gemma-3-12b"]
)
def test_a_text_encoder_is_recognised(name):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        shapes = {
            key: value.shape
            for key, value in text_model(host_clip(encoder, {})).transformer.state_dict().items()
        }
    found = identify(contents_of(shapes | encoder.markers))
    assert found.model_type == ENCODER and found.cards
    assert "where it runs before the model:" in inspection_text(found)
    assert (
        found.family
        == TITLES[
            encoder.te_model.replace("T5", "UMT5") if name.startswith("umt5") else encoder.te_model
        ]
    )


@pytest.mark.parametrize("name", ["t5-xxl", "qwen3-4b"])
def test_a_text_encoder_in_llama_cpps_names_is_recognised(name, tmp_path):
    write_encoder(tmp_path / "encoder.gguf", ENCODERS[name], random_weights(ENCODERS[name]))
    found, = inspect(tmp_path / "encoder.gguf")
    assert found.model_type == ENCODER and found.family == TITLES[ENCODERS[name].te_model]


OTHERS = {
    LORA: {
        f"lora_unet_double_blocks_{index}_img_attn_proj.lora_{part}.weight": shape
        for index in range(3) for part, shape in (("down", (4, 3072)), ("up", (3072, 4)))
    }, "VAE": {"decoder.conv_in.weight": (512, 16, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)},
    "vision part (mmproj) of a text encoder": {
        "v.blk.0.attn_q.weight": (64, 64), "mm.0.weight": (64, 64)
    }, "ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "weight file of an unknown type": {"one.weight": (4, 4), "two.bias": (4,)}
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_called_what_they_are(kind):
    found = identify(contents_of(OTHERS[kind]))
    assert found.model_type == kind and f"is a {kind}" in inspection_text(found)
    assert inspection_picture(found).shape[2] == 960


SIDE_MODELS = {
    "control_all_x_embedder.2-1.weight": ("model patch", "Z-Image Fun ControlNet"),
    "controlnet_blocks.0.y_rms.weight": ("model patch", "Qwen-Image DiffSynth ControlNet"),
    "controlnet_patch_embedding.weight": ("model patch", "Uni3C ControlNet for Wan"),
    "audio_proj.proj1.weight": ("model patch", "MultiTalk or InfiniteTalk for Wan"),
    "feature_embedder.mid_layer_norm.bias": ("model patch", "USO style projector for Flux"),
    "lllite_conditioning1.conv1.weight": ("model patch", "LLLite for Anima"),
    "model.diffusion_model.project_modules.0.zero_conv.bias": ("model patch", "SUPIR for SDXL"),
}
VISION = {"CLIP L": "CLIP L", "LLaVA": "CLIP L", "CLIP H": "CLIP H", "CLIP bigG": "CLIP bigG",
          "CLIP H of open_clip": "CLIP H", "SigLIP": "SigLIP", "DINOv2 giant": "DINOv2",
          "DINOv3": "DINOv3"}


@pytest.mark.parametrize("name", SIDE_MODELS)
def test_a_model_patch_is_called_what_it_is(name):
    found = identify(contents_of({"first.weight": (32, 32), name: (32, 32)}))
    assert (found.model_type, found.family) == SIDE_MODELS[name]
    assert "Load it with Load Model Patch (Featherweight)." in inspection_text(found)


@pytest.mark.parametrize("name", VISION)
def test_a_clip_vision_model_is_called_what_it_is(name):
    shapes = {key: tuple(value.shape) for key, value in VISION_MODELS[name]().items()}
    found = identify(contents_of(shapes))
    assert (found.model_type, found.family) == ("CLIP vision model", VISION[name])
    assert "Load it with Load CLIP Vision (Featherweight)." in inspection_text(found)


def test_a_lora_says_what_it_is_for():
    assert "3 layers, for Flux.1" in inspection_text(identify(contents_of(OTHERS[LORA])))


def test_a_checkpoint_says_what_is_in_it():
    shapes = {
        f"model.diffusion_model.{name}": shape
        for name, shape in tiny_models.flux_shapes(**SIZES).items()
    }
    found = identify(
        contents_of(shapes | {"first_stage_model.decoder.conv_in.weight": (64, 16, 3, 3)}))
    assert found.model_type == CHECKPOINT and set(found.parts) == {MODEL, "VAE"}
    assert set(found.needs) == {"text encoder"}
    assert "in it: diffusion model" in inspection_text(found)


def test_a_file_and_the_model_loaded_from_it_are_the_same(flux_file, caplog):
    caplog.set_level("DEBUG")
    from_file, = inspect(flux_file)
    model = load_diffusion_model(str(flux_file))
    from_model, = inspect(model)
    assert (
        from_file.types == from_model.types and from_file.host == from_model.host == "FluxSchnell"
    )
    assert from_file.name == from_model.name == "flux.gguf"
    assert from_model.memory_bytes == model.model_size()
    assert "kernels: dequantized by torch, computes exactly in float32\n" in (
        inspection_text(from_model) + "\n")
    assert "Inputs of few rows are multiplied by torch" in caplog.text


def test_patches_of_a_model_are_named(flux_file):
    model = load_diffusion_model(str(flux_file)).clone()
    name = "diffusion_model.double_blocks.0.img_attn.proj.weight"
    model.add_patches({name: ("diff", (torch.zeros(128, 128),))}, 1.0)
    assert "1 weights are changed by LoRAs" in inspection_text(inspect(model)[0])


def truncated(path, flux_file):
    path.write_bytes(flux_file.read_bytes()[:5000])


BAD_FILES = {
    "cut.gguf": (truncated, "download"),
    "old.ckpt": (lambda path, _: path.write_bytes(b"PK\x03\x04" + bytes(99)),
                 "cannot be read as a model"),
    "folder": (lambda path, _: path.mkdir(), "is a folder without the config.json"),
    "gone.gguf": (lambda path, _: None, "does not exist"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_cannot_be_read_says_why_in_a_sentence(name, tmp_path, flux_file):
    write, words = BAD_FILES[name]
    write(tmp_path / name, flux_file)
    found, = inspect(tmp_path / name)
    text = inspection_text(found)
    assert words in text and "\n" not in text and not found.model_type
    assert inspection_picture(found).shape[0] == 1


def test_a_package_of_diffusers_is_inspected_part_by_part(tmp_path):
    for part, shapes in (("transformer", {"img_in.weight": (8, 8)}),
                         ("text_encoder_4", {"shared.weight": (8, 8)}),
                         ("vae", {"decoder.conv_in.weight": (8, 4, 3, 3)})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()},
                  tmp_path / part / "model.safetensors")
    found = inspect(tmp_path)
    assert [part.name for part in found] == ["transformer", "text_encoder_4", "vae"]
    assert found[-1].model_type == "VAE"


def test_a_file_made_here_says_how(tmp_path):
    path = tmp_path / "made.gguf"
    plan = json.dumps({"types": {"Q8_0": ["a", "b"], "F32": ["c"]}})
    write_gguf(path, tiny_models.flux(**SIZES), lambda name, values: "F32",
               metadata={"featherweight.plan": plan})
    assert "made here, plan: Q8_0 2, F32 1" in inspection_text(inspect(path)[0])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("double_blocks.3.img_attn.qkv.weight", "double_blocks.3"),
        ("model.diffusion_model.single_blocks.0.linear1.bias", "single_blocks.0"),
        ("img_in.weight", "img_in"),
        ("model.layers.7.mlp.up_proj.weight", "layers.7"),
        ("blk.5.attn_q.weight", "blk.5"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "block.2"),
        ("token_embd.weight", "token_embd"),
        (
            "txt_in.individual_token_refiner.blocks.1.mlp.0.weight",
            "individual_token_refiner.blocks.1",
        ),
        ("scale", "scale"),
    ],
)
def test_tensors_belong_to_blocks(name, block):
    assert weight_block(name) == block


def test_blocks_stand_in_the_order_of_their_numbers():
    names = ["img_in", "double_blocks.10", "double_blocks.2", "final_layer", "double_blocks.0"]
    assert list(sort_blocks({name: {} for name in names})) == [
        "img_in", "double_blocks.0", "double_blocks.2", "double_blocks.10", "final_layer"]


def test_the_picture_has_the_colour_of_each_type(flux_file):
    found, = inspect(flux_file)
    picture = (inspection_picture(found)[0] * 255).round().byte()
    colours = {tuple(colour) for colour in picture.view(-1, 3).unique(dim=0).tolist()}
    assert {color_of(kind) for kind in found.types} <= colours and BACKGROUND in colours


def test_common_types_have_colours_of_their_own():
    common = [
        "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "NF4", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32",
        "F8_E4M3"
    ]
    assert len({color_of(kind) for kind in common}) == len(common)
    assert color_of("NF4_128") == color_of("NF4")
    assert all(len(color_of(packed.name)) == 3 for packed in GGML_FORMATS.values())
