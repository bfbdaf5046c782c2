"""Error feedback in rows whose groups have scales."""
import pytest
import torch
from pack_api import ROW_TYPES, SecondMoments

from featherweight.ops import kernels
from featherweight.ops.quantize import row_columns

IN_GROUPS = [name for name, row_type in ROW_TYPES.items()
             if row_type.family.example.codes.bits == 4
             and row_type.format_of((64, 512)).layout.groups > 1]


@pytest.mark.parametrize("name", IN_GROUPS)
@pytest.mark.parametrize("has_kernel", [True, False])
def test_scales_of_groups_fit_the_values_that_feedback_leaves(name, has_kernel, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 512, generator=generator)
    tokens = torch.randn(2048, 512, generator=generator) * torch.arange(1, 513)**-0.7
    tokens = tokens @ torch.linalg.qr(torch.randn(512, 512, generator=generator))[0]
    moments = SecondMoments.zeros(512)
    moments.add(tokens[:1536], hold_out=False)

    def loss():
        off = (ROW_TYPES[name].pack(weight, moments).dequantize() - weight).double()
        return float((tokens[1536:].double() @ off.T).norm())

    if not has_kernel:
        monkeypatch.setattr(kernels, "find", lambda *arguments: None)
    searched = loss()
    monkeypatch.setattr(kernels, "find", lambda *arguments: None)
    monkeypatch.setattr(row_columns, "searches_groups", lambda encoder: False)
    assert searched < 0.97 * loss()
