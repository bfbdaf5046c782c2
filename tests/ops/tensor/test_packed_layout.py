"""A packed tensor behaves as the host expects of any tensor, and keeps the bytes of the file while
it does."""
import comfy.memory_management
import comfy.model_management
import gguf
import numpy as np
import pytest
import torch
from pack_api import FORMATS, FormatError, is_packed, packed_tensor, relabel

from devtools.files.gguf_files import pack
from featherweight.ops import formats  # noqa: F401

SHAPE = (6, 512)


@pytest.fixture(params=["Q8_0", "Q4_K"])
def packed(request):
    values = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    data = pack(values, request.param)
    tensor = packed_tensor(FORMATS[request.param], torch.from_numpy(data), SHAPE)
    tensor.reference = torch.from_numpy(
        gguf.quants.dequantize(data, gguf.GGMLQuantizationType[request.param]))
    return tensor


def same_bytes(a, b):
    return is_packed(a) and is_packed(b) and torch.equal(a._qdata, b._qdata)


def test_shows_its_logical_shape_and_a_float_dtype_and_holds_the_bytes_given(packed):
    assert packed.shape == SHAPE and packed.dtype == torch.float32 and packed.is_floating_point()
    assert packed.nbytes == packed._qdata.nbytes < 4 * packed.numel()
    assert torch.equal(packed.dequantize(), packed.reference)


def test_falls_back_to_the_right_values_in_operations_it_does_not_know(packed):
    assert torch.equal(packed[1:3], packed.reference[1:3])
    assert torch.equal(torch.cat([packed, packed]), torch.cat([packed.reference] * 2))


def test_copies_and_moves_stay_packed(packed):
    other = torch.device("cpu", 0)
    for copy in (packed.clone(), packed.detach(), packed.to("cpu"), packed.to(other),
                 packed.contiguous(), torch.nn.Parameter(packed, requires_grad=False)):
        assert (
            same_bytes(copy, packed) and copy.dtype == packed.dtype and copy.shape == packed.shape
        )


def test_another_dtype_is_another_label_on_the_same_bytes(packed):
    for half in (packed.to(torch.bfloat16), packed.half(), relabel(packed, dtype=torch.float16)):
        assert half.dtype in (torch.bfloat16, torch.float16) and same_bytes(half, packed)
        assert torch.equal(half.dequantize(), packed.reference.to(half.dtype))
    assert relabel(packed, dtype=torch.float16)._qdata.data_ptr() == packed._qdata.data_ptr()


def test_travels_through_the_hosts_gathered_buffers(packed):
    bias = torch.arange(6, dtype=torch.float32)
    size = comfy.memory_management.vram_aligned_size([packed, bias])
    assert size == 1024 * (-(-packed.nbytes // 1024) + 1)
    buffer = torch.empty(size, dtype=torch.uint8)
    comfy.model_management.cast_to_gathered([packed, bias], buffer)
    weight, gathered_bias = comfy.memory_management.interpret_gathered_like([packed, bias], buffer)
    assert same_bytes(weight, packed) and torch.equal(gathered_bias, bias)
    assert buffer.data_ptr() <= weight.data_ptr() < buffer.data_ptr() + size


def test_copy_into_an_empty_one_keeps_the_destinations_dtype(packed):
    destination = torch.empty_like(relabel(packed, dtype=torch.bfloat16))
    destination.copy_(packed)
    assert same_bytes(destination, packed) and destination.dtype == torch.bfloat16


def test_the_host_counts_its_bytes_and_its_state_dict_holds_it(packed):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert comfy.model_management.module_size(module) == packed.nbytes
    assert same_bytes(module.state_dict()["weight"], packed)


def test_packing_again_is_refused(packed):
    with pytest.raises(FormatError, match="packed again"):
        # the host, after it patched a weight
        type(packed).from_float(packed.reference, packed._layout_cls)


def test_bytes_of_another_shape_are_refused():
    with pytest.raises(FormatError, match="hold 64 values"):
        packed_tensor(FORMATS["Q8_0"], torch.zeros(68, dtype=torch.uint8), (2, 64))
