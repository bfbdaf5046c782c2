"""torch.compile of packed Flux models: one graph, the same numbers, and weights that stay packed.

Attention is PyTorch's, as on a GPU. The one that the host takes on a CPU asks how much memory is
free and breaks the graph, with dense models too.
"""
import gc

from devtools.measure.weights import random_weight

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sample
import pytest
import torch
import torch._inductor.cpp_builder
from comfy_extras.nodes_torch_compile import TorchCompileModel
from pack_api import load_diffusion_model, packed_operations
from patched_models import (
    flux_file,
    flux_inputs,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
    relative,
    tiny_flux,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

HIDDEN, TOKENS, TEXT = 256, 16, 5


@pytest.fixture(autouse=True)
def attention_of_a_gpu(small_models, monkeypatch):
    attention = comfy.ldm.modules.attention.attention_pytorch
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(request, tmp_path):
    """(packed patcher, its dense values)"""
    if request.param != "NF4":
        return packed_flux(request.param), flux_file(request.param)[1]
    pytest.importorskip("bitsandbytes", reason="it writes the file")
    from devtools.files.bnb_files import write_bnb

    path = str(tmp_path / "flux.safetensors")
    values = write_bnb(path, tiny_flux())
    return load_diffusion_model(path), values


def parts_of(patcher) -> dict:
    """Name -> (module, its inputs): a block of each kind, and the whole model."""
    model, generator = patcher.model.diffusion_model, torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    positions = torch.arange(TEXT + TOKENS)[None, :, None].expand(-1, -1, 3).float()
    rotations, vector = model.pe_embedder(positions), random(1, HIDDEN)
    return {
        "double": (
            model.double_blocks[0],
            (random(1, TOKENS, HIDDEN), random(1, TEXT, HIDDEN), vector, rotations),
        ),
        "single": (model.single_blocks[0], (random(1, TEXT + TOKENS, HIDDEN), vector, rotations)),
        "model": (model, (random(1, 16, 8, 8), torch.tensor([0.5]), random(1, TEXT, 256))),
    }


def outputs(part, inputs) -> list[torch.Tensor]:
    """What a module gives. Its inputs are copied, since blocks write into them."""
    with torch.inference_mode():
        found = part(*(tensor.clone() for tensor in inputs))
    return list(found) if isinstance(found, tuple) else [found]


USUAL = {("Q4_K", None), ("NF4", None), ("Q4_K", "lora"), ("NF4", "dora")}


@pytest.mark.parametrize(("model", "kind"), [
    pytest.param(name, kind, marks=() if (name, kind) in USUAL else pytest.mark.heavy)
    for name in ("Q8_0", "Q4_K", "NF4") for kind in (None, "lora", "dora")], indirect=["model"])
def test_blocks_and_the_model_are_one_graph_with_equal_numbers(model, kind):
    patcher, values = model
    if kind:
        patcher = patched(patcher, (lora_for(values, kind), 1.0))
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
    parts = parts_of(patcher)
    # the sampler below runs the model with LoRAs
    for name in ("double", "single") if kind else ("model",):
        part, inputs = parts[name]
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(part, fullgraph=True, backend=backend)
        assert all(map(torch.equal, outputs(compiled, inputs), outputs(part, inputs)))
        assert backend.frame_count == 1


def test_layers_of_a_layout_and_a_shape_are_compiled_once():
    """As dense layers of a shape are: torch holds the sizes of a module's tensors constant."""
    shapes = {"Q4_K": [(64, 512)] * 3, "F8_E4M3": [(64, 512), (64, 768)] * 3,
              "SDNQ_UINT4": [(64, 512)] * 3, "Q6_K": [(64, 512)]}
    backend = CompileCounterWithBackend("eager")
    for name, sizes in shapes.items():
        for rows, columns in sizes:
            layer = packed_operations().Linear(columns, rows, bias=False)
            layer.load_state_dict({"weight": random_weight(name, (rows, columns))})
            compiled = torch.compile(layer, fullgraph=True, backend=backend)
            with torch.inference_mode():
                input = torch.randn(3, columns)
                assert torch.equal(compiled(input), layer(input))
    assert backend.frame_count == sum(len(set(sizes)) for sizes in shapes.values())


def sample(patcher) -> torch.Tensor:
    """Two steps, as the host's sampler runs them: wrappers of the model, such as a compiled one,
    are in place."""
    inputs = flux_inputs()
    conditioning = [[inputs["c_crossattn"], {}]]
    with torch.inference_mode():
        return comfy.sample.sample(patcher, inputs["x"], 2, 1.0, "euler",
                                   "simple", conditioning, conditioning,
                                   torch.zeros_like(inputs["x"]), seed=1, disable_pbar=True)


def tensor_bytes() -> int:
    """Bytes of all plain tensors that live, each memory once."""
    gc.collect()
    plain = (found for found in gc.get_objects()
             if type(found) in (torch.Tensor, torch.nn.Parameter))
    return sum({
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in plain
    }.values())


def smallest_weight(patcher) -> int:
    """Bytes of the smallest packed weight dequantised: more memory would be held if one were a
    constant of a graph."""
    return min(4 * layer.weight.numel() for layer in packed_layers(patcher))


def has_compiler() -> bool:
    try:
        return bool(torch._inductor.cpp_builder.get_cpp_compiler())
    except torch._inductor.exc.InvalidCxxCompiler:
        return False


@pytest.mark.parametrize("name", [pytest.param("double", marks=pytest.mark.heavy), "single"])
@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler")
def test_a_block_with_a_lora_by_inductor(name):
    patcher = patched(packed_flux("Q4_K"), (lora_for(flux_file("Q4_K")[1]), 1.0))
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
    part, inputs = parts_of(patcher)[name]
    expected, held = outputs(part, inputs), tensor_bytes()
    compiled = torch.compile(part, fullgraph=True)
    assert all(map(lambda a, b: relative(a, b) < 1e-5, outputs(compiled, inputs), expected))
    assert tensor_bytes() - held < smallest_weight(patcher)


def test_the_hosts_compile_node_with_loras_that_change_and_a_model_unloaded_between():
    with torch.inference_mode():
        plain = packed_flux("Q4_K")
        compiled = TorchCompileModel.execute(plain, "aot_eager")[0]
    values = flux_file("Q4_K")[1]
    first, second = lora_for(values, seed=1), lora_for(values, seed=2)
    stacks = {
        "none": (), "one": ((first, 1.0),), "weaker": ((first, 0.3),),
        "two": ((first, 0.3), (second, 0.6))
    }
    expected = {name: sample(patched(plain, *stack)) for name, stack in stacks.items()}
    held, layers = tensor_bytes(), packed_layers(plain)
    pointers = [layer.weight._qdata.data_ptr() for layer in layers]
    graphs = []
    for name in ("none", "one", "weaker", "two", "none", "unload", "none", "weaker"):
        if name == "unload":
            comfy.model_management.unload_all_models()
            continue
        assert relative(sample(patched(compiled, *stacks[name])), expected[name]) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 3, 3, 3, 3]  # a strength, and going back, compiles nothing
    assert not counters["graph_break"]
    assert packed_layers(plain) == layers
    assert [layer.weight._qdata.data_ptr() for layer in layers] == pointers
    assert tensor_bytes() - held < smallest_weight(plain)
