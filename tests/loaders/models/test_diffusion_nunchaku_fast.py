"""Models of Nunchaku's files, multiplied in 4 bits as Nunchaku does, by comfy_kitchen's reference.

What is expected comes from comfy_kitchen's own layers, with the tensors in the order in which the
converter had them before it brought them into tiles.
"""
import dataclasses
import types

import comfy.model_management
import nunchaku_writer as writer
import pytest
import torch
from comfy_kitchen.constraints import FunctionConstraints
from comfy_kitchen.registry import BackendRegistry, registry
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from families import FAMILIES, relative_error
from families import run as run_family
from nunchaku_models import dense_of, load, quantized, table_of
from patched_models import lora_for, patched

from featherweight.loaders.comfyui.contents import file_contents, model_contents
from featherweight.loaders.comfyui.model_summary import arithmetic_text
from featherweight.loaders.inspect.identify import identify
from featherweight.loaders.inspect.inspection_text import inspection_text
from featherweight.ops.layers import fast_by_kitchen, fast_on_cpu

pytestmark = pytest.mark.usefixtures("small_models")

LAYOUT = "TensorCoreSVDQuantW4A4Layout"
# A few codes of inputs are rounded to the other side where floats differ in their last bit.
LIMIT = 0.01


@pytest.fixture(params=writer.WRITERS)
def name(request, monkeypatch):
    """A family of small models, in 4 bits from the first token on."""
    monkeypatch.setattr(fast_by_kitchen, "BACKENDS", ("eager",))
    products = fast_by_kitchen.PRODUCTS
    for key in ("svdquant", "nvfp4"):
        monkeypatch.setitem(products, key, dataclasses.replace(products[key], least=1))
    return request.param


def layer_of_kitchen(layer, is_shifted):
    """What comfy_kitchen makes of a layer, in float32, a function of its input."""
    plain = {name: part.float() for name, part in layer.plain.items()}
    codes = layer.plain["codes"].to(torch.uint8) & 15
    params = get_layout_class(LAYOUT).Params(
        scale=plain["scales"].t().contiguous(), orig_dtype=torch.float32,
        orig_shape=tuple(layer.weight.shape), proj_down=plain["down"].t().contiguous(),
        proj_up=plain["up"], smooth_factor=plain["divisors"], act_unsigned=is_shifted)
    weight = QuantizedTensor((codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8), LAYOUT, params)
    return lambda input: torch.nn.functional.linear(input, weight, plain.get("bias"))


def places_of(name, source):
    """(the host's layer, its rows, its columns) of a layer in diffusers' names."""
    hidden = FAMILIES[name].config.get("hidden_size", 0)
    whole = slice(None)
    if source.endswith((".attn.to_out", ".mlp_fc2")) and source.startswith("single_"):
        columns = slice(0, hidden) if source.endswith("to_out") else slice(hidden, None)
        block = source.partition(".attn" if source.endswith("to_out") else ".mlp")[0]
        return table_of(name)[f"{block}.proj_out.weight"].removesuffix(".weight"), whole, columns
    target = table_of(name)[f"{source}.weight"]
    if isinstance(target, str):
        return target.removesuffix(".weight"), whole, whole
    (_, start, length), host = target[1], target[0]
    return host.removesuffix(".weight"), slice(start, start + length), whole


def in_4_bits(name, model):
    """The host's own model, whose quantised layers comfy_kitchen computes."""
    dense, _ = dense_of(name, model.values)
    pieces = {}
    for layer, sources, rows_by, columns_by, is_shifted in model.layers:
        compute, first = layer_of_kitchen(layer, is_shifted), 0
        for source in sources:
            host, rows, columns = places_of(name, source)
            # the layers of a writer that were popped as one have rows alike
            count = len(layer.weight) // len(sources)
            part = slice(first, first + count)
            first += count
            pieces.setdefault(host, []).append((rows, columns, part, compute, rows_by, columns_by))
    for host, parts in pieces.items():
        module = dense.model.diffusion_model.get_submodule(host)
        rows = module.weight.shape[0]

        def forward(input, parts=parts, rows=rows):
            out = input.new_zeros(*input.shape[:-1], rows)
            for target, columns, part, compute, rows_by, columns_by in parts:
                values = compute(input[..., columns] / columns_by) * rows_by
                out[..., target] += values[..., part]
            return out

        module.forward = forward
    return dense, pieces


def test_a_model_is_what_comfy_kitchens_layers_compute(name, tmp_path):
    model, family = quantized(name, "int4"), FAMILIES[name]
    path = str(tmp_path / "model.safetensors")
    writer.write(path, model)
    expected, pieces = in_4_bits(name, model)
    fast, exact = load(name, path, compute="int8"), load(name, path)
    out = run_family(fast, family)
    of_kitchen = run_family(expected, family)
    assert len(pieces) >= 5
    assert relative_error(out, of_kitchen) < LIMIT
    difference = relative_error(out, run_family(exact, family))
    assert 3 * LIMIT < difference < 0.5


def test_a_lora_joins_the_low_rank(name, tmp_path):
    model, family = quantized(name, "int4"), FAMILIES[name]
    path = str(tmp_path / "model.safetensors")
    writer.write(path, model)
    expected, pieces = in_4_bits(name, model)
    _, weights = dense_of(name, model.values)
    lora = lora_for({f"{host}.weight": weights[f"{host}.weight"] for host in pieces}, size=0.1)
    network = expected.model.diffusion_model
    for host in pieces:  # in float, next to comfy_kitchen's product
        stem, = {key.rpartition(".lora_")[0] for key in lora
                 if f"{host.replace('.', '_')}.lora_" in key}
        up, down = lora[f"{stem}.lora_up.weight"], lora[f"{stem}.lora_down.weight"]
        scale = 0.8 * float(lora.get(f"{stem}.alpha", len(down))) / len(down)
        module = network.get_submodule(host)

        def forward(input, base=module.forward, up=up, down=down, scale=scale):
            return base(input) + input @ down.t() @ up.t() * scale

        module.forward = forward
    fast = load(name, path, compute="int8")
    with_lora, of_kitchen = run_family(patched(fast, (lora, 0.8)), family), run_family(
        expected, family)
    without = run_family(fast, family)
    assert relative_error(with_lora, of_kitchen) < LIMIT
    assert relative_error(with_lora, without) > 3 * LIMIT


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_the_loader_and_inspect_say_what_multiplies_and_why_not(precision, tmp_path, monkeypatch):
    name, path = "flux-dev", str(tmp_path / "model.safetensors")
    writer.write(path, quantized(name, precision))
    exact, fast = load(name, path), load(name, path, compute="int8")
    exactly = arithmetic_text(exact)
    assert exactly.startswith("computes exactly in ")
    the_rest = f"the rest {exactly.removeprefix('computes ')}"
    for has_units, text in ((True, f"int8 by this pack (fast), {the_rest}"),
                            (False, f"{exactly}, since cpu has no int8 units that this pack uses")):
        monkeypatch.setattr(fast_on_cpu, "multiplies_integers", lambda device, has=has_units: has)
        assert arithmetic_text(fast) == text
    assert not identify(file_contents(path)).kernels
    own, gpu = BackendRegistry(), torch.device("cuda:0")
    monkeypatch.setattr(fast_by_kitchen, "registry", own)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: gpu)
    for patcher in (exact, fast):
        patcher.load_device = gpu
        patcher.model.manual_cast_dtype = torch.bfloat16
    own.mark_unavailable("cuda", "no library")
    reason = ("exact, since comfy_kitchen's CUDA kernels are off: no library; a newer comfy-kitchen"
              " may have them (pip install -U comfy-kitchen)")
    exactly = "computes exactly in bfloat16"
    assert arithmetic_text(exact) == exactly
    assert arithmetic_text(fast) == f"{exactly}, {reason.removeprefix('exact, ')}"
    assert identify(file_contents(path)).kernels == reason
    assert f"kernels: {reason}" in inspection_text(identify(file_contents(path)))
    functions = {function for one in fast_by_kitchen.PRODUCTS.values()
                 for function in one.functions}
    module = types.SimpleNamespace(quantize_nvfp4=registry.get_implementation(
        "quantize_nvfp4", backend="eager"))
    own.register("cuda", module, dict.fromkeys(functions, FunctionConstraints()))
    assert arithmetic_text(exact) == exactly and not identify(file_contents(path)).kernels
    assert arithmetic_text(fast) == (
        "SVDQuant + AWQ by ComfyUI's kernels (fast), the rest exactly in bfloat16")
    assert model_contents(fast).kernels.endswith(arithmetic_text(fast))
    own.disable("cuda")
    assert "ComfyUI has turned them off" in arithmetic_text(fast)
