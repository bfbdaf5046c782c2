"""Formats and references for the tests of kernels in C++."""
import gguf
import pytest
import torch
from featherweight.ops import formats  # noqa: F401
from featherweight.ops.format import FORMATS, GGML_FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.kernels.source import FORMAT_NAMES
from gguf import GGMLQuantizationType

CODEBOOKS = [FORMATS["NF4"], FORMATS["FP4"]]
BASIC_FORMATS = [*(fmt for fmt in GGML_FORMATS.values() if fmt.__name__ in FORMAT_NAMES), *CODEBOOKS, INT8.of_columns(96)]
ALL_FORMATS = BASIC_FORMATS + [fmt.of_block_length(length) for fmt in CODEBOOKS for length in (32, 4096)]
BITS = {4: torch.int32, 2: torch.int16}
each_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.__name__)
each_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)


def assert_same_bits(values, expected):
    bits = BITS[values.dtype.itemsize]
    wrong = (values.view(bits) != expected.view(bits)) & ~(values.isnan() & expected.isnan())
    assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} values differ, the first at {wrong.nonzero()[0].tolist()}"


def reference(fmt, tensors) -> torch.Tensor:
    """float32 values by gguf, or by bitsandbytes' definition."""
    if fmt.ggml_type is not None:
        return torch.from_numpy(gguf.quants.dequantize(tensors[0].numpy(), GGMLQuantizationType(fmt.ggml_type))).flatten()
    if issubclass(fmt, INT8):
        values = tensors[0].view(torch.int8).float()
    else:
        values = torch.tensor(fmt.codebook)[torch.stack([tensors[0] >> 4, tensors[0] & 15], -1).flatten().long()]
    return values * tensors[1].repeat_interleave(fmt.block_length)
