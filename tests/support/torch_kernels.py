"""Kernels that are right and run plain torch, and a device that has them without a check."""
import torch
from user_kernels import forget_decisions

from featherweight.ops import kernels
from featherweight.ops.kernels import decider, registry
from featherweight.ops.kernels.int8_codes import encode_rows, encode_tokens
from featherweight.ops.kernels.kernel_source import DEQUANTIZED, MULTIPLIED, PLAIN
from featherweight.ops.stochastic_rounding import stochastic_round


def dequantize(packed_format, tensors, out, first):
    out.copy_(packed_format.dequantize_into(tensors, out.new_empty(out.shape), first))


def multiply(packed_format, tensors, input, addend, out):
    weight = packed_format.dequantize_into(tensors, input.new_empty(out.shape[1], input.shape[1]))
    out.copy_(input @ weight.t() + (0 if addend is None else addend))


def transpose(values, out):
    out.copy_(values.transpose(1, 2))


def attention(query, key, value, mask, scale, out):
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    scores = scale * query @ key.transpose(2, 3) + (0 if mask is None else mask)
    out.copy_(scores.softmax(-1).nan_to_num().to(value.dtype) @ value)


def add_rounded(value, change):
    value.copy_(stochastic_round(value.float() + change, value.dtype))


RIGHT = {
    "dequantize": dequantize, "linear": multiply, "int8_rows": encode_rows,
    "int8_tokens": encode_tokens, "channels_last": transpose, "attention": attention,
    "add_rounded": add_rounded
}
FORMATS_OF = {"dequantize": DEQUANTIZED, "linear": MULTIPLIED | PLAIN, "int8_rows": MULTIPLIED}


def unchecked_kernels(monkeypatch, device_type: str = "cpu"):
    """Gives a type of devices all kernels for all formats and dtypes, right without a check."""
    all_dtypes = frozenset([torch.float32, torch.float16, torch.bfloat16, torch.int8])
    found = tuple(kernels.Kernel(capability, frozenset(FORMATS_OF.get(capability, ())), all_dtypes,
                                 run, takes_pitch=True) for capability, run in RIGHT.items())
    forget_decisions(monkeypatch)
    monkeypatch.setitem(kernels.BACKENDS, device_type, "unchecked")
    monkeypatch.setenv(kernels.VARIABLE, "unchecked")  # by its name: in this process
    monkeypatch.setitem(registry.IMPORTS, "unchecked", lambda: kernels.Backend(
        "unchecked", lambda device: None, found))

    def take_all(device, asked, take, bar):
        for name in asked:
            take(name, "right")
        return {}

    monkeypatch.setattr(decider, "check_here", take_all)
    monkeypatch.setattr(decider, "ready_here", lambda device, found, take: {})
