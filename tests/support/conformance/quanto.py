"""Weights of optimum-quanto."""
import torch
from quantizer_writers import quanto_bits, quanto_bytes

from .base import Written, damaged, each, grid, weight


def of_bytes(shape, *dtypes, **options):
    return Written(*quanto_bytes(weight(*shape), *dtypes, **options))


def of_bits(shape=(96, 256), bias=True, **options):
    parts, values = quanto_bits(weight(*shape), **options)
    bias = torch.ones(shape[0]) if bias else None
    return Written(parts if bias is None else parts | {"bias": bias}, values, bias, held=1)


WRITERS = {
    **grid("bytes", of_bytes, shape=[(96, 128), (8, 4, 3, 3)],
           dtype=[torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]),
    **grid("bytes of an odd width", of_bytes, shape=[(264, 540)],
           dtype=[torch.int8, torch.float8_e4m3fn, torch.float8_e5m2],
           scale_dtype=[torch.float16, torch.float32]),
    **each("bits", of_bits, *(
        {"bits": bits, "dtype": dtype, "shape": shape, "group": group} for bits in (2, 4)
        for dtype in (torch.bfloat16, torch.float16, torch.float32) for shape, group in (
            ((96, 256), 128), ((6, 64), 64), ((7, 96), 32), ((3, 96), 96), ((264, 544), 32)))),
}
BAD = damaged(
    lambda: of_bits(bias=False),
    no_bias=({}, "it has no bias, without which .* qint8 and qfloat8 need none"),
    a_bias_of_other_rows=({"bias": torch.ones(7)}, r"are not whole rows of its bias of \(7,\)"),
    a_bias_of_one_number=({"bias": torch.ones(())}, r"are not whole rows of its bias of \(\)"),
    shifts_missing=({"weight._shift": torch.ones(5).bfloat16()},
                    "expected G numbers of .* with G = 192"),
    codes_missing=({"weight._data._data": torch.zeros(5, 128, dtype=torch.uint8)},
                   "expected 2 or 4 bits a value"),
    a_group_of_no_whole_bytes=({"weight._data._data": torch.zeros(96, 129).to(torch.uint8)},
                               "and whole bytes for each group"),
    shifts_of_another_type=({"weight._shift": torch.Tensor.float}, "expected the same"),
    codes_of_floats=({"weight._data._data": torch.zeros(5, 128)}, r"expected \(C, L\) of uint8"),
    bytes_and_bits=({"weight._data": torch.zeros(192, 8, dtype=torch.int8)},
                    "it has weight._shift, expected only weight._data, weight._scale"),
    no_scale=({"weight._scale": None}, "it has no weight._scale"),
    codes_alone=(lambda _: {"weight._data": torch.zeros(2, 2, dtype=torch.int8)},
                 "it has no weight._scale"),
    a_scale_alone=(lambda _: {"weight._scale": torch.ones(1)},
                   "'L.weight._scale' is part of a weight packed by quanto whose"),
) | damaged(
    lambda: of_bytes((96, 128), torch.int8),
    bytes_of_other_rows=({"weight._data": torch.zeros(9, 8, dtype=torch.int8)},
                         "expected one number or N numbers of any float type with N = 9"),
    bytes_of_an_unknown_type=({"weight._data": torch.zeros(96, 8, dtype=torch.uint8)},
                              r"expected \(N, K, L, ...\) of int8, float8_e4m3fn or float8_e5m2"),
) | damaged(
    lambda: of_bits((8, 4), bits=2, group=4),
    no_eight_columns=({}, "it has 4 columns of 2 bits a value, expected a multiple of 8"),
)
