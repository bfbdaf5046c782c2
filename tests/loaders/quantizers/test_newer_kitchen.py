"""ComfyUI's formats as newer versions of comfy-kitchen write them than that of the host."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from host_formats import awq_weight
from oracles import installed
from pack_api import ROW_TYPES

from featherweight.loaders.quantizers.comfy_quant import layer_parts, pack_parts

pytestmark = pytest.mark.heavy

WRITER = Path(__file__).parents[2] / "support/kitchen_writer.py"
VERSIONS = ("0.2.31", "0.2.40")  # of ComfyUI 0.33, and the newest that was read
ASYMMETRIC = "AsymW4A8Int8Layout"
CUBES = torch.linspace(-1, 1, 16)**3
# name -> (format, settings, options of the writer); fp8 is written by ComfyUI itself
CASES = {
    "mxfp8": ("mxfp8", {}, {}),
    "nvfp4": ("nvfp4", {}, {}),
    "int8": ("int8_tensorwise", {}, {}),
    "int8 of rows": ("int8_tensorwise", {}, {"per_channel": True}),
    "int8, rotated": ("int8_tensorwise", {"convrot": True}, {"per_channel": True, "convrot": True}),
    "int4, rotated": ("convrot_w4a4", {}, {}),
    "levels": ("asym_w4a8_int8", {}, {}),
    "levels, bfloat16": ("asym_w4a8_int8", {}, {}),
    "levels of its own": ("asym_w4a8_int8", {}, {"codebook_tensor": CUBES}),
    "integers": ("asym_w4a8_int8", {}, {"codebook": False}),
    "added numbers": ("asym_w4a8_int8", {}, {"symmetric": False, "codebook": False}),
    "added numbers, bfloat16": ("asym_w4a8_int8", {}, {"symmetric": False, "codebook": False}),
    "8 columns": ("asym_w4a8_int8", {"group_size": 8, "convrot_groupsize": 64},
                  {"group_size": 8, "convrot_groupsize": 64}),
    "6 bits": ("asym_w4a8_int8", {}, {"bits": 6}),
    "6 bits, by its own name": ("w6a8_int8", {}, {"bits": 6}),
    "6 bits of 32 columns": ("asym_w4a8_int8", {"group_size": 32, "convrot_groupsize": 64},
                             {"bits": 6, "group_size": 32, "convrot_groupsize": 64}),
}


# formats that comfy-kitchen reads and does not write: name -> the dtype of the scales
READ = {"awq": torch.bfloat16, "awq, float16": torch.float16}


# type that is written here -> what comfy-kitchen calls the parts of its files
OWN = {
    "int8_convrot": {"scale": "weight_scale"},
    "mxfp8": {"scale": "weight_scale"},
    "nvfp4": {"scale": "weight_scale_2", "block_scale": "weight_scale"},
    "asym_w4a8_int8": {"scale": "weight_s_rel", "s_channel": "weight_s_channel",
                       "codebook": "weight_codebook"},
}


def written_here(name: str, weight: torch.Tensor) -> tuple[str, dict]:
    """The layout of a weight that is packed here, and what comfy-kitchen is told of it."""
    settings, parts = layer_parts(ROW_TYPES[name].pack(weight))
    layout = QUANT_ALGOS.get(settings.pop("format"), {}).get("comfy_tensor_layout", ASYMMETRIC)
    arguments = {argument: parts[part] for argument, part in OWN[name].items()}
    if name == "mxfp8":
        arguments["scale"] = arguments["scale"].view(torch.float8_e8m0fnu)
    return layout, {"qdata": parts["weight"], **arguments, **settings}


@pytest.fixture(scope="module", params=VERSIONS)
def written(request, tmp_path_factory):
    """(version, name -> parts and values)"""
    folder = installed(f"comfy-kitchen=={request.param}")
    weight = torch.randn(160, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    cases = {}
    for name, (format_name, _, options) in CASES.items():
        layout = QUANT_ALGOS.get(format_name, {}).get("comfy_tensor_layout", ASYMMETRIC)
        if "bits" not in options or request.param != VERSIONS[0]:
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
            cases[name] = weight.to(dtype), layout, options
    for name, dtype in READ.items():
        parts, _ = awq_weight(160, 512, dtype)
        cases[name] = weight, "TensorCoreAWQW4A16Layout", {
            "qdata": parts["weight"], "scale": parts["weight_scale"],
            "zeros": parts["weight_zeros"]}
    for name in OWN:
        cases[name, "here"] = weight, *written_here(name, weight)
    work = tmp_path_factory.mktemp("kitchen")
    torch.save(cases, work / "cases")
    subprocess.run([sys.executable, str(WRITER), str(work / "cases"), str(work / "written")],
                   check=True, env=os.environ | {"PYTHONPATH": str(folder)})
    return request.param, torch.load(work / "written")


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_writer(name, written):
    version, of_kitchen = written
    format_name, settings, options = CASES[name]
    if name not in of_kitchen:
        pytest.skip(f"comfy-kitchen {version} does not write it")
    parts, expected = of_kitchen[name]
    packed = pack_parts({"format": format_name} | settings, parts)
    values = packed.dequantize()
    if "rotated" in name or "a8_int8" in format_name:  # it rounds each product of its sum
        assert (values - expected).abs().max() < 1e-6 * expected.abs().max()
    else:
        assert torch.equal(values, expected)
    assert packed.nbytes <= 1.05 * sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("name", READ)
def test_values_are_those_of_the_reader(name, written):
    parts, expected = written[1][name]
    packed = pack_parts({"format": "awq_w4a16"}, parts)
    assert torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize("name", OWN)
def test_what_is_written_here_has_the_same_values_there(name, written):
    parts, values = written[1][name, "here"]
    weight = torch.randn(160, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = ROW_TYPES[name].pack(weight)
    settings, expected = layer_parts(packed)
    assert parts.keys() == expected.keys()
    for part, tensor in expected.items():
        assert torch.equal(*(each.view(-1).view(torch.uint8) for each in (parts[part], tensor)))
    assert (values - packed.dequantize()).abs().max() < 1e-6 * weight.abs().max()
