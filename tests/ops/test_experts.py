"""The experts of a mixture in one packed weight: each computes what the host's dense expert computes."""
import comfy.ops
import gguf
import numpy as np
import pytest
import torch
from families import relative_error
from featherweight.ops.format import FORMATS
from featherweight.ops.operations import packed_operations
from featherweight.ops.tensor import packed_tensor

from devtools.files.gguf_files import pack

SHAPE = EXPERTS, ROWS, COLUMNS = 5, 48, 512


def banks(format_name, bias=True):
    """A packed layer of ours, and the host's with the dense values by gguf's reference."""
    data = pack(np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32), format_name)
    dense = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[format_name]))
    biases = {"bias": torch.linspace(-1, 1, EXPERTS * ROWS).view(EXPERTS, ROWS)} if bias else {}
    ours = packed_operations().MoEExperts(EXPERTS, COLUMNS, ROWS, bias=bias, dtype=torch.float32)
    hosts = comfy.ops.mixed_precision_ops({}, torch.float32).MoEExperts(EXPERTS, COLUMNS, ROWS, bias=bias)
    ours.load_state_dict({"weight": packed_tensor(FORMATS[format_name], torch.from_numpy(data), SHAPE), **biases})
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


def test_only_the_experts_asked_for_are_unpacked(monkeypatch):
    ours, _ = banks("MXFP4")
    unpacked, terms = [], FORMATS["MXFP4"].terms
    monkeypatch.setattr(FORMATS["MXFP4"], "terms", lambda blocks: unpacked.append(len(blocks)) or terms(blocks))
    input = torch.randn(3, COLUMNS)
    with ours.bank_resident(input) as bank:
        for expert in (1, 4):
            bank.expert_linear(input, expert)
    assert sum(unpacked) == 2 * ROWS * COLUMNS // 32


def test_dense_experts_compute_in_the_inputs_dtype():
    ours = packed_operations().MoEExperts(EXPERTS, COLUMNS, ROWS, bias=False, dtype=torch.float32)
    weight = torch.randn(SHAPE)
    ours.load_state_dict({"weight": weight})
    input = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert torch.equal(ours.expert_linear(input, 3), torch.nn.functional.linear(input, weight[3].bfloat16()))
