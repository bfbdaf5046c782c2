"""Weights of scales without a mark and of ComfyUI's formats at random widths, groups, signs, zero
points and extreme codes, each next to the values that its writer means."""
import random

import pytest
import torch
from host_formats import asymmetric_parts, asymmetric_values, mark_of
from pack_api import is_packed, open_weights
from quantizer_writers import pack_quantized
from safetensors.torch import save_file

from featherweight.loaders.quantizers.comfy_quant import pack_parts

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Case:
    """One weight at random.

    parts, expected: what a file holds, and its values. Of ComfyUI's formats `settings` are those of
    the layer's comfy_quant.
    """

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.settings = None

    def sizes(self, multiple: int, most: int = 30) -> tuple[int, int]:
        return self.rng.randint(1, 40) * 8, multiple * self.rng.randint(1, most)

    def values(self, rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=self.generator)
        return values * 10 ** self.rng.uniform(-4, 0)

    def choose(self, *options):
        return self.rng.choice(options)

    def scale(self, *shape: int, dtype=None) -> torch.Tensor:
        scale = torch.rand(shape, generator=self.generator) * 10 ** self.rng.uniform(-6, 0)
        if self.rng.random() < 0.2:
            scale = -scale  # nothing forbids it
        return scale.to(dtype or self.choose(*FLOATS))


def of_one_scale(case):
    """compressed-tensors' strategy "tensor": one number for all rows."""
    rows, columns = case.sizes(32)
    codes = torch.randint(-128, 128, (rows, columns), generator=case.generator, dtype=torch.int8)
    scale = case.scale(*case.choose((), (1,), (1, 1)))
    zero = torch.randint(-128, 128, scale.shape, generator=case.generator, dtype=torch.int8)
    parts = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}
    return parts, (codes.float() - zero.float().view(1, 1)) * scale.float().view(1, 1)


def of_one_packed_scale(case):
    bits = case.choose(2, 4, 8)
    rows, columns = case.sizes(32)
    parts, _ = pack_quantized(case.values(rows, columns), bits, columns, dtype=case.choose(*FLOATS))
    parts["weight_scale"] = parts["weight_scale"].view(-1)[:1].view(case.choose((), (1,), (1, 1)))
    fields = parts["weight_packed"].view(torch.uint8)
    codes = (fields.unsqueeze(-1) >> torch.arange(0, 8, bits, dtype=torch.uint8)) & (1 << bits) - 1
    codes = codes.view(rows, -1)[:, :columns].float() - (1 << bits - 1)
    return parts, codes * parts["weight_scale"].float().view(1, 1)


# --- without a mark ---

def fp8_codes(case, rows, columns, dtype):
    """Any finite codes, the largest ones and those of both zeros among them."""
    codes = torch.randint(0, 256, (rows, columns), generator=case.generator, dtype=torch.uint8)
    values = codes.view(dtype).float()
    codes[~values.isfinite()] = 0
    codes[0, 0], codes[-1, -1] = 128, 127 - (1 if dtype == FP8[0] else 4)
    return codes.view(dtype)


def of_fp8_rows(case):
    rows, columns = case.sizes(1, 300)
    codes, scale = fp8_codes(case, rows, columns, FP8[0]), case.scale(*case.choose(
        (), (1,), (rows,), (rows, 1)))
    numbers = scale.float().view(-1, 1)
    return {"weight": codes, "weight_scale": scale}, codes.float() * numbers


def of_fp8_blocks(case):
    rows, columns = case.rng.randint(1, 500), case.rng.randint(1, 500)
    codes = fp8_codes(case, rows, columns, FP8[0])
    scale = case.scale(-(-rows // 128), -(-columns // 128))
    numbers = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * numbers


def of_int8_rows(case):
    rows, columns = case.sizes(1, 300)
    codes = torch.randint(-128, 128, (rows, columns), generator=case.generator, dtype=torch.int8)
    scale = case.scale(*case.choose((), (1,), (rows,), (rows, 1)))
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float().view(-1, 1)


# --- ComfyUI's own ---


def of_comfy_levels(case):
    bits, group, size = case.choose(4, 6), case.choose(8, 16, 32), case.choose(16, 64, 256)
    rows, columns = case.sizes(max(size, group, 32), 4)
    codebook = torch.linspace(-128, 127, 16).tolist() if case.choose(0, 1) else None
    parts = asymmetric_parts(rows, columns, bits, group, codebook)
    case.settings = {"format": "asym_w4a8_int8", "group_size": group, "convrot_groupsize": size}
    return parts, asymmetric_values(parts, group, size)


def of_comfy_awq(case):
    group = case.choose(16, 64, 128)
    rows, columns = case.sizes(group, 6)
    columns = case.choose(columns, group)  # one group in a row too
    codes = torch.randint(0, 16, (rows, columns), generator=case.generator, dtype=torch.uint8)
    scale = case.scale(columns // group, rows)
    zeros = case.scale(columns // group, rows, dtype=scale.dtype)
    case.settings = {"format": "awq_w4a16", "group_size": group}
    numbers, added = (side.float().t().repeat_interleave(group, 1) for side in (scale, zeros))
    parts = {"weight": (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8),
             "weight_scale": scale, "weight_zeros": zeros}
    return parts, (codes.float() - 8) * numbers + added


WRITERS = {name.removeprefix("of_"): writer for name, writer in globals().items()
           if name.startswith("of_")}


def read(case, parts, folder):
    if case.settings is not None:
        return pack_parts(case.settings, parts | {"comfy_quant": mark_of(case.settings)})
    stored = {f"L.{name}": tensor.contiguous() for name, tensor in parts.items()}
    path = folder / "model.safetensors"
    save_file(stored, path)
    weights = open_weights(path).state_dict()
    assert set(weights) == {"L.weight"}
    return weights["L.weight"]


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 80), marks=pytest.mark.heavy)])
@pytest.mark.parametrize("family", WRITERS)
def test_values_are_those_that_the_writer_means(family, seeds, tmp_path):
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        case = Case(seed)
        parts, expected = WRITERS[family](case)
        weight = read(case, parts, folder)
        assert is_packed(weight) and weight.shape == expected.shape, seed
        error, largest = (weight.dequantize() - expected).abs().max(), expected.abs().max()
        assert error <= 1e-6 * largest, f"{seed}: {error} of {largest}"
