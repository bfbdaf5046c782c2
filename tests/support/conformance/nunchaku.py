"""Weights of SVDQuant and AWQ that Nunchaku quantised."""
import nunchaku_writer
import torch

from .base import Written, damaged, grid, weight


def of_svdquant(rows=256, columns=128, **options):
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    layer = nunchaku_writer.Layer(weight(rows, columns), bias, **options)
    return Written(layer.parts, layer.weight, bias=layer.bias, error=1e-6)


def of_awq(**options):
    parts, values, bias = nunchaku_writer.awq(weight(128, 256), torch.ones(128), **options)
    return Written(parts, values, bias=bias, error=1e-6, held=None)


HALVES = [torch.bfloat16, torch.float16]
WRITERS = grid("svdquant", of_svdquant, precision=["int4", "nvfp4"], dtype=HALVES,
               rank=[16, 48]) | grid("awq", of_awq, dtype=HALVES)


def beside_a_good_one(write=of_svdquant):
    good = {f"M.{name}": part for name, part in of_svdquant().parts.items()}
    return Written(write().parts, beside=good)


BAD = damaged(
    beside_a_good_one,
    no_codes=({"qweight": None}, "it has no qweight"),
    no_scales=({"wscales": None},
               r"\(SVDQuant int4\): it has no wscales, expected \(K / 64, N\) of bf"),
    no_divisors=({"smooth_factor": None}, "has no smooth_factor"),
    half_a_low_rank=({"proj_up": None}, "has no proj_up"),
    the_other_half=({"proj_down": None}, "has no proj_down"),
    few_scales=({"wscales": lambda part: part[:1, :128]},
                r"has wscales of bfloat16 \(1, 128\), expected .* with N = 256, K = 128"),
    scales_of_another_type=({"wscales": torch.Tensor.float}, "has wscales of float32"),
    another_rank=({"proj_up": lambda part: part.repeat(1, 2)},
                  r"has proj_up of bfloat16 \(256, 32\), expected .* with N = 256, R = 16"),
    a_rank_that_is_no_tile=({name: lambda part: part[:, :7] for name in ("proj_down", "proj_up")},
                            "a low rank of 7, expected .* ranks of 16"),
    a_short_bias=({"bias": lambda part: part[:128]}, r"has bias of bfloat16 \(128,"),
    no_whole_tiles=(lambda parts: {
        name: part[:, :100] if name == "wscales" else part[:100] if len(part) == 256 else part
        for name, part in parts.items()}, r"a weight of \(100, 128\) .* multiples of 128"),
    codes_of_another_type=({"qweight": lambda part: part.view(torch.uint8)},
                           r"has qweight of uint8 \(256, 64\), expected \(N, K / 2\) of int8"),
    codes_of_one_dimension=({"qweight": torch.Tensor.flatten}, r"expected \(N, K / 2\) of int8"),
    a_divisor_of_0=({"smooth_factor": lambda part: part * 0}, "its smooth_factor has a 0"),
    a_dense_weight_too=({"weight": torch.ones(256, 128)}, "it is in the file twice: 'L.weight'"),
    an_unknown_part=({"rotation": torch.ones(3)}, "has a tensor 'rotation', which is not known"),
    scales_of_nvfp4_in_int4=({"wcscales": torch.ones(256).bfloat16()},
                             "it has wcscales, expected only qweight, wscales"),
    two_versions_of_a_part=(lambda parts: parts | {"lora_up": parts["proj_up"]},
                            "it has both 'L.proj_up' and 'L.lora_up'"),
) | damaged(
    lambda: beside_a_good_one(of_awq),
    AWQ_without_zeros=({"wzeros": None}, "has no wzeros"),
    AWQ_of_other_groups=({"wscales": lambda part: part.repeat(5, 1)},
                         r"has wzeros of bfloat16 \(8, 128\), expected .* with N = 128, S = 40"),
    AWQ_of_more_groups=({name: lambda part: part.repeat(5, 1) for name in ("wscales", "wzeros")},
                        r"wscales of bfloat16 \(40, 128\), expected one for each 64 columns"),
    AWQ_of_half_a_group=({"qweight": lambda part: part[:, :16]},
                         "it has 32 columns and .* expected one for each 64 columns"),
) | damaged(
    lambda: Written({}),
    codes_and_scales_alone=(lambda _: {"qweight": torch.zeros(2, 2, dtype=torch.int8),
                                       "wscales": torch.rand(2)},
                            "it has no smooth_factor"),
)
