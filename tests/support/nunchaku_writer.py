"""Models as Nunchaku's files have them, and the values that a reader should see.

Orders of tiles and names are those of deepcompressor-toolkit 0.1.0, with which the heavy tests
compare.
"""
import json

import torch
from safetensors.torch import save_file

SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
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


def interleaved(numbers: torch.Tensor, parts: int) -> torch.Tensor:
    return numbers.view(parts, -1, *numbers.shape[1:]).transpose(0, 1).reshape(numbers.shape)


class Layer:
    """One layer of SVDQuant. `weight`, `bias`: the values that its parts stand for, in float32."""

    def __init__(self, weight, bias, precision="int4", rank=16, divisors=None, is_shifted=False,
                 dtype=torch.bfloat16, seed=0):
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(seed)
        factors = torch.linalg.svd(weight.double(), full_matrices=False)
        up = (factors[0][:, :rank] * factors[1][:rank]).to(dtype)
        down = factors[2][:rank].to(dtype)
        low_rank = up.double() @ down.double()
        if divisors is None:
            divisors = (torch.rand(columns, generator=generator) + 0.5).to(dtype)
        smoothed = (weight.double() - low_rank) * divisors.double()
        self.parts = {"smooth_factor": tile_vector(divisors),
                      "proj_down": tile_low_rank(down, True), "proj_up": tile_low_rank(up, False)}
        quantise = self.int4 if precision == "int4" else self.nvfp4
        main = quantise(smoothed, dtype) / divisors.double()
        self.weight = (main + low_rank).float()
        shift = SHIFT * main.sum(1) if is_shifted and precision == "int4" else 0
        self.bias = None
        if bias is not None:
            stored = (bias.double() - shift).to(dtype)
            self.parts["bias"] = tile_vector(stored)
            self.bias = (stored.double() + shift).float()

    def int4(self, values, dtype):
        groups = values.view(len(values), -1, 64)
        scales = (groups.abs().amax(-1) / 7).to(dtype)
        codes = (groups / scales.double().unsqueeze(-1)).round().clamp(-7, 7)
        self.parts |= {"qweight": tile_codes(codes.to(torch.int8).view(values.shape) & 15),
                       "wscales": tile_numbers(scales)}
        return (codes * scales.double().unsqueeze(-1)).view(values.shape)

    def nvfp4(self, values, dtype):
        of_rows = (values.abs().amax(1) / (448 * 6) * 3).to(dtype)
        of_tensor = torch.tensor([1 / 3]).to(dtype)
        outer = of_rows.double() * of_tensor.double()
        groups = values.view(len(values), -1, 16) / outer.view(-1, 1, 1)
        scales = (groups.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
        steps = scales.double().unsqueeze(-1)
        codes = ((groups / steps).unsqueeze(-1) - E2M1.double()).abs().argmin(-1)
        self.parts |= {"qweight": tile_codes(codes.view(values.shape)),
                       "wscales": tile_bytes(scales), "wcscales": tile_vector(of_rows),
                       "wtscale": of_tensor}
        return (E2M1.double()[codes] * steps * outer.view(-1, 1, 1)).view(values.shape)


def awq(weight, bias, group=64, parts=0, is_t5=False, dtype=torch.bfloat16):
    """(parts of a layer of AWQ, the weight and the bias that they stand for)."""
    rows, columns = weight.shape
    groups = weight.double().view(rows, -1, group)
    scales = (groups.abs().amax(-1) / 7).to(dtype)
    zeros = (-7 * scales.double()).to(dtype)
    steps, offsets = scales.double().unsqueeze(-1), zeros.double().unsqueeze(-1)
    codes = ((groups - offsets) / steps).round().clamp(0, 15)
    values = (codes * steps + offsets).view(rows, columns).float()
    tensors = [codes.view(rows, columns).to(torch.uint8), scales, zeros]
    if parts:
        tensors = [interleaved(tensor, parts) for tensor in tensors]
    padded = torch.zeros(-(-columns // group // 8) * 8 - columns // group, rows, dtype=dtype)
    sides = [torch.cat([side.t(), padded]).contiguous() for side in tensors[1:]]
    names = ("scales", "scaled_zeros") if is_t5 else ("wscales", "wzeros")
    stored = {"qweight": tile_awq(tensors[0]), **dict(zip(names, sides))}
    if not is_t5:
        stored["qweight"] = stored["qweight"].view(torch.int32)
    if bias is not None:
        ones = torch.zeros(max(parts, 1), 1)
        for part in ((1, parts - 2) if parts else ()):
            ones[part] = 1
        added = (bias.view(max(parts, 1), -1) + ones).to(dtype)
        stored["bias"] = interleaved(added.view(-1), parts) if parts else added.view(-1)
        bias = (added.float() - ones).view(-1)
    return stored, values, bias


class Model:
    """A model whose layers are quantised one after another.

    tensors: of the file. seen: name in diffusers -> the value that a reader should see.
    """

    def __init__(self, weights, **how):
        self.weights = {name: values.float() for name, values in weights.items()}
        self.how = how
        self.dtype = how.get("dtype", torch.bfloat16)
        self.tensors: dict[str, torch.Tensor] = {}
        self.seen: dict[str, torch.Tensor] = {}

    def take(self, layer):
        return self.weights.pop(f"{layer}.weight"), self.weights.pop(f"{layer}.bias", None)

    def put(self, layer, parts):
        self.tensors |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}

    def see(self, layer, weight, bias):
        self.seen[f"{layer}.weight"] = weight.contiguous()
        if bias is not None:
            self.seen[f"{layer}.bias"] = bias.contiguous()

    def linear(self, name, sources, is_shifted=False, factors=None, value_factors=None):
        """Quantises the rows of some layers as one.

        name: in the file. sources: names in diffusers. factors: what the columns are multiplied by.
        value_factors: what the last rows are divided by.
        """
        weights, biases = zip(*map(self.take, sources))
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
                      is_shifted=is_shifted, seed=len(self.tensors), **self.how)
        self.put(name, layer.parts)
        original = layer.parts["smooth_factor"] if factors is None else tile_vector(factors)
        self.tensors[f"{name}.smooth_factor_orig"] = original.clone()
        seen = layer.weight.double() * rows_by.unsqueeze(1) / columns_by
        seen_bias = None if layer.bias is None else layer.bias.double() * rows_by
        for source, part, own in zip(sources, seen.float().split(rows), [None] * len(rows)
                                     if seen_bias is None else seen_bias.float().split(rows)):
            self.see(source, part, own)

    def factors(self, columns):
        generator = torch.Generator().manual_seed(columns + len(self.tensors))
        return (torch.rand(columns, generator=generator) * 2 + 0.25).to(self.dtype)

    def modulation(self, name, parts):
        stored, weight, bias = awq(*self.take(name), parts=parts, dtype=self.dtype)
        self.put(name, stored)
        self.see(name, weight, bias)

    def blocks(self, pattern):
        count = 0
        while any(name.startswith(f"{pattern.format(count)}.") for name in self.weights):
            yield pattern.format(count)
            count += 1

    def finish(self):
        for name, values in self.weights.items():
            self.tensors[name] = values.to(self.dtype)
            self.seen[name] = self.tensors[name].float()
        self.weights = {}


def projections(block, prefix="", end="to_{}"):
    return [f"{block}.{prefix}{end.format(part)}" for part in "qkv"]


def flux(weights, is_first=False, **how) -> Model:
    """Flux by its names in diffusers."""
    model = Model(weights, **how)
    for block in model.blocks("transformer_blocks.{}"):
        model.modulation(f"{block}.norm1.linear", 6)
        model.modulation(f"{block}.norm1_context.linear", 6)
        factors = model.factors(model.weights[f"{block}.attn.to_v.weight"].shape[0])
        model.linear(f"{block}.attn.to_qkv", projections(block, "attn."), value_factors=factors)
        model.linear(f"{block}.attn.add_qkv_proj", projections(block, "attn.", "add_{}_proj"),
                     value_factors=factors)
        for name in ("attn.to_out.0", "attn.to_add_out"):
            model.linear(f"{block}.{name}", [f"{block}.{name}"], factors=factors)
        for name in ("ff", "ff_context"):
            model.linear(f"{block}.{name}.net.0.proj", [f"{block}.{name}.net.0.proj"])
            model.linear(f"{block}.{name}.net.2", [f"{block}.{name}.net.2"], is_shifted=True)
    for block in model.blocks("single_transformer_blocks.{}"):
        model.modulation(f"{block}.norm.linear", 3)
        weight, bias = model.take(f"{block}.proj_out")
        hidden = len(weight)
        model.weights |= {f"{block}.attn.to_out.weight": weight[:, :hidden],
                          f"{block}.attn.to_out.bias": bias / 2,
                          f"{block}.mlp_fc2.weight": weight[:, hidden:],
                          f"{block}.mlp_fc2.bias": bias / 2}
        factors = model.factors(hidden)
        model.linear(f"{block}.attn.to_qkv", projections(block, "attn."), value_factors=factors)
        model.linear(f"{block}.attn.to_out", [f"{block}.attn.to_out"], factors=factors)
        model.linear(f"{block}.mlp_fc1", [f"{block}.proj_mlp"])
        model.linear(f"{block}.mlp_fc2", [f"{block}.mlp_fc2"], is_shifted=True)
        parts = [[model.seen.pop(f"{block}.{name}.{end}") for name in ("attn.to_out", "mlp_fc2")]
                 for end in ("weight", "bias")]
        model.see(f"{block}.proj_out", torch.cat(parts[0], 1), parts[1][0] + parts[1][1])
    model.finish()
    if is_first:
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


def qwen_image(weights, **how) -> Model:
    model = Model(weights, **how)
    for block in model.blocks("transformer_blocks.{}"):
        model.modulation(f"{block}.img_mod.1", 6)
        model.modulation(f"{block}.txt_mod.1", 6)
        factors = model.factors(model.weights[f"{block}.attn.to_v.weight"].shape[0])
        model.linear(f"{block}.attn.to_qkv", projections(block, "attn."), value_factors=factors)
        model.linear(f"{block}.attn.add_qkv_proj", projections(block, "attn.", "add_{}_proj"),
                     value_factors=factors)
        for name in ("attn.to_out.0", "attn.to_add_out"):
            model.linear(f"{block}.{name}", [f"{block}.{name}"], factors=factors)
        for name in ("img_mlp", "txt_mlp"):
            model.linear(f"{block}.{name}.net.0.proj", [f"{block}.{name}.net.0.proj"])
            model.linear(f"{block}.{name}.net.2", [f"{block}.{name}.net.2"], is_shifted=True)
    model.finish()
    return model


def z_image(weights, skip_refiners=False, **how) -> Model:
    model = Model(weights, **how)
    kinds = ("layers",) if skip_refiners else ("layers", "noise_refiner", "context_refiner")
    for block in [block for kind in kinds for block in model.blocks(f"{kind}.{{}}")]:
        factors = model.factors(model.weights[f"{block}.attention.to_v.weight"].shape[0])
        model.linear(f"{block}.attention.to_qkv", projections(block, "attention."),
                     value_factors=factors)
        model.linear(f"{block}.attention.to_out.0", [f"{block}.attention.to_out.0"],
                     factors=factors)
        model.linear(f"{block}.feed_forward.net.0.proj",
                     [f"{block}.feed_forward.{name}" for name in ("w3", "w1")])
        model.linear(f"{block}.feed_forward.net.2", [f"{block}.feed_forward.w2"])
    model.finish()
    for name in [name for name in model.tensors if ".feed_forward.w3.weight" in name]:
        block = name.removesuffix(".feed_forward.w3.weight")
        parts = [model.tensors.pop(f"{block}.feed_forward.{part}.weight") for part in
                 ("w3", "w1", "w2")]
        model.tensors |= {f"{block}.feed_forward.net.0.proj.weight": torch.cat(parts[:2]),
                          f"{block}.feed_forward.net.2.weight": parts[2]}
    return model


def lite(weights, targets, modulations, **how) -> Model:
    """As diffusers' nunchaku_lite: layers of their own names, modulations in order."""
    model = Model(weights, **how)
    for name in targets:
        model.linear(name, [name])
    for name in modulations:
        model.modulation(name, 0)
    for name in list(model.tensors):
        if name.endswith("smooth_factor_orig"):
            del model.tensors[name]
    model.finish()
    return model


METADATA = {
    "model_class": "NunchakuFluxTransformer2DModelV2",
    "quantization_config": json.dumps({
        "method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": 16}),
}
WRITERS = {"flux-dev": flux, "qwen-image": qwen_image, "z-image": z_image}


def write(path, model: Model, metadata=METADATA):
    save_file(model.tensors, str(path), metadata)
    return model.seen
