"""Weights of GPTQ, AutoRound and AWQ."""
import random

import torch
from quantizer_writers import awq, bit_planes, gptq

from .base import Written, damaged, each, grid, weight

V1 = {"quant_method": "gptq", "bits": 4}
NAMED = V1 | {"checkpoint_format": "gptq"}
PLANES = {"quant_method": "gptq", "checkpoint_format": "gptq_p"}
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def of_gptq(rows=96, columns=128, seed=0, config=NAMED, has_groups=True, held=1.05, **options):
    parts, values = gptq(weight(rows, columns, seed=seed), **options)
    if not has_groups:
        del parts["g_idx"]
    uncounted = () if "order" in options else ("g_idx",)
    return Written(parts, values, config=config, held=held, uncounted=uncounted)


def of_any_width(seed):
    """Groups that do not divide the columns, and of which the last is short."""
    rng = random.Random(seed)
    group = rng.choice([32, 64, 128])
    columns = rng.choice([96, 192, 960, 32 * rng.randint(1, 32)])
    bits, symmetric = rng.choice(range(2, 9)), rng.random() < 0.5
    return of_gptq(32, columns, seed, NAMED | {"group_size": group}, rng.random() >= 0.7, None,
                   bits=bits, group=group, symmetric=symmetric)


def of_zeros_of_none(bits):
    """A zero of none is stored as the largest."""
    return Written(*gptq(weight(96, 128).abs(), bits), config=V1, uncounted=("g_idx",))


def of_half_the_range(stored_less):
    """Zeros of half the range need no config and no memory."""
    parts, values = gptq(weight(96, 128), symmetric=True, stored_less=stored_less)
    return Written(parts, values, held=1, uncounted=("qzeros", "g_idx"))


def of_planes(bits, symmetric, config, columns=128):
    """GPTQModel stores the bits of codes apart."""
    return of_gptq(columns=columns, bits=bits, symmetric=symmetric, config=config, stored_less=0,
                   join=bit_planes)


def of_apart(bits, symmetric):
    """Columns of a group lie apart."""
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    return of_gptq(bits=bits, symmetric=symmetric, order=order)


def of_a_short_group(config, has_groups):
    values = torch.nn.functional.pad(weight(96, 160), (0, 32))
    parts, expected = gptq(values, group=64)
    parts |= {"qweight": parts["qweight"][:20], "g_idx": parts["g_idx"][:160]}
    if not has_groups:
        del parts["g_idx"]
    return Written(parts, expected[:, :160], config=config, held=None)


def of_awq(shape=(96, 128), symmetric=False, group=32):
    parts, values = awq(weight(*shape), min(group, shape[1]), symmetric)
    return Written(parts, values, held=None if shape[1] < 32 else 1.05)


WRITERS = {
    **grid("gptq", of_gptq, bits=range(2, 9), group=[64], symmetric=[False, True], dtype=FLOATS),
    **grid("an odd width", of_gptq, rows=[288], columns=[544], bits=[3, 8], group=[32, 0],
           dtype=FLOATS),
    **grid("any width", of_any_width, seed=range(24)),
    **each("without a config", of_gptq, *(
        {"rows": 32, "columns": columns, "group": group, "symmetric": True, "config": None,
         "has_groups": False, "held": None}
        for columns, group in ((96, 64), (192, 128), (960, 128), (384, 128), (128, 64), (256, 32),
                               (48, 32), (96, 0)))),
    # the config says whether zeros are stored less one
    **each("zeros", of_gptq, *({"stored_less": less, "config": config} for less, config in (
        (1, V1), (0, V1 | {"checkpoint_format": "gptq_v2"}),
        (1, V1 | {"checkpoint_format": "gptq"}), (0, V1 | {"format": "gptq_v2"}),
        (1, AUTO_ROUND), (1, {"quant_method": "auto-round"}),
        (0, {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}),
        (0, {"quant_method": "intel/auto-round", "packing_format": "auto_round"})))),
    **grid("zeros of none", of_zeros_of_none, bits=[2, 4, 8]),
    **grid("zeros of half the range", of_half_the_range, stored_less=[0, 1]),
    **grid("planes", of_planes, bits=range(2, 9), symmetric=[False, True],
           config=[PLANES, {"quant_method": "gptq", "format": "gptq_p"}]),
    **grid("planes without a config", of_planes, bits=[3, 5, 6, 7], symmetric=[True],
           config=[None], columns=[128, 96]),
    **grid("columns apart", of_apart, bits=range(2, 9), symmetric=[False, True]),
    **each("a short group", of_a_short_group, {"config": V1, "has_groups": True}, *(
        {"config": config, "has_groups": False}
        for config in (AUTO_ROUND, AUTO_ROUND | {"group_size": 64}))),
    **grid("awq", of_awq, symmetric=[False, True], shape=[(96, 128), (8, 2), (2048, 4128)]),
    **grid("awq of an odd width", of_awq, symmetric=[False, True], shape=[(264, 1088)],
           group=[16, 64, 1088]),
}


def of_odd_groups():
    """Groups of a length that writers do not offer."""
    parts, _ = gptq(weight(96, 160), group=16)
    return Written({"qweight": parts["qweight"], "scales": parts["scales"][:7],
                    "qzeros": parts["qzeros"][:7]}, config=AUTO_ROUND)


BAD = damaged(
    of_gptq,
    no_zeros=({"qzeros": None}, "it has no qzeros, expected"),
    no_scales=({"scales": None}, "it has no scales, expected"),
    words_of_another_type=({"qweight": torch.Tensor.short},
                           r"it has qweight of int16 \(16, 96\), expected .* with N = 96, B = 4"),
    rows_missing=({"qweight": lambda words: words[:, :32]}, r"expected \(K \* B / 32, N\) or"),
    groups_missing=({"qzeros": lambda words: words[:2]}, "expected .* with G = 4, N = 96"),
    one_bit=({"qzeros": torch.zeros(4, 3, dtype=torch.int32),
              "qweight": torch.zeros(4, 96, dtype=torch.int32)},
             "it has 1 bits a value, expected 2, 3, 4, 5, 6, 7, 8"),
    scales_of_integers=({"scales": torch.Tensor.short}, "scales of int16"),
    a_group_out_of_range=({"g_idx": lambda groups: groups + 1},
                          "columns do not name one of its 4 groups each"),
    groups_beyond_int64=({"g_idx": torch.tensor([2**63] * 128, dtype=torch.uint64)},
                         r"it has g_idx of uint64 \(128,\) with numbers above 9223372036854775807"),
    groups_of_other_columns=({"g_idx": lambda groups: groups[:8]},
                             r"it has g_idx of int32 \(8,\), expected K numbers"),
    no_dimension=({"scales": torch.ones(1).half()}, r"expected \(G, N\) of bfloat16"),
    nothing=({"qweight": lambda words: words[:0]}, "it has qweight of int32"),
) | {
    "no config": (lambda: of_gptq(config=None), {}, "does not say whether zeros"
                                                    " .* pick the folder with its"),
    "groups of no length that writers offer": (of_odd_groups, {},
                                               "its 7 groups do not divide its 160 columns"),
    "codes and columns alone": (lambda: Written(
        {"qweight": torch.zeros(2, 2, dtype=torch.int32), "g_idx": torch.arange(2)}), {},
        "it has no scales"),
    "an unknown order of bits": (
        lambda: of_planes(5, False, PLANES | {"checkpoint_format": "other"}), {},
        "its config does not say in which order its 5 bits are; .*config"),
    "no order of bits": (lambda: of_planes(7, True, V1), {}, "in which order its 7 bits are"),
    "words of no whole planes": (
        lambda: of_planes(6, False, PLANES), {
            "qweight": lambda words: words[:21], "g_idx": lambda groups: groups[:112]},
        "it has rows of 21 words of 6 bits a value, expected multiples of 6"),
    "zeros alone": (lambda: Written({"qzeros": torch.zeros(2, 2, dtype=torch.int32)}), {},
                    "'L.qzeros' is part of a weight packed by GPTQ"),
}
