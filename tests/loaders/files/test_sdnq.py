"""Weights of SDNQ: values by SDNQ itself, and by plain arithmetic on codes chosen at random."""
import json
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import sdnq_oracle
import torch
from safetensors.torch import load_file

from featherweight.loaders.files import open_weights
from featherweight.ops.packed_layout import is_packed

# versions -> a package that they need beside torch, diffusers and transformers
VERSIONS = {"0.1.0": ("accelerate==1.2.0",), "0.1.9": ("accelerate==1.2.0",),
            "0.2.0": ("accelerate==1.2.0",), "0.2.8": ()}
TYPES = ("int8", "int7", "int6", "int5", "int4", "int3", "int2", "uint8", "uint7", "uint6",
         "uint5", "uint4", "uint3", "uint2", "uint1", "float8_e4m3fn", "float8_e5m2")
FLOATS = [f"float{bits}_e{e}m{bits - signed - e}fn{'' if signed else 'u'}"
          for bits in range(1, 9) for signed in (1, 0) for e in range(1, min(5, bits - signed) + 1)]
FLOATS = ["float8_e4m3fn_sdnq" if name == "float8_e4m3fn" else name for name in FLOATS]
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
def written(request, tmp_path_factory):
    """Folders that a version of SDNQ wrote, and the cases."""
    package = oracles.installed(f"sdnq=={request.param}", *VERSIONS[request.param])
    folder = tmp_path_factory.mktemp("sdnq")
    subprocess.run([sys.executable, sdnq_oracle.__file__, folder], check=True, text=True,
                   input=json.dumps(cases(request.param)), env={"PYTHONPATH": str(package)})
    return [(folder / str(number), case) for number, case in enumerate(cases(request.param))]


@pytest.mark.heavy
def test_values_are_those_of_sdnq(written):
    errors = []
    for folder, case in written:
        expected = load_file(folder / "expected.safetensors")
        (folder / "expected.safetensors").unlink()
        try: weights = open_weights(folder).state_dict()
        except Exception as e: errors.append((case, str(e))); continue
        names = {name for name, weight in weights.items() if is_packed(weight)}
        assert names == set(expected) and len(names) == len(case["layers"]), case
        for name, values in expected.items():
            error = (weights[name].dequantize() - values).norm() / values.norm()
            # the reference rounds the sum and the product with the rotation to 16 bits
            limit = 5e-3 if case.get("torch_dtype") == "bfloat16" else 1e-6
            if not (weights[name].shape == values.shape and error < limit): errors.append((case, name, error))
    for e in errors: print("ERR",e)
    assert not errors
