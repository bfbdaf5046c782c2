"""Weights of compressed-tensors."""
import torch
from quantizer_writers import int_quantized, mxfp, nvfp4, pack_quantized

from .base import Written, damaged, grid, weight


def packed(rows=96, columns=128, held=1.05, **options):
    return Written(*pack_quantized(weight(rows, columns), **options), held=held)


def apart(symmetric, bits):
    """Columns of a group lie apart."""
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    return packed(held=None, symmetric=symmetric, bits=bits, order=order)


def unordered(symmetric):
    parts, values = pack_quantized(weight(96, 128), symmetric=symmetric)
    return Written(parts | {"weight_g_idx": torch.full((128,), -1, dtype=torch.int32)}, values)


def of_one_scale():
    """One scale, and its zero in a byte."""
    parts, values = pack_quantized(weight(1, 128), group=None, symmetric=False)
    zero = int(parts["weight_zero_point"]) & 15
    return Written(parts | {"weight_zero_point": torch.tensor([[zero - 8]], dtype=torch.int8),
                            "weight_scale": parts["weight_scale"].view(1)}, values, held=None)


def integers(symmetric=False, group=32, shape=(96, 128), **options):
    return Written(*int_quantized(weight(*shape), symmetric=symmetric, group=group, **options),
                   has_own_marks=not symmetric or group is not None)


def floats(shape):
    return Written(*nvfp4(weight(*shape)))


def small_floats(shape, bits, dtype=torch.uint8, config=None, extremes=False):
    """mxfp4 and mxfp6, whose exponents may have a dtype of their own."""
    parts, values = mxfp(weight(*shape), bits, extremes)
    parts["weight_scale"] = parts["weight_scale"].view(dtype)
    return Written(parts, values, config=config)


def of_few_columns(bits, columns=24, group=8):
    """The words alone do not say how many bits a code has."""
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "weights": {"num_bits": bits, "symmetric": True}}}}
    parts, values = pack_quantized(weight(96, columns), bits, group=group)
    return Written(parts, values, config=config, held=None)


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
E8M0 = [torch.uint8, *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else [])]
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:mx_fp", "bits": 4}
WRITERS = {
    **grid("pack-quantized", packed, bits=range(2, 9), symmetric=[False, True], group=[32, None]),
    # rows may end within a word
    **grid("a word of two rows", packed, bits=range(2, 9), rows=[90, 40], columns=[136], group=[8],
           symmetric=[False], held=[None]),
    **grid("an odd width", packed, bits=[3, 4, 8], rows=[264], columns=[1088], group=[64, None],
           symmetric=[False], dtype=FLOATS),
    **grid("columns apart", apart, symmetric=[False, True], bits=range(2, 9)),
    **grid("columns without an order", unordered, symmetric=[False, True]),
    "one scale and zeros in bytes": of_one_scale,
    **grid("int-quantized", integers, symmetric=[False, True], group=[32, None]),
    **grid("int-quantized of an odd width", integers, shape=[(264, 544)], group=[16, None],
           dtype=FLOATS),
    **grid("a config says the bits", of_few_columns, bits=[7, 8]),
    **grid("nvfp4", floats, shape=[(64, 1024), (264, 544)]),
    **grid("mxfp", small_floats, shape=[(96, 128), (7, 352), (1, 32)], bits=[4, 6], dtype=E8M0),
    **grid("mxfp with all exponents", small_floats, shape=[(256, 1024)], bits=[4, 6],
           extremes=[True]),
    "mxfp4 of AutoRound": lambda: small_floats((96, 128), 4, config=AUTO_ROUND),
}
BAD = damaged(
    packed,
    no_scales=({"weight_scale": None},
               r"\(pack-quantized\): it has no weight_scale, expected one number or"),
    no_shape=({"weight_shape": None}, "it has no weight_shape, expected 2 numbers of any integer"),
    rows_missing=({"weight_packed": lambda words: words[:9]},
                  r"it has weight_scale of bfloat16 \(96, 4\), expected .* with N = 9\."),
    words_with_gaps=({"weight_packed": torch.zeros(96, 13).int()},
                     "expected words of 2, 3, 4, 5, 6, 7, 8 bits a value without gaps"),
    scales_of_other_rows=({"weight_scale": torch.ones(7, 4)},
                          "expected one number or .* with N = 96"),
    zeros_of_other_rows=({"weight_zero_point": torch.zeros(3, 4).int()},
                         r"its weight_zero_point is int32 \(3, 4\)"),
    zeros_of_other_bits=({"weight_zero_point": torch.full((96, 4), 8, dtype=torch.int8)},
                         "expected 4-bit integers"),
    groups_of_other_columns=({"weight_g_idx": torch.zeros(9).int()},
                             r"its weight_g_idx is int32 \(9,\) for 128 columns"),
    a_shape_of_floats=({"weight_shape": torch.Tensor.float}, "it has weight_shape of float32"),
    no_groups=({"weight_scale": torch.ones(96, 0).bfloat16()},
               r"it has weight_scale of bfloat16 \(96, 0\), expected"),
    groups_of_floats=({"weight_g_idx": torch.ones(128)}, "expected K numbers of any integer"),
    groups_of_none=({"weight_g_idx": torch.full((128,), 4)},
                    "its columns do not name one of its 4 groups each"),
    groups_beyond_int64=({"weight_g_idx": torch.tensor([2**64 - 1] * 128, dtype=torch.uint64)},
                         r"it has weight_g_idx of uint64 \(128,\) with numbers above 922337203685"),
    scales_of_doubles=({"weight_scale": torch.Tensor.double}, "it has weight_scale of float64"),
    codes_of_floats=({"weight_packed": torch.ones(96, 16)}, r"expected \(N, W\) of int32"),
    nvfp4_without_its_number=(
        lambda _: {"weight_packed": torch.zeros(96, 64, dtype=torch.uint8),
                   "weight_scale": torch.zeros(96, 8).to(torch.float8_e4m3fn)},
        r"\(nvfp4-pack-quantized\): it has no weight_global_scale"),
    nvfp4_of_other_scales=(
        lambda _: nvfp4(weight(96, 128))[0] | {"weight_scale": torch.ones(96)},
        r"expected \(N, K / 16\) of float8_e4m3fn with N = 96, K = 128"),
) | damaged(
    lambda: small_floats((96, 128), 4),
    mxfp4_without_scales=({"weight_scale": None}, "it has no weight_scale, expected"),
    mxfp4_of_other_groups=({"weight_scale": torch.zeros(96, 8, dtype=torch.uint8)},
                           r"\(mxfp4-pack-quantized\): it has weight_scale of uint8 \(96, 8\),"
                           r" expected \(N, K / 32\) of uint8 .* with N = 96, K = 128"),
    mxfp4_of_other_rows=({"weight_scale": lambda scale: scale[:7]}, "with N = 96, K = 128"),
    mxfp4_of_floats=({"weight_scale": torch.ones(96, 4)}, "it has no weight_global_scale"),
    mxfp4_of_two_scales=({"weight_global_scale": torch.ones(1)},
                         r"\(nvfp4-pack-quantized\): it has weight_scale of uint8"),
    mxfp4_with_zeros=({"weight_zero_point": torch.zeros(96, 4, dtype=torch.int8)},
                      "it has weight_zero_point, expected only"),
    mxfp4_of_one_axis=({"weight_packed": lambda codes: codes.view(-1)}, r"expected \(N, K / 2\)"),
    mxfp4_of_no_axis=({"weight_scale": torch.tensor(7, dtype=torch.uint8)}, "it has weight_scale"),
    mxfp4_without_columns=({"weight_packed": torch.zeros(96, 0, dtype=torch.uint8)},
                           r"it has weight_packed of uint8 \(96, 0\)"),
) | damaged(
    lambda: small_floats((96, 128), 6),
    mxfp6_of_other_rows=({"weight_scale": lambda scale: scale[:7]},
                         r"\(mxfp6-pack-quantized\): it has weight_scale .* with N = 96, K = 128"),
    mxfp6_of_other_columns=({"weight_packed": lambda codes: codes[:, :95]},
                            r"\(mxfp4-pack-quantized\): it has weight_scale"),
) | damaged(
    lambda: of_few_columns(2, 4, None),
    no_eight_columns=({}, "it has 4 columns of 2 bits a value, expected a multiple of 8")
) | damaged(
    integers, zeros_of_floats=({"weight": torch.ones(96, 128)}, r"expected \(N, K\) of int8"))
