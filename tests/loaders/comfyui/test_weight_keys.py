"""Names and shapes of a file that are not the model's own: prefixes of trainers, names that were
cut, dimensions that C programs drop or merge."""
import pytest
import torch
from families import FAMILIES, random_weights
from pack_api import WeightFileError, load_checkpoint, load_diffusion_model, load_notes
from patched_models import relative, run, tiny_flux
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.weight_keys import to_comfy_keys
from featherweight.loaders.inspect import inspect

pytestmark = pytest.mark.usefixtures("small_models")

WRAPPERS = ["diffusion_model.", "transformer.", "module.", "unet.", "dit.", "_orig_mod.",
            "model.diffusion_model.", "module._orig_mod.", "transformer._orig_mod.",
            "module.model.diffusion_model."]


def write(path, weights):
    if path.suffix == ".gguf":
        write_gguf(path, weights, lambda name, values: "F16" if values.ndim > 1 else "F32")
    else:
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return str(path)


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_prefix_that_all_names_have_is_stripped(suffix, prefix, tmp_path):
    weights = {name: value.half().float() for name, value in tiny_flux().items()}
    bare = load_diffusion_model(write(tmp_path / f"bare.{suffix}", weights))
    path = write(tmp_path / f"model.{suffix}", {prefix + name: value
                                                for name, value in weights.items()})
    wrapped = load_diffusion_model(path)
    # of weights that lie at other addresses a CPU may sum in another order
    assert relative(run(wrapped), run(bare)) < 1e-6 and load_notes(wrapped) == ()
    assert inspect(path)[0].family == "Flux.1"


def test_a_name_of_the_model_that_is_also_a_prefix_stays():
    weights = dict(random_weights(FAMILIES["sd1.5"]))
    assert to_comfy_keys({f"model.diffusion_model.{name}": value
                          for name, value in weights.items()}).keys() == {
        f"model.diffusion_model.{name}" for name in weights}


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_names_that_were_cut_get_their_ends_again(suffix, tmp_path):
    weights = {name: value.half().float() for name, value in tiny_flux().items()}
    names = {name: name for name in weights} | {
        name: name[:-2] for name in weights if len(name) > 25 and "_norm" not in name}
    assert sum(name != cut for name, cut in names.items()) > 3
    right = load_diffusion_model(write(tmp_path / f"right.{suffix}", weights))
    patcher = load_diffusion_model(write(tmp_path / f"cut.{suffix}", {
        names[name]: value for name, value in weights.items()}))
    assert torch.equal(run(patcher), run(right)) and load_notes(patcher) == ()


def test_a_cut_name_that_two_weights_begin_with_is_a_sentence(tmp_path):
    weights = dict(tiny_flux())
    weights["single_blocks.0.norm."] = weights.pop("single_blocks.0.norm.query_norm.scale")
    del weights["single_blocks.0.norm.key_norm.scale"]
    with pytest.raises(WeightFileError, match="makes only a part of the model: it has no 'single_"):
        load_diffusion_model(write(tmp_path / "two.safetensors", weights))


@pytest.mark.parametrize("fold", [True, False])
def test_position_tables_without_their_leading_one_are_the_models(fold, tmp_path):
    family = FAMILIES["sd3.5"]
    weights = dict(random_weights(family))
    tables = [name for name, value in weights.items() if value.ndim == 3 and len(value) == 1]
    assert "pos_embed" in tables
    stored = {name: value[0] if fold and name in tables else value
              for name, value in weights.items()}
    model = load_diffusion_model(write(tmp_path / "sd3.safetensors", stored)).model
    loaded = model.diffusion_model.state_dict()
    assert max(relative(loaded[name], value) for name, value in weights.items()) < 1e-6


def test_a_checkpoint_in_such_a_shape_loads(tmp_path):
    family = FAMILIES["sd3.5"]
    weights = dict(random_weights(family))
    stored = {f"model.diffusion_model.{name}": value[0] if name == "pos_embed" else value
              for name, value in weights.items()}
    path = tmp_path / "sd3.gguf"
    write_gguf(path, stored, lambda name, values: "F32")
    model, *_ = load_checkpoint(str(path), output_clip=False, output_vae=False)
    assert relative(model.model.diffusion_model.pos_embed, weights["pos_embed"]) < 1e-6


@pytest.mark.parametrize(("name", "left_out", "model"), [
    ("wan2.1-t2v", "patch_embedding.weight", "Wan"),
    ("hunyuan-video", "img_in.proj.weight", "HunyuanVideo")])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_tensor_that_comfyui_ggufs_converter_left_out_is_named(
        prefix, name, left_out, model, tmp_path):
    weights = {prefix + key: value for key, value in random_weights(FAMILIES[name]).items()
               if key != left_out}
    with pytest.raises(WeightFileError, match=f"has no '{left_out}'.*{model}.*fix_5d_tensors"):
        load_diffusion_model(write(tmp_path / "a.gguf", weights))


def test_an_ltx_without_the_metadata_with_its_sizes_is_told(tmp_path):
    family = next(family for family in FAMILIES.values() if "config" in family.metadata)
    with pytest.raises(WeightFileError, match="a.gguf has no `config` in its metadata"):
        load_diffusion_model(write(tmp_path / "a.gguf", random_weights(family)))
