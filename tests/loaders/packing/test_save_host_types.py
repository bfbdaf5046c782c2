"""Files in ComfyUI's own types are such as ComfyUI's own: it opens them without this pack, and what
is in them is the model with its LoRAs, rounded once."""
import json

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from patched_models import lora_for, packed_flux, patched, relative, run, tiny_flux
from safetensors import safe_open
from safetensors.torch import save_file
from saving import save
from stored_files import FILES, diffusion_model, written

from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.packing.planning.file_plan import (
    HOST_TYPES,
    KEEP_TYPES,
    plan_file,
    suffix_for,
)
from featherweight.loaders.packing.planning.plan import PlanError
from featherweight.loaders.packing.source import source_of_file, source_of_model
from featherweight.loaders.quantizers.comfyui import layer_parts
from featherweight.ops.quantize.row_types import ROW_TYPES, pack_rows
from featherweight.ops.tensor.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models")
each_type = pytest.mark.parametrize("kind", HOST_TYPES)
BLOCK = "double_blocks.0.img_mlp.0.weight"  # a matrix that is packed
LEAST_DB = {"int8_convrot": 40, "float8_e4m3fn": 30, "mxfp8": 30, "nvfp4": 19}
DIFFUSION_FILES = [name for name, (load, *_) in FILES.items() if load is diffusion_model]


def stored(path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def host_values(model) -> dict[str, torch.Tensor]:
    """Name -> values of a model that ComfyUI has loaded."""
    weights = model.model.diffusion_model.state_dict()
    values = {}
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(getattr(module, "weight", None), QuantizedTensor):
            values[f"{name}.weight"] = module.weight.dequantize().float()
    return {name: tensor.float() for name, tensor in weights.items()
            if name.endswith(("weight", "bias"))} | values


def db(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float(-20 * torch.log10((values - expected).norm() / expected.norm()))


@each_type
def test_the_host_opens_a_file_and_holds_what_packing_gives(tmp_path, kind):
    save_file({name: tensor.bfloat16() for name, tensor in tiny_flux().items()},
              tmp_path / "model.safetensors")
    saved = save(source_of_file(tmp_path / "model.safetensors"), tmp_path / "a.safetensors", kind)
    assert saved.types[BLOCK] == kind and saved.nbytes == saved.path.stat().st_size
    tensors = stored(saved.path)
    model = comfy.sd.load_diffusion_model(str(saved.path))
    values = host_values(model)
    for name, weight in tiny_flux().items():
        weight, name = weight.bfloat16(), name.replace("_norm.scale", "_norm.weight")
        if saved.types[name] == kind:
            settings, parts = layer_parts(pack_rows(weight.float(), ROW_TYPES[kind]))
            layer = name.removesuffix("weight")
            mark = json.loads(tensors[f"{layer}comfy_quant"].numpy().tobytes())
            assert mark == settings and settings["format"] in QUANT_ALGOS
            for part, tensor in parts.items():
                assert torch.equal(tensors[layer + part].view(-1).view(torch.uint8),
                                   tensor.view(-1).view(torch.uint8)), name
            assert db(values[name], weight.float()) > LEAST_DB[kind], name
        else:
            assert torch.equal(values[name], weight.float()), name
    exact = load_diffusion_model(str(tmp_path / "model.safetensors"))
    assert relative(run(model), run(exact)) < 0.5
