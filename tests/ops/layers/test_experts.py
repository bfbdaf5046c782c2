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

from devtools.files.gguf_files import pack
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.patches.layer_patches import build_patches
from featherweight.ops.tensor.packed_layout import packed_tensor

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
        "dora": LoRAAdapter(set(),
                            (up, down, 1.5, None, whole.flatten(1).norm(dim=1)[:, None, None],
                             None)),
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


@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize(
    "kinds", [(), ("lora",), ("loha",), ("diff", "lora"), ("set",)], ids="-".join
)
def test_only_the_experts_asked_for_are_dequantized(kinds, is_resident, dequantized):
    ours, hosts = banks("MXFP4")
    patches = [patch for seed, kind in enumerate(kinds) for patch in patches_of(kind, seed)]
    ours.lora = build_patches("w", patches, torch.Size(SHAPE), torch.device("cpu"), torch.float32,
                              ours.has_branch)
    hosts.weight.data = patched_by_host(patches, hosts.weight.data)
    input = torch.randn(3, COLUMNS)
    with ours.bank_resident(input) if is_resident else contextlib.nullcontext(ours) as bank:
        for count, expert in enumerate((1, 4, 2), 1):
            assert (
                relative_error(
                    bank.expert_linear(input, expert), hosts.expert_linear(input, expert)
                )
                < 1e-6
            )
            assert sum(dequantized) * 32 == count * ROWS * COLUMNS


def test_a_patch_that_needs_the_whole_bank_is_computed_once_while_it_is_resident(dequantized):
    ours, hosts = banks("MXFP4")
    patches = patches_of("dora")
    ours.lora = build_patches("w", patches, torch.Size(SHAPE), torch.device("cpu"), torch.float32,
                              ours.has_branch)
    hosts.weight.data = patched_by_host(patches, hosts.weight.data)
    input = torch.randn(3, COLUMNS)
    with ours.bank_resident(input) as bank:
        for expert in range(EXPERTS):
            assert (
                relative_error(
                    bank.expert_linear(input, expert), hosts.expert_linear(input, expert)
                )
                < 1e-6
            )
    assert sum(dequantized) * 32 == EXPERTS * ROWS * COLUMNS


def test_dense_experts_take_patches_too():
    ours = packed_operations().MoEExperts(EXPERTS, COLUMNS, ROWS, bias=False, dtype=torch.float32)
    weight, input, patches = torch.randn(SHAPE), torch.randn(3, COLUMNS), patches_of("lora")
    ours.load_state_dict({"weight": weight})
    ours.lora = build_patches("w", patches, weight.shape, torch.device("cpu"), torch.float32,
                              ours.has_branch)
    patched = patched_by_host(patches, weight)
    assert relative_error(ours.expert_linear(input, 3), input @ patched[3].t()) < 1e-6
    assert torch.equal(ours.weight, weight)


def test_dense_experts_compute_in_the_inputs_dtype():
    ours = packed_operations().MoEExperts(EXPERTS, COLUMNS, ROWS, bias=False, dtype=torch.float32)
    weight = torch.randn(SHAPE)
    ours.load_state_dict({"weight": weight})
    input = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert torch.equal(ours.expert_linear(input, 3),
                       torch.nn.functional.linear(input, weight[3].bfloat16()))
