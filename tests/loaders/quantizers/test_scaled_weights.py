"""Weights with scales without a marker, against transformers and diffusers, which write them."""
import json
import random

import pytest
import torch
from conformance.base import weight
from oracles import installed
from pack_api import WeightFileError, is_packed, load_diffusion_model, open_weights
from patched_models import dense_of, relative, run, tiny_flux
from quantizer_writers import fp8_blocks, quantized_state_dict, save_config, svdquant
from safetensors.torch import save_file

from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, read_marked
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.comfy_quant_marks import SETTINGS, mark_of

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="it is the oracle")

pytestmark = pytest.mark.usefixtures("small_models")
FP8 = torch.float8_e4m3fn


def by_transformers(codes, scale):
    return fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)


def read(path, tensors):
    save_file(tensors, path)
    return open_weights(str(path)).state_dict()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (512, 128)])
def test_values_are_those_of_transformers(shape, scale_dtype, tmp_path):
    parts, _ = fp8_blocks(torch.randn(shape) * 0.02)
    codes, scale = parts["weight"], parts["weight_scale_inv"].to(scale_dtype)
    weights = read(tmp_path / "a.safetensors", {
        "L.weight": codes, "L.weight_scale_inv": scale, "L.activation_scale": torch.ones(1),
        "L.bias": torch.ones(3)
    })
    assert set(weights) == {"L.weight", "L.bias"} and is_packed(weights["L.weight"])
    expected = by_transformers(codes, scale.float())
    assert torch.equal(weights["L.weight"].dequantize(), expected)
    stored = codes.nbytes + scale.nbytes
    assert weights["L.weight"].nbytes < 1.05 * stored


def test_values_are_those_of_black_forest_labs(tmp_path):
    bfl = pytest.importorskip("diffusers.quantizers.bfl.utils", reason="it is the oracle")
    values = (torch.randn(96, 256) * 0.02).bfloat16()
    codes, scale = bfl.quantize_fp8r(values)
    weights = read(tmp_path / "a.safetensors", {"L.weight": codes, "L.weight_scale": scale})
    assert torch.equal(weights["L.weight"].dequantize(), bfl.dequantize_fp8r(codes, scale))
    codes, scale, of_tensor = bfl.quantize_nvfp4(values)
    weights = read(tmp_path / "b.safetensors", {
        "L.weight": codes, "L.weight_scale": scale, "L.weight_scale_2": of_tensor})
    assert set(weights) == {"L.weight"} and is_packed(weights["L.weight"])
    assert torch.equal(weights["L.weight"].dequantize(),
                       bfl.dequantize_nvfp4(codes, scale, of_tensor))


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["channel", "tensor", "group", "block"])
@pytest.mark.parametrize("shape", [(96, 256), (200, 384), (256, 250)])
def test_values_are_those_of_compressed_tensors(strategy, shape, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("compressed-tensors==0.20.0", "loguru"))
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rows, columns = shape
    if strategy == "group" and columns % 64:
        pytest.skip("the package wants whole groups")
    values = torch.randn(shape) * 0.02
    counts = {"channel": (rows, 1), "tensor": (1,), "group": (rows, columns // 64),
              "block": (-(-rows // 128), -(-columns // 128))}[strategy]
    scale = (torch.rand(counts) + 0.5) * values.abs().amax() / 448
    args = QuantizationArgs(
        num_bits=8, type="float", strategy=strategy,
        group_size=64 if strategy == "group" else None,
        block_structure=[128, 128] if strategy == "block" else None)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = NaiveQuantizationCompressor.compress(
        {"weight": values, "weight_scale": scale}, scheme)
    expected = NaiveQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
    assert stored["weight"].dtype == FP8 and expected.dtype == torch.float32
    weights = read(tmp_path / "a.safetensors", {
        f"L.{name}": tensor.contiguous() for name, tensor in stored.items()})
    assert torch.equal(weights["L.weight"].dequantize(), expected)


@pytest.mark.heavy
@pytest.mark.parametrize("rank", [1, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_svdquant_computes_what_a_layer_of_modelopt_computes(rank, dtype, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed(
        "nvidia-modelopt==0.47.0", "omegaconf", "antlr4-python3-runtime==4.9.3", "pulp",
        "kernels"))
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.unified_export_hf import _promote_quantizer_tensors_to_module
    from modelopt.torch.quantization.conversion import create_and_replace_svdquant_linear_on_the_fly
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    model = torch.nn.Sequential(torch.nn.Linear(256, 96, bias=False))
    mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}],
                         "algorithm": None})
    create_and_replace_svdquant_linear_on_the_fly(model)
    layer, values = model[0], weight(96, 256)
    codes, scale, of_tensor = NVFP4QTensor.quantize(values, 16)
    layer.weight.data = codes.dequantize(torch.float32, scale=scale, double_scale=of_tensor,
                                         block_sizes={-1: 16})
    layer.weight_quantizer.svdquant_lora_a = (torch.randn(rank, 256) * 0.05).to(dtype).float()
    layer.weight_quantizer.svdquant_lora_b = (torch.randn(96, rank) * 0.05).to(dtype).float()
    layer.input_quantizer.pre_quant_scale = torch.rand(256) + 0.5
    with torch.no_grad():
        expected = layer(torch.eye(256)).t()
    _promote_quantizer_tensors_to_module(model)
    beside = {name: tensor.to(dtype) if "lora" in name else tensor
              for name, tensor in layer.state_dict().items()
              if name in ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")}
    assert len(beside) == 3
    stored = {"weight": codes._quantized_data, "weight_scale": scale,
              "weight_scale_2": of_tensor} | beside
    weights = read(tmp_path / "a.safetensors", {
        f"L.{name}": tensor for name, tensor in stored.items()})
    assert set(weights) == {"L.weight"}
    difference = (weights["L.weight"].dequantize() - expected).abs().max()
    assert difference <= 1e-6 * expected.abs().max()


def folder(tmp_path, tensors, **settings):
    save_config(tmp_path, **settings)
    save_file(tensors, tmp_path / "model.safetensors")
    return open_weights(str(tmp_path))


def test_fp8_without_scales_is_refused_in_a_folder_whose_other_layers_have_them(tmp_path):
    tensors = {f"{name}.weight": torch.ones(128, 128).to(FP8) for name in "LM"}
    file = folder(tmp_path, tensors | {"L.weight_scale": torch.ones(128, 1)},
                  quant_method="compressed-tensors")
    with pytest.raises(WeightFileError, match="'M.weight' has no weight_scale, as other layers"):
        file.state_dict()


@pytest.mark.parametrize("settings", [
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "weights": {"strategy": "block", "block_structure": [128, 128]}}}}])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (4, 2)])
def test_scales_of_other_blocks_than_the_config_says_are_refused(settings, shape, tmp_path):
    name = "weight_scale_inv" if settings["quant_method"] == "fp8" else "weight_scale"
    file = folder(tmp_path, {"L.weight": torch.ones(256, 256).to(FP8),
                             f"L.{name}": torch.ones(shape)}, **settings)
    with pytest.raises(WeightFileError, match="expected blocks of the size that its config says"):
        file.state_dict()


def test_a_layer_of_svdquant_without_factors_that_others_have_is_noted(tmp_path):
    tensors = {}
    for layer, smoothed in (("L", True), ("M", False)):
        parts, _ = svdquant(weight(96, 128), smoothed=smoothed)
        tensors |= {f"{layer}.{name}": part.clone() for name, part in parts.items()}
    file = folder(tmp_path, tensors, quant_method="modelopt")
    file.state_dict()
    assert [note for note in file.notes if "pre_quant_scale" in note and "'M'" in note]


def test_a_layer_with_a_mark_of_comfyui_is_left_to_its_reader(tmp_path):
    marker = {"L.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}')).byte()}
    tensors = {"L.weight": torch.ones(4, 4).to(FP8), "L.weight_scale": torch.tensor(1.0)} | marker
    assert set(read(tmp_path / "a.safetensors", tensors)) == set(tensors)


def test_a_file_in_comfyuis_names_needs_no_config(tmp_path):
    path = str(tmp_path / "model.safetensors")
    stored, values = quantized_state_dict(tiny_flux(), fp8_blocks,
                                          lambda name: "_blocks." not in name)
    save_file(stored, path)
    assert needs_own_reader(path)
    ours = load_diffusion_model(path)
    assert sum(map(is_packed, ours.model.diffusion_model.parameters())) >= 13
    assert relative(run(ours), run(dense_of(values))) < 1e-5


MARKERS = {
    "none": lambda dtype: ({}, None),
    "scaled_fp8": lambda dtype: ({"scaled_fp8": torch.zeros(2).to(FP8)}, None),
    "comfy_quant": lambda dtype: ({"L.comfy_quant": mark_of({"format": dtype})}, None),
    "metadata": lambda dtype: ({}, {SETTINGS: json.dumps({"layers": {"L": {"format": dtype}}})}),
}
FORMATS = {FP8: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise"}


@pytest.mark.parametrize("shape", [(96, 4, 1), (96, 4), (96, 1), (1,)], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("marker", MARKERS)
def test_codes_times_their_scales_are_read_under_each_marker(marker, dtype, shape, tmp_path):
    """For N rows of K columns: one number, N, or those of blocks of columns."""
    beside, metadata = MARKERS[marker](FORMATS[dtype])
    codes = torch.randint(-100, 100, (96, 256)).float().to(dtype)
    scale = torch.rand(shape) + 0.5
    is_old = marker in ("none", "scaled_fp8")
    name = "L.scale_weight" if is_old else "L.weight_scale"
    path = tmp_path / "model.safetensors"
    save_file({"L.weight": codes, name: scale, **beside}, path, metadata)
    file = open_weights(str(path))
    weights = as_tensors(file, read_marked(file), formats=())
    if not is_packed(weights["L.weight"]):  # ComfyUI's own layer reads it as it is
        assert shape in ((1,), (96, 1)) and (not is_old or dtype != torch.int8)
        weights = as_tensors(file, read_marked(file))
    else:
        assert needs_own_reader(str(path))
    scales = scale.view(len(scale), -1)
    expected = codes.float() * scales.repeat_interleave(256 // scales.shape[1], 1)
    assert set(weights) == {"L.weight"}
    assert torch.equal(weights["L.weight"].dequantize(), expected)


@pytest.mark.parametrize("marker", ["none", "scaled_fp8"])
@pytest.mark.parametrize("shape", [(96, 4, 1), (96, 1), (1,)], ids=str)
def test_a_factor_of_all_scales_counts(shape, marker, tmp_path):
    """musubi-tuner's, under the marker too, where ComfyUI would pass over it."""
    codes, scale = torch.randn(96, 256).to(FP8), torch.rand(shape)
    path = tmp_path / "model.safetensors"
    save_file({"L.weight": codes, "L.scale_weight": scale,
               "L.scale_weight_tensor": torch.tensor([0.375]), **MARKERS[marker](None)[0]}, path)
    assert needs_own_reader(str(path))
    file = open_weights(str(path))
    weights = as_tensors(file, read_marked(file), formats=())
    columns = 256 // (*shape, 1)[1]
    of_blocks = codes.float().view(96, -1, columns) * scale.view(len(scale), -1, 1) * 0.375
    assert set(weights) == {"L.weight"}
    torch.testing.assert_close(weights["L.weight"].dequantize(), of_blocks.view(96, 256),
                               rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_second_scale_under_a_mark_is_refused_unless_it_is_1(dtype, tmp_path):
    tensors = {"L.weight": torch.ones(4, 4).to(dtype), "L.weight_scale": torch.tensor(1.0),
               "L.comfy_quant": mark_of({"format": FORMATS[dtype]})}
    for second in (1.0, 3.0):
        path = tmp_path / f"{second}.safetensors"
        save_file(tensors | {"L.weight_scale_2": torch.tensor(second)}, path)
        file = open_weights(str(path))
        if second == 1:
            assert torch.equal(as_tensors(file, read_marked(file))["L.weight"].dequantize(),
                               torch.ones(4, 4))
            continue
        with pytest.raises(WeightFileError, match="it has weight_scale_2, which .* has not"):
            as_tensors(file, read_marked(file))


def lightx2v(name):
    """(weight, other parts) as LightX2V's kernels write them of (96, 320) values."""
    if name == "nvfp4":
        return torch.zeros(96, 160).byte(), {"weight_scale": torch.ones(128, 20).to(FP8),
                                             "weight_global_scale": torch.tensor(1.0)}
    bits = {"mxfp4": 4, "mxfp6": 6, "mxfp8": 8}[name]
    scale = torch.ones(128, 12).to(torch.float8_e8m0fnu)
    return torch.zeros(96, 320 * bits // 8).byte(), {"weight_scale": scale}


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp6", "mxfp8"])
def test_bytes_of_lightx2v_are_named_with_their_writer(name, as_bytes, tmp_path):
    weight_, parts = lightx2v(name)
    if as_bytes:
        parts["weight_scale"] = parts["weight_scale"].view(torch.uint8)
    path = tmp_path / "model.safetensors"
    save_file({f"L.{part}": tensor for part, tensor in {"weight": weight_, **parts}.items()}, path)
    assert needs_own_reader(str(path))
    with pytest.raises(WeightFileError) as error:
        open_weights(str(path)).state_dict()
    assert str(error.value) == (
        f"model.safetensors: 'L', packed by LightX2V: it is in {name}, which is not read from its"
        " files. Get its fp8 or int8, or the model as GGUF.")


@pytest.mark.parametrize(("columns", "scale"), [
    (128, (128, 8)), (128, (128, 16, 1)), (100, (128, 13)), (128, ())], ids=str)
def test_bytes_are_nvfp4_by_their_own_shapes_alone(columns, scale, tmp_path):
    message = (r"'L', packed by an unknown tool: it has weight of uint8 .*which are of no format"
               r" that is read\. Get another conversion\.$")
    with pytest.raises(WeightFileError, match=message):
        read(tmp_path / "a.safetensors", {
            "L.weight": torch.zeros(128, columns).byte(),
            "L.weight_scale": torch.ones(scale).to(FP8), "L.weight_scale_2": torch.ones(1)})


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_scales_of_blocks_are_none_of_rows_though_there_are_as_many(name, dtype, tmp_path):
    rows = 128 * random.randint(1, 2)
    codes = torch.randint(-127, 128, (rows, 128 * 128)).to(dtype)
    scales = torch.rand(rows // 128, 128) + 0.5
    path = tmp_path / "a.safetensors"
    save_file({"L.weight": codes, f"L.{name}": scales}, path)
    expected = codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(open_weights(path).state_dict()["L.weight"].dequantize(), expected)
