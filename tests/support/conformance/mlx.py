"""Weights of MLX."""
from functools import partial

import torch

from featherweight.ops.formats.comfy_quant import E2M1

from .base import Written, damaged, each, weight

CONFIG = {"quant_method": "mlx"}


def words(codes, bits):
    """Codes (N, K) as a stream of bits, the lowest first, in words of 32 bits."""
    planes = codes.long().unsqueeze(-1) >> torch.arange(bits) & 1
    stream = planes.view(len(codes), -1, 8)
    data = (stream << torch.arange(8)).sum(-1).to(torch.uint8)
    return data.contiguous().view(torch.uint32)


def affine_parts(values, bits=4, group=64, dtype=torch.bfloat16):
    """What MLX stores of a matrix, and its values."""
    shape, values = values.shape, values.view(-1, group)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    most = (1 << bits) - 1
    scale, bias = ((high - low) / most).to(dtype), low.to(dtype)
    scale[::2] = -scale[::2]  # MLX counts from the end of larger magnitude
    bias[::2] = high.to(dtype)[::2]
    codes = ((values - bias.float()) / scale.float()).round().clamp(0, most)
    expected = codes * scale.float() + bias.float()
    parts = {"weight": words(codes.view(shape), bits), "scales": scale.view(shape[0], -1),
             "biases": bias.view(shape[0], -1)}
    return parts, expected.view(shape)


def affine(shape=(24, 256), config=None, dtype=torch.bfloat16, **options):
    return Written(*affine_parts(weight(*shape), dtype=dtype, **options), config=config, held=1,
                   error=0 if dtype.itemsize == 2 else 1e-6)


def without_biases(mode, shape=(24, 256)):
    generator = torch.Generator().manual_seed(len(mode))
    rows, columns = shape
    group, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    codes = torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)
    if mode == "mxfp8":
        codes[codes & 127 == 127] = 0  # not a number
    scales = torch.randint(100, 130, (rows, columns // group), generator=generator).to(torch.uint8)
    if mode == "nvfp4":
        scales -= 60
    numbers = (codes.view(torch.float8_e4m3fn).float() if bits == 8 else
               torch.tensor(E2M1)[codes.long()])
    factors = (scales.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else
               torch.exp2(scales.float() - 127))
    return Written({"weight": words(codes, bits), "scales": scales},
                   numbers * factors.repeat_interleave(group, 1), held=1.15)


def stated(bits, group):
    return CONFIG | {"bits": bits, "group_size": group}


WRITERS = each("affine", affine, *(
    {"bits": bits, "dtype": dtype, "shape": shape} for bits in (2, 3, 4, 5, 6, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for shape in ((24, 256), (7, 192)))) | {
        f"affine, {bits} bits in groups of {group} by the config": partial(
            affine, bits=bits, group=group, config=stated(bits, group))
        for bits in (2, 3, 4, 5, 6, 8) for group in (32, 128)} | {
        f"affine, {bits} bits in groups of {group} by the only size that is whole": partial(
            affine, bits=bits, group=group) for bits, group in ((5, 32), (6, 128), (8, 128))} | {
        "affine, a layer with settings of its own": partial(
            affine, bits=8, group=32, config=stated(4, 64) | {"L": {"bits": 8, "group_size": 32}}),
    } | each("no biases", without_biases, *(
        {"mode": mode, "shape": shape} for mode in ("mxfp4", "mxfp8", "nvfp4")
        for shape in ((24, 256), (5, 96))))
BAD = damaged(
    affine,
    scales_missing=({"scales": lambda scales: scales[:-1]}, r"expected \(N, G\)"),
    groups_missing=({"scales": lambda scales: scales[:, :-1].contiguous(),
                     "biases": lambda biases: biases[:, :-1].contiguous()}, "do not divide"),
    biases_of_other_rows=({"biases": lambda biases: biases[:-1]}, r"it has biases of"),
    biases_of_another_type=({"biases": torch.Tensor.float}, "expected the same"),
    biases_without_scales=({"scales": lambda scales: scales[:, :0].contiguous()}, "it has scales"),
    biases_of_other_groups=({"biases": lambda biases: biases[:, :2].contiguous()},
                            "it has biases of"),
    biases_of_one_dimension=({"biases": lambda biases: biases.flatten()}, "it has biases of"),
    words_for_half=({"weight": lambda words: words[:12]}, "it has scales of"),
    biases_of_integers=({"biases": lambda biases: biases.to(torch.int32)}, r"expected \(N, G\)"),
    scales_of_bytes=({"scales": lambda scales: scales.view(torch.uint8)}, r"expected \(N, G\)"),
    words_of_one_dimension=({"weight": lambda words: words.flatten()}, r"expected \(N, W\)"),
    experts=({"weight": lambda words: words.view(2, 12, -1)}, r"expected \(N, W\) of uint32"),
) | damaged(
    partial(affine, config=stated(4, 64)),
    bits_of_the_config=({"weight": lambda words: words[:, :16].contiguous()},
                        "its config says group_size 64"),
) | damaged(
    partial(affine, config=stated(4, 32)),
    a_group_of_the_config=({}, "its config says group_size 32"),
) | damaged(
    partial(affine, config=stated(7, 64)), bits_that_are_none=({}, "its config says bits 7"),
) | damaged(
    partial(without_biases, "mxfp4"),
    bytes_of_other_groups=({"scales": lambda scales: scales[:, :2].contiguous()},
                           r"it has 512 bits a group, expected those of mxfp4 \(128\)"),
    of_eight_bits=({"weight": lambda words: torch.cat([words] * 3, 1)},
                   r"it has 384 bits a group, expected those of mxfp4"),
    floats_for_bytes=({"scales": torch.Tensor.float}, r"expected \(N, G\) of uint8"),
    no_rows=({"scales": lambda scales: scales[:0]}, r"expected \(N, G\)"),
    biases_beside_bytes=({"biases": torch.ones(24, 8)}, r"it has scales of .* expected"),
)
