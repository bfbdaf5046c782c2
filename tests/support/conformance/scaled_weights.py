"""Weights of 8 and 4 bits with scales without a marker."""
import torch
from quantizer_writers import fp8_blocks

from .base import Written, damaged, grid, weight

FP8, INT8, NIBBLES = torch.float8_e4m3fn, torch.int8, torch.uint8


def of_blocks(shape, block=(128, 128), **options):
    return Written(*fp8_blocks(weight(*shape), block), **options)


def of_rows(dtype, scale_shape, scale_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-100, 100, (96, 80), generator=generator).float().to(dtype)
    scale = torch.rand(scale_shape, generator=generator).to(scale_dtype)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
    return Written(parts, codes.float() * scale.float().view(-1, 1), held=None)


def of_nibbles():
    """nvfp4 without a marker has the low nibble first."""
    parts = {"weight": torch.tensor([[0x21] * 8, [0x9F] * 8], dtype=NIBBLES),
             "weight_scale": torch.tensor([[2.0], [0.5]]).to(FP8),
             "weight_scale_2": torch.tensor(3.0)}
    values = torch.tensor([[0.5, 1.0] * 8, [-6.0, -0.5] * 8]) * torch.tensor([[6.0], [1.5]])
    return Written(parts, values, held=None)


WRITERS = {
    **grid("blocks", of_blocks, shape=[(256, 384), (128, 128), (512, 128)]),
    **grid("short last blocks", of_blocks, shape=[(200, 256), (256, 200), (130, 131)], held=[None]),
    "other blocks": lambda: of_blocks((96, 192), (32, 64), held=None),
    **grid("rows", of_rows, dtype=[FP8, INT8], scale_shape=[(), (96,), (96, 1)],
           scale_dtype=[torch.float32, torch.bfloat16]),
    "nvfp4": of_nibbles,
}


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype)


BAD = {name: (lambda parts=parts: Written(parts), {}, message)
       for name, (message, parts) in {
    "blocks of other rows": (r"scales of \(7, 3\) blocks, which do not divide \(128, 128\)", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale_inv": ones(7, 3)}),
    "blocks of three axes": (r"\(blocks\): it has weight .* expected \(N, K\) of float8", {
        "weight": ones(2, 128, 128, dtype=FP8), "weight_scale_inv": ones(2, 1, 1)}),
    "blocks of int8": (r"it has weight of int8 .* of float8_e4m3fn or float8_e5m2", {
        "weight": ones(128, 128, dtype=INT8), "weight_scale_inv": ones(1, 1)}),
    "fp8 of other rows": (r"\(rows\): it has weight_scale of float32 .* with N = 128", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale": ones(64)}),
    "fp8 of two scales": ("it has weight_scale_2, expected only weight, weight_scale", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale": ones(128),
        "weight_scale_2": ones(1)}),
    "int8 of other rows": ("expected one number or N numbers", {
        "weight": ones(128, 128, dtype=INT8), "weight_scale": ones(64)}),
    "nvfp4 of one scale": (r"\(nvfp4\): it has no weight_scale_2", {
        "weight": ones(128, 128, dtype=NIBBLES), "weight_scale": ones(128, 16, dtype=FP8)}),
    "nvfp4 of other groups": (r"expected \(N, K / 16\) of float8_e4m3fn with N = 128, K = 256", {
        "weight": ones(128, 128, dtype=NIBBLES), "weight_scale": ones(128, 8, dtype=FP8),
        "weight_scale_2": ones(1)}),
}.items()} | damaged(
    lambda: Written({"weight": ones(128, 64, dtype=FP8), "weight_scale": ones(128)}),
    factors_that_are_not_of_the_columns=({"pre_quant_scale": ones(128)},
                                         r"its pre_quant_scale is float32 \(128,\)"))
