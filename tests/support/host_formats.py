"""Layers in the quantised formats that the host has itself, written by the host's own
quantisers."""
import json

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import save_file

from featherweight.ops.formats.comfy_quant import NORMAL

HOST_FORMATS = tuple(QUANT_ALGOS)
# with the further settings of a layer's mark
HOST_VARIANTS = (*((name, {}) for name in HOST_FORMATS), ("int8_tensorwise", {"convrot": True}))
# of which the host looks up rows
TABLE_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
OPTIONS = {"float8_e4m3fn": {"scale": "recalculate"}, "float8_e5m2": {"scale": "recalculate"},
           "int8_tensorwise": {"per_channel": True}}
ASYMMETRIC = "asym_w4a8_int8"  # of a newer ComfyUI than the oldest


def mark_of(settings) -> torch.Tensor:
    """A layer's `comfy_quant`. settings: of the layer, or bytes."""
    text = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def saved(path, parts: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Writes the parts of the layer `L`; returns the path."""
    save_file({f"L.{name}": part.contiguous() for name, part in parts.items()}, path, metadata)
    return str(path)


def in_host_format(name: str, values: torch.Tensor, format_name: str,
                   **config) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a file holds of one weight (rows, columns), and its dense float32 values; config: goes
    into its `comfy_quant`.

    Skips the test where the host lacks the format, except for asym_w4a8_int8: then the values are
    others.
    """
    mark = mark_of({"format": format_name, **config})
    parts = {f"{name.removesuffix('weight')}comfy_quant": mark}
    if format_name == ASYMMETRIC and format_name not in QUANT_ALGOS:
        stored = asymmetric_parts(*values.shape)
        named = {f"{name}{part.removeprefix('weight')}": value for part, value in stored.items()}
        return parts | named, asymmetric_values(stored)
    if format_name not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no format {format_name}")
    layout = QUANT_ALGOS[format_name]["comfy_tensor_layout"]
    options = OPTIONS.get(format_name, {}) | ({"convrot": True} if config.get("convrot") else {})
    quantised = QuantizedTensor.from_float(values, layout, **options)
    return parts | quantised.state_dict(name), quantised.dequantize()


def by_kitchen(layer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A layer of the host's, which now quantises its input and has comfy_kitchen multiply, as on a
    GPU whose kernels multiply the format."""

    def refused(*args, **kwargs):
        raise RuntimeError("a CPU multiplies no blocks that have scales of their own")

    layer._full_precision_mm = False
    if layer.quant_format in ("mxfp8", "nvfp4"):
        # comfy_kitchen then multiplies the values of both operands; torch raises ValueError
        for name in ("scaled_mm", "_scaled_mm"):
            where = torch.nn.functional if hasattr(torch.nn.functional, name) else torch
            monkeypatch.setattr(where, name, refused, raising=False)
    return layer


def asymmetric_parts(rows: int, columns: int, bits: int = 4, level_group: int = 16,
                     codebook: tuple[float, ...] | None = NORMAL) -> dict[str, torch.Tensor]:
    """A weight in the form of asym_w4a8_int8, as comfy-kitchen 0.2.31 to 0.2.40 write it: random
    codes and scales. Of 6 bits there is no codebook."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    scales = torch.rand(rows, columns // level_group, generator=generator)
    parts = {
        "weight": torch.randint(-128, 128, (rows, columns * bits // 8), dtype=torch.int8,
                                generator=generator),
        "weight_s_rel": (scales * (130 if bits == 4 and codebook else 20)).to(
            torch.float8_e4m3fn), "weight_s_channel": torch.rand(rows, generator=generator) * 1e-3
    }
    if bits == 4 and codebook:
        parts["weight_codebook"] = torch.tensor(codebook)
    return parts


def asymmetric_values(parts: dict[str, torch.Tensor], level_group: int = 16,
                      rotation: int = 256) -> torch.Tensor:
    """The values of such a weight, float32, by the formula in float64."""
    rows, columns = len(parts["weight"]), parts["weight_s_rel"].shape[1] * level_group
    packed = parts["weight"].view(torch.uint8).long()
    nibbles, upper = packed[:, :columns // 2], packed[:, columns // 2:]
    codes = torch.stack([nibbles & 15, nibbles >> 4], -1).view(rows, columns)
    if upper.numel():
        codes += (torch.stack([upper >> shift & 3 for shift in (0, 2, 4, 6)], -1) << 4).view(
            rows, columns)
    levels = codes.float() - (32 if upper.numel() else 8)
    if "weight_codebook" in parts:
        levels = parts["weight_codebook"][codes]
    scales = parts["weight_s_rel"].float().repeat_interleave(level_group, 1)
    values = (levels * scales).round().clamp(-127, 127).double()
    values *= parts["weight_s_channel"].double()[:, None]
    if "weight_correction" in parts:
        values += parts["weight_correction"].double().t().repeat_interleave(level_group, 1)
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]],
                      dtype=torch.float64) / 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < rotation:
        matrix = torch.kron(matrix, h4)
    return (values.view(-1, rotation) @ matrix).view(rows, columns).float()


def awq_weight(rows: int, columns: int,
               dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight in the form of awq_w4a16, random codes and scales, and its values, float32."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale, zeros = (torch.rand(columns // 64, rows, generator=generator).to(dtype) * 0.01
                    for _ in range(2))
    parts = {"weight": (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8),
             "weight_scale": scale, "weight_zeros": zeros}
    scale, zeros = (side.float().t().repeat_interleave(64, 1) for side in (scale, zeros))
    return parts, (codes.float() - 8) * scale + zeros


def is_nf4(name: str) -> bool:
    """Whether a matrix of Flux is NF4 in mixed files."""
    # the host reads some shapes of the model from layers outside of blocks
    return "txt" in name or "_blocks." not in name


def write_mixed(path: str, tensors: dict[str, torch.Tensor], format_name: str,
                exact: bool = False) -> tuple[dict, dict]:
    """Write a Flux of NF4 and of layers in a format of the host. Returns (its dense values, what
    the host itself can load).

    exact: the values are those that the file holds; otherwise the host's own, which rotates
    asym_w4a8_int8 with a rounding of each sum.
    """
    from devtools.files.bnb_files import quantised  # needs bitsandbytes

    stored, values, for_host = {}, {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            parts = {name: tensor}
            values[name] = for_host[name] = tensor
        elif is_nf4(name):
            parts, values[name] = quantised(tensor, "nf4")
            parts, for_host[name] = (
                {f"{name}{part}": value for part, value in parts.items()},
                values[name],
            )
        else:
            parts, values[name] = in_host_format(name, tensor, format_name)
            for_host |= parts
            if exact and format_name == ASYMMETRIC:
                start = name.removesuffix("weight")
                values[name] = asymmetric_values(
                    {part.removeprefix(start): value for part, value in parts.items()})
        stored |= parts
    save_file({name: value.contiguous() for name, value in stored.items()}, path)
    return values, {name: value.clone() for name, value in for_host.items()}
