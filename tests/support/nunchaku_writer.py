"""Writes small models as Nunchaku's files have them, with the values that a reader must get.

Orders of tiles and names are those of deepcompressor-toolkit 0.1.0, with which the heavy tests
compare.
"""
import json

import torch
from safetensors.torch import save_file

SHIFT = 0.171875
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FIRST_PARTS = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth",
               "smooth_factor_orig": "smooth_orig"}


def tile_codes(codes: torch.Tensor) -> torch.Tensor:
    """int8 (N, K / 2) of codes 0 to 15, (N, K)."""
    rows, columns = codes.shape
    tiles = codes.view(rows // 128, 8, 2, 8, columns // 64, 2, 4, 8).permute(0, 4, 1, 3, 6, 2, 5, 7)
    low, high = tiles.reshape(-1, 2).to(torch.uint8).unbind(1)
    return (low | high << 4).view(torch.int8).view(rows, columns // 2)


def tile_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """(G, N) of (N, G)."""
    rows, groups = numbers.shape
    tiles = numbers.view(rows // 128, 8, 2, 4, 2, groups).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(groups, rows).contiguous()


def tile_vector(numbers: torch.Tensor) -> torch.Tensor:
    return tile_numbers(numbers.unsqueeze(1)).view(-1)


def tile_bytes(scales: torch.Tensor) -> torch.Tensor:
    """fp8 (G, N) of (N, G)."""
    rows, groups = scales.shape
    tiles = scales.view(torch.uint8).view(rows // 128, 4, 4, 8, groups // 4, 4)
    tiles = tiles.permute(0, 4, 3, 2, 1, 5).reshape(groups, rows).contiguous()
    return tiles.view(torch.float8_e4m3fn)


def tile_low_rank(factor: torch.Tensor, is_down: bool) -> torch.Tensor:
    """(C, R) of A (R, C) or of B (C, R)."""
    if is_down:
        ranks, features = factor.shape
        tiles = factor.view(ranks // 16, 16, features // 16, 16).permute(2, 0, 1, 3)
    else:
        features, ranks = factor.shape
        tiles = factor.view(features // 16, 16, ranks // 16, 16).permute(0, 2, 1, 3)
    tiles = tiles.reshape(*tiles.shape[:2], 2, 8, 2, 4, 2).permute(0, 1, 3, 5, 2, 4, 6)
    return tiles.reshape(features, ranks).contiguous()


def tile_awq(codes: torch.Tensor) -> torch.Tensor:
    """int16 (N / 4, K) of codes 0 to 15, (N, K)."""
    rows, columns = codes.shape
    words = codes.view(-1, 4, 8).int()
    words = words[:, 0] | words[:, 1] << 4 | words[:, 2] << 8 | words[:, 3] << 12
    tiles = words.view(rows // 4, 4, columns // 64, 16).permute(0, 2, 1, 3)
    return tiles.reshape(rows // 4, columns).to(torch.int16)


def interleave(numbers: torch.Tensor, parts: int) -> torch.Tensor:
    return numbers.view(parts, -1, *numbers.shape[1:]).transpose(0, 1).reshape(numbers.shape)


class Layer:
    """One layer of SVDQuant.

    Attributes:
        parts: tensors of the file.
        plain: for int4, the same in order: codes (N, K), scales (N, groups), divisors, down (R, K),
            up and bias.
        weight, bias: the values that they stand for, float32.
    """

    def __init__(self, weight, bias, precision="int4", rank=16, divisors=None, is_shifted=False,
                 dtype=torch.bfloat16, seed=0):
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(seed)
        factors = torch.linalg.svd(weight.float(), full_matrices=False)
        up = (factors[0][:, :rank] * factors[1][:rank]).to(dtype)
        down = factors[2][:rank].to(dtype)
        low_rank = up.double() @ down.double()
        if divisors is None:
            divisors = (torch.rand(columns, generator=generator) + 0.5).to(dtype)
        smoothed = (weight.double() - low_rank) * divisors.double()
        self.parts = {"smooth_factor": tile_vector(divisors),
                      "proj_down": tile_low_rank(down, True), "proj_up": tile_low_rank(up, False)}
        self.plain = {"divisors": divisors, "down": down, "up": up}
        quantize = self.int4 if precision == "int4" else self.nvfp4
        main = quantize(smoothed, dtype) / divisors.double()
        self.weight = (main + low_rank).float()
        shift = SHIFT * main.sum(1) if is_shifted and precision == "int4" else 0
        self.bias = None
        if bias is not None:
            stored = (bias.double() - shift).to(dtype)
            self.parts["bias"] = tile_vector(stored)
            self.plain["bias"] = stored
            self.bias = (stored.double() + shift).float()

    def int4(self, values, dtype):
        groups = values.view(len(values), -1, 64)
        scales = (groups.abs().amax(-1) / 7).to(dtype)
        codes = (groups / scales.double().unsqueeze(-1)).round().clamp(-7, 7)
        self.parts |= {"qweight": tile_codes(codes.to(torch.int8).view(values.shape) & 15),
                       "wscales": tile_numbers(scales)}
        self.plain |= {"codes": codes.to(torch.int8).view(values.shape), "scales": scales}
        return (codes * scales.double().unsqueeze(-1)).view(values.shape)

    def nvfp4(self, values, dtype):
        of_rows = (values.abs().amax(1) / (448 * 6) * 3).to(dtype)
        of_tensor = torch.tensor([1 / 3]).to(dtype)
        outer = of_rows.double() * of_tensor.double()
        groups = values.view(len(values), -1, 16) / outer.view(-1, 1, 1)
        scales = (groups.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
        steps = scales.double().unsqueeze(-1)
        wanted = groups / steps
        between = (E2M1[1:8] + E2M1[:7]).double() / 2
        codes = torch.bucketize(wanted.abs(), between)
        codes += 8 * ((wanted < 0) & (codes > 0))
        self.parts |= {"qweight": tile_codes(codes.view(values.shape)),
                       "wscales": tile_bytes(scales), "wcscales": tile_vector(of_rows),
                       "wtscale": of_tensor}
        return (E2M1.double()[codes] * steps * outer.view(-1, 1, 1)).view(values.shape)


def awq(weight, bias, group=64, parts=1, is_t5=False, dtype=torch.bfloat16):
    """Quantises a layer by AWQ.

    Args:
        weight, bias: (N, K) and (N,) or None.
        group: columns that share a scale.
        parts: of a modulation, whose rows are interleaved.
        is_t5: whether names and types are those of the text encoder.
        dtype: of the scales.

    Returns:
        (tensors of the file, the weight and the bias that they stand for).
    """
    rows, columns = weight.shape
    groups = weight.double().view(rows, -1, group)
    scales = (groups.abs().amax(-1) / 7).to(dtype)
    zeros = (-7 * scales.double()).to(dtype)
    steps, offsets = scales.double().unsqueeze(-1), zeros.double().unsqueeze(-1)
    codes = ((groups - offsets) / steps).round().clamp(0, 15)
    values = (codes * steps + offsets).view(rows, columns).float()
    codes, scales, zeros = (interleave(tensor, parts) for tensor in (
        codes.view(rows, columns).to(torch.uint8), scales, zeros))
    padding = torch.zeros(-(columns // group) % 8, rows, dtype=dtype)
    sides = [torch.cat([side.t(), padding]).contiguous() for side in (scales, zeros)]
    names = ("scales", "scaled_zeros") if is_t5 else ("wscales", "wzeros")
    stored = {"qweight": tile_awq(codes), **dict(zip(names, sides))}
    if not is_t5:
        stored["qweight"] = stored["qweight"].view(torch.int32)
    if bias is not None:
        ones = torch.zeros(parts, 1)
        if parts > 1:
            ones[[1, parts - 2]] = 1
        added = (bias.view(parts, -1) + ones).to(dtype)
        stored["bias"] = interleave(added.view(-1), parts)
        bias = (added.float() - ones).view(-1)
    return stored, values, bias


class Model:
    """A model whose layers are quantised one after another.

    Args:
        weights: name in diffusers -> tensor.
        options: of `Layer`, for all layers.

    Attributes:
        tensors: of the file.
        values: name in diffusers -> the value that a reader must get.
        layers: (layer, names in diffusers of its rows, factors of rows and of columns, whether its
            input is shifted).
    """

    def __init__(self, weights, **options):
        self.weights = {name: tensor.float() for name, tensor in weights.items()}
        self.options = options
        self.dtype = options.get("dtype", torch.bfloat16)
        self.tensors: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.layers = []

    def pop(self, layer):
        return self.weights.pop(f"{layer}.weight"), self.weights.pop(f"{layer}.bias", None)

    def add_tensors(self, layer, parts):
        self.tensors |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}

    def set_values(self, layer, weight, bias):
        self.values[f"{layer}.weight"] = weight.contiguous()
        if bias is not None:
            self.values[f"{layer}.bias"] = bias.contiguous()

    def linear(self, name, sources, is_shifted=False, factors=None, value_factors=None):
        """Quantises the rows of some layers as one.

        Args:
            name: in the file.
            sources: names in diffusers.
            is_shifted: whether the input has `SHIFT` added to it.
            factors: numbers that the columns are multiplied by.
            value_factors: numbers that the last rows are divided by.
        """
        weights, biases = zip(*map(self.pop, sources))
        rows = [len(weight) for weight in weights]
        weight = torch.cat(weights).double()
        bias = None if biases[0] is None else torch.cat(biases).double()
        rows_by = torch.ones(len(weight), dtype=torch.float64)
        if value_factors is not None:
            rows_by[-len(value_factors):] = value_factors.double()
        columns_by = torch.ones(weight.shape[1], dtype=torch.float64)
        divisors = None
        if factors is not None:
            columns_by, divisors = factors.double(), torch.ones(len(factors), dtype=self.dtype)
        layer = Layer(weight / rows_by.unsqueeze(1) * columns_by,
                      None if bias is None else bias / rows_by, divisors=divisors,
                      is_shifted=is_shifted, seed=len(self.tensors), **self.options)
        self.add_tensors(name, layer.parts)
        self.layers.append((layer, sources, rows_by.float(), columns_by.float(), is_shifted))
        original = layer.parts["smooth_factor"] if factors is None else tile_vector(factors)
        self.tensors[f"{name}.smooth_factor_orig"] = original.clone()
        values = layer.weight.double() * rows_by.unsqueeze(1) / columns_by
        biases = [None] * len(rows)
        if layer.bias is not None:
            biases = (layer.bias.double() * rows_by).float().split(rows)
        for source, part, part_bias in zip(sources, values.float().split(rows), biases):
            self.set_values(source, part, part_bias)

    def random_factors(self, columns):
        generator = torch.Generator().manual_seed(columns + len(self.tensors))
        return (torch.rand(columns, generator=generator) * 2 + 0.25).to(self.dtype)

    def modulation(self, name, parts=1):
        stored, weight, bias = awq(*self.pop(name), parts=parts, dtype=self.dtype)
        self.add_tensors(name, stored)
        self.set_values(name, weight, bias)

    def blocks(self, pattern):
        count = 0
        while any(name.startswith(f"{pattern.format(count)}.") for name in self.weights):
            yield pattern.format(count)
            count += 1

    def add_plain_tensors(self):
        for name, tensor in self.weights.items():
            self.tensors[name] = tensor.to(self.dtype)
            self.values[name] = self.tensors[name].float()
        self.weights = {}


def projections(block, prefix="", end="to_{}"):
    return [f"{block}.{prefix}{end.format(part)}" for part in "qkv"]


def add_joint_attention(model, block):
    """Q, K and V of both streams, and the layers after them, into which the V's are smoothed."""
    factors = model.random_factors(model.weights[f"{block}.attn.to_v.weight"].shape[0])
    model.linear(f"{block}.attn.to_qkv", projections(block, "attn."), value_factors=factors)
    model.linear(f"{block}.attn.add_qkv_proj", projections(block, "attn.", "add_{}_proj"),
                 value_factors=factors)
    for name in ("attn.to_out.0", "attn.to_add_out"):
        model.linear(f"{block}.{name}", [f"{block}.{name}"], factors=factors)


def add_mlps(model, block, *names):
    for name in names:
        model.linear(f"{block}.{name}.net.0.proj", [f"{block}.{name}.net.0.proj"])
        model.linear(f"{block}.{name}.net.2", [f"{block}.{name}.net.2"], is_shifted=True)


def flux(weights, is_first_version=False, **options) -> Model:
    """Flux by its names in diffusers; is_first_version: the names of Nunchaku's first files."""
    model = Model(weights, **options)
    for block in model.blocks("transformer_blocks.{}"):
        model.modulation(f"{block}.norm1.linear", 6)
        model.modulation(f"{block}.norm1_context.linear", 6)
        add_joint_attention(model, block)
        add_mlps(model, block, "ff", "ff_context")
    for block in model.blocks("single_transformer_blocks.{}"):
        model.modulation(f"{block}.norm.linear", 3)
        weight, bias = model.pop(f"{block}.proj_out")
        hidden = len(weight)
        model.weights |= {f"{block}.attn.to_out.weight": weight[:, :hidden],
                          f"{block}.attn.to_out.bias": bias / 2,
                          f"{block}.mlp_fc2.weight": weight[:, hidden:],
                          f"{block}.mlp_fc2.bias": bias / 2}
        factors = model.random_factors(hidden)
        model.linear(f"{block}.attn.to_qkv", projections(block, "attn."), value_factors=factors)
        model.linear(f"{block}.attn.to_out", [f"{block}.attn.to_out"], factors=factors)
        model.linear(f"{block}.mlp_fc1", [f"{block}.proj_mlp"])
        model.linear(f"{block}.mlp_fc2", [f"{block}.mlp_fc2"], is_shifted=True)
        parts = [[model.values.pop(f"{block}.{name}.{end}") for name in ("attn.to_out", "mlp_fc2")]
                 for end in ("weight", "bias")]
        model.set_values(f"{block}.proj_out", torch.cat(parts[0], 1), parts[1][0] + parts[1][1])
    model.add_plain_tensors()
    if is_first_version:
        model.tensors = {_first_name(name): tensor for name, tensor in model.tensors.items()}
    return model


FIRST_LAYERS = {
    "attn.to_qkv": "qkv_proj", "attn.add_qkv_proj": "qkv_proj_context", "attn.to_out.0": "out_proj",
    "attn.to_out": "out_proj", "attn.to_add_out": "out_proj_context", "ff.net.0.proj": "mlp_fc1",
    "ff.net.2": "mlp_fc2", "ff_context.net.0.proj": "mlp_context_fc1",
    "ff_context.net.2": "mlp_context_fc2", "attn.norm_q": "norm_q", "attn.norm_k": "norm_k",
    "attn.norm_added_q": "norm_added_q", "attn.norm_added_k": "norm_added_k",
}


def _first_name(name: str) -> str:
    layer, _, part = name.rpartition(".")
    pieces = layer.split(".", 2)
    if len(pieces) == 3 and pieces[0].endswith("transformer_blocks"):
        layer = ".".join([*pieces[:2], FIRST_LAYERS.get(pieces[2], pieces[2])])
    return f"{layer}.{FIRST_PARTS.get(part, part)}" if layer else name


def qwen_image(weights, **options) -> Model:
    model = Model(weights, **options)
    for block in model.blocks("transformer_blocks.{}"):
        model.modulation(f"{block}.img_mod.1", 6)
        model.modulation(f"{block}.txt_mod.1", 6)
        add_joint_attention(model, block)
        add_mlps(model, block, "img_mlp", "txt_mlp")
    model.add_plain_tensors()
    return model


def z_image(weights, skip_refiners=False, **options) -> Model:
    model = Model(weights, **options)
    groups = ("layers",) if skip_refiners else ("layers", "noise_refiner", "context_refiner")
    for block in [block for group in groups for block in model.blocks(f"{group}.{{}}")]:
        factors = model.random_factors(model.weights[f"{block}.attention.to_v.weight"].shape[0])
        model.linear(f"{block}.attention.to_qkv", projections(block, "attention."),
                     value_factors=factors)
        model.linear(f"{block}.attention.to_out.0", [f"{block}.attention.to_out.0"],
                     factors=factors)
        model.linear(f"{block}.feed_forward.net.0.proj",
                     [f"{block}.feed_forward.{name}" for name in ("w3", "w1")])
        model.linear(f"{block}.feed_forward.net.2", [f"{block}.feed_forward.w2"])
    model.add_plain_tensors()
    for name in [name for name in model.tensors if ".feed_forward.w3.weight" in name]:
        block = name.removesuffix(".feed_forward.w3.weight")
        parts = [model.tensors.pop(f"{block}.feed_forward.{part}.weight") for part in
                 ("w3", "w1", "w2")]
        model.tensors |= {f"{block}.feed_forward.net.0.proj.weight": torch.cat(parts[:2]),
                          f"{block}.feed_forward.net.2.weight": parts[2]}
    return model


def lite(weights, targets, modulations, **options) -> Model:
    """A model of diffusers' nunchaku_lite: layers of their own names, modulations in order."""
    model = Model(weights, **options)
    for name in targets:
        model.linear(name, [name])
    for name in modulations:
        model.modulation(name)
    for name in list(model.tensors):
        if name.endswith("smooth_factor_orig"):
            del model.tensors[name]
    model.add_plain_tensors()
    return model


METADATA = {
    "model_class": "NunchakuFluxTransformer2DModelV2",
    "quantization_config": json.dumps({
        "method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": 16}),
}
WRITERS = {"flux-dev": flux, "qwen-image": qwen_image, "z-image": z_image}


def write(path, model: Model, metadata=METADATA) -> dict[str, torch.Tensor]:
    """Writes a file; returns the values that a reader must get."""
    save_file(model.tensors, str(path), metadata)
    return model.values
