"""No byte is shifted on a device, which some Intel GPUs crash on."""
import pytest
import torch
from pack_api import FORMATS, GGML_FORMATS, Format, pack_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featherweight.ops.formats import bits, row_layout
from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.packing.pack_tensor import can_pack

COLUMNS = 512
META = torch.device("meta")
ROWS = list(FAMILIES)
SINGLE = {each.name: each
          for each in (*GGML_FORMATS.values(), FORMATS["NF4"], FORMATS["FP4"])}
SHIFTS = ("__lshift__", "__rshift__", "__ilshift__", "__irshift__", "bitwise_left_shift",
          "bitwise_left_shift_", "bitwise_right_shift", "bitwise_right_shift_")


class NoByteShifts(TorchDispatchMode):
    """Refuses operations that shift numbers of one byte."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func.overloadpacket.__name__ not in SHIFTS or out.dtype.itemsize > 1, func
        return out


def test_a_shift_of_bytes_is_seen():
    data = torch.zeros(4, dtype=torch.uint8)
    for shift in (lambda: data >> 1, lambda: data << 1, lambda: data.view(torch.int8) >> 1,
                  lambda: data.clone().__irshift__(1), lambda: torch.bitwise_left_shift(data, 1)):
        with pytest.raises(AssertionError), NoByteShifts():
            shift()
    with NoByteShifts():
        data.int() >> 1
        data >> torch.arange(4, dtype=torch.int32)  # which torch computes in int32


def tensors_on(device: torch.device, packed_format: Format, blocks: int):
    return [torch.empty(blocks * packed_format.block_bytes, dtype=torch.uint8, device=device),
            *(torch.empty(qparam.length(blocks), dtype=qparam.dtype, device=device)
              for qparam in packed_format.qparams)]


@pytest.mark.parametrize("name", [*SINGLE, *ROWS])
def test_no_format_shifts_bytes_to_dequantize(name):
    packed_format = SINGLE.get(name) or FAMILIES[name].of_columns(COLUMNS)
    blocks = 8
    out = torch.empty(blocks * packed_format.block_length, device=META)
    with NoByteShifts():
        packed_format.dequantize_into(tensors_on(META, packed_format, blocks), out)


@pytest.mark.parametrize("width", row_layout.PACK_CODES)
def test_sdnq_codes_are_the_same_without_them(width, monkeypatch):
    packed = torch.randint(0, 256, (5, 840), dtype=torch.uint8)
    expected = row_layout.split_codes(packed, width)
    monkeypatch.setattr(row_layout, "passes_are_cheap", lambda device: False)
    with NoByteShifts():
        codes = row_layout.split_codes(packed, width)
    assert torch.equal(codes, expected) and codes.dtype == torch.uint8


@pytest.mark.parametrize("name", [name for name, each in SINGLE.items() if can_pack(each)])
def test_no_format_shifts_bytes_to_pack(name, monkeypatch):
    monkeypatch.setattr(bits, "passes_are_cheap", lambda device: False)
    with NoByteShifts():
        pack_tensor(torch.randn(2, COLUMNS), FORMATS[name])
