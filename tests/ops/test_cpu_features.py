"""What the CPU multiplies natively, as torch says."""
from functools import partial

import pytest
import torch

from featherweight.ops import cpu_features as cpu_features

ZEN5, SAPPHIRE_RAPIDS, GRAVITON3, HASWELL = (
    {"avx512_bf16": True, "avx512_vnni": True, "amx_bf16": False},
    {"avx512_bf16": True, "avx512_vnni": True, "amx_bf16": True, "amx_int8": True},
    {"bf16": True}, {"avx2": True, "avx512_bf16": False})


@pytest.fixture(params=["of a new torch", "of an old torch"])
def cpu_with(request, monkeypatch):
    """cpu_with(capabilities): makes the CPU another one."""

    def cpu_with(capabilities):
        if request.param == "of a new torch":
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
            return
        if "bf16" in capabilities:
            pytest.skip("has no word for it")
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        for function, name in (("_is_avx512_bf16_supported", "avx512_bf16"),
                               ("_is_amx_tile_supported", "amx_bf16"),
                               ("_is_vnni_supported", "avx512_vnni")):
            monkeypatch.setattr(torch.cpu, function, partial(capabilities.get, name, False),
                                raising=False)

    return cpu_with


@pytest.mark.parametrize(("capabilities", "bfloat16", "by_avx512", "vnni"), [
    (ZEN5, True, True, True), (SAPPHIRE_RAPIDS, True, False, True), (GRAVITON3, True, False, False),
    (HASWELL, False, False, False)],
    ids=["AVX512-BF16", "AMX", "Arm's BF16", "none of them"])
def test_torch_is_asked(capabilities, bfloat16, by_avx512, vnni, cpu_with, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    cpu_with(capabilities)
    assert cpu_features.multiplies_bfloat16() == bfloat16
    assert cpu_features.has_avx512_bfloat16() == by_avx512
    assert cpu_features.has_vnni() == vnni
