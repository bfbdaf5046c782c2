"""Weights of GPTQ, AutoRound and AWQ against their packages."""
import importlib
import importlib.util

import pytest
import torch
from conformance.base import read_weight, weight
from oracles import auto_round, installed, sources
from pack_api import WeightFileError, open_weights
from quantizer_writers import gptq, quantize
from safetensors.torch import save_file

from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.base import TensorHeader
from featherweight.loaders.quantizers.gptq import QUANTIZER


@pytest.mark.parametrize("sides", [("scales", "scaled_zeros"), ("wscales", "smooth_factor")])
def test_nunchakus_words_are_left_to_its_reader(sides):
    def header_of(name):
        return TensorHeader(torch.int32, (16, 64))

    assert not QUANTIZER.finds([f"L.{name}" for name in ("qweight", *sides)], {}, header_of)
    assert QUANTIZER.finds(["L.qweight", "L.scales"], {}, header_of)
    assert not QUANTIZER.finds(["L.qweight"], {}, lambda name: TensorHeader(torch.int8, (16, 64)))


@pytest.mark.parametrize(("absent", "others"), [
    (["qzeros"], []), (["scales"], []), (["qzeros", "scales"], []),
    (["qzeros"], ["M.weight", "N.qweight.lora"])])
def test_a_file_that_lacks_a_part_everywhere_is_refused_by_its_name(absent, others, tmp_path):
    """ComfyUI's own loader, which does not know them, would make nothing of them."""
    parts, _ = gptq(weight(32, 64))
    tensors = {f"{layer}.{name}": part.clone() for layer in ("a.0", "a.1")
               for name, part in parts.items() if name not in absent}
    path = tmp_path / "model.safetensors"
    save_file(tensors | {name: torch.ones(1) for name in others}, path)
    assert needs_own_reader(str(path))
    first = max(absent)
    with pytest.raises(WeightFileError, match=(
            rf"^model.safetensors: 'a.0', packed by GPTQ, AutoRound or AWQ: it has no {first},"
            rf" expected .*\. Get another conversion\.$")):
        open_weights(path).state_dict()


@pytest.mark.heavy
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("module_name", ["qlinear_torch", "qlinear_torch_zp"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(128, 64), (96, 64), (960, 128), (320, 128)])
def test_values_are_those_of_auto_round(columns, group, bits, module_name, symmetric, tmp_path,
                                        monkeypatch):
    auto_round(monkeypatch)
    module = importlib.import_module(f"auto_round_extension.torch.{module_name}")
    layer = module.QuantLinear(bits, group, columns, 96, False)
    values = weight(96, columns)
    parts, dense = gptq(values, bits, group, symmetric=symmetric)
    scales = parts["scales"].t().float()
    zeros = quantize(values, bits, group, symmetric=symmetric)[2].float().clamp(min=1)
    linear = torch.nn.Linear(columns, 96, bias=False)
    linear.weight.data = dense
    layer.device = None
    layer.pack(linear, scales, zeros, device="cpu")
    stored = {name: value for name, value in layer.state_dict().items() if name != "bias"}
    less = module_name.endswith("zp")
    packing = "auto_round:auto_gptq" if less else "auto_round"
    stored.pop("g_idx", None)
    packed = read_weight(tmp_path, stored, config={
        "quant_method": "auto-round", "packing_format": packing, "group_size": group})
    if columns % group == 0:  # its own layer does not run otherwise; it multiplies in float16
        identity = torch.eye(columns)
        assert torch.equal(packed.dequantize().half(), layer(identity).t().half())
    assert torch.allclose(packed.dequantize(), dense, atol=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_planes_are_those_of_gptqmodel(bits, symmetric, tmp_path):
    path = sources("gptqmodel==7.7.0") / "gptqmodel" / "utils" / "planar_packing.py"
    module = loaded("planar_packing", path)
    values = weight(96, 192, seed=bits)
    parts, dense = gptq(values, bits, 64, 0, symmetric)
    codes, _, zeros = quantize(values, bits, 64, symmetric=symmetric)
    parts["qweight"] = module.planar_pack_rows(codes.view(96, 192).t().contiguous(), bits)
    parts["qzeros"] = module.planar_pack_cols(zeros.t().contiguous(), bits)
    config = {"quant_method": "gptq", "checkpoint_format": "gptq_p", "bits": bits}
    packed = read_weight(tmp_path, parts, config=config).dequantize()
    assert torch.equal(packed, dense)
    unpacked = module.planar_unpack_rows(parts["qweight"], bits).t().float().view(96, 3, 64)
    zeros = module.planar_unpack_cols(parts["qzeros"], bits).t().float()
    scales = parts["scales"].t().float()
    assert torch.equal(packed, ((unpacked - zeros[..., None]) * scales[..., None]).view(96, 192))


def loaded(name, path):
    """A module of a package that is not imported whole."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_values_are_those_of_autoawq(tmp_path):
    path = installed("autoawq==0.2.9") / "awq" / "utils" / "packing_utils.py"
    module = loaded("awq_packing", path)
    generator = torch.Generator().manual_seed(0)

    def words(*shape):
        return torch.randint(-2**31, 2**31, shape, generator=generator).int()

    codes, zeros, scales = words(256, 16), words(2, 16), torch.rand(2, 128).half() * 0.01
    packed = read_weight(tmp_path, {"qweight": codes, "qzeros": zeros, "scales": scales})
    expected = module.dequantize_gemm(codes, zeros, scales, 4, 128)
    assert torch.equal(packed.dequantize().half(), expected.t())
