"""Weights of torchao in safetensors."""
import torch
from quantizer_writers import torchao_bytes, torchao_header, torchao_integers

from .base import Written, damaged, each, grid, weight

INTEGERS = "IntxUnpackedToInt8Tensor"


def metadata(header):
    return {"L.weight": header, "tensor_names": '["L.weight"]'}


def of_bytes(dtype, shape):
    type_name = "Int8Tensor" if dtype == torch.int8 else "Float8Tensor"
    return Written(*torchao_bytes(weight(*shape), dtype), metadata=metadata(
        torchao_header(type_name)))


def of_integers(bits=4, type_name=INTEGERS, target=None, columns=128, **options):
    """`target`: bits by the header."""
    data = {"target_dtype": {"_type": "torch.dtype", "_data": f"int{target or bits}"}}
    header = torchao_header(type_name, **data if type_name == INTEGERS else {})
    return Written(*torchao_integers(weight(96, columns), bits, **options),
                   metadata=metadata(header), held=None if columns < 32 else 1.05)


WRITERS = {
    **grid("bytes", of_bytes, dtype=[torch.int8, torch.float8_e4m3fn, torch.float8_e5m2],
           shape=[(96, 128), (264, 540)]),
    **each("integers", of_integers, *(
        {"bits": bits, "symmetric": symmetric, "dtype": dtype} for bits in range(1, 9)
        for symmetric in (False, True)[:bits]
        for dtype in (torch.bfloat16, torch.float16, torch.float32))),
    **grid("an odd width", of_integers, bits=[3, 6], columns=[544], group=[32, 544]),
    # zeros of int8 count, and so do codes beyond the bits of the header
    **each("eight bits", of_integers, {"bits": 8, "group": 128, "type_name": "Int8Tensor"},
           {"bits": 8, "group": 128, "target": 4}),
    **grid("few columns", of_integers, bits=[1, 2, 4], columns=[1, 2, 4, 12], group=[0]),
}


KNOWN = torchao_header(INTEGERS)


def of_header(header=KNOWN):
    return Written(torchao_integers(weight(96, 128))[0],
                   metadata={"L.weight": header} if header else None)


BAD = {
    "no header": (lambda: of_header(None), {}, "the header of its file does not say its type"),
    "no JSON": (lambda: of_header("{"), {}, "the header of its file does not say its type"),
    "tiles": (lambda: of_header(torchao_header("Int4TilePackedTo4dTensor")), {},
              "it is a 'Int4TilePackedTo4dTensor', expected Int8Tensor, Float8Tensor, Intx"),
    "rows of groups": (lambda: of_header(torchao_header("Float8Tensor")), {
        "_weight_qdata": torch.ones(96, 128).to(torch.float8_e4m3fn)},
        r"\(Float8Tensor\): it has _weight_scale .* expected one number or N numbers"),
    "zeros of fp8": (lambda: of_header(torchao_header("Int8Tensor")), {
        "_weight_zero_point": torch.zeros(96, 4).to(torch.float8_e4m3fn)},
        r"\(Int8Tensor\): .* expected \(N, G\) of int8"),
    "no zeros": (of_header, {"_weight_zero_point": None}, "it has no _weight_zero_point"),
} | damaged(
    of_header,
    scales_of_other_rows=({"_weight_scale": torch.ones(7, 4)},
                          r"it has _weight_scale of float32 \(7, 4\), expected .* with N = 96"),
    zeros_of_floats=({"_weight_zero_point": torch.ones(96, 4)}, r"expected \(N, G\) of int8"),
    codes_of_floats=({"_weight_qdata": torch.ones(96, 128)}, r"expected \(N, K\) of int8"),
    codes_alone=(lambda _: {"_weight_qdata": torch.zeros(2, 2, dtype=torch.int8)},
                 "it has no _weight_scale"),
    a_scale_alone=(lambda _: {"_weight_scale": torch.ones(2)},
                   "'L.* is part of a weight packed by torchao whose"),
)
