"""Whether a LoRA was trained on a base or a distilled model, and which the model is: only what the
files say, and where they say it."""
import shutil

import pytest
from lora_models import empty_model, pairs
from model_folders import use_folder
from pack_api import load_diffusion_model
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.lora.compatibility import check_lora
from featherweight.loaders.lora.report import report_text
from featherweight.loaders.lora.training_base import UNKNOWN, read_words
from featherweight.nodes.apply_lora import ApplyLora
from featherweight.nodes.check_lora import CheckLora

SIZES = {"hidden": 128, "double_blocks": 1, "single_blocks": 1, "context": 64}
LAYER = "diffusion_model.double_blocks.0.img_attn.proj"
GUIDANCE = "diffusion_model.guidance_in.in_layer"
SCHNELL = "your model is schnell (distilled)"  # for it has no guidance embedding


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes a small Flux under a name and returns its path; each content once."""
    folder = tmp_path_factory.mktemp("flux")
    made = {}

    def file(name, guidance=False, **metadata):
        key = guidance, str(metadata)
        if key not in made:
            made[key] = folder / f"{len(made)}.gguf"
            write_gguf(made[key], tiny_models.flux(**SIZES, guidance=guidance),
                       lambda name, values: "Q8_0" if values.ndim > 1 else "F32", **metadata)
        (folder / name).parent.mkdir(exist_ok=True)
        return str(shutil.copyfile(made[key], folder / name))

    return file


def line(model, metadata, name="", layers=(LAYER,)) -> str:
    """The line of a report on a LoRA of a small Flux."""
    lora = pairs(dict.fromkeys(layers, (128, 128)))
    report = check_lora(model, None, lora, metadata)
    found, = [row for row in report_text(report, name).splitlines() if row.startswith("training: ")]
    return found.removeprefix("training: ")


@pytest.mark.parametrize(("text", "word"), [
    ("flux2-klein-base-4b", "base"), ("FLUX.2_Klein_Base", "base"), ("flux1-dev", "dev"),
    ("flux-1-schnell/lora", "schnell"), ("z_image_turbo", "turbo"), ("ltx-2-19b-distilled",
    "distilled"), ("Qwen-Image-Lightning-8steps", "lightning"), ("krea2_raw_bf16", "raw"),
    ("flux1-dev-turbo", "turbo"), ("flux-dev-de-distilled", "undistilled"),
    ("turbocharged", None), ("database", None), ("hyperreal", None), ("developer", None),
    ("sdxl_base_v1-0", None), ("stable-diffusion-xl-v1-base/lora", None), ("raw photo", None),
    ("flux2_klein_4b", None), ("", None), ("x" * 95 + " turbocharged", None),
])
def test_only_whole_words_are_read(text, word):
    assert (read_words(text) or (None,))[0] == word


BY_BASE = "trained on base (its metadata ss_base_model_version: 'flux2-klein-base-4b')"


@pytest.mark.parametrize(("metadata", "name", "expected"), [
    ({}, "", f"{UNKNOWN}; {SCHNELL}"),
    ({"ss_base_model_version": "flux1"}, "style", f"{UNKNOWN}; {SCHNELL}"),
    ({"ss_base_model_version": "flux2-klein-base-4b", "ss_sd_model_name": "turbo"}, "lcm",
     f"{BY_BASE}; {SCHNELL}: expect less effect"),
    ({"ss_base_model_version": "flux1", "ss_sd_model_name": "D:\\turbo\\flux1-dev.safetensors"}, "",
     "trained on dev (its metadata ss_sd_model_name: 'flux1-dev.safetensors');"
     f" {SCHNELL}: expect less effect"),
    ({"modelspec.architecture": "flux-1-schnell/lora"}, "",
     f"trained on schnell (its metadata modelspec.architecture: 'flux-1-schnell/lora');"
     f" {SCHNELL}"),
    ({"modelspec.title": "FLUX Lightning"}, "",
     "by its name it makes a base model fast: lightning (its metadata modelspec.title: 'FLUX"
     f" Lightning'); {SCHNELL}: expect worse images"),
    ({}, "Hyper-FLUX.1-dev-8steps-lora.safetensors",
     "by its name it makes a base model fast: hyper (its file name:"
     f" 'Hyper-FLUX.1-dev-8steps-lora.safetensors'); {SCHNELL}: expect worse images"),
    ({}, "pixels_turbo.safetensors", "by its name it makes a base model fast or is for a turbo:"
     f" turbo (its file name: 'pixels_turbo.safetensors'); {SCHNELL}"),
    ({}, "dev style", f"trained on dev (its file name: 'dev style'); {SCHNELL}: expect"
     " less effect"),
    ({"modelspec.title": "a\nbase " + "x" * 5000}, "",
     "trained on base (its metadata modelspec.title: 'a\\nbase " + "x" * 108 + "...);"
     f" {SCHNELL}: expect less effect"),
])
def test_a_lora_is_told_by_its_metadata_before_its_name(metadata, name, expected):
    model = empty_model("Flux.1", hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1,
                        context_in_dim=64, vec_in_dim=None, guidance_embed=False)
    assert line(model, metadata, name) == expected


@pytest.mark.parametrize(("name", "options", "expected"), [
    ("a.gguf", {}, SCHNELL),
    ("a.gguf", {"guidance": True}, "your model is dev (base)"),
    ("flux-2-klein-4b-Q8_0.gguf", {}, "your model is distilled (its file name:"
     " 'flux-2-klein-4b-Q8_0.gguf', klein without base)"),
    ("flux-2-klein-base-4b.gguf", {},
     "your model is base (its file name: 'flux-2-klein-base-4b.gguf')"),
    ("flux1-dev-turbo.gguf", {"metadata": {"general.name": "FLUX.1 Schnell"}},
     "your model is schnell (distilled; its metadata general.name: 'FLUX.1 Schnell')"),
])
def test_a_model_is_told_by_its_metadata_then_its_name_then_its_weights(
        files, name, options, expected):
    model = load_diffusion_model(files(name, **options))
    assert line(model, {}) == f"{UNKNOWN}; {expected}"
    warned = line(model, {"ss_base_model_version": "schnell"})
    assert warned.endswith(": expect a weak or wrong effect") == (
        expected.startswith(("your model is dev", "your model is base")))


def test_a_file_that_is_gone_says_its_name(files, tmp_path):
    model = load_diffusion_model(shutil.copyfile(files("a.gguf"), tmp_path / "x-turbo.gguf"))
    (tmp_path / "x-turbo.gguf").unlink()
    assert line(model, {}) == (
        f"{UNKNOWN}; your model is turbo (distilled; its file name: 'x-turbo.gguf')")


def test_layers_of_a_guidance_embedding_are_of_dev():
    model = empty_model("Flux.1", hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1,
                        context_in_dim=64, vec_in_dim=None, guidance_embed=False)
    assert line(model, {}, layers=(LAYER, GUIDANCE)).startswith(
        "trained on dev (it changes a guidance embedding, which schnell lacks)")


def test_other_families_say_nothing_of_themselves():
    assert check_lora(empty_model("SDXL"), None, pairs(
        {"lora_unet_mid_block_attentions_0_proj_in": (1280, 1280)})).model_words is None


def test_the_nodes_tell_it_and_verdict_and_misfits_stay(files, tmp_path, monkeypatch):
    use_folder(tmp_path, monkeypatch)
    model = load_diffusion_model(files("flux-schnell.gguf"))
    save_file(pairs({LAYER: (128, 128)}), tmp_path / "a.safetensors",
              {"ss_base_model_version": "flux1-dev"})
    expected = ("training: trained on dev (its metadata ss_base_model_version: 'flux1-dev'); your"
                " model is schnell (distilled; its file name: 'flux-schnell.gguf'): expect less"
                " effect")
    checked = CheckLora.execute(model, "a.safetensors").args[0]
    applied = ApplyLora.execute(model, "a.safetensors", misfits="error").args[2]
    for text in (checked, applied):
        assert text.splitlines()[0].endswith("fits: all 1 layers match the model.")
        assert expected in text.splitlines()
