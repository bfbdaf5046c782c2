"""Weights of HQQ."""
import torch

from .base import Written, damaged, each, weight


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def of_bits(shape=(96, 256), bits=4, group=64, dtype=torch.float16, stated=None):
    """As hqq's layers store them; stated: the bits of codes that each have a byte."""
    values = weight(*shape).view(-1, group)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    most = (1 << (stated or bits)) - 1
    scale = ((high - low) / most).to(dtype)
    zero = (-low / scale.float()).to(dtype)
    codes = (values / scale.float() + zero.float()).round().clamp(0, most).to(torch.uint8)
    pieces = codes.chunk(8 // bits)
    stored = sum(piece.int() << (8 - bits) - bits * i for i, piece in enumerate(pieces))
    parts = {
        "W_q": stored.to(torch.uint8), "scale": scale, "zero": zero, "shape": torch.tensor(shape),
        "nbits": torch.tensor(stated or bits, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "axis": torch.tensor(1, dtype=torch.int32), "packing": text(f"{bits}bit_u8"),
        "compute_dtype": text(str(dtype)), "encoded_state_dict": torch.tensor(1).to(torch.uint8)}
    expected = (codes.double() - zero.double()) * scale.double()
    return Written(parts, expected.float().view(shape), held=1.15,
                   error=0 if dtype.itemsize == 2 else 1e-6)


WRITERS = each("bits", of_bits, *(
    {"bits": bits, "dtype": dtype, "shape": shape, "group": group} for bits in (2, 4, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for shape, group in (((96, 256), 64), ((6, 128), 32), ((8, 96), 96))
)) | each("bytes", of_bits, {"bits": 8, "stated": 5}, {"bits": 8, "stated": 6})
BAD = damaged(
    of_bits,
    groups_of_rows=({"axis": torch.tensor(0)}, r"its groups are of rows \(axis 0\)"),
    three_bits=({"nbits": torch.tensor(3)}, "it has 3 bits a value, expected 2, 4, 5, 6 or 8"),
    a_part_of_a_bit=({"nbits": torch.tensor(1.58)}, "it has 1.58 bits a value"),
    complex_bits=({"nbits": torch.tensor(4j)},
                  "has nbits of complex64 .*, expected one number of any real type"),
    no_bits=({"nbits": torch.tensor(0)}, "it has 0 bits a value"),
    bits_that_are_not_a_number=({"nbits": torch.tensor(float("nan"))}, "it has nan bits a value"),
    bits_of_others=({"nbits": torch.tensor(8)}, "of 8 bits .* expected 384 rows"),
    no_scale=({"scale": None}, "it has no scale"),
    no_zero=({"zero": None}, "it has no zero"),
    no_shape=({"shape": None}, "it has no shape"),
    no_axis=({"axis": None}, "it has no axis"),
    no_group=({"group_size": None}, "it has no group_size"),
    another_group=({"group_size": torch.tensor(32)}, "whole groups of columns"),
    zeros_of_another_type=({"zero": torch.Tensor.float}, "expected the same"),
    zeros_missing=({"zero": torch.ones(5, 1).half()}, "expected G numbers of .* with G = 384"),
    codes_missing=({"W_q": lambda codes: codes[:-1]}, "it has 191 rows"),
    codes_of_floats=({"W_q": lambda codes: codes.half()}, r"expected \(C, L\) of uint8"),
    a_shape_of_one=({"shape": torch.tensor([96])}, "expected 2 numbers"),
    a_shape_of_others=({"shape": torch.tensor([96, 128])}, r"a weight of \(96, 128\)"),
    a_shape_that_is_vast=({"shape": torch.tensor([2**40, 2**40])}, "whole groups"),
    a_shape_beyond_int64=({"shape": torch.tensor([2**64 - 96, 256], dtype=torch.uint64)},
                          r"it has shape of uint64 \(2,\) with numbers above 9223372036854775807"),
    a_shape_below_nothing=({"shape": torch.tensor([-96, -256])}, "whole groups"),
    groups_across_rows=({"shape": torch.tensor([768, 32])}, "whole groups of columns"),
) | damaged(
    lambda: of_bits((8, 4), 2, 4),
    no_eight_columns=({}, "it has 4 columns of 2 bits a value, expected a multiple of 8"),
) | damaged(
    lambda: of_bits((8, 1), 4, 1),
    one_column=({}, "it has 1 columns of 4 bits a value, expected a multiple of 2"),
)
