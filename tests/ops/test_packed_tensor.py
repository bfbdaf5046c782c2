"""What other people's nodes do to packed weights: they get what a dense tensor gives, or one sentence, and end no process."""
import collections
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelSave
from featherweight.ops.format import FORMATS
from featherweight.ops.layers import PACKED_LAYERS
from featherweight.ops.operations import packed_operations
from featherweight.ops.tensor import is_packed, packed_tensor
from tensor_attempts import ATTEMPTS
from patched_models import dense_flux, packed_flux, packed_layers
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("small_models")

FORMAT_NAMES = ("Q8_0", "Q4_K", "INT8", "float8_e4m3fn")  # the last is the host's, in a file with NF4
IMPORTED = os.pathsep.join(map(str, Path(__file__).resolve().parents[1:3]))
CHILD = {**os.environ, "PYTHONPATH": IMPORTED, "PYTHONWARNINGS": "ignore"}


def test_whatever_is_done_to_a_packed_tensor_works_as_on_a_dense_one_or_says_why_not():
    """Each attribute of torch.Tensor, files, copies, writes of all kinds. The child is started again past one that ends it."""
    faults, start = {}, 0
    while start < len(ATTEMPTS):
        child = subprocess.run([sys.executable, "-m", "tensor_attempts", str(start)], env=CHILD,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines = [json.loads(line) for line in child.stdout.splitlines()]
        faults |= {ATTEMPTS[line["done"]]: line["faults"] for line in lines if line.get("faults")}
        if child.returncode:
            assert lines, child.stderr
            faults[ATTEMPTS[lines[-1]["begun"]]] = f"ended the process with {child.returncode}"
        start = lines[-1].get("done", lines[-1].get("begun")) + 1
    assert not faults


SAVING = """
import conftest, sys, torch, safetensors.torch
from patched_models import packed_flux
torch.set_num_threads(1)
for format_name in sys.argv[2:]:
    model = packed_flux(format_name).model
    try:
        safetensors.torch.save_file(model.state_dict(), f"{sys.argv[1]}/{format_name}.safetensors")
    except NotImplementedError as error:
        print(error)
    torch.save(model.state_dict(), f"{sys.argv[1]}/{format_name}.pt")
"""


def dense_values(format_name: str) -> dict:
    return dense_flux(format_name).model.state_dict()


def test_the_state_dict_of_a_model_is_saved_right_or_not_at_all(tmp_path):
    child = subprocess.run([sys.executable, "-c", SAVING, tmp_path, *FORMAT_NAMES], env=CHILD, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("held packed") == child.stdout.count("save the model with a node") == len(FORMAT_NAMES)
    assert not list(tmp_path.glob("*.safetensors"))
    for format_name in FORMAT_NAMES:
        saved, expected = torch.load(tmp_path / f"{format_name}.pt", weights_only=True), dense_values(format_name)
        assert saved.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.allclose(saved[name].float(), values.float(), atol=1e-6), name


def kjnodes_save(patcher, path):
    """As KJNodes' node saves a model."""
    comfy.model_management.load_models_gpu([patcher])
    state_dict = patcher.state_dict_for_saving(None, None, None)
    comfy.utils.save_torch_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, str(path))


def the_hosts_save(patcher, path):
    node = ModelSave()
    node.output_dir = str(path.parent)
    node.save(patcher, path.stem)
    (saved,) = path.parent.glob(f"{path.stem}*")
    saved.rename(path)


@pytest.mark.parametrize("save", [kjnodes_save, the_hosts_save])
@pytest.mark.parametrize("format_name", ("Q8_0", "INT8"))
def test_nodes_that_save_a_model_write_its_values(tmp_path, format_name, save):
    save(packed_flux(format_name), tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    expected = {name: values for name, values in dense_values(format_name).items() if name.startswith("diffusion_model.")}
    assert {f"model.{name}" for name in expected} == {name for name in saved if name.startswith("model.diffusion_model.")}
    for name, values in expected.items():
        assert torch.equal(saved[f"model.{name}"].float(), values.float()), name


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_weights_loaded_into_another_module_are_the_values(format_name):
    packed, dense = packed_flux(format_name), dense_flux(format_name)
    expected = {name: value.clone() for name, value in dense.model.diffusion_model.state_dict().items()}
    for value in dense.model.diffusion_model.state_dict().values():
        value.zero_()
    dense.model.diffusion_model.load_state_dict(packed.model.diffusion_model.state_dict())
    for name, value in dense.model.diffusion_model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


WRITING = """
import conftest
from patched_models import packed_flux, packed_layers
weight = packed_layers(packed_flux("Q8_0"))[0].weight
try:
    weight.copy_(weight.clone())
except NotImplementedError as error:
    print(error)
"""


def test_the_pages_of_a_file_are_not_written_to():
    child = subprocess.run([sys.executable, "-c", WRITING], env=CHILD, capture_output=True, text=True)
    assert child.returncode == 0 and "copy_ would write to the file itself" in child.stdout, child.stderr


# --- other ways of holding a weight ---

class Holder(torch.nn.Module):
    """As packs wrap an embedding of the host: a module of their own with the layer's weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_after_free_memory_weights_are_handled_as_before(format_name):
    with torch.inference_mode():
        patcher = packed_flux(format_name)
        comfy.model_management.load_models_gpu([patcher])
    comfy.model_management.unload_all_models()  # as the server does on request, outside of inference mode
    with torch.inference_mode():
        for layer in packed_layers(patcher):
            weight = layer.weight
            assert weight.is_inference()
            dense = weight.dequantize()
            for use in (torch.Tensor.detach, torch.Tensor.t, lambda w: w[1:3], lambda w: w.view(-1), torch.nn.Parameter):
                assert torch.equal(use(weight) * 1, use(dense)), use
            assert torch.equal(Holder(weight).to(torch.float16).to("cpu").weight * 1, weight.to(torch.float16) * 1)


@pytest.mark.parametrize("format_name", ("Q8_0", "NF4"))
def test_weights_made_outside_of_inference_mode_are_handled_inside(format_name):
    weight = torch.nn.Parameter(weight_in(format_name, (64, 64)), requires_grad=False)
    with torch.inference_mode():
        for use in (torch.Tensor.detach, torch.Tensor.t, lambda w: w[1:3], lambda w: w.view(-1), torch.nn.Parameter):
            assert torch.equal(use(weight) * 1, use(weight.dequantize())), use


# --- layers ---

LAYERS = {"Linear": (64, 32), "Embedding": (32, 64), "Conv1d": (64, 32, 3), "Conv2d": (64, 32, 3), "Conv3d": (64, 32, 3),
          "MoEExperts": (2, 64, 32)}
INPUTS = {"Linear": torch.ones(2, 64), "Embedding": torch.tensor([1, 3]), "Conv1d": torch.ones(1, 64, 5),
          "Conv2d": torch.ones(1, 64, 5, 5), "Conv3d": torch.ones(1, 64, 5, 5, 5)}


def weight_in(format_name, shape):
    """A packed weight of random codes and scales of a usual size."""
    packed_format, generator = FORMATS[format_name], torch.Generator().manual_seed(0)
    blocks = torch.Size(shape).numel() // packed_format.block_length
    codes = torch.randint(0, 60, (blocks, packed_format.block_bytes), dtype=torch.uint8, generator=generator)
    scale = torch.rand(blocks, generator=generator) if packed_format.scales_apart else None
    return packed_tensor(packed_format, codes, shape, scale=scale)


def layer_in(format_name, layer_class, bias=True):
    layer = getattr(packed_operations(), layer_class.__name__)(*LAYERS[layer_class.__name__], dtype=torch.float32)
    state = {"weight": weight_in(format_name, tuple(layer.weight.shape))}
    if getattr(layer, "bias", None) is not None:
        state["bias"] = torch.linspace(-1, 1, layer.bias.numel()).view(layer.bias.shape)
    layer.load_state_dict(state)
    return layer


def output(layer, input):
    if input is None:
        return torch.cat([layer.expert_linear(torch.ones(2, layer.weight.shape[-1]), expert) for expert in range(2)])
    return layer(input)


@pytest.mark.parametrize("format_name", ("Q8_0", "NF4"))
@pytest.mark.parametrize("layer_class", PACKED_LAYERS, ids=lambda layer_class: layer_class.__name__)
def test_a_layer_is_copied(layer_class, format_name):
    layer = layer_in(format_name, layer_class)
    copied = copy.deepcopy(torch.nn.Sequential(layer))[0]
    input = INPUTS.get(layer_class.__name__)
    assert is_packed(copied.weight) and isinstance(copied.weight, torch.nn.Parameter) and copied._scratch is layer._scratch
    assert copied.weight._qdata.data_ptr() != layer.weight._qdata.data_ptr()
    assert torch.equal(output(copied, input), output(layer, input))


@pytest.mark.parametrize("format_name", ("Q8_0", "NF4"))
@pytest.mark.parametrize("layer_class", PACKED_LAYERS, ids=lambda layer_class: layer_class.__name__)
def test_a_layer_takes_its_own_state_dict(layer_class, format_name):
    layer = layer_in(format_name, layer_class)
    expected = output(layer, INPUTS.get(layer_class.__name__))
    block = torch.nn.Sequential(layer)
    assert block.state_dict().keys() == dict(block.named_parameters()).keys()  # scales apart are no weights
    for options in ({}, {"assign": True}):
        block.load_state_dict(block.state_dict(), **options)
        assert is_packed(layer.weight) and torch.equal(output(layer, INPUTS.get(layer_class.__name__)), expected)


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_a_model_takes_its_own_state_dict(format_name):
    patcher = packed_flux(format_name)
    model = patcher.model.diffusion_model
    before = {name: value.dequantize() if hasattr(value, "dequantize") and is_packed(value) else value
              for name, value in model.state_dict().items()}
    count = len(packed_layers(patcher))
    model.load_state_dict(model.state_dict())
    assert len(packed_layers(patcher)) == count
    assert all(torch.equal(model.state_dict()[name] * 1, value * 1) for name, value in before.items())


def held_bytes(patcher) -> int:
    """Bytes of all tensors of a model, each once: codes, scales and the rest."""
    tensors = []
    for tensor in (*patcher.model.parameters(), *patcher.model.buffers()):
        quantised = hasattr(tensor, "_qdata")
        tensors += [tensor._qdata, *(getattr(tensor._params, field) for field in tensor._params._tensor_fields())] \
            if quantised else [tensor]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_scales_that_lie_apart_are_counted_as_memory_and_are_no_weights(format_name):
    patcher = packed_flux(format_name)
    assert patcher.model_size() == comfy.model_management.module_size(patcher.model) == held_bytes(patcher)
    for names in (patcher.model.state_dict(), patcher.model_state_dict()):
        assert not [name for name in names if "scale" in name.rpartition(".")[2] and "weight" in name.rpartition(".")[2]]


def test_scales_of_nf4_are_counted():
    weight = weight_in("NF4", (64, 64))
    layer = layer_in("NF4", PACKED_LAYERS[0])
    assert weight.nbytes == 64 * 64 // 2 + 64 * 64 // 64 * 4
    assert comfy.model_management.module_size(layer) == 32 * 64 // 2 + 32 * 64 // 64 * 4 + 32 * 4


def test_what_the_host_pins_is_the_bytes(monkeypatch):
    pinned = collections.Counter()
    monkeypatch.setattr(comfy.model_management, "pin_memory", lambda tensor: not pinned.update([tensor.data_ptr()]))
    monkeypatch.setattr(comfy.model_management, "unpin_memory", lambda tensor: pinned.subtract([tensor.data_ptr()]))
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 1 << 30)  # on a CPU the host pins nothing
    patcher = packed_flux("Q8_0")
    name, layer = next((name, layer) for name, layer in patcher.model.named_modules() if layer in packed_layers(patcher))
    patcher.pin_weight_to_device(f"{name}.weight")
    assert pinned == {layer.weight._qdata.data_ptr(): 1} and patcher.pinned == {f"{name}.weight"}
    patcher.unpin_all_weights()
    assert not pinned.total() and not patcher.pinned
