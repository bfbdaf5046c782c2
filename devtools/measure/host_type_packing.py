"""ComfyUI's own types as other tools pack them, and as ComfyUI's kernels compute with them."""
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from devtools.measure.weights import LAYOUTS

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from oracles import installed
from safetensors.torch import load_file, save_file

from devtools import ROOT
from featherweight.loaders.quantizers.comfy_quant import pack_parts
from featherweight.ops.formats.row_layout import RowFormat
from featherweight.ops.tensor.packed_layout import is_packed
from featherweight.ops.tensor.packed_tensor import PackedTensor

ASYMMETRIC = "asym_w4a8_int8"
NEWER_KITCHEN = "comfy-kitchen==0.2.40"  # which writes ASYMMETRIC
CONVERTER = "convert_to_quant==1.3.4", "prodigy-plus-schedule-free==2.0.1"
# type -> the options of convert_to_quant, with which its rounding is learned
LEARNED = {"int8_convrot": ["--int8", "--scaling_mode", "row", "--convrot"], "float8_e4m3fn": [],
           "mxfp8": ["--mxfp8"], "nvfp4": ["--nvfp4"]}

Weights = dict[str, torch.Tensor]  # name that ends in "weight" -> float32 (N, K)
Packed = dict[str, PackedTensor]


def by_kitchen(weights: Weights, type_name: str, folder: Path) -> Packed:
    """Weights as comfy_kitchen quantises them: that of the host, or a newer one in a process of its
    own for a type that the host's lacks."""
    if type_name != ASYMMETRIC:
        layout, options = LAYOUTS[type_name]
        settings = ({"format": "int8_tensorwise", "convrot": True} if type_name == "int8_convrot"
                    else {"format": type_name})
        parts = {name: QuantizedTensor.from_float(weight, layout, **options).state_dict("weight")
                 for name, weight in weights.items()}
        return {name: _read(settings, part) for name, part in parts.items()}
    torch.save({name: (weight, "AsymW4A8Int8Layout", {}) for name, weight in weights.items()},
               folder / "cases")
    _run(installed(NEWER_KITCHEN), str(ROOT / "tests" / "support" / "kitchen_writer.py"),
         str(folder / "cases"), str(folder / "written"))
    return {name: _read({"format": type_name}, parts)
            for name, (parts, _) in torch.load(folder / "written").items()}


def by_learned_rounding(weights: Weights, type_name: str, folder: Path) -> Packed:
    """Weights as convert_to_quant learns to round them, with what it does unless told otherwise."""
    source, target = folder / "blocks.safetensors", folder / f"converted-{type_name}.safetensors"
    if not target.exists():
        save_file({name: weight.half() for name, weight in weights.items()}, source)
        _run(installed(*CONVERTER), "-m", "convert_to_quant.convert_to_quant", "-i", str(source),
             "-o", str(target), "--comfy_quant", "--manual_seed", "1", *LEARNED[type_name])
    tensors, packed = load_file(target), {}
    for name in weights:
        layer = name.removesuffix("weight")
        parts = {part.removeprefix(layer): tensor for part, tensor in tensors.items()
                 if part.startswith(layer)}
        settings = json.loads(bytes(parts.pop("comfy_quant").tolist()))
        packed[name] = _read(settings, parts)
    return packed


def _read(settings: dict, parts: dict[str, torch.Tensor]) -> PackedTensor:
    packed = pack_parts(settings, parts)
    assert packed is not None, settings
    return packed


def _run(packages: Path, *arguments: str):
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(packages)})


@contextlib.contextmanager
def quantised_inputs(model, type_name: str):
    """Inside this block, packed layers get their inputs rounded as ComfyUI's kernels round them for
    weights of a type, by comfy_kitchen's arithmetic on the CPU.

    Products of int8 have their inputs in rows, rotated like the weight. model: the host's
    ModelPatcher, whose layers multiply by the values of their weights.
    """
    layout, options = LAYOUTS["int8_convrot" if type_name == ASYMMETRIC else type_name]
    # without one in the file, ComfyUI takes 1 for the scale of fp8's inputs
    options = {name: value for name, value in options.items() if name != "scale"}

    def quantise(layer, args):
        rows = args[0].reshape(-1, args[0].shape[-1])
        if "convrot" in options:
            sizes = {"convrot_groupsize": layer.weight.params.format.layout.rotation}
        else:
            sizes = {}
        rounded = QuantizedTensor.from_float(rows, layout, **options, **sizes).dequantize()
        return rounded.view_as(args[0]), *args[1:]

    with contextlib.ExitStack() as hooks:
        for layer in model.model.diffusion_model.modules():
            weight = getattr(layer, "weight", None)
            if (isinstance(layer, torch.nn.Linear) and is_packed(weight)
                    and isinstance(weight.params.format, RowFormat)):
                hooks.enter_context(layer.register_forward_pre_hook(quantise))
        yield
