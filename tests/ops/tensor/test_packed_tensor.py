"""What other people's nodes do to packed weights: they get what a dense tensor gives, or one
sentence, and end no process."""
import collections
import copy
import json
import os
import pickle
import subprocess
import sys

import comfyui_and_pack

import comfy.model_management
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelSave
from pack_api import FORMATS, is_packed, packed_operations, packed_tensor, packed_tensors
from patched_layers import COPIES
from patched_models import (
    dense_flux,
    flux_file,
    forward,
    lora_for,
    packed_flux,
    packed_layers,
    parts,
    patched,
    run,
)
from safetensors.torch import load_file
from tensor_attempts import ATTEMPTS

from featherweight.ops.layers.packed_layers import PACKED_LAYERS

pytestmark = pytest.mark.usefixtures("small_models")

# the last is the host's, in a file with NF4
FORMAT_NAMES = ("Q8_0", "Q4_K", "INT8", "float8_e4m3fn")
CHILD = {
    **os.environ, "PYTHONPATH": os.pathsep.join(
        [os.path.dirname(comfyui_and_pack.__file__), os.environ.get("PYTHONPATH", "")]),
    "PYTHONWARNINGS": "ignore"
}


HALF = len(ATTEMPTS) // 2  # one format without scales apart, and one with them


@pytest.mark.parametrize(
    ("start", "stop"), [(0, HALF), pytest.param(HALF, len(ATTEMPTS), marks=pytest.mark.heavy)])
def test_whatever_is_done_to_a_packed_tensor_works_as_on_a_dense_one_or_says_why_not(start, stop):
    """Each attribute of torch.Tensor, files, copies, writes of all kinds. The child is started
    again past one that ends it."""
    faults = {}
    while start < stop:
        child = subprocess.run(
            [sys.executable, "-m", "tensor_attempts", str(start), str(stop)], env=CHILD,
            capture_output=True, text=True)
        lines = [json.loads(line) for line in child.stdout.splitlines()]
        faults |= {ATTEMPTS[line["done"]]: line["faults"] for line in lines if line.get("faults")}
        if child.returncode:
            assert lines, child.stderr
            faults[ATTEMPTS[lines[-1]["begun"]]] = f"ended the process with {child.returncode}"
        start = lines[-1].get("done", lines[-1].get("begun")) + 1
    assert not faults


SAVING = """
import comfyui_and_pack, sys, torch, safetensors.torch
from patched_models import packed_flux, packed_layers
torch.set_num_threads(1)
for format_name in sys.argv[2:]:
    model = packed_flux(format_name).model
    try:
        safetensors.torch.save_file(model.state_dict(), f"{sys.argv[1]}/{format_name}.safetensors")
    except NotImplementedError as error:
        print(error)
    torch.save(model.state_dict(), f"{sys.argv[1]}/{format_name}.pt")
weight = packed_layers(packed_flux("Q8_0"))[0].weight
try:
    weight.copy_(weight.clone())
except NotImplementedError as error:
    print("a write:", error)
"""


def dense_values(format_name: str) -> dict:
    return dense_flux(format_name).model.state_dict()


def test_the_state_dict_of_a_model_is_saved_right_or_not_at_all_and_its_file_not_written_to(
        tmp_path):
    """By another process, which a write to the pages of a file would end."""
    child = subprocess.run([sys.executable, "-c", SAVING, tmp_path, *FORMAT_NAMES], env=CHILD,
                           capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    saving, write = child.stdout.split("a write:")
    for words in ("stays packed", "save the model with a node"):
        assert saving.count(words) == len(FORMAT_NAMES)
    assert "copy_ would write to the file itself" in write
    assert not list(tmp_path.glob("*.safetensors"))
    for format_name in FORMAT_NAMES:
        saved = torch.load(tmp_path / f"{format_name}.pt", weights_only=True)
        expected = dense_values(format_name)
        assert saved.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.allclose(saved[name].float(), values.float(), atol=1e-6), name


def kjnodes_save(patcher, path):
    """As KJNodes' node saves a model."""
    comfy.model_management.load_models_gpu([patcher])
    state_dict = patcher.state_dict_for_saving(None, None, None)
    comfy.utils.save_torch_file({name: tensor.contiguous() for name, tensor in state_dict.items()},
                                str(path))


def the_hosts_save(patcher, path):
    node = ModelSave()
    node.output_dir = str(path.parent)
    node.save(patcher, path.stem)
    (saved,) = path.parent.glob(f"{path.stem}*")
    saved.rename(path)


@pytest.mark.parametrize("save", [kjnodes_save, the_hosts_save])
@pytest.mark.parametrize("format_name", ["Q8_0", "INT8"])
def test_nodes_that_save_a_model_write_its_values(tmp_path, format_name, save):
    save(packed_flux(format_name), tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    expected = {
        name: values for name, values in dense_values(format_name).items()
        if name.startswith("diffusion_model.")
    }
    assert {f"model.{name}" for name in expected} == {
        name for name in saved if name.startswith("model.diffusion_model.")
    }
    for name, values in expected.items():
        assert torch.equal(saved[f"model.{name}"].float(), values.float()), name


# --- parts of a weight ---

PARTS = {
    "[:4]": lambda w: w[:4], "[0]": lambda w: w[0], "[:, 3]": lambda w: w[:, 3],
    "[None]": lambda w: w[None], "split in columns": lambda w: w.split(4, 1)[1],
    "tensor_split": lambda w: w.tensor_split(3)[0], "unbind": lambda w: w.unbind()[2],
    "the first of an iteration": lambda w: next(iter(w)), "select": lambda w: w.select(1, 2),
    "narrow": lambda w: w.narrow(0, 1, 3), "diagonal": lambda w: w.diagonal(),
    "as_strided": lambda w: w.as_strided((4,), (1,)), "view(-1)[:10]": lambda w: w.view(-1)[:10],
    "reshape": lambda w: w.reshape(4, -1), "flatten": lambda w: w.flatten(), "t()": lambda w: w.t(),
    "T": lambda w: w.T, "permute": lambda w: w.permute(1, 0), "unsqueeze": lambda w: w.unsqueeze(0),
    "expand": lambda w: w.expand(2, *w.shape),
    "a view of a view": lambda w: w.t()[2:8].view_as(w[:, 2:8].t())
}
WRITES = {
    "mul_": lambda part: part.mul_(2), "zero_": lambda part: part.zero_(),
    "fill_": lambda part: part.fill_(1), "add_": lambda part: part.add_(1),
    "copy_": lambda part: part.copy_(torch.ones(part.shape)), "+=": lambda part: part.__iadd__(1),
    "[0] = 1": lambda part: part.__setitem__(0, 1),
    "[:] = 1": lambda part: part.__setitem__(slice(None), 1),
    "[...] = a tensor": lambda part: part.__setitem__(..., part + 1),
    "a view of it": lambda part: part[0].mul_(2), "its data": lambda part: part.data.mul_(2),
    "data =": lambda part: setattr(part, "data", part + 1),
    "out=": lambda part: torch.add(part + 1, 1, out=part),
    "a foreach function": lambda part: torch._foreach_mul_([part], 2),
    "torch.nn.init": torch.nn.init.normal_,
    "relu, in place": lambda part: torch.nn.functional.relu(part, inplace=True),
    "index_fill_": lambda part: part.index_fill_(0, torch.tensor([0]), 1.0)
}


@pytest.mark.parametrize(("format_name", "mode"), [
    ("Q8_0", torch.no_grad), ("NF4", torch.inference_mode)], ids=["normal", "inference"])
@pytest.mark.parametrize("take", PARTS.values(), ids=PARTS)
def test_a_write_to_a_part_is_refused_as_one_to_the_whole_is(take, format_name, mode):
    with mode():
        weight = torch.nn.Parameter(weight_in(format_name, (64, 64)), requires_grad=False)
        with pytest.raises(NotImplementedError) as whole:
            weight.data.mul_(2)
        instead = str(whole.value).partition("would write to")[2]
        for held in (weight, weight.data, weight.detach()):
            expected = take(weight.dequantize())
            for name, write in WRITES.items():
                part = take(held)
                with pytest.raises(NotImplementedError, match="^A packed weight stays") as refusal:
                    write(part)
                assert str(refusal.value).endswith(instead), name
                assert torch.equal(part, expected), name
        assert torch.equal(weight.dequantize(), weight_in(format_name, (64, 64)).dequantize())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["normal", "inference"])
@pytest.mark.parametrize("take", PARTS.values(), ids=PARTS)
def test_what_is_computed_from_a_part_is_plain(take, mode):
    with mode():
        weight = weight_in("Q8_0", (64, 64))
        expected = take(weight.dequantize())
        uses = {
            "+": lambda part: part + 1, "clone": torch.clone,
            "contiguous": lambda part: part.contiguous(), "to": lambda part: part.to(torch.float32),
            "to half": lambda part: part.to(torch.float16), "float": lambda part: part.float(),
            "cpu": lambda part: part.cpu(), "cat": lambda part: torch.cat([part, part]),
            "cat with others": lambda part: torch.cat([
                part.reshape(-1), weight.view(-1), torch.ones(3)
            ]), "sum": torch.sum, "deepcopy": copy.deepcopy,
            "pickle": lambda part: pickle.loads(pickle.dumps(part)),
            "copied into": lambda part: torch.zeros(part.shape).copy_(part),
            "index": lambda part: part[torch.zeros(1, dtype=torch.long)],
            "empty_like": lambda part: torch.empty_like(part).zero_()
        }
        for name, use in uses.items():
            result = use(take(weight))
            assert type(result) is torch.Tensor and torch.equal(result, use(expected)), name
        part = take(weight)
        assert part.tolist() == expected.tolist() and str(part) == str(expected)
        assert torch.equal(part, expected)
        assert not part.numpy().flags.writeable and (part.numpy() == expected.numpy()).all()
        take(weight).clone().mul_(2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["normal", "inference"])
def test_a_parameter_that_is_made_of_a_part_is_its_makers_own(mode):
    with mode():
        weight = weight_in("Q8_0", (64, 64))
        holder = Holder(torch.nn.Parameter(weight[2:4], requires_grad=False))
        expected = weight.dequantize()[2:4]
        holder.weight.mul_(2)
        holder.weight.data[0] = 1
        assert torch.equal(holder.weight, torch.stack([torch.ones(64), expected[1] * 2]))
        holder.load_state_dict({"weight": expected})
        copied = copy.deepcopy(holder).half()
        copied.weight += 1
        assert isinstance(copied.weight, torch.nn.Parameter)
        assert torch.equal(copied.weight, expected.half().add(1))
        assert torch.equal(holder.weight, expected)


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
    # as the server does on request, outside of inference mode
    comfy.model_management.unload_all_models()
    with torch.inference_mode():
        for layer in packed_layers(patcher):
            weight = layer.weight
            assert weight.is_inference()
            dense = weight.dequantize()
            for use in (torch.Tensor.detach, torch.Tensor.t, lambda w: w[1:3], lambda w: w.view(-1),
                        torch.nn.Parameter):
                assert torch.equal(use(weight) * 1, use(dense)), use
            assert torch.equal(
                Holder(weight).to(torch.float16).to("cpu").weight * 1,
                weight.to(torch.float16) * 1)


@pytest.mark.parametrize("format_name", ["Q8_0", "NF4"])
def test_weights_made_outside_of_inference_mode_are_handled_inside(format_name):
    weight = torch.nn.Parameter(weight_in(format_name, (64, 64)), requires_grad=False)
    with torch.inference_mode():
        for use in (torch.Tensor.detach, torch.Tensor.t, lambda w: w[1:3], lambda w: w.view(-1),
                    torch.nn.Parameter):
            assert torch.equal(use(weight) * 1, use(weight.dequantize())), use


# --- layers ---

# the table is larger than those that stay plain
LAYERS = {
    "Linear": (64, 32), "Embedding": (128, 64), "Conv1d": (64, 32, 3), "Conv2d": (64, 32, 3),
    "Conv3d": (64, 32, 3), "MoEExperts": (2, 64, 32)
}
INPUTS = {
    "Linear": torch.ones(2, 64), "Embedding": torch.tensor([1, 3]), "Conv1d": torch.ones(1, 64, 5),
    "Conv2d": torch.ones(1, 64, 5, 5), "Conv3d": torch.ones(1, 64, 5, 5, 5)
}


def weight_in(format_name, shape):
    """A packed weight of random codes and scales of a usual size."""
    packed_format, generator = FORMATS[format_name], torch.Generator().manual_seed(0)
    blocks = torch.Size(shape).numel() // packed_format.block_length
    codes = torch.randint(0, 60, (blocks, packed_format.block_bytes), dtype=torch.uint8,
                          generator=generator)
    scale = torch.rand(blocks, generator=generator) if packed_format.qparams else None
    return packed_tensor(packed_format, codes, shape, scale=scale)


def layer_in(format_name, layer_class, bias=True):
    layer = getattr(packed_operations(), layer_class.__name__)(
        *LAYERS[layer_class.__name__], dtype=torch.float32
    )
    state = {"weight": weight_in(format_name, tuple(layer.weight.shape))}
    if getattr(layer, "bias", None) is not None:
        state["bias"] = torch.linspace(-1, 1, layer.bias.numel()).view(layer.bias.shape)
    layer.load_state_dict(state)
    return layer


def output(layer, input):
    if input is None:
        return torch.cat([
            layer.expert_linear(torch.ones(2, layer.weight.shape[-1]), expert)
            for expert in range(2)
        ])
    return layer(input)


# one with scales apart
each_layer = pytest.mark.parametrize(("layer_class", "format_name"), [
    *((layer_class, "Q8_0") for layer_class in PACKED_LAYERS), (PACKED_LAYERS[0], "NF4")])


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
@each_layer
def test_a_layer_is_copied_and_pickled_as_the_hosts_are(layer_class, format_name, way):
    layer, input = layer_in(format_name, layer_class), INPUTS.get(layer_class.__name__)
    again = way(layer)
    assert is_packed(again.weight) and isinstance(again.weight, torch.nn.Parameter)
    assert again._workspace is layer._workspace and again.compute == layer.compute
    assert torch.equal(output(again, input), output(layer, input))
    assert again.state_dict().keys() == layer.state_dict().keys()
    assert (again.weight is layer.weight) == (way is copy.copy)
    assert (again.weight._qdata.data_ptr() == layer.weight._qdata.data_ptr()) == (way is copy.copy)


@pytest.mark.parametrize("format_name", ["Q8_0", "INT8"])
def test_a_model_is_pickled_with_its_weights_packed(format_name):
    patcher = patched(packed_flux(format_name), (lora_for(flux_file(format_name)[1]), 1.0))
    expected, model = run(patcher), patcher.model.diffusion_model
    file = pickle.dumps(model)
    # and with the factors of the LoRA
    assert len(file) < 1.2 * sum(tensor.nbytes for tensor in model.parameters())
    patcher.model.diffusion_model = pickle.loads(file)
    assert len(packed_layers(patcher)) and torch.equal(forward(patcher), expected)
    patcher.model.diffusion_model = model


@pytest.mark.parametrize("format_name", ["Q8_0", "NF4"])  # one with scales apart
def test_of_a_buffer_that_weights_share_a_pickle_holds_a_weights_own_bytes(format_name):
    layer = layer_in(format_name, PACKED_LAYERS[0])
    expected = output(layer, INPUTS.get(PACKED_LAYERS[0].__name__))
    tensors = packed_tensors(layer.weight)
    shared = [torch.cat([tensor.reshape(-1)] * 50)[:tensor.numel()].view(tensor.shape)
              for tensor in tensors]
    layer.weight = torch.nn.Parameter(packed_tensor(
        layer.weight.params.format, shared[0], layer.weight.shape, layer.weight.dtype,
        *shared[1:]), requires_grad=False)
    file = pickle.dumps(layer)
    nbytes = sum(tensor.nbytes for tensor in (*tensors, *layer.parameters()))
    assert len(file) < nbytes + 10_000 < 40 * sum(tensor.nbytes for tensor in tensors)
    assert torch.equal(output(pickle.loads(file), INPUTS.get(PACKED_LAYERS[0].__name__)), expected)


@each_layer
def test_a_layer_takes_its_own_state_dict(layer_class, format_name):
    layer = layer_in(format_name, layer_class)
    expected = output(layer, INPUTS.get(layer_class.__name__))
    block = torch.nn.Sequential(layer)
    # scales apart are no weights
    assert block.state_dict().keys() == dict(block.named_parameters()).keys()
    for options in ({}, {"assign": True}):
        block.load_state_dict(block.state_dict(), **options)
        assert is_packed(layer.weight)
        assert torch.equal(output(layer, INPUTS.get(layer_class.__name__)), expected)


def held_bytes(patcher) -> int:
    """Bytes of all tensors of a model, each once: codes, scales and the rest."""
    held = (*patcher.model.parameters(), *patcher.model.buffers())
    return sum(part.nbytes for tensor in held for part in parts(tensor))


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_scales_that_lie_apart_are_counted_as_memory_and_are_no_weights(format_name):
    patcher = packed_flux(format_name)
    assert patcher.model_size() == held_bytes(patcher)
    assert comfy.model_management.module_size(patcher.model) == held_bytes(patcher)
    for names in (patcher.model.state_dict(), patcher.model_state_dict()):
        last = [name.rpartition(".")[2] for name in names]
        assert not [name for name in last if "scale" in name and "weight" in name]


def test_what_the_host_pins_is_the_bytes(monkeypatch):
    pinned = collections.Counter()
    monkeypatch.setattr(comfy.model_management, "pin_memory",
                        lambda tensor: not pinned.update([tensor.data_ptr()]))
    monkeypatch.setattr(comfy.model_management, "unpin_memory",
                        lambda tensor: pinned.subtract([tensor.data_ptr()]))
    # on a CPU the host pins nothing
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 1 << 30)
    # other tests may need the memory that is to stay free
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 1 << 40)
    patcher = packed_flux("Q8_0")
    name, layer = next((name, layer) for name, layer in patcher.model.named_modules()
                       if layer in packed_layers(patcher))
    patcher.pin_weight_to_device(f"{name}.weight")
    assert pinned == {layer.weight._qdata.data_ptr(): 1} and patcher.pinned == {f"{name}.weight"}
    patcher.unpin_all_weights()
    assert not pinned.total() and not patcher.pinned
