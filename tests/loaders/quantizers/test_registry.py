"""Of every family of quantised files it is said who packed it."""
import json

import pytest
import torch
from host_formats import HOST_FORMATS
from pack_api import open_weights
from quantizer_writers import gptq, save_config
from safetensors.torch import save_file
from stored_files import FILES, written

from featherweight.loaders.inspect import inspect
from featherweight.loaders.inspect.inspection_text import inspection_text
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.registry import quantizer_of

COMFYUI = "ComfyUI's own formats"
PACKED_BY = {
    **dict.fromkeys((*HOST_FORMATS, "text encoder", "ControlNet"), COMFYUI),
    **dict.fromkeys(("NF4", "int8"), "bitsandbytes"), **dict.fromkeys(("Q8_0", "Q4_K", "VAE"), ""),
    "SDNQ": "SDNQ", "gptq": "GPTQ", "gptqmodel": "GPTQ", "modelopt": "ModelOpt",
    "auto-round": "AutoRound", "awq": "AWQ",
    "fp8": "transformers in fp8",
    "compressed-tensors": "compressed-tensors", "quanto": "quanto", "torchao": "torchao",
}


@pytest.mark.parametrize("family", FILES)
def test_who_packed_a_file_is_said(family, tmp_path):
    expected = PACKED_BY[family if family in PACKED_BY else family.split()[0]]
    _, stored = written(family, tmp_path)
    assert quantizer_of(open_weights(stored.path)) == expected
    text = "".join(map(inspection_text, inspect(stored.path)))
    assert (f"packed by: {expected}" in text) == bool(expected)


@pytest.mark.parametrize(("names", "expected"), [
    (("qweight", "wscales", "smooth_factor"), "Nunchaku"),
    (("weight", "weight_scale_inv"), "transformers, ModelOpt, Black Forest Labs or the like"),
])
def test_who_packed_a_file_is_said_by_its_names(names, expected, tmp_path):
    tensors = {f"L.{name}": torch.zeros(8, 8).to(torch.float8_e4m3fn) for name in names}
    save_file(tensors, tmp_path / "a.safetensors")
    assert quantizer_of(open_weights(tmp_path / "a.safetensors")) == expected


CODES = torch.zeros(512, 1, dtype=torch.uint8)
SQUARE = torch.ones(4, 4)
# tensors with the names of a quantiser's parts that are none
OTHERS = {
    "bitsandbytes": [
        {"a.weight": CODES.float()}, {"a.table": CODES},
        {"a.weight": CODES.float(), "a.weight.absmax": torch.ones(16)}],
    "GPTQ": [
        {"L.weight": SQUARE, "L.scales": torch.ones(4)}, {"L.qweight_bias": torch.ones(4)},
        {"L.qweight": SQUARE.char()}, {"qweight": SQUARE.int()}, {"L.g_idx": torch.arange(4)}],
    "SDNQ": [{"norm.scale": torch.ones(4), "L.weight": SQUARE, "L.scale": torch.ones(1)}],
    "scales": [{"L.weight": SQUARE, "M.weight_scale": torch.ones(1)}],
}


@pytest.mark.parametrize(("quantizer", "tensors"), [
    pytest.param(name, tensors, id=f"{name} {', '.join(tensors)}")
    for name, files in OTHERS.items() for tensors in files])
def test_a_file_with_other_tensors_of_such_names_is_left_to_the_host(quantizer, tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    assert not needs_own_reader(str(path))
    if quantizer in ("SDNQ", "scales"):  # of the others this pack's own reader may refuse parts
        read = open_weights(path).state_dict()
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("stored_less", [0, 1])
def test_the_settings_of_a_quantiser_may_be_in_a_files_metadata(stored_less, tmp_path):
    settings = {"quant_method": "gptq", "checkpoint_format": ("gptq_v2", "gptq")[stored_less]}
    parts, expected = gptq(torch.randn(32, 64), stored_less=stored_less)
    save_file({f"L.{name}": value.contiguous() for name, value in parts.items()},
              tmp_path / "a.safetensors", {"quantization_config": json.dumps(settings)})
    file = open_weights(tmp_path / "a.safetensors")
    assert torch.equal(file.state_dict()["L.weight"].dequantize(), expected)
    assert quantizer_of(file) == "GPTQ"


def test_who_packed_a_folder_is_said_by_its_config(tmp_path):
    save_file({"L.weight": torch.ones(8, 16, dtype=torch.int8), "L.weight_scale": torch.ones(8, 1)},
              tmp_path / "model.safetensors")
    save_config(tmp_path, quant_method="compressed-tensors", format="int-quantized")
    assert quantizer_of(open_weights(tmp_path)) == "compressed-tensors"


def test_one_stage_of_progress_goes_over_all_parts_whoever_packed_them(tmp_path):
    config = {"quant_method": "gptq", "checkpoint_format": "gptq"}
    parts, _ = gptq(torch.randn(32, 64))
    tensors = {f"a.{name}": value.contiguous() for name, value in parts.items()} | {
        "b.weight": torch.ones(8, 16, dtype=torch.int8), "b.weight_scale": torch.ones(8),
        "c.weight": torch.ones(2, 2), "d.weight": torch.ones(2, 2).half() * 99,
        "d.scale_weight": torch.tensor(0.5)}
    save_file(tensors, tmp_path / "a.safetensors", {"quantization_config": json.dumps(config)})
    stages, yielded = [], []

    def track(names):
        stages.append(list(names))
        for name in stages[-1]:
            yielded.append(name)
            yield name

    weights = open_weights(tmp_path / "a.safetensors").state_dict(track)
    assert weights.keys() == {f"{layer}.weight" for layer in "abcd"}
    assert len(stages) == 1 and sorted(yielded) == sorted(stages[0]) == sorted(tensors)


def test_a_layer_without_a_part_that_the_others_have_is_noted(tmp_path):
    parts, _ = gptq(torch.randn(32, 64), symmetric=True)
    tensors = {f"{layer}.{name}": value.clone() for layer in "abc" for name, value in parts.items()
               if (layer, name) != ("b", "g_idx")}
    save_file(tensors, tmp_path / "a.safetensors")
    file = open_weights(tmp_path / "a.safetensors")
    file.state_dict()
    assert file.notes == ["a.safetensors: 'b', packed by GPTQ, AutoRound or AWQ, has no g_idx, as"
                          " other layers have."]
