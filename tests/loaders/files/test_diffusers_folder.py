"""Folders of diffusers and transformers: found, put together and refused."""
import json

import pytest
import torch
from pack_api import WeightFileError, is_packed, open_weights
from safetensors.torch import load_file, save_file

from devtools.files.bnb_files import write_bnb
from featherweight.loaders.files.diffusers_folder import ModelFolder

CONFIG = {"_class_name": "FluxTransformer2DModel", "quantization_config": {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
NAME = "diffusion_pytorch_model"
SHARDS = [f"{NAME}-00001-of-00002.safetensors", f"{NAME}-00002-of-00002.safetensors"]
INDEX = f"{NAME}.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """An empty folder of a model, `package/transformer`, with its config."""
    path = tmp_path / "package" / "transformer"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def sharded(folder):
    """The same with weights in two files, the parts of one weight in both. Gives the folder and the
    values."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(12, 96, generator=generator) for name in "abc"} | {
        "a.bias": torch.ones(12)
    }
    seen = write_bnb(folder / "all", tensors, nested=True)
    stored = load_file(folder / "all")
    (folder / "all").unlink()
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(stored)}
    for shard in SHARDS:
        save_file({name: stored[name] for name, file in weight_map.items() if file == shard},
                  str(folder / shard))
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder, seen


def test_a_sharded_folder_is_read_as_one_model(sharded):
    path, seen = sharded
    file = open_weights(path)
    found = file.state_dict()
    assert (
        type(file) is ModelFolder
        and file.config == CONFIG
        and file.declared_type == "FluxTransformer2DModel"
    )
    assert file.path == path and [part.name for part in file.paths] == SHARDS
    assert file.tensor_bytes == sum(entry.nbytes for entry in file.entries.values()) > 0
    assert set(found) == set(seen)
    for name, expected in seen.items():
        assert torch.equal(found[name].dequantize() if is_packed(found[name]) else found[name],
                           expected)


@pytest.mark.parametrize(
    "name", [f"{NAME}.safetensors", "model.safetensors", "flux-nf4.safetensors"]
)
def test_a_folder_of_one_file_is_read(folder, name):
    seen = write_bnb(folder / name, {"a.weight": torch.randn(8, 64)}, "fp4")
    file = open_weights(str(folder))
    assert (
        torch.equal(file.state_dict()["a.weight"].dequantize(), seen["a.weight"])
        and file.metadata["format"] == "pt"
    )


def test_the_usual_file_is_taken_where_a_variant_lies_beside_it(folder):
    save_file({"a": torch.zeros(1)}, str(folder / f"{NAME}.fp16.safetensors"))
    save_file({"b": torch.zeros(1)}, str(folder / f"{NAME}.safetensors"))
    assert set(open_weights(folder).state_dict()) == {"b"}


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_variant_in_shards_is_read_where_it_is_the_only_one(folder, variant):
    shards = [f"{NAME}.{variant}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for name, shard in zip("ab", shards):
        save_file({name: torch.zeros(1)}, str(folder / shard))
    index = f"{NAME}.safetensors.index.{variant}.json"
    (folder / index).write_text(json.dumps({"weight_map": dict(zip("ab", shards))}))
    assert set(open_weights(folder).state_dict()) == {"a", "b"}
    save_file({"c": torch.zeros(1)}, str(folder / "whole.safetensors"))
    (folder / "other.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"c": "whole.safetensors"}}))
    assert set(open_weights(folder).state_dict()) == {"c"}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ({"architectures": []}, ""),
        ({}, ""),
        ({"quantization_config": {"load_in_8bit": True}}, ""),
        ({"quantization_config": None}, ""),
    ],
)
def test_configs_of_plain_and_older_models_are_read(folder, config, kind):
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, str(folder / "model.safetensors"))
    assert open_weights(folder).declared_type == kind


# --- bad input
# ------------------------------------------------------------------------------------------------

def refused(path, message):
    with pytest.raises(WeightFileError, match=message) as error:
        open_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("quantiser", "named"),
    [
        ({"quant_method": "vptq", "bits": 4}, "'vptq'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ("vptq", "'vptq'"),
        ({"quant_method": ["x"]}, r"\['x'\]"),
        ({"bits": 4}, "'bits'"),
    ],
)
def test_another_quantiser_is_named(folder, quantiser, named):
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantiser}))
    save_file({"a": torch.zeros(1)}, str(folder / "model.safetensors"))
    refused(
        folder,
        rf"transformer: its config.json says .* quantized by .*{named}.* only folders quantized by"
        r" bitsandbytes .*, transformers in fp8, ModelOpt or SDNQ are supported"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("", "empty"),
        ("\xff", "not a JSON object"),
        ('{"a": ' * 9000, "not a JSON object"),
    ],
)
def test_a_config_that_is_not_json_is_refused(folder, text, found):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, f"transformer: its config.json is {found}")


def test_a_folder_without_a_config_is_refused_and_its_models_are_named(folder):
    refused(
        folder.parent,
        "is a folder without the config.json of a model. Pick one of the folders in it:"
        " transformer."
    )
    (folder / "config.json").unlink()
    refused(folder, "is a folder without the config.json of a model. Pick a weight file.")


def test_a_folder_without_weights_is_refused(folder):
    refused(folder, r"it has no \*.safetensors weights\. Download them")
    (folder / f"{NAME}.bin").write_bytes(b"x")
    refused(folder, rf"it has no \*.safetensors weights, only {NAME}.bin")


def test_a_missing_shard_is_named(sharded):
    path, _ = sharded
    (path / SHARDS[1]).unlink()
    refused(path, f"transformer: missing in it: {SHARDS[1]}, of the 2 files that its {INDEX} lists")
    (path / SHARDS[0]).unlink()
    refused(path, f"missing in it: {SHARDS[0]} and 1 more")


@pytest.mark.parametrize("shards", [SHARDS, SHARDS[:1], ["a.safetensors", "b.safetensors"]])
def test_several_files_without_an_index_are_refused(folder, shards):
    for shard in shards:
        save_file({shard: torch.zeros(1)}, str(folder / shard))
    refused(folder, r"it has .*, but no \*.safetensors.index.json")


@pytest.mark.parametrize(
    "names",
    [
        ("a.safetensors.index.json", "b.safetensors.index.json"),
        ("a.safetensors.index.fp16.json", "a.safetensors.index.bf16.json"),
    ],
)
def test_several_indices_are_refused(folder, names):
    for name in names:
        (folder / name).write_text("{}")
    refused(folder, "several indices")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": "config.json"}}',
    ],
)
def test_an_index_that_lists_no_files_is_refused(folder, index):
    (folder / INDEX).write_text(index)
    refused(folder, rf"transformer: its {INDEX} (is not a JSON object|has no weight_map)")


def test_a_tensor_that_the_index_promises_and_no_file_has_is_named(sharded):
    path, _ = sharded
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["absent.weight"] = SHARDS[0]
    (path / INDEX).write_text(json.dumps(index))
    refused(
        path, f"its index lists 'absent.weight' in {SHARDS[0]}, which does not contain it")


@pytest.mark.parametrize(("left", "message"), [(-1, ": .* download it again"), (0, " is empty")])
def test_a_damaged_shard_is_named(sharded, left, message):
    path, _ = sharded
    content = (path / SHARDS[1]).read_bytes()
    (path / SHARDS[1]).write_bytes(content[:left])
    refused(path, f"{SHARDS[1]}{message}")


def test_bad_weights_name_the_shard_they_are_in(sharded):
    path, _ = sharded
    stored = load_file(path / SHARDS[0]) | load_file(path / SHARDS[1])
    index = {name: "other.safetensors" for name in stored if name != "b.weight.absmax"}
    save_file({name: stored[name] for name in index}, str(path / "other.safetensors"))
    (path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(WeightFileError, match=(
            "^package/transformer/other.safetensors: 'b.weight', .* it has no absmax")):
        open_weights(path).state_dict()
