"""Small writers of the quantisers that transformers and diffusers know, by the layouts they have.

Each takes a weight, float32 (N, K), and returns the parts of the layer and the values that they
mean, float32. Codes and scales are simple: what counts is where they lie.
"""
import json

import numpy
import torch

AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of each of eight neighbouring rows


def quantize(values, bits, group, dtype=torch.float16, symmetric=False):
    """Codes int32 (N, G, group), scales (N, G) of `dtype` and zeros int32 (N, G)."""
    blocks = values.view(len(values), -1, group or values.shape[1])
    half, largest = 1 << bits - 1, (1 << bits) - 1
    if symmetric:
        scales = (blocks.abs().amax(-1) / max(1, half - 1) + 1e-8).to(dtype)
        zeros = torch.full(scales.shape, half)
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scales = ((high - low) / largest + 1e-8).to(dtype)
        zeros = (-low / scales.float()).round().clamp(0, largest)
    zeros = zeros.int()
    codes = (blocks / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, largest).int(), scales, zeros


def meant(codes, scales, zeros):
    values = (codes - zeros[..., None]).float() * scales.float()[..., None]
    return values.view(len(values), -1)


def bit_stream(codes, bits):
    """Rows of codes, the lowest bit of the first one first, as int32 words, the last filled up."""
    fields = numpy.asarray(codes, dtype=numpy.uint32)[..., None] >> numpy.arange(bits) & 1
    fields = fields.reshape(len(fields), -1).astype(numpy.uint8)
    fields = numpy.pad(fields, ((0, 0), (0, -fields.shape[1] % 32)))
    words = numpy.ascontiguousarray(numpy.packbits(fields, axis=1, bitorder="little"))
    return torch.from_numpy(words.view(numpy.int32).copy())


def gptq(values, bits=4, group=32, stored_less=1, symmetric=False, order=None, dtype=torch.float16):
    """`order`: of the columns, whose groups are those of their places in it."""
    columns = values.shape[1]
    order = torch.arange(columns) if order is None else order
    codes, scales, zeros = quantize(values[:, order], bits, group, dtype, symmetric)
    expected = torch.empty_like(values)
    expected[:, order] = meant(codes, scales, zeros)
    in_place = torch.empty(values.shape, dtype=torch.int32)
    in_place[:, order] = codes.view(values.shape)
    stored = (zeros.t() - stored_less) % (1 << bits)
    parts = {"qweight": bit_stream(in_place, bits).t().contiguous(),
             "qzeros": bit_stream(stored, bits), "scales": scales.t().contiguous()}
    group_of_column = torch.empty(columns, dtype=torch.int32)
    group_of_column[order] = torch.arange(columns, dtype=torch.int32) // (group or columns)
    return parts | {"g_idx": group_of_column}, expected


def awq_words(matrix):
    """int32 words of a matrix (R, N), of which each holds eight neighbouring columns."""
    nibbles = matrix.long().view(len(matrix), -1, 8)
    words = sum(nibbles[..., i] << 4 * AWQ_NIBBLES[i] for i in range(8))
    return torch.from_numpy(words.numpy().astype(numpy.uint32).view(numpy.int32))


def awq(values, group=32, symmetric=False):
    codes, scales, zeros = quantize(values, 4, group, torch.float16, symmetric)
    parts = {"qweight": awq_words(codes.view(values.shape).t()), "qzeros": awq_words(zeros.t()),
             "scales": scales.t().contiguous()}
    return parts, meant(codes, scales, zeros)


def quantized_state_dict(weights, write, keep=lambda name: False):
    """What a file holds of a model whose matrices `write` quantises, and its values."""
    stored, values = {}, {}
    for name, tensor in weights.items():
        if tensor.ndim != 2 or keep(name):
            stored[name] = values[name] = tensor.contiguous()
            continue
        parts, values[name] = write(tensor.contiguous())
        layer = name.removesuffix(".weight")
        stored |= {f"{layer}.{part}": value for part, value in parts.items()}
    return stored, values


def save_config(folder, **settings):
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
