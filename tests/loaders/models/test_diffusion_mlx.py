"""Diffusion models that mflux saved, compared with the host's dense models of the same values."""
import json
import os

import folder_paths
import pytest
import torch
from mflux_models import NAMES, VERSION, mflux_name, write_folder
from oracles import installed
from pack_api import WeightFileError, load_diffusion_model, open_weights
from safetensors.torch import save_file

from featherweight.loaders.files.mlx_names import channels_first, common_name
from featherweight.loaders.paths.folders import list_model_folders

MAPPINGS = {"flux-dev": "flux.weights.flux.Flux", "flux2-klein": "flux2.weights.flux2.Flux2",
            "qwen-image": "qwen.weights.qwen.Qwen", "z-image": "z_image.weights.z_image.ZImage",
            "krea2": "krea2.weights.krea2.Krea2"}

pytestmark = pytest.mark.usefixtures("small_models")


def test_a_folder_of_mflux_is_listed(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models",
                        ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "schnell-4bit").mkdir()
    for folder in ("transformer", "vae"):
        write_folder("flux-dev", tmp_path / "schnell-4bit" / folder)
    assert list_model_folders("diffusion_models") == [os.path.join("schnell-4bit", "transformer")]


def test_a_folder_of_numbered_files_without_mfluxs_index_is_a_sentence(tmp_path):
    write_folder("flux-dev", tmp_path / "transformer")
    index = tmp_path / "transformer" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(WeightFileError, match=r"without the config\.json of a model"):
        load_diffusion_model(str(tmp_path / "transformer"))


def test_two_tensors_of_one_name_are_a_sentence(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"norm.weight": torch.ones(4), "model.norm.weight": torch.ones(4)}
    save_file(tensors, path, {VERSION: "0.24.0"})
    with pytest.raises(WeightFileError, match=r"^a\.safetensors: .* both mean 'model.norm.weight'"):
        open_weights(path)


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_package(name, monkeypatch):
    monkeypatch.syspath_prepend(installed("mlx==0.32.4", "mlx-cpu==0.32.4"))
    monkeypatch.syspath_prepend(installed("mflux==0.24.0", "platformdirs", "tqdm", "toml",
                                          "piexif"))
    module, _, kind = MAPPINGS[name].rpartition(".")
    targets = getattr(pytest.importorskip(f"mflux.models.{module}_weight_mapping"),
                      f"{kind}WeightMapping").get_transformer_mapping()
    for target in targets:
        theirs = target.to_pattern.replace("{block}", "0").replace("{layer}", "0")
        common = target.from_pattern[0].replace("{block}", "0").replace("{layer}", "0")
        assert common_name(theirs, {VERSION: "0.24.0"}) == common
        assert mflux_name(name, common) == theirs


@pytest.mark.parametrize("name", ["visual.patch_embed.proj.weight",
                                  "vision_tower.vision_model.embeddings.patch_embedding.weight"])
@pytest.mark.parametrize("depth", [(), (2,)])
def test_kernels_of_patches_come_into_torchs_order(name, depth):
    kernels = torch.rand(8, *depth, 14, 14, 3)
    tensors = {name: kernels, "other.weight": kernels}
    channels_first(tensors, {"format": "mlx"})
    assert torch.equal(tensors[name], kernels.movedim(-1, 1))
    assert tensors["other.weight"] is kernels
