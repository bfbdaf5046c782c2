"""Small writers of the quantisers that transformers and diffusers know, by the layouts they have.

Each takes a weight, float32 (N, K), and returns the parts of the layer and the values that they
mean, float32. Codes and scales are simple: what counts is where they lie.
"""
import json

import numpy
import torch

AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of each of eight neighbouring rows


def quantize(values, bits, group, dtype=torch.float16, symmetric=False):
    """Codes int32 (N, G, group), scales (N, G) of `dtype` and zeros int32 (N, G); the last group is
    filled up where it is short."""
    group = group or values.shape[1]
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % group))
    blocks = values.view(len(values), -1, group)
    half, largest = 1 << bits - 1, (1 << bits) - 1
    if symmetric:
        scales = (blocks.abs().amax(-1) / max(1, half - 1) + 1e-8).to(dtype)
        zeros = torch.full(scales.shape, half)
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scales = ((high - low) / largest + 1e-8).to(dtype)
        zeros = (-low / scales.float()).round().clamp(0, largest)
        zeros[0, 0], zeros[-1, -1] = 0, largest
    zeros = zeros.int()
    codes = (blocks / scales.float()[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, largest).int()
    codes[:, 0, 0], codes[:, -1, 0] = 0, largest  # the lowest and the highest in each row
    return codes, scales, zeros


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


PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def bit_planes(codes, bits):
    """Rows of codes as int32 words; of 32 codes, the words of the lowest bits come first."""
    blocks, start, words = codes.reshape(len(codes), -1, 32), 0, []
    for width in PLANES.get(bits, (bits,)):
        plane = blocks.flatten(0, 1) >> start & (1 << width) - 1
        words.append(bit_stream(plane, width).view(len(codes), -1, width))
        start += width
    return torch.cat(words, -1).flatten(1)


def gptq(values, bits=4, group=32, stored_less=1, symmetric=False, order=None, dtype=torch.float16,
         join=bit_stream):
    """`order`: of the columns, whose groups are those of their places in it. `join`: makes words of
    codes."""
    columns = values.shape[1]
    order = torch.arange(columns) if order is None else order
    codes, scales, zeros = quantize(values[:, order], bits, group, dtype, symmetric)
    expected = torch.empty_like(values)
    expected[:, order] = meant(codes, scales, zeros)[:, :columns]
    in_place = torch.empty(values.shape, dtype=torch.int32)
    in_place[:, order] = codes.flatten(1)[:, :columns]
    stored = (zeros.t() - stored_less) % (1 << bits)
    parts = {"qweight": join(in_place, bits).t().contiguous(),
             "qzeros": join(stored, bits), "scales": scales.t().contiguous()}
    group_of_column = torch.empty(columns, dtype=torch.int32)
    group_of_column[order] = torch.arange(columns, dtype=torch.int32) // (group or columns)
    return parts | {"g_idx": group_of_column}, expected


def awq_words(matrix):
    """int32 words of a matrix (R, N), of which each holds eight neighbouring columns."""
    nibbles = matrix.long().view(len(matrix), -1, 8)
    words = torch.zeros_like(nibbles[..., 0])
    for i, nibble in enumerate(AWQ_NIBBLES):
        words |= nibbles[..., i] << 4 * nibble
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
        stored |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
    return stored, values


def save_config(folder, **settings):
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))


# --- compressed-tensors
# ------------------------------------------------------------------------------------------------

def pack_quantized(values, bits=4, group=32, symmetric=True, order=None, dtype=torch.bfloat16):
    rows, columns = values.shape
    order = torch.arange(columns) if order is None else order
    codes, scales, zeros = quantize(values[:, order], bits, group, dtype, symmetric)
    expected, in_place = torch.empty_like(values), torch.empty(values.shape, dtype=torch.int32)
    expected[:, order] = meant(codes, scales, zeros)
    in_place[:, order] = codes.view(values.shape)
    parts = {"weight_packed": bit_stream(in_place, bits), "weight_scale": scales,
             "weight_shape": torch.tensor([rows, columns])}
    if not symmetric:
        parts["weight_zero_point"] = bit_stream(zeros.t(), bits).t().contiguous()
    if not torch.equal(order, torch.arange(columns)):
        parts["weight_g_idx"] = torch.empty(columns, dtype=torch.int32)
        parts["weight_g_idx"][order] = torch.arange(columns, dtype=torch.int32) // group
    return parts, expected


def int_quantized(values, group=32, symmetric=False, dtype=torch.bfloat16):
    codes, scales, zeros = quantize(values, 8, group, dtype, symmetric)
    parts = {"weight": (codes - 128).view(values.shape).to(torch.int8), "weight_scale": scales}
    if not symmetric:
        parts["weight_zero_point"] = (zeros - 128).to(torch.int8)
    return parts, meant(codes, scales, zeros)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(values):
    blocks = values.view(len(values), -1, 16)
    of_tensor = (448 * 6 / values.abs().max()).view(1)
    scale = (blocks.abs().amax(-1) / 6 * of_tensor).to(torch.float8_e4m3fn)
    scales = scale.float() / of_tensor
    codes = (blocks / scales.clamp(min=1e-12)[..., None]).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    codes = codes.view(values.shape)
    parts = {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
             "weight_scale": scale, "weight_global_scale": of_tensor,
             "input_global_scale": torch.ones(1)}
    return parts, (E2M1[codes].view(blocks.shape) * scales[..., None]).view(values.shape)


E2M3 = torch.tensor([mantissa / 8 for mantissa in range(8)] + [
    (1 + mantissa / 8) * 2.0**exponent for exponent in range(3) for mantissa in range(8)])
OF_BITS = {4: E2M1, 6: torch.cat([E2M3, -E2M3])}


def _powers(values, largest):
    """Exponents (N, K / 32), uint8, and values of which the largest of 32 is at most `largest`."""
    blocks = values.view(len(values), -1, 32)
    scale = (blocks.abs().amax(-1) / largest).log2().ceil()
    return (scale + 127).to(torch.uint8), blocks / scale.exp2()[..., None], scale.exp2()[..., None]


def mxfp(values, bits=4, extremes=False):
    """mxfp4 or mxfp6. `extremes`: with random codes, and exponents from 1 to 254."""
    numbers = OF_BITS[bits]
    exponents, blocks, scale = _powers(values, numbers.max())
    codes = (blocks.unsqueeze(-1) - numbers).abs().argmin(-1)
    if extremes:
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(len(numbers), codes.shape, generator=generator)
        exponents = torch.randint(1, 251, exponents.shape, generator=generator)
        scale = (exponents.double() - 127).exp2().float()[..., None]
        exponents = exponents.to(torch.uint8)
    stored = bit_stream(codes.view(values.shape), bits).view(torch.uint8)
    parts = {"weight_packed": stored[:, :values.shape[1] * bits // 8].contiguous(),
             "weight_scale": exponents}
    return parts, (numbers[codes] * scale).view(values.shape)


def mxfp8(values):
    exponents, blocks, scale = _powers(values, 448)
    codes = blocks.to(torch.float8_e4m3fn)
    return ({"weight": codes.view(values.shape), "weight_scale": exponents},
            (codes.float() * scale).view(values.shape))


# --- optimum-quanto
# ------------------------------------------------------------------------------------------------

def quanto_bytes(values, dtype=torch.int8, scale_dtype=torch.bfloat16):
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (values.flatten(1).abs().amax(1) / largest).to(scale_dtype)
    scale = scale.view(-1, *[1] * (values.ndim - 1))
    codes = (values / scale.float()).clamp(-largest, largest)
    codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
    lowest = -128 if dtype == torch.int8 else torch.finfo(dtype).min
    codes.view(len(codes), -1)[0, 0] = torch.tensor(lowest).to(dtype)
    parts = {"weight._data": codes, "weight._scale": scale, "input_scale": torch.ones(()),
             "output_scale": torch.ones(())}
    return parts, codes.float() * scale.float()


def quanto_bits(values, bits=4, group=128, dtype=torch.bfloat16):
    """A layer of these parts needs a bias in the file."""
    blocks = values.view(-1, group)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale, shift = ((high - low) / ((1 << bits) - 1)).to(dtype), (-low).to(dtype)
    codes = ((blocks + shift.float()) / scale.float()).round().clamp(0, (1 << bits) - 1).int()
    count = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % count))
    stored = torch.zeros_like(padded[:len(padded) // count])
    for i, piece in enumerate(padded.chunk(count)):
        stored |= piece << bits * i
    parts = {"weight._data._data": stored.to(torch.uint8), "weight._scale": scale,
             "weight._shift": shift}
    return parts, (codes.float() * scale.float() - shift.float()).view(values.shape)


# --- torchao
# ------------------------------------------------------------------------------------------------

def torchao_header(type_name, **data):
    return json.dumps({"_type": type_name, "_data": data, "_tensor_data_names": ["qdata", "scale"]})


def torchao_bytes(values, dtype=torch.int8):
    parts, expected = quanto_bytes(values, dtype, torch.float32)
    named = {"_weight_qdata": parts["weight._data"], "_weight_scale": parts["weight._scale"]}
    if dtype == torch.int8:
        named["_weight_zero_point"] = torch.zeros(len(values), 1, dtype=torch.int8)
    return named, expected


def torchao_integers(values, bits=4, group=32, symmetric=False, dtype=torch.bfloat16):
    codes, scales, zeros = quantize(values, bits, group, dtype, symmetric)
    half = 1 << bits - 1
    return {"_weight_qdata": (codes - half).view(values.shape).to(torch.int8),
            "_weight_scale": scales, "_weight_zero_point": (zeros - half).to(torch.int8)
            }, meant(codes, scales, zeros)


# --- scales without a marker
# ------------------------------------------------------------------------------------------------

def svdquant(values, rank=8, smoothed=True, dtype=torch.bfloat16):
    """nvfp4 of ModelOpt, and the low rank that it leaves out."""
    generator = torch.Generator().manual_seed(3)
    parts, main = nvfp4(values)
    up = (torch.randn(len(values), rank, generator=generator) * 0.05).to(dtype)
    down = (torch.randn(rank, values.shape[1], generator=generator) * 0.05).to(dtype)
    parts = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"],
             "weight_scale_2": 1 / parts["weight_global_scale"].view(()),
             "input_scale": torch.ones(()), "svdquant_lora_a": down, "svdquant_lora_b": up}
    whole = main + up.float() @ down.float()
    if smoothed:
        factors = torch.rand(values.shape[1], generator=generator) + 0.5
        parts["pre_quant_scale"] = factors.to(dtype)
        whole = whole * factors.to(dtype).float()
    return parts, whole


def fp8_blocks(values, block=(128, 128)):
    """A scale for each block of rows and columns, of which the last of each axis may be short."""
    rows, columns = values.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    of_values = torch.empty(rows, columns)
    for i in range(len(scale)):
        for j in range(scale.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]),
                    slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = of_values[part] = values[part].abs().max() / 448
    codes = (values / of_values).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * of_values
