"""Weights of SDNQ: values by SDNQ itself, and by plain arithmetic on codes chosen at random."""
import json
import os
import subprocess
import sys

import oracles
import pytest
import sdnq_oracle
import torch
from conformance.sdnq import FLOATS, TYPES
from pack_api import is_packed, open_weights
from patched_models import relative
from safetensors.torch import load_file, save_file
from sdnq_writer import config_of, write_folder, write_weight

from featherweight.loaders.inspect import inspect
from featherweight.loaders.quantizers.base import PartError
from featherweight.loaders.quantizers.sdnq import matches, read_settings
from featherweight.ops.tensor.read_only_memory import is_read_only

# versions -> a package that they need beside torch, diffusers and transformers
VERSIONS = {"0.1.0": ("accelerate==1.2.0",), "0.1.9": ("accelerate==1.2.0",),
            "0.2.0": ("accelerate==1.2.0",), "0.2.8": ()}
LINEAR = {"lin": ["Linear", [512, 96]]}
CONV = {"conv": ["Conv2d", [96, 64, 3]]}
SQUARE = {"lin": ["Linear", [256, 256]]}
OPTIONS = [
    {"weights_dtype": "uint4", "use_svd": True},
    {"weights_dtype": "uint4", "use_svd": True, "torch_dtype": "bfloat16"},
    {"weights_dtype": "uint4", "dequantize_fp32": False, "torch_dtype": "bfloat16"},
    {"weights_dtype": "uint4", "group_size": -1}, {"weights_dtype": "int6", "group_size": 32},
    {"weights_dtype": "int8", "group_size": 64},
    {"weights_dtype": "int5", "use_svd": True, "svd_rank": 7},
    {"layers": {"a": ["Conv2d", [96, 64, 3]], "b": ["Conv2d", [256, 64, 1]],
                "c": ["Conv3d", [32, 64, [2, 3, 3]]], "d": ["Conv1d", [96, 64, 3]]},
     "weights_dtype": "uint4", "quant_conv": True},
    {"layers": CONV, "weights_dtype": "int8", "quant_conv": True},
    {"layers": CONV, "weights_dtype": "uint4", "quant_conv": True, "use_svd": True},
    {"layers": LINEAR | {"proj": ["Linear", [256, 96]], "out": ["Linear", [320, 64]]},
     "weights_dtype": "uint4", "modules_dtype_dict": {"int8": ["proj"], "int5": ["*ut.weight"]}},
]
OF_0_1_9 = [
    *({"weights_dtype": name, "use_hadamard": True, "hadamard_group_size": size}
      for name in ("uint4", "int8") for size in (256, 128, 64, 16, 4)),
    {"weights_dtype": "int4", "use_hadamard": True, "use_svd": True},
    {"weights_dtype": "int4", "use_hadamard": True, "use_svd": True, "torch_dtype": "bfloat16"},
    {"layers": {"lin": ["Linear", [480, 64]]}, "weights_dtype": "uint4", "use_hadamard": True},
    {"layers": CONV, "weights_dtype": "uint4", "quant_conv": True, "use_hadamard": True},
    {"layers": CONV, "weights_dtype": "int8", "quant_conv": True, "use_hadamard": True,
     "use_svd": True},
    {"layers": LINEAR | {"proj": ["Linear", [512, 64]]}, "weights_dtype": "fp4",
     "modules_dtype_dict": {"minimum_6bit": ["proj"]}},
]
OF_MATMUL = [
    {"layers": layers, "weights_dtype": name, "use_quantized_matmul": True, **options}
    for layers in (LINEAR, SQUARE) for name in ("int8", "uint8", "uint4", "float8_e4m3fn")
    for options in ({}, {"use_svd": True})]
OF_0_2_8 = [
    *({"weights_dtype": "uint4", "scale_dtype": name}
      for name in ("float8_e4m3fn", "uint8", "int8", "bfloat16", "float16")),
    {"weights_dtype": "uint4", "scale_dtype": "uint8", "use_codebook_scale": True},
    {"weights_dtype": "uint4", "zero_point_dtype": "uint8"},
    {"weights_dtype": "int4", "scale_dtype": "float8_e4m3fn", "use_svd": True},
    {"weights_dtype": "uint4", "use_codebook": True},
    {"weights_dtype": "uint8", "use_codebook": True},
    {"weights_dtype": "uint4", "use_codebook": True, "group_size": 64},
    {"weights_dtype": "uint3", "use_codebook": True, "use_svd": True, "use_hadamard": True},
    {"weights_dtype": "uint4", "use_codebook": True, "scale_dtype": "uint8"},
    {"layers": CONV, "weights_dtype": "uint4", "quant_conv": True, "use_codebook": True,
     "group_size": 32},
    {"weights_dtype": "uint4", "group_size": -2}, {"weights_dtype": "int8", "group_size": -2},
    {"weights_dtype": "int8", "group_size": -2, "use_quantized_matmul": True},
    {"layers": {"emb": ["Embedding", [64, 256]]}, "weights_dtype": "uint4", "quant_embedding": True,
     "use_hadamard": True, "use_svd": True},
    {"layers": LINEAR | {"proj": ["Linear", [512, 64]]}, "weights_dtype": "uint4",
     "modules_quant_config": {"proj": {"weights_dtype": "int5", "use_hadamard": True}}},
]


def cases(version: str) -> list[dict]:
    """What a version of SDNQ is asked to write."""
    types = [{"weights_dtype": name} for name in TYPES]
    options = [*types, *OPTIONS]
    if version != "0.1.0":
        options += [*({"weights_dtype": name} for name in FLOATS), *OF_0_1_9]
    if version in ("0.1.0", "0.2.8"):  # between these it needs Triton
        options += OF_MATMUL
    if version == "0.2.8":
        options += OF_0_2_8
    return [{"layers": LINEAR} | case for case in options]


@pytest.fixture(scope="module", params=VERSIONS)
def folders(request, tmp_path_factory):
    """Folders that a version of SDNQ wrote, and the cases."""
    package = oracles.installed(f"sdnq=={request.param}", *VERSIONS[request.param])
    folder = tmp_path_factory.mktemp("sdnq")
    subprocess.run([sys.executable, sdnq_oracle.__file__, folder], check=True, text=True,
                   input=json.dumps(cases(request.param)),
                   env={**os.environ, "PYTHONPATH": str(package)})
    return [(folder / str(number), case) for number, case in enumerate(cases(request.param))]


@pytest.mark.heavy
def test_values_are_those_of_sdnq(folders):
    for folder, case in folders:
        expected = load_file(folder / "expected.safetensors")
        (folder / "expected.safetensors").unlink()
        weights = open_weights(folder).state_dict()
        names = {name for name, weight in weights.items() if is_packed(weight)}
        assert names == set(expected) and len(names) == len(case["layers"]), case
        for name, values in expected.items():
            error = relative(weights[name].dequantize(), values)
            # the reference rounds the sum and the product with the rotation to 16 bits
            limit = 5e-3 if case.get("torch_dtype") == "bfloat16" else 1e-6
            assert weights[name].shape == values.shape and error < limit, (case, name, error)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def assert_read(folder, expected: dict, limit=1e-6):
    """Every weight is packed and has the expected values; gives the weights."""
    weights = open_weights(folder).state_dict()
    assert set(weights) == set(expected)
    for name, dense in expected.items():
        if dense.ndim > 1:
            assert is_packed(weights[name]) and weights[name].shape == dense.shape, name
            assert relative(weights[name].dequantize(), dense) < limit, name
    return weights


@pytest.mark.parametrize(("name", "expected"), [
    ("float4_e2m1fn", [0, 0.75, 1, 1.5, 2, 3, 4, 6]),
    ("float4_e1m2fn", [1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5])])
def test_the_floats_of_early_versions_have_no_subnormals(name, expected, tmp_path):
    """The numbers are those that SDNQ 0.1.9 and 0.2.1 read."""
    tensors = {"weight": torch.arange(16, dtype=torch.uint8).repeat(8), "scale": torch.ones(8, 1)}
    (tmp_path / "config.json").write_text(json.dumps(config_of(name, sdnq_version="0.2.1")))
    save_layer(tmp_path / "model.safetensors", tensors)
    expected = torch.tensor(expected)
    row = open_weights(tmp_path).state_dict()["L.weight"].dequantize()[0]
    assert torch.equal(row[::2], torch.cat([expected, -expected]))


def save_layer(path, tensors, metadata=None):
    save_file({f"L.{name}": tensor for name, tensor in tensors.items()}, path, metadata)


@pytest.mark.parametrize("place", ["metadata", "config.json", "quantization_config.json"])
def test_a_file_takes_its_config_from_the_metadata_or_from_beside_it(place, tmp_path):
    tensors, expected = write_weight(values(24, 512), "uint4")
    config = config_of("uint4")["quantization_config"]
    if place == "config.json":
        config = {"quantization_config": config}
    metadata = {"quantization_config": json.dumps(config)} if place == "metadata" else None
    if metadata is None:
        (tmp_path / place).write_text(json.dumps(config))
    save_layer(tmp_path / "model.safetensors", tensors, metadata)
    assert_read(tmp_path / "model.safetensors", {"L.weight": expected})
    for name in ("model.safetensors", "another.safetensors"):  # whose config may it be?
        save_layer(tmp_path / name, tensors, metadata)
    file = open_weights(tmp_path / "model.safetensors")
    file.state_dict()
    assert bool([note for note in file.notes if "config of SDNQ beside it" in note]) == (
        metadata is None)


def test_a_folder_may_have_the_config_in_a_file_of_its_own(tmp_path):
    expected = write_folder(tmp_path, {"L.weight": values(24, 64)}, "uint4")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "quantization_config.json").write_text(json.dumps(config["quantization_config"]))
    (tmp_path / "config.json").write_text("{}")
    assert_read(tmp_path, expected)


@pytest.mark.parametrize("codes", [
    (torch.uint8, torch.arange(256).float()), (torch.int8, torch.arange(256).float() - 128),
    (torch.float8_e4m3fn, None)], ids=str)
def test_scales_that_are_codes_stay_codes(codes, tmp_path):
    tensors, _ = write_weight(values(24, 512), "uint4", group=64)
    dtype = codes[0]
    scale, zero = (torch.randint(1, 100, (24, 8, 1)).float().to(dtype) for _ in range(2))
    parts = {"scale": scale, "zero_point": zero, "scale_2": torch.tensor([1e-4]),
             "zero_point_scale": torch.tensor([2e-4])}
    if dtype == torch.uint8:
        parts |= {"scale_zero_point": torch.tensor([1e-3]), "zero_point_2": torch.tensor([-1e-2])}
    save_layer(tmp_path / "model.safetensors", tensors | parts)
    (tmp_path / "config.json").write_text(json.dumps(config_of("uint4")))
    packed = tensors["weight"]
    numbers = torch.stack([packed & 15, packed >> 4], -1).view(24, 8, 64).float()
    scales = scale.float() * 1e-4 + parts.get("scale_zero_point", 0)
    zeros = zero.float() * 2e-4 + parts.get("zero_point_2", 0)
    expected = (numbers * scales + zeros).view(24, 512)
    weights = assert_read(tmp_path / "model.safetensors", {"L.weight": expected})
    assert weights["L.weight"].nbytes < packed.nbytes + scale.nbytes + zero.nbytes + 2200


@pytest.mark.parametrize(("pattern", "name", "expected"), [
    ("a.b.weight", "a.b.weight", True), ("b", "a.b.weight", True), ("a.b", "a.b.weight", False),
    (".a", "ab.c.weight", True), (".b", "a.b.weight", False), ("a.*", "a.b.weight", True),
    ("*b", "a.b.weight", True), ("*b*x", "a.b.weight", False), ("b.*", "a.b.weight", False),
    ("a.1*", "a.2.weight", False), ("", "a.weight", False), (3, "3", False)])
def test_patterns_are_those_of_sdnq(pattern, name, expected):
    """Observed of sdnq 0.2.8, see `test_values_are_those_of_sdnq`."""
    assert matches(pattern, name) == expected


@pytest.mark.parametrize(("settings", "type_name"), [
    ({"modules_dtype_dict": {"int6": ["b"], "int8": ["c"]}}, "int6"),
    ({"modules_dtype_dict": {"int8": ["x"], "minimum_6bit": ["b"]}}, "int6"),
    ({"modules_dtype_dict": {"minimum_3bit": ["b"]}}, "uint4"),
    ({"modules_quant_config": {"b": {"weights_dtype": "int5"}}}, "int5"),
    ({"modules_quant_config": {"b": {"weights_dtype": "int5"}},
      "modules_dtype_dict": {"fp4": ["b"]}}, "float4_e2m1fn"),
    ({"modules_dtype_dict": 3, "modules_quant_config": ["b"]}, "uint4")])
def test_a_layer_may_have_a_type_of_its_own(settings, type_name):
    config = config_of("uint4", **settings)["quantization_config"]
    assert read_settings(config, "a.b.c.weight").type_name == type_name


@pytest.mark.parametrize("settings", [
    {"modules_dtype_dict": {"int6": [f"x{number}" for number in range(5000)]}},
    {"modules_quant_config": {f"x{number}": {} for number in range(5000)}}])
def test_more_patterns_than_a_model_has_layers_are_a_sentence(settings):
    config = config_of("uint4", **settings)["quantization_config"]
    with pytest.raises(PartError, match="more than 4096 patterns"):
        read_settings(config, "a.weight")


def test_weights_take_as_many_bytes_as_in_the_file(tmp_path):
    weights = {f"{name}.weight": values(256, 512, seed=seed) for seed, name in enumerate("abc")}
    for number, options in enumerate((
            {"name": "uint4", "group": 128, "rank": 32}, {"name": "int8"}, {"name": "uint4"},
            {"name": "uint4", "group": 64, "scale_dtype": torch.bfloat16})):
        folder = tmp_path / str(number)
        write_folder(folder, weights, **options)
        file = open_weights(folder)
        held = file.state_dict()
        assert sum(tensor.nbytes for tensor in held.values()) <= 1.05 * file.tensor_bytes
        data = held["a.weight"]._qdata
        assert is_read_only(data)  # it is the file, mapped


@pytest.mark.parametrize(("options", "title"), [
    ({"name": "uint4", "rank": 32}, "SDNQ uint4, rank 32"), ({"name": "int8"}, "SDNQ int8"),
    ({"name": "uint4", "codebook": True}, "SDNQ uint4 codebook")])
def test_an_inspection_names_the_type_and_the_rank(options, title, tmp_path):
    name = options.pop("name")
    write_folder(tmp_path, {"L.weight": values(64, 512)}, name,
                 settings={"use_codebook": "codebook" in options}, **options)
    inspection, = inspect(tmp_path)
    assert list(inspection.types) == [title]
