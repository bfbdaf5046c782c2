"""Weights of SVDQuant and AWQ that Nunchaku quantised."""
import nunchaku_writer
import torch

from .base import Written, damaged, grid, weight

TOLD = "'L', quantised by Nunchaku, "


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
    no_codes=({"qweight": None}, "but no qweight"),
    no_scales=({"wscales": None}, "has no wscales; expected qweight, wscales, smooth_factor"),
    no_divisors=({"smooth_factor": None}, "has no smooth_factor"),
    half_a_low_rank=({"proj_up": None}, "has no proj_up"),
    the_other_half=({"proj_down": None}, "has no proj_down"),
    few_scales=({"wscales": lambda part: part[:1, :128]},
                r"has wscales of bfloat16 \(1, 128\); expected bfloat16 or float16 \(2, 256\)"),
    scales_of_another_type=({"wscales": torch.Tensor.float}, "has wscales of float32"),
    another_rank=({"proj_up": lambda part: part.repeat(1, 2)},
                  r"has proj_up of bfloat16 \(256, 32\); expected .* \(256, 16\)"),
    a_rank_that_is_no_tile=({"proj_down": lambda part: part[:, :7]}, "has proj_down"),
    a_short_bias=({"bias": lambda part: part[:128]}, r"has bias of bfloat16 \(128,"),
    no_whole_tiles=({"qweight": lambda part: part[:100]}, "multiples of 128"),
    codes_of_another_type=({"qweight": lambda part: part.view(torch.uint8)},
                           r"has a qweight of uint8 \(256, 64\); expected int8"),
    codes_of_one_dimension=({"qweight": torch.Tensor.flatten}, "expected two dimensions"),
    a_divisor_of_0=({"smooth_factor": lambda part: part * 0}, "smooth_factor with 0"),
    an_unknown_part=({"rotation": torch.ones(3)}, "has a tensor 'rotation', which is not known"),
    scales_of_nvfp4_in_int4=({"wcscales": torch.ones(256).bfloat16()},
                             "has a tensor 'wcscales', which is not known"),
    two_versions_of_a_part=(lambda parts: parts | {"lora_up": parts["proj_up"]},
                            "has two tensors proj_up"),
) | damaged(
    lambda: beside_a_good_one(of_awq),
    AWQ_without_zeros=({"wzeros": None}, "has no wzeros"),
    AWQ_of_other_groups=({"wscales": lambda part: part.repeat(5, 1)},
                         r"has wscales of bfloat16 \(40, 128\); expected .* \(4, 128\)"),
    AWQ_of_half_a_group=({"qweight": lambda part: part[:, :16]},
                         "expected columns in multiples of 64"),
) | damaged(
    lambda: Written({}),
    codes_and_scales_alone=(lambda _: {"qweight": torch.zeros(2, 2, dtype=torch.int8),
                                       "wscales": torch.rand(2)},
                            "has a qweight of .* multiples of 128"),
)
