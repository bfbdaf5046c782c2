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


@pytest.mark.parametrize("family", DIFFUSION_FILES)
@each_type
def test_any_file_is_saved_and_opened_by_the_host(tmp_path, kind, family):
    _, source_file = written(family, tmp_path)
    source = source_of_file(source_file.path)
    saved = save(source, tmp_path / "a.safetensors", kind)
    values = host_values(comfy.sd.load_diffusion_model(str(saved.path)))
    assert kind in saved.types.values() and values.keys() == source.shapes.keys()
    for name, weight in source.weights.items():
        expected = weight.read(0, len(values[name]))
        packed = saved.types[name] == kind
        assert db(values[name], expected) > (LEAST_DB[kind] if packed else 55), name


@each_type
def test_a_lora_is_in_the_file_and_its_share_is_told(tmp_path, kind):
    lora = lora_for(tiny_flux(), size=0.05)
    model = patched(packed_flux("Q4_K"), (lora, 0.7))
    source = source_of_model(model)
    saved = save(source, tmp_path / "a.safetensors", kind)
    share = float(saved.text.split("LoRA 1 (strength 0.7): ")[1].split("%")[0])
    assert share == pytest.approx(100, abs=8 if kind == "nvfp4" else 2)
    weight = source.weights[BLOCK]
    expected = pack_rows(weight.patched(0, weight.shape[0]), ROW_TYPES[kind]).dequantize()
    found = open_weights(saved.path)
    assert db(host_values(comfy.sd.load_diffusion_model(str(saved.path)))[BLOCK], expected) > 15
    assert found.path == saved.path


@each_type
def test_a_file_saved_again_is_the_same_bit_for_bit(tmp_path, kind):
    save_file({name: tensor.bfloat16() for name, tensor in tiny_flux().items()},
              tmp_path / "model.safetensors")
    first = save(source_of_file(tmp_path / "model.safetensors"), tmp_path / "a.safetensors", kind)
    model = load_diffusion_model(str(first.path), host_formats="exact, from the file's weights")
    for number, wanted in enumerate((kind, KEEP_TYPES)):
        for source in (source_of_file(first.path), source_of_model(model)):
            assert suffix_for(source, wanted) == ".safetensors"
            again = save(source, tmp_path / f"b{number}.safetensors", wanted, overwrite=True)
            expected, tensors = stored(first.path), stored(again.path)
            assert tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(tensors[name].view(-1).view(torch.uint8),
                                   tensor.view(-1).view(torch.uint8)), name


def test_a_type_that_the_host_does_not_read_is_refused(tmp_path):
    source = source_of_model(packed_flux("Q4_K"))
    for kind in ROW_TYPES.keys() - set(HOST_TYPES):
        with pytest.raises(PlanError, match=f"^This ComfyUI does not read {kind}. Update it, or"):
            plan_file(source, tmp_path / "a.safetensors", kind)
