"""The experts of a mixture in one packed weight: each computes what the host's dense expert
computes."""
import contextlib

import comfy.lora
import comfy.ops
import gguf
import numpy as np
import pytest
import torch
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter
from families import relative_error
from host_patches import patched_by_host
from pack_api import FORMATS, packed_operations, packed_tensor
from patched_layers import with_patches

from devtools.files.gguf_files import pack

SHAPE = EXPERTS, ROWS, COLUMNS = 5, 48, 512


def banks(format_name, bias=True):
    """A packed layer of ours, and the host's with the dense values by gguf's reference."""
    data = pack(np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32), format_name)
    dense = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[format_name]))
    biases = {"bias": torch.linspace(-1, 1, EXPERTS * ROWS).view(EXPERTS, ROWS)} if bias else {}
    ours = packed_operations().MoEExperts(EXPERTS, COLUMNS, ROWS, bias=bias, dtype=torch.float32)
    hosts = comfy.ops.mixed_precision_ops({}, torch.float32).MoEExperts(
        EXPERTS, COLUMNS, ROWS, bias=bias
    )
    ours.load_state_dict(
        {"weight": packed_tensor(FORMATS[format_name], torch.from_numpy(data), SHAPE), **biases})
    hosts.load_state_dict({"weight": dense, **biases})
    return ours, hosts


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format_name", ["MXFP4", "Q8_0", "Q4_K"])
def test_each_expert_agrees_with_the_hosts(format_name, bias):
    ours, hosts = banks(format_name, bias)
    input = torch.randn(3, COLUMNS)
    with ours.bank_resident(input) as bank:
        for expert in range(EXPERTS):
            expected = hosts.expert_linear(input, expert)
            assert relative_error(bank.expert_linear(input, expert), expected) < 1e-6
    assert relative_error(ours.expert_linear(input, EXPERTS - 1), expected) < 1e-6


def patches_of(kind: str, seed: int = 0) -> list:
    """One LoRA of the host's for the bank, whose rows are its experts."""
    generator = torch.Generator().manual_seed(seed)
    factors = {"up": (EXPERTS, 3), "down": (3, ROWS * COLUMNS), "whole": SHAPE}
    up, down, whole = (torch.randn(shape, generator=generator) / 8 for shape in factors.values())
    value = {
        "lora": LoRAAdapter(set(), (up, down, 1.5, None, None, None)),
        "loha": LoHaAdapter(set(), (up, down, None, up + 1, down - 1, None, None, None)),
        "dora": LoRAAdapter(set(), (
            up, down, 1.5, None, whole.flatten(1).norm(dim=1)[:, None, None], None)),
        "diff": ("diff", (whole,)), "set": ("set", (whole,))
    }[kind]
    return [(0.7, value, 1.0, None, None)]


@pytest.fixture
def dequantized(monkeypatch):
    """Numbers of blocks of MXFP4 that are dequantised meanwhile."""
    counts, terms = [], FORMATS["MXFP4"].terms
    monkeypatch.setattr(FORMATS["MXFP4"], "terms",
                        lambda blocks: counts.append(len(blocks)) or terms(blocks))
    return counts


@pytest.mark.parametrize(("kinds", "is_resident"), [
    *((kinds, is_resident) for kinds in ((), ("lora",), ("loha",), ("diff", "lora"), ("set",))
      for is_resident in (True, False)), (("dora",), True)], ids=str)
def test_only_the_experts_asked_for_are_dequantized(kinds, is_resident, dequantized):
    """But for a patch that needs the whole bank, once while it is resident."""
    whole = kinds == ("dora",)
    ours, hosts = banks("MXFP4")
    patches = [patch for seed, kind in enumerate(kinds) for patch in patches_of(kind, seed)]
    with_patches(ours, patches)
    hosts.weight.data = patched_by_host(patches, hosts.weight.data)
    input = torch.randn(3, COLUMNS)
    with ours.bank_resident(input) if is_resident else contextlib.nullcontext(ours) as bank:
        for count, expert in enumerate(range(EXPERTS) if whole else (1, 4, 2), 1):
            expected = hosts.expert_linear(input, expert)
            assert relative_error(bank.expert_linear(input, expert), expected) < 1e-6
            assert sum(dequantized) * 32 == (EXPERTS if whole else count) * ROWS * COLUMNS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_experts_take_patches_and_compute_in_the_inputs_dtype(dtype):
    ours = packed_operations().MoEExperts(EXPERTS, COLUMNS, ROWS, bias=False, dtype=torch.float32)
    weight, input = torch.randn(SHAPE), torch.randn(3, COLUMNS, dtype=dtype)
    ours.load_state_dict({"weight": weight})
    expected = torch.nn.functional.linear(input, weight[3].to(dtype))
    assert torch.equal(ours.expert_linear(input, 3), expected)
    if dtype == torch.float32:
        patches = patches_of("lora")
        patched = patched_by_host(patches, weight)
        out = with_patches(ours, patches).expert_linear(input, 3)
        assert relative_error(out, input @ patched[3].t()) < 1e-6
        assert torch.equal(ours.weight, weight)
