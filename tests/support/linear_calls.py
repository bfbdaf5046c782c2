"""The shapes that calls of linear layers have in later ComfyUIs, put on the one under test.

| shape  | whose it is                                                                      |
|--------|----------------------------------------------------------------------------------|
| stock  | that of the ComfyUI under test                                                   |
| 0.33   | `comfy.ops.linear_input_act` reads an int8 weight past `forward`                 |
| kwargs | 0.40's, reconstructed from what other packs say of it: `forward` hands the       |
|        | arguments of a fused call on to `forward_comfy_cast_weights` in every call, and  |
|        | the weight of a norm is the norm itself                                          |
| helper | October's: the helper calls `forward` where a layer has `comfy_force_forward`    |

`pytest --linear-calls kwargs` runs any test on a shape.
"""
import contextlib
import inspect
from unittest import mock

import comfy.ops
import torch

from featherweight.ops.layers import fused_calls

SHAPES = ("stock", "0.33", "kwargs", "helper")
FUSED = fused_calls.POSITIONAL
HELPER = "linear_input_act"


def _swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


ACTIVATIONS = {
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "swiglu": _swiglu,
}


def activate(x, input_act, act_weight=None, act_eps=0.0):
    """What the host's `_eager_input_act` does, by the name that it has there from 0.36 on."""
    if input_act is None:
        return x
    if input_act != "rms_norm":
        return ACTIVATIONS[input_act](x)
    if isinstance(act_weight, torch.nn.Module):
        return act_weight(x)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], act_weight, act_eps)


def add_residual(out, residual, residual_scale):
    return out if residual is None else torch.addcmul(residual, out, residual_scale)


def reading_helper(forces: bool):
    """A helper that computes layers in int8 itself. forces: not those with
    `comfy_force_forward`."""
    def linear_input_act(linear, x, input_act, act_weight=None, act_eps=0.0, residual=None,
                         residual_scale=None):
        input, weight = activate(x, input_act, act_weight, act_eps), linear.weight
        is_read = (isinstance(weight, comfy.ops.QuantizedTensor)
                   and weight._layout_cls == "TensorWiseINT8Layout")
        if not is_read or (forces and getattr(linear, "comfy_force_forward", False)):
            return add_residual(linear(input), residual, residual_scale)
        dense, bias = weight.dequantize().to(x.dtype), linear.bias
        bias = None if bias is None else bias.to(x.dtype)
        out = torch.nn.functional.linear(input, dense, bias)
        return add_residual(out, residual, residual_scale)

    return linear_input_act


def _handing_on(forward_cast):
    """The plain layer's `forward_comfy_cast_weights` with a fused call's arguments."""
    def cast(self, input, input_act=None, act_weight=None, residual=None, residual_scale=None):
        out = forward_cast(self, activate(input, input_act, act_weight))
        return add_residual(out, residual, residual_scale)

    return cast


def _fused_forward(self, input, input_act=None, act_weight=None, residual=None,
                   residual_scale=None):
    comfy.ops.run_every_op()
    return self.forward_comfy_cast_weights(input, input_act=input_act, act_weight=act_weight,
                                           residual=residual, residual_scale=residual_scale)


def _fused_mixed(mixed_precision_ops):
    """`mixed_precision_ops` whose Linear takes a fused call."""
    def make(*args, **kwargs):
        operations = mixed_precision_ops(*args, **kwargs)
        plain = operations.Linear.forward

        def forward(self, input, input_act=None, act_weight=None, residual=None,
                    residual_scale=None):
            out = plain(self, activate(input, input_act, act_weight))
            return add_residual(out, residual, residual_scale)

        operations.Linear.forward = forward
        return operations

    return make


@contextlib.contextmanager
def linear_calls(shape: str):
    """Gives the host a shape inside the block."""
    ops = comfy.ops
    with contextlib.ExitStack() as stack:

        def put(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        if hasattr(ops, HELPER):  # which ours may replace
            put(ops, HELPER, getattr(ops, HELPER))
        if shape in ("0.33", "helper"):
            put(ops, "INPUT_ACT_EAGER", ACTIVATIONS)
            put(ops, "_eager_input_act", activate)
            put(ops, HELPER, reading_helper(forces=shape == "helper"))
            if shape == "helper":
                put(ops.CastWeightBiasOp, "comfy_force_forward", False)
            elif hasattr(ops.CastWeightBiasOp, "comfy_force_forward"):
                stack.callback(setattr, ops.CastWeightBiasOp, "comfy_force_forward", False)
                del ops.CastWeightBiasOp.comfy_force_forward
        elif shape == "kwargs":
            put(ops, "INPUT_ACT_EAGER", ACTIVATIONS)
            put(ops, "_eager_input_act", lambda x, act, weight=None: activate(x, act, weight))
            linear = ops.disable_weight_init.Linear
            if not set(FUSED) <= inspect.signature(linear.forward).parameters.keys():
                put(linear, "forward_comfy_cast_weights",
                    _handing_on(linear.forward_comfy_cast_weights))
                put(linear, "forward", _fused_forward)
                put(ops, "mixed_precision_ops", _fused_mixed(ops.mixed_precision_ops))
        fused_calls.keep_forward.cache_clear()
        stack.callback(fused_calls.keep_forward.cache_clear)
        yield
