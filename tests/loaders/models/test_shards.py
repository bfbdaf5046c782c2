"""Models in several safetensors files of which a user picks one: the host's own loaders would read
that one alone."""
import comfy.sd
import pytest
import torch
from checkpoint_parts import SD15, clip_l, stable_diffusion
from families import relative_error
from families import run as run_family
from marked_flux import old_scaled
from pack_api import WeightFileError, load_checkpoint, load_diffusion_model, load_text_encoder
from patched_models import relative, run, tiny_flux
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("small_models")

SHARDS = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
DIFFUSION_MODEL = {name: value.bfloat16() for name, value in tiny_flux().items()}


def write(folder, tensors) -> list[str]:
    """Both files and the whole model in one; their paths, the whole one last."""
    names = list(tensors)
    for name, held in zip([*SHARDS, "whole.safetensors"], (names[::2], names[1::2], names)):
        save_file({key: tensors[key].contiguous() for key in held}, folder / name)
    return [str(folder / name) for name in [*SHARDS, "whole.safetensors"]]


@pytest.mark.parametrize("tensors", [DIFFUSION_MODEL, old_scaled(torch.float8_e4m3fn)[0]],
                         ids=["bf16", "scaled fp8"])
def test_any_of_the_files_of_a_plain_diffusion_model_loads_all_of_it(tensors, tmp_path):
    *shards, whole = write(tmp_path, tensors)
    expected = run(comfy.sd.load_diffusion_model(whole))
    for shard in shards:
        assert relative(run(load_diffusion_model(shard)), expected) < 1e-5


def test_any_of_the_files_of_a_plain_text_encoder_loads_all_of_it(tmp_path):
    weights = {name.removeprefix("transformer."): value for name, value in clip_l().items()}
    *shards, _ = write(tmp_path, weights)
    for shard in shards:
        found = load_text_encoder([shard]).cond_stage_model.clip_l.transformer.state_dict()
        assert all(torch.equal(found[name].half(), value) for name, value in weights.items())


def test_any_of_the_files_of_a_plain_checkpoint_loads_all_of_it(tmp_path):
    *shards, whole = write(tmp_path, stable_diffusion())
    (expected, *_), (model, clip, vae) = load_checkpoint(whole), load_checkpoint(shards[0])
    assert relative_error(run_family(model, SD15), run_family(expected, SD15)) < 1e-5
    of_clip = next(value for name, value in clip.cond_stage_model.state_dict().items()
                   if "layers.7.mlp.fc1.weight" in name)
    assert of_clip.any() and all(
        value.any() for value in vae.first_stage_model.state_dict().values() if value.ndim == 4
    )


def test_a_file_without_the_others_of_its_model_names_them(tmp_path):
    write(tmp_path, DIFFUSION_MODEL)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(WeightFileError,
                       match=f"missing in its folder: {SHARDS[1]}. Download all 2 into one folder"):
        load_diffusion_model(str(tmp_path / SHARDS[0]))
