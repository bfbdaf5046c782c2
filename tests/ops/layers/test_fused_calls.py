"""Fused calls of linear layers, in every shape that ComfyUI has given them: an activation before
the product, a residual after it, and nothing past a LoRA."""
import inspect
import itertools
import pickle

import comfy.lora
import comfy.ops
import pytest
import torch
from host_formats import HOST_FORMATS
from host_patches import patched_by_host
from linear_calls import ACTIVATIONS, FUSED, HELPER, SHAPES, activate, linear_calls
from pack_api import packed_operations
from patched_layers import COLUMNS, ROWS, layer_and_twin, patches_for, with_patches

from featherweight.ops import host_versions
from featherweight.ops.layers.fused_calls import UnknownArgumentError
from featherweight.ops.layers.packed_layers import make_packed

# kind of layer -> the format of its weight: of this pack, of the host, or none
KINDS = {
    "packed": "Q8_0", "blocks cross rows": "Q4_0", "float32": None, "16 bits": None,
    "made packed": None, "int8": "int8_tensorwise", "convrot": "convrot_w4a4",
    "fp8": "float8_e4m3fn", "mxfp8": "mxfp8"
}
BY_HOST = ("int8", "convrot")  # kinds whose product the host computes on a CPU too
each_kind = pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.heavy
                 if kind in ("blocks cross rows", "16 bits", "convrot", "mxfp8") else ())
    for kind in KINDS])
ACTS = (None, "gelu_tanh", "swiglu", "rms_norm")
PATCHES = (None, "lora", "diff and lora")


@pytest.fixture(params=SHAPES)
def shape(request):
    with linear_calls(request.param):
        yield request.param


pytestmark = pytest.mark.usefixtures("fixed_seed")


def dense_layer(kind: str, patches: str | None):
    """(a layer that this pack gives a plain weight, the function that it stands for)"""
    weight, bias = torch.randn(ROWS, COLUMNS) / 8, torch.linspace(-1, 1, ROWS)
    if kind == "made packed":
        layer = comfy.ops.manual_cast.Linear(COLUMNS, ROWS, dtype=torch.float32)
        make_packed(layer)
    else:
        layer = packed_operations().Linear(COLUMNS, ROWS, dtype=torch.float32)
    weight = weight.bfloat16() if kind == "16 bits" else weight
    layer.load_state_dict({"weight": weight, "bias": bias})
    weight = weight.float()
    if patches is not None:
        with_patches(layer, given := patches_for(patches, weight))
        weight = patched_by_host(given, weight)
    return layer, lambda input: torch.nn.functional.linear(input, weight, bias)


def layer_of_kind(kind: str, patches: str | None):
    """(a layer, what it computes without a fused call)"""
    if KINDS[kind] is None:
        return dense_layer(kind, patches)
    torch.manual_seed(0)
    layer, twin = layer_and_twin("Linear", KINDS[kind], patches, torch.float32)
    if KINDS[kind] in HOST_FORMATS and patches != "diff and lora":
        torch.manual_seed(0)  # another of the same: the host's product quantises the input
        twin, _ = layer_and_twin("Linear", KINDS[kind], patches, torch.float32)
    return layer, twin


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, COLUMNS), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, 1e-3)


def arguments(shape: str, act: str | None, residual: bool):
    """(input, the arguments of a fused call of a shape, the activated input)"""
    input = torch.randn(2, 3, COLUMNS * (2 if act == "swiglu" else 1))
    given = {}
    if act is not None:
        given["input_act"] = act
    if act == "rms_norm" and shape == "kwargs":
        given["act_weight"] = Norm()
    elif act == "rms_norm":
        given |= {"act_weight": torch.linspace(0.5, 1.5, COLUMNS), "act_eps": 1e-3}
    if residual:
        given |= {"residual": torch.randn(2, 3, ROWS), "residual_scale": torch.randn(ROWS)}
    weight = given.get("act_weight")
    return input, given, activate(input, act, weight, given.get("act_eps", 0.0))


def acts() -> tuple:
    """The activations that the host's calls may name."""
    known = getattr(comfy.ops, "INPUT_ACT_EAGER", {})
    return tuple(act for act in ACTS if act is None or act in known
                 or (act == "rms_norm" and hasattr(comfy.ops, "_eager_input_act")))


def expected_of(twin, given: dict, activated: torch.Tensor) -> torch.Tensor:
    out = twin(activated)
    if "residual" in given:
        return given["residual"] + given["residual_scale"] * out
    return out


@pytest.mark.parametrize("patches", PATCHES)
@each_kind
def test_a_fused_call_is_the_calls_apart(shape, kind, patches):
    layer, twin = layer_of_kind(kind, patches)
    for act, residual in itertools.product(acts(), (False, True)):
        input, given, activated = arguments(shape, act, residual)
        with torch.no_grad():
            out, expected = layer(input, **given), expected_of(twin, given, activated)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("patches", PATCHES)
@each_kind
def test_the_hosts_helper_loses_no_patch(shape, kind, patches):
    layer, twin = layer_of_kind(kind, patches)
    helper = getattr(comfy.ops, HELPER, None)
    if helper is None:
        pytest.skip("this shape has no helper")
    takes_all = "residual" in inspect.signature(helper).parameters
    for act, residual in itertools.product(acts() if takes_all else ("gelu_tanh", "swiglu"),
                                           (False, True) if takes_all else (False,)):
        input, given, activated = arguments(shape, act, residual)
        with torch.no_grad():
            out = helper(layer, input, given.pop("input_act", None), **given)
            expected = expected_of(twin, given, activated)
        if kind in BY_HOST and patches is None:
            # the helper's own product, in which the host may quantise the input
            assert (out - expected).norm() < 0.02 * expected.norm()
        else:
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("act", ACTS)
def test_a_call_that_gives_the_arguments_by_position(act):
    with linear_calls("kwargs"):
        layer, twin = layer_of_kind("packed", "lora")
        input, given, activated = arguments("kwargs", act, True)
        with torch.no_grad():
            out = layer(input, *(given.get(name) for name in FUSED))
    torch.testing.assert_close(out, expected_of(twin, given, activated), rtol=1e-5, atol=2e-5)


def test_a_residual_without_a_scale_is_added():
    layer, twin = layer_of_kind("packed", None)
    input, residual = torch.randn(3, COLUMNS), torch.randn(3, ROWS)
    with torch.no_grad():
        torch.testing.assert_close(layer(input, residual=residual), residual + twin(input),
                                   rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_product_that_is_the_hosts_may_be_read_past_forward(kind):
    layer, _ = layer_of_kind(kind, None)
    assert layer.comfy_force_forward == (kind not in BY_HOST)
    layer, _ = layer_of_kind(kind, "lora")
    assert layer.comfy_force_forward


def test_the_hosts_bypass_may_force_and_release_a_layer():
    layer, _ = layer_of_kind("int8", None)
    layer.comfy_force_forward = True
    assert layer.comfy_force_forward and pickle.loads(pickle.dumps(layer)).comfy_force_forward
    del layer.comfy_force_forward
    assert not layer.comfy_force_forward


# --- what is not known ---

def layers_of_all_kinds():
    """name -> what calls a layer with arguments"""
    operations, ids = packed_operations(), torch.tensor([1])
    made = {
        "linear": (operations.Linear(32, 8, dtype=torch.float32), torch.randn(2, 32)),
        "embedding": (operations.Embedding(4, 32, dtype=torch.float32), ids),
        "conv2d": (operations.Conv2d(3, 2, 3, dtype=torch.float32), torch.randn(1, 3, 5, 5)),
        "conv3d": (operations.Conv3d(3, 2, 3, dtype=torch.float32), torch.randn(1, 3, 5, 5, 5)),
    }
    for layer, _ in made.values():
        layer.load_state_dict({name: torch.ones(param.shape) for name, param in
                               layer.named_parameters()})
    experts = operations.MoEExperts(2, 32, 8, dtype=torch.float32)
    experts.load_state_dict({"weight": torch.ones(2, 8, 32), "bias": torch.ones(2, 8)})
    calls = {name: lambda layer=layer, input=input, **given: layer(input, **given)
             for name, (layer, input) in made.items()}
    return calls | {
        "experts": lambda **given: experts.expert_linear(torch.randn(2, 32), 1, **given)
    }


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "conv3d", "experts"])
def test_an_unknown_argument_that_carries_something_is_a_sentence(name):
    call = layers_of_all_kinds()[name]
    with torch.no_grad():
        assert torch.equal(call(output_gate=None, is_decode=False).isfinite(), call().isfinite())
        with pytest.raises(UnknownArgumentError) as told:
            call(output_gate=torch.ones(1))
    words = ("'output_gate'", f"ComfyUI {host_versions.HOST_VERSION}",
             f"Featherweight {host_versions.VERSION}", host_versions.NEWEST_HOST,
             host_versions.UPDATES)
    assert all(word in str(told.value) for word in words)


def test_an_unknown_activation_is_a_sentence(shape):
    layer, _ = layer_of_kind("packed", None)
    with pytest.raises(UnknownArgumentError, match="the activation 'snake'"):
        layer(torch.randn(2, COLUMNS), input_act="snake")


def test_more_arguments_by_position_than_known_are_a_sentence():
    layer, _ = layer_of_kind("packed", None)
    with pytest.raises(UnknownArgumentError, match="5 further arguments"):
        layer(torch.randn(2, COLUMNS), None, None, None, None, None)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_fused_call_compiles_as_one_graph(act):
    with linear_calls("kwargs"):
        layer, _ = layer_of_kind("packed", "lora")
        input, given, _ = arguments("kwargs", act, True)
        compiled = torch.compile(lambda x, given: layer(x, **given), backend="aot_eager",
                                 fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(input, given), layer(input, **given))
            plain = compiled(input[..., :COLUMNS], dict.fromkeys(FUSED))
            assert plain.shape == (2, 3, ROWS)
