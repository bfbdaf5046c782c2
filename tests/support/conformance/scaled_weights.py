"""Weights of 8 and 4 bits with scales without a marker."""
import torch
from quantizer_writers import fp8_blocks, mxfp8, svdquant

from .base import Written, damaged, grid, weight

FP8, INT8, NIBBLES = torch.float8_e4m3fn, torch.int8, torch.uint8


def of_blocks(shape, block=(128, 128), **options):
    return Written(*fp8_blocks(weight(*shape), block), **options)


def of_llm_compressor(shape, block, named=True, scale_dtype=torch.float32, **options):
    """The same under the name of other scales."""
    parts, values = fp8_blocks(weight(*shape), block)
    scale = parts.pop("weight_scale_inv").to(scale_dtype)
    rows = scale.float().repeat_interleave(block[0], 0)[:shape[0]]
    values = parts["weight"].float() * rows.repeat_interleave(block[1], 1)[:, :shape[1]]
    weights = ({"strategy": "group", "group_size": block[1]} if block[0] == 1 else
               {"strategy": "block", "block_structure": list(block)})
    config = {"quant_method": "compressed-tensors", "format": "float-quantized",
              "config_groups": {"group_0": {"weights": weights | {"num_bits": 8}}}}
    return Written(parts | {"weight_scale": scale}, values, config=config if named else None,
                   has_own_marks=not named, **options)


def of_exponents(shape, named):
    parts, values = mxfp8(weight(*shape))
    config = {"quant_method": "auto-round", "packing_format": "auto_round:mx_fp"}
    return Written(parts, values, config=config if named else None, has_own_marks=not named)


def of_svdquant(smoothed, rank, dtype):
    parts, values = svdquant(weight(96, 128), rank, smoothed, dtype)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4_SVD", "config_groups": {"group_0": {
        "weights": {"num_bits": 4, "type": "float", "group_size": 16}, "lora_rank": rank}}}
    return Written(parts, values, config=config, error=1e-6, held=None)


def of_rows(dtype, scale_shape, scale_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-100, 100, (96, 80), generator=generator).float().to(dtype)
    scale = torch.rand(scale_shape, generator=generator).to(scale_dtype)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
    return Written(parts, codes.float() * scale.float().view(-1, 1), held=None)


def of_musubi(dtype, shape, whole):
    """Scales of 64 columns, (N, K / 64, 1) or (N, K / 64), as musubi-tuner keeps them, where not of
    int8, and one factor for all of them."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-100, 100, (96, 256), generator=generator).float().to(dtype)
    scale = torch.rand(96, 4, 1, generator=generator) * 0.01
    values = codes.float().view(96, 4, 64) * (scale if whole is None else scale * whole)
    parts = {"weight": codes, "scale_weight": scale.view(shape)}
    if whole is not None:
        parts["scale_weight_tensor"] = torch.tensor(whole)
    return Written(parts, values.view(96, 256), held=None)


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
    "blocks that are larger than memory": lambda: of_blocks(
        (200, 250), (1 << 40, 1 << 50), held=None,
        config={"quant_method": "fp8", "weight_block_size": [1 << 40, 1 << 50]}),
    "other blocks": lambda: of_blocks((96, 192), (32, 64), held=None),
    **grid("rows", of_rows, dtype=[FP8, INT8], scale_shape=[(), (96,), (96, 1)],
           scale_dtype=[torch.float32, torch.bfloat16]),
    **grid("blocks of llm-compressor", of_llm_compressor, shape=[(256, 384), (200, 250), (7, 300)],
           block=[(128, 128)], named=[True, False], scale_dtype=[torch.float32, torch.bfloat16],
           held=[None]),
    # four rows of 50 and not of 64, would say what divides
    **grid("blocks of a config", of_llm_compressor, shape=[(200, 250)], block=[(64, 64), (96, 32)],
           held=[None]),
    **grid("blocks of musubi-tuner", of_musubi, dtype=[FP8, torch.float8_e5m2, INT8],
           shape=[(96, 4, 1), (96, 4)], whole=[None, 0.375]),
    **grid("groups", of_llm_compressor, shape=[(96, 256), (7, 192), (128, 512)],
           block=[(1, 64), (1, 32)], named=[True, False], held=[None]),
    **grid("mxfp8", of_exponents, shape=[(96, 128), (7, 352), (1, 32)], named=[True, False]),
    **grid("mxfp8 of ComfyUI's shapes", of_exponents, shape=[(128, 128), (256, 512)], named=[True]),
    "nvfp4": of_nibbles,
    **grid("SVDQuant", of_svdquant, smoothed=[True, False], rank=[1, 8, 32],
           dtype=[torch.bfloat16, torch.float16, torch.float32]),
}


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype)


BAD = {name: (lambda parts=parts: Written(parts), {}, message)
       for name, (message, parts) in {
    "blocks of other rows": (r"scales of \(7, 3\) blocks, which do not divide \(128, 128\)", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale_inv": ones(7, 3)}),
    "blocks of three axes": (r"\(blocks\): it has weight .* expected \(N, K\) of float8", {
        "weight": ones(2, 128, 128, dtype=FP8), "weight_scale_inv": ones(2, 1, 1)}),
    "blocks of bytes": (r"it has weight of uint8 .* of float8_e4m3fn, float8_e5m2 or int8", {
        "weight": ones(128, 128, dtype=NIBBLES), "weight_scale_inv": ones(1, 1)}),
    "fp8 of other rows": (r"\(rows\): it has weight_scale of float32 .* with N = 128", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale": ones(64)}),
    "fp8 of two scales": ("it has weight_scale_2, expected only weight, weight_scale", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale": ones(128),
        "weight_scale_2": ones(1)}),
    "int8 of other rows": ("expected one number or N numbers", {
        "weight": ones(128, 128, dtype=INT8), "weight_scale": ones(64)}),
    "nvfp4 of one scale": (r"\(nvfp4\): it has no weight_scale_2", {
        "weight": ones(128, 128, dtype=NIBBLES), "weight_scale": ones(128, 16, dtype=FP8)}),
    "mxfp8 that may be ComfyUI's": ("its scales may be in rows, or in ComfyUI's order .* config", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale": ones(128, 4, dtype=NIBBLES)}),
    "mxfp8 of other groups": (r"\(mxfp8\): it has weight_scale of uint8 \(96, 3\), expected"
                              r" \(N, K / 32\) of uint8.* with N = 96, K = 128", {
        "weight": ones(96, 128, dtype=FP8), "weight_scale": ones(96, 3, dtype=NIBBLES)}),
    "mxfp8 of e5m2": (r"\(mxfp8\): it has weight of float8_e5m2", {
        "weight": ones(96, 128, dtype=torch.float8_e5m2),
        "weight_scale": ones(96, 4, dtype=NIBBLES)}),
    "exponents of one axis": (r"\(rows\): it has weight_scale of uint8 \(96,\)", {
        "weight": ones(96, 128, dtype=FP8), "weight_scale": ones(96, dtype=NIBBLES)}),
    "blocks of llm-compressor that do not divide": (
        r"\(blocks\): it has scales of \(7, 3\) blocks, which do not divide \(128, 128\)", {
            "weight": ones(128, 128, dtype=FP8), "weight_scale": ones(7, 3)}),
    "blocks under both names": (r"\(blocks\): it has weight_scale, expected only", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale": ones(1, 1),
        "weight_scale_inv": ones(1, 1)}),
    "blocks whose scales are bytes of floats": (r"it has weight_scale of float8_e4m3fn \(2, 2\)", {
        "weight": ones(256, 256, dtype=FP8), "weight_scale": ones(2, 2, dtype=FP8)}),
    "blocks of integers": (r"it has weight_scale of int32 \(2, 2\), expected", {
        "weight": ones(256, 256, dtype=FP8), "weight_scale": ones(2, 2, dtype=torch.int32)}),
    "no blocks": (r"it has weight_scale of float32 \(0, 2\), expected", {
        "weight": ones(256, 256, dtype=FP8), "weight_scale": ones(0, 2)}),
    "blocks of nothing": (r"it has weight of float8_e4m3fn \(0, 256\), expected", {
        "weight": ones(0, 256, dtype=FP8), "weight_scale": ones(2, 2)}),
    "blocks of more axes": (r"it has weight_scale of float32 \(128, 2, 2\), expected", {
        "weight": ones(128, 128, dtype=FP8), "weight_scale": ones(128, 2, 2)}),
    "a factor of all scales of nothing": (
        r"'L.scale_weight_tensor' is part of a weight packed by .* whose other parts are missing", {
            "weight": ones(128, 128, dtype=INT8), "weight_scale": ones(128, 2),
            "scale_weight_tensor": ones(1)}),
    "two factors of all scales": (r"it has scale_weight_tensor of float32 \(2,\), expected one", {
        "weight": ones(128, 128, dtype=FP8), "scale_weight": ones(128, 2, 1),
        "scale_weight_tensor": ones(2)}),
}.items()} | damaged(
    lambda: of_svdquant(True, 8, torch.bfloat16),
    half_a_low_rank=({"svdquant_lora_a": None}, r"\(nvfp4\): it has no svdquant_lora_a, expected"
                     r" \(T, K\) of bfloat16"),
    the_other_half=({"svdquant_lora_b": None}, "it has no svdquant_lora_b"),
    a_low_rank_of_other_columns=({"svdquant_lora_a": torch.ones(8, 64)},
                                 r"it has svdquant_lora_a of .* with K = 128"),
    a_low_rank_of_other_rows=({"svdquant_lora_b": torch.ones(64, 8)}, "with N = 96, T = 8"),
    two_ranks=({"svdquant_lora_b": torch.ones(96, 4)}, "with N = 96, T = 8"),
    a_rank_of_none=({"svdquant_lora_a": torch.ones(0, 128)}, "it has svdquant_lora_a of"),
    a_low_rank_of_integers=({"svdquant_lora_a": torch.ones(8, 128).int()},
                            "it has svdquant_lora_a of int32"),
    factors_that_are_integers=({"pre_quant_scale": torch.ones(128).int()},
                               "it has pre_quant_scale of int32"),
    factors_of_other_columns=({"pre_quant_scale": torch.ones(64)}, "its pre_quant_scale is"),
) | damaged(
    lambda: Written({"weight": ones(128, 64, dtype=FP8), "weight_scale": ones(128)}),
    factors_that_are_not_of_the_columns=({"pre_quant_scale": ones(128)},
                                         r"its pre_quant_scale is float32 \(128,\)"))
