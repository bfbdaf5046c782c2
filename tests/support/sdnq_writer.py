"""Writes weights as SDNQ's files have them, by plain arithmetic, and says what values they have.

It shares no code with the pack: `sdnq_oracle.py` compares both with SDNQ itself.
"""
import json

import torch
from safetensors.torch import save_file

H2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
H4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])


def rotation(size: int, base: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix (size, size)."""
    matrix = base
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    return matrix / size**0.5


def float_numbers(exponent: int, mantissa: int, is_signed: bool) -> torch.Tensor:
    """The numbers of all codes of a small float."""
    numbers = []
    for code in range(2**(exponent + mantissa)):
        power, fraction = divmod(code, 2**mantissa)
        bias = 2**(exponent - 1) - 1
        numbers.append(fraction / 2**mantissa * 2.0**(1 - bias) if power == 0
                       else (1 + fraction / 2**mantissa) * 2.0**(power - bias))
    return torch.tensor(numbers + [-number for number in numbers] if is_signed else numbers)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes (n,) of fewer than 8 bits."""
    c = codes.reshape(-1, {1: 8, 2: 4, 4: 2, 6: 4}.get(bits, 8)).int()
    if bits in (1, 2, 4):
        fields = [c[:, i] << i * bits for i in range(c.shape[1])]
        return torch.stack(fields).sum(0).to(torch.uint8)
    if bits == 3:
        packed = [c[:, i] | c[:, i + 3] << 3 for i in range(3)]
        packed[0] = packed[0] | (c[:, 6] & 3) << 6
        packed[1] = packed[1] | (c[:, 7] & 3) << 6
        packed[2] = packed[2] | c[:, 6] >> 2 << 6 | c[:, 7] >> 2 << 7
    elif bits == 5:
        tops = [c[:, 5] & 7, c[:, 6] & 7, c[:, 7] & 7, c[:, 5] >> 3 | c[:, 7] >> 4 << 2,
                c[:, 6] >> 3 | (c[:, 7] >> 3 & 1) << 2]
        packed = [c[:, i] | tops[i] << 5 for i in range(5)]
    elif bits == 6:
        packed = [c[:, i] | (c[:, 3] >> 4 - 2 * i & 3) << 6 for i in range(3)]
    else:
        packed = [c[:, i] | (c[:, 7] >> 6 - i & 1) << 7 for i in range(7)]
    return torch.stack(packed, 1).to(torch.uint8)


def numbers_of(name: str) -> torch.Tensor:
    """The number of each code of a type; int8 from -128 on."""
    if name.startswith("float"):
        bits, exponent = int(name[5]), int(name[8])
        return float_numbers(exponent, int(name[10]), not name.endswith("u"))
    bits = int(name[-1])
    return torch.arange(2.0**bits) - (0 if name[0] == "u" else 2**(bits - 1))


def write_weight(values: torch.Tensor, name: str, group: int = 0, rank: int = 0,
                 rotated: tuple[int, torch.Tensor] | None = None, scale_dtype=torch.float32,
                 codebook: bool = False, transposed: bool = False,
                 ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantises a weight.

    Args:
        values: float32 (N, K) or (N, C, *kernel).
        name: of the type.
        group: channels that share a scale; 0: all.
        rank: of the low rank in bfloat16, of random factors.
        rotated: size of the rotation and its base.
        scale_dtype: of scales and zero points.
        codebook: whether the codes select levels.
        transposed: whether it is written for a product of quantised numbers.

    Returns:
        The tensors by the last parts of their names, and the values that they stand for, float32.
    """
    shape = values.shape
    rows, channels, kernel = shape[0], shape[1], shape[2:]
    bits = int(name.removeprefix("u").removeprefix("int").removeprefix("float")[0])
    group = group or channels
    stored, tensors = values.reshape(rows, -1), {}
    low_rank = torch.zeros_like(stored)
    if rotated:
        stored = _rotate(stored, *rotated)
    if rank:
        generator = torch.Generator().manual_seed(rank)
        up = torch.randn(rows, rank, generator=generator).mul(0.3 * stored.std()).bfloat16()
        down = torch.randn(rank, stored.shape[1], generator=generator).div(rank**0.5).bfloat16()
        low_rank = (up.double() @ down.double()).float()
        tensors |= {"svd_up": up.t().contiguous() if transposed else up,
                    "svd_down": down.t().contiguous() if transposed else down}
    # (rows, groups, group, taps)
    parts = (stored - low_rank).reshape(rows, channels // group, group, -1)
    least, most = parts.amin(2, keepdim=True), parts.amax(2, keepdim=True)
    numbers = numbers_of(name)
    if codebook:
        levels = least + (most - least) * torch.linspace(0, 1, 2**bits).view(1, 1, -1, 1)**1.5
        levels = levels.to(scale_dtype).float()
        codes = torch.stack([
            (parts[..., tap].unsqueeze(-1) - levels[..., tap].unsqueeze(2)).abs().argmin(-1)
            for tap in range(parts.shape[3])], -1)
        result = levels.gather(2, codes)
        of_groups = (2**bits,) if group == channels else (channels // group, 2**bits)
        tensors["scale"] = levels.to(scale_dtype).reshape(rows, *of_groups, *kernel)
    else:
        is_unsigned = numbers.min() >= 0
        span = (most - least) / numbers.max() if is_unsigned else (
            parts.abs().amax(2, keepdim=True) / numbers.abs().max())
        scale = span.to(scale_dtype).float()
        zero = least.to(scale_dtype).float() if is_unsigned else torch.zeros_like(least)
        wanted = (parts - zero) / scale
        ordered, order = numbers.sort()
        codes = order[torch.bucketize(wanted, (ordered[1:] + ordered[:-1]) / 2)]
        result = numbers[codes] * scale + zero
        of_groups = (1,) if group == channels else (channels // group, 1)
        tensors["scale"] = scale.to(scale_dtype).reshape(rows, *of_groups, *kernel)
        if is_unsigned:
            tensors["zero_point"] = zero.to(scale_dtype).reshape(rows, *of_groups, *kernel)
    codes = codes.reshape(rows, -1)
    if bits < 8:
        tensors["weight"] = pack(codes, bits)
    else:
        codes = (codes - 128).to(torch.int8) if name == "int8" else codes.to(torch.uint8)
        grouped = (rows, channels // group, group, *kernel) if group < channels else shape
        tensors["weight"] = codes.reshape(grouped)
        if transposed:
            tensors |= {part: tensors[part].t().contiguous()
                        for part in ("weight", "scale", "zero_point") if part in tensors}
    result = result.reshape(rows, -1) + low_rank
    if rotated:
        result = _rotate(result, *rotated)
    return tensors, result.reshape(shape)


def _rotate(rows: torch.Tensor, size: int, base: torch.Tensor) -> torch.Tensor:
    values = rows.double().reshape(-1, size) @ rotation(size, base).double()
    return values.reshape(rows.shape).float()


def config_of(name: str, **settings) -> dict:
    """The content of a config.json."""
    return {"quantization_config": {
        "quant_method": "sdnq", "weights_dtype": name, "sdnq_version": "0.2.8", **settings}}


def write_folder(folder, weights: dict[str, torch.Tensor], name: str = "uint4",
                 is_chosen=lambda key, tensor: tensor.ndim == 2, settings: dict | None = None,
                 config: dict | None = None, **options) -> dict[str, torch.Tensor]:
    """Writes a model as a folder, and returns its values.

    Args:
        folder: to write to.
        weights: name -> values.
        name: type of the codes.
        is_chosen: returns whether a tensor is quantised.
        settings: of the quantisation config.
        config: the rest of the config.
        options: of `write_weight`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored, values = {}, {}
    for key, tensor in weights.items():
        stored[key] = values[key] = tensor.contiguous()
        if key.endswith(".weight") and is_chosen(key, tensor):
            parts, values[key] = write_weight(tensor, name, **options)
            stored |= {f"{key.removesuffix('weight')}{part}": part_tensor
                       for part, part_tensor in parts.items()}
    save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    content = {**(config or {}), **config_of(name, **(settings or {}))}
    (folder / "config.json").write_text(json.dumps(content))
    return values
