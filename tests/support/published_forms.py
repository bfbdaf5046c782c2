"""How publishers write models: the forms of the files in `published_files`, made small.

Each function returns an `Encode`. What it draws, where files of one kind differ, it takes from a
`random.Random`.
"""
import collections.abc
import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from host_formats import in_host_format
from kernel_writer import write_kernel
from quantizer_writers import nvfp4

from devtools.files.gguf_files import random_rows, write_gguf
from featherweight.ops.formats.comfy_quant import ROTATION

Weights = Mapping[str, torch.Tensor]
FP8 = torch.float8_e4m3fn
SETTINGS = "_quantization_metadata"
MODEL = "model.diffusion_model."


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a file holds of some weights.

    Attributes:
        tensors: of the file.
        values: name of each weight as it was given -> the values that a reader must get.
        metadata: of the file.
    """

    tensors: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    def under(self, prefix: str) -> "Encoded":
        """Returns the same as a part of a checkpoint."""
        metadata = dict(self.metadata)
        if SETTINGS in metadata:
            settings = json.loads(metadata[SETTINGS])
            settings["layers"] = {prefix + name: each for name, each in settings["layers"].items()}
            metadata[SETTINGS] = json.dumps(settings)
        return Encoded({prefix + name: tensor for name, tensor in self.tensors.items()},
                       {prefix + name: value for name, value in self.values.items()}, metadata)


def joined(*parts: Encoded) -> Encoded:
    """Returns the parts of a checkpoint as one."""
    tensors, values, metadata, layers = {}, {}, {}, {}
    for part in parts:
        tensors |= part.tensors
        values |= part.values
        metadata |= part.metadata
        layers |= json.loads(part.metadata.get(SETTINGS, '{"layers": {}}'))["layers"]
    if layers:
        metadata[SETTINGS] = json.dumps({"format_version": "1.0", "layers": layers})
    return Encoded(tensors, values, metadata)


Encode = Callable[[Weights, random.Random], Encoded]


def is_block(name: str) -> bool:
    """Returns whether a name is that of a tensor of a numbered block."""
    return any(part.isdigit() for part in name.split("."))


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight")


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is the weight of a linear layer in a numbered block."""
    is_table = "embed" in name or "relative_attention_bias" in name
    return is_matrix(name, tensor) and is_block(name) and not is_table


def plain(*dtypes: torch.dtype, keeps: Callable[[str, torch.Tensor], bool] | None = None) -> Encode:
    """All tensors in one of some dtypes; keeps: those that stay in float32."""
    def encode(weights: Weights, chance: random.Random) -> Encoded:
        dtype = chance.choice(dtypes)
        tensors = {name: value if keeps and keeps(name, value) else value.to(dtype)
                   for name, value in weights.items()}
        return Encoded(tensors, {name: value.float() for name, value in tensors.items()})
    return encode


def plain_fp8(weights: Weights, chance: random.Random) -> Encoded:
    """Every tensor in fp8, as of Comfy-Org in 2024, or what is no matrix in 16 bits, as of Kijai;
    no scales."""
    whole = chance.choice((True, False))
    return plain(FP8, keeps=None if whole else lambda name, value: value.ndim < 2)(weights, chance)


def scaled_fp8(weights: Weights, chance: random.Random) -> Encoded:
    """Matrices in fp8 with a scale beside each, and a tensor `scaled_fp8` that says so."""
    tensors, values = {}, {}
    rest = chance.choice((torch.bfloat16, torch.float16, torch.float32))
    has_inputs = chance.choice((True, False))
    for name, value in weights.items():
        if is_linear(name, value):
            layer = name.removesuffix(".weight")
            scale = value.abs().max() / 448
            tensors[name] = (value / scale).to(FP8)
            tensors[f"{layer}.scale_weight"] = scale
            if has_inputs:
                tensors[f"{layer}.scale_input"] = torch.tensor(chance.choice((1.0, 0.02)))
            values[name] = tensors[name].float() * scale
        else:
            tensors[name] = value.to(rest)
            values[name] = tensors[name].float()
    tensors["scaled_fp8"] = torch.empty(chance.choice((0, 2)), dtype=FP8).zero_()
    return Encoded(tensors, values)


def marked(*formats: str, mixed: bool = False, convrot: bool = False,
           smoothed: bool = False) -> Encode:
    """Matrices of blocks in formats of ComfyUI's, each marked by a tensor, by the metadata or both.

    mixed: some stay in 16 bits. convrot: of rotated columns. smoothed: some have factors of their
    inputs, as AWQ makes them.
    """
    def encode(weights: Weights, chance: random.Random) -> Encoded:
        tensors, values, layers = {}, {}, {}
        rest = chance.choice((torch.bfloat16, torch.bfloat16, torch.float32))
        marks = chance.choice(("tensors", "metadata", "both"))
        has_inputs = chance.choice((True, False))
        for name, value in weights.items():
            format_name = chance.choice(formats)
            settings = {"convrot": True, "convrot_groupsize": ROTATION} if convrot else {}
            if format_name == "float8_e4m3fn" and chance.random() < 0.2:
                settings["full_precision_matrix_mult"] = True
            if (not is_linear(name, value) or value.shape[1] % ROTATION or value.shape[0] % 16
                    or (mixed and chance.random() < 0.3)):
                tensors[name] = value.to(rest)
                values[name] = tensors[name].float()
                continue
            layer = name.removesuffix(".weight")
            parts, values[name] = in_host_format(name, value, format_name, **settings)
            mark = parts.pop(f"{layer}.comfy_quant")
            layers[layer] = json.loads(bytes(mark.tolist()))
            # older versions of safetensors have no such dtype
            tensors |= {key: part.view(torch.uint8) if part.dtype == torch.float8_e8m0fnu else part
                        for key, part in parts.items()}
            if has_inputs and format_name in ("float8_e4m3fn", "nvfp4"):
                tensors[f"{layer}.input_scale"] = torch.tensor(0.02)
            if smoothed and format_name == "nvfp4":
                factors = torch.rand(value.shape[1]).add(0.5).bfloat16()
                tensors[f"{layer}.pre_quant_scale"] = factors
                values[name] = values[name] * factors.float()
            if marks != "metadata":
                tensors[f"{layer}.comfy_quant"] = mark
        settings = json.dumps({"format_version": "1.0", "layers": layers})
        return Encoded(tensors, values, {} if marks == "tensors" else {SETTINGS: settings})
    return encode


fp8_mixed = marked("float8_e4m3fn", mixed=True)
int8_convrot = marked("int8_tensorwise", convrot=True)
w4a8 = marked("asym_w4a8_int8")


def int8_kernels(weights: Weights, chance: random.Random) -> Encoded:
    """A VAE with matrices and kernels in int8, those rotated whose channels divide."""
    tensors, values = {}, {}
    for name, value in weights.items():
        tensors[name] = values[name] = value
        is_kernel = name.endswith(".weight") and value.ndim in (2, 5)
        if is_kernel and is_block(name) and value.shape[1] % 4 == 0:
            group = next(size for size in (64, 16, 4) if value.shape[1] % size == 0)
            parts, values[name] = write_kernel(value, group=group)
            tensors |= {f"{name.removesuffix('weight')}{part}": part_tensor
                        for part, part_tensor in parts.items()}
    return Encoded(tensors, values)


def of_black_forest_labs(form: str) -> Encode:
    """Matrices of blocks by Black Forest Labs: "fp8" has a number for each row or one, "nvfp4" the
    lower nibble first and its scales in rows; there are no marks."""
    def encode(weights: Weights, chance: random.Random) -> Encoded:
        tensors, values = {}, {}
        one = chance.choice((True, False))
        for name, value in weights.items():
            tensors[name] = value.bfloat16()
            values[name] = tensors[name].float()
            if not is_linear(name, value):
                continue
            layer = name.removesuffix(".weight")
            if form == "nvfp4":
                parts, values[name] = nvfp4(value)
                tensors[name] = parts["weight_packed"]
                tensors[f"{layer}.weight_scale"] = parts["weight_scale"]
                tensors[f"{layer}.weight_scale_2"] = 1 / parts["weight_global_scale"].view(())
            else:
                scale = (value.abs().max() if one else value.abs().amax(1)) / 448
                tensors[name] = (value / scale.view(-1, 1)).to(FP8)
                tensors[f"{layer}.weight_scale"] = scale
                values[name] = tensors[name].float() * scale.view(-1, 1)
            tensors[f"{layer}.input_scale"] = torch.tensor(0.02)
        return Encoded(tensors, values)
    return encode


# What stands in the names of files -> the types of the matrices in them, by llama.cpp's
# `llama_tensor_get_type` and by Unsloth's dynamic mixes.
MIXES = {
    "Q2_K": ("Q2_K", "Q3_K", "Q4_K"), "Q3_K_S": ("Q3_K",), "Q3_K_M": ("Q3_K", "Q4_K", "Q5_K"),
    "Q3_K": ("Q3_K",), "Q4_K_S": ("Q4_K", "Q5_K"), "Q4_K_M": ("Q4_K", "Q5_K", "Q6_K"),
    "Q4_K": ("Q4_K",), "Q5_K_S": ("Q5_K",), "Q5_K_M": ("Q5_K", "Q6_K"), "Q5_K": ("Q5_K",),
    "Q6_K": ("Q6_K",), "Q8_0": ("Q8_0",), "Q4_0": ("Q4_0",), "Q5_0": ("Q5_0",), "F16": ("F16",),
    "Q2_K_M": ("Q2_K", "Q3_K", "Q4_K"), "Q2_K_MIX": ("Q2_K", "Q3_K", "Q6_K"),
    "UD-Q2_K_XL": ("Q2_K", "Q3_K", "Q4_K", "IQ3_S", "IQ4_XS"),
    "UD-Q4_K_XL": ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16"),
    "AD-Q3_K": ("Q3_K", "Q5_K"), "AD-Q4_K": ("Q4_K", "Q6_K"), "AD-Q5_K": ("Q5_K", "Q6_K", "Q8_0"),
    "Q3_K_IMAT": ("Q3_K",), "Q4_K_IMAT": ("Q4_K",),
}
LONGEST_NAME = 127  # of stable-diffusion.cpp, which sets GGML_MAX_NAME to 128
FALLBACK = ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")  # where rows are no whole K-blocks


def type_in(mix: str, chance: random.Random, columns: int) -> str:
    """Returns the type of one matrix in a file of a mix."""
    types = MIXES[mix.upper()]
    if columns % 256 and not {*types} & {"Q4_0", "Q5_0", "Q8_0"}:
        return chance.choice(FALLBACK)
    return chance.choice(types)


def write_converted(path, weights: Weights, chance: random.Random, mix: str,
                    architecture: str | None, metadata: Mapping[str, Any] | None = None):
    """Writes a GGUF file as ComfyUI-GGUF's converter and llama-quantize do, and its forks: what is
    no matrix is F32, and what is outside of the blocks keeps its type. Returns the values."""
    outside = chance.choice(("F16", "BF16", "F32"))

    def type_of(name, values):
        if values.ndim < 2 or not name.endswith(".weight") or values.size <= 1024:
            return "F32"
        inside = is_block(name) and values.ndim == 2
        return type_in(mix, chance, values.shape[-1]) if inside else outside

    if chance.choice((True, False)):  # llama-quantize writes no leading dimensions of one
        weights = {name: value.squeeze(0) if value.ndim == 3 and len(value) == 1 else value
                   for name, value in weights.items()}
    details = {"general.quantization_version": 2, "general.file_type": 15, **(metadata or {})}
    if chance.choice((True, False)):
        details |= {"general.name": "A Model", "general.quantized_by": "Someone"}
    return write_gguf(path, dict(weights), type_of, architecture, details, pack=random_rows)


class Renamed(collections.abc.Mapping):
    """Values of a file under other names, read when they are asked for."""

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, str]):
        self.values_in_file, self.names = values, names

    def __getitem__(self, name: str):
        return self.values_in_file[self.names[name]]

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def write_by_c(path, weights: Weights, chance: random.Random, mix: str,
               metadata: Mapping[str, Any] | None = None):
    """Writes a GGUF file as stable-diffusion.cpp does: every matrix is packed, no architecture is
    named, and names may have a prefix. Returns the values under the given names."""
    prefix = chance.choice(("", MODEL))
    vectors = chance.choice(("F32", "F16"))
    names = {name: f"{prefix}{name}"[:LONGEST_NAME] for name in weights}
    # five dimensions become four
    stored = {names[name]: value.flatten(0, value.ndim - 4) if value.ndim > 4 else value
              for name, value in weights.items()}
    packed = {names[name] for name, value in weights.items() if is_matrix(name, value)}

    def type_of(name, values):
        if name in packed:
            return type_in(mix, chance, values.shape[-1])
        return vectors if values.ndim == 1 else "F16"

    seen = write_gguf(path, stored, type_of, None, dict(metadata or {}), pack=random_rows)
    return Renamed(seen, names)
