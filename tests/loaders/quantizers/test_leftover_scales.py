"""Scales that stand beside weights which a tool packed again, or dequantised."""

import pytest
import torch
from families import comfyui_gguf_style
from pack_api import QuantizedTensor, WeightFileError, is_packed, load_diffusion_model, open_weights
from patched_models import relative, tiny_flux
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.quantizers.leftover_scales import WEIGHT_SCALES

TYPES = ["Q8_0", "Q4_0", "Q6_K", "F16", "BF16", "F32"]
ROWS, COLUMNS = 48, 256


def codes(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Values as those of fp8 codes, which need a scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).clamp(-3, 3) * 140


def write(path, tensors: dict[str, torch.Tensor], packed_type: str, **options):
    """Writes a GGUF with 2-D weights in a type. Returns name -> values in the file."""
    def type_of(name, values):
        return packed_type if values.ndim == 2 and min(values.shape) > 1 else "F32"

    seen = write_gguf(path, tensors, type_of=type_of, architecture="flux", **options)
    return {name: torch.as_tensor(value).reshape(tensors[name].shape)
            for name, value in seen.items()}


def read(path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Name -> values as read, and the notes of the file."""
    file = open_weights(path)
    return {name: tensor.dequantize() if is_packed(tensor) else tensor
            for name, tensor in file.state_dict().items()}, file.notes


@pytest.mark.parametrize("packed_type", TYPES)
@pytest.mark.parametrize("name", [name for name in WEIGHT_SCALES if name != "weight_scale_2"])
@pytest.mark.parametrize("shape", [(), (1,), (ROWS,), (ROWS, 1)])
@pytest.mark.parametrize("marker", [False, True])
def test_codes_are_multiplied_by_the_scale_beside_them(marker, shape, name, packed_type, tmp_path):
    scale = torch.rand(shape) * 1e-3 + 1e-4
    tensors = {"a.L.weight": codes(), f"a.L.{name}": scale, "a.M.weight": codes(seed=1) / 1e4}
    tensors |= {"scaled_fp8": torch.ones(1)} if marker else {}
    seen = write(tmp_path / "a.gguf", tensors, packed_type)
    values, notes = read(tmp_path / "a.gguf")
    expected = seen["a.L.weight"] * scale.reshape(-1, 1)
    assert relative(values["a.L.weight"], expected) < 1e-6 and not notes
    assert torch.equal(values["a.M.weight"].float(), seen["a.M.weight"])
    assert values.keys() - {"scaled_fp8"} == {"a.L.weight", "a.M.weight"}


@pytest.mark.parametrize("packed_type", TYPES)
def test_factors_of_columns_and_a_scale_of_the_scale_are_multiplied_too(packed_type, tmp_path):
    tensors = {"L.weight": codes(), "L.weight_scale": torch.rand(ROWS), "L.weight_scale_2":
               torch.tensor(3e-3), "L.pre_quant_scale": torch.rand(COLUMNS) + 0.5}
    seen = write(tmp_path / "a.gguf", tensors, packed_type)
    values, _ = read(tmp_path / "a.gguf")
    expected = (seen["L.weight"] * tensors["L.weight_scale"].unsqueeze(1) * 3e-3
                * tensors["L.pre_quant_scale"])
    assert relative(values["L.weight"], expected) < 1e-6


@pytest.mark.parametrize("packed_type", TYPES)
def test_scales_beside_weights_that_are_scaled_already_are_left_out_and_told(packed_type, tmp_path):
    tensors = {"a.weight": codes() * 1e-4, "a.weight_scale": torch.tensor(1e-4),
               "b.weight": codes() * 1e-4, "b.scale_weight": torch.tensor(1.0)}
    seen = write(tmp_path / "a.gguf", tensors, packed_type)
    values, notes = read(tmp_path / "a.gguf")
    assert all(torch.equal(values[name].float(), seen[name]) for name in values)
    assert values.keys() == {"a.weight", "b.weight"}
    assert notes == ["a.gguf: scales are left out, as their weights look scaled already: 'a'."]


@pytest.mark.parametrize("packed_type", TYPES)
@pytest.mark.parametrize(("name", "shape"), [
    ("weight_scale", (ROWS, COLUMNS // 16)), ("weight_scale", (3,)), ("weight_scale", (1, ROWS)),
    ("weight_scale_inv", (1, 2)), ("pre_quant_scale", (ROWS,))])
def test_scales_that_do_not_fit_are_a_sentence(name, shape, packed_type, tmp_path):
    tensors = {"L.weight": codes(), f"L.{name}": torch.rand(shape)}
    write(tmp_path / "a.gguf", tensors, packed_type)
    with pytest.raises(WeightFileError, match=f"a.gguf: 'L', .* has {name} of .*float.* expected"):
        read(tmp_path / "a.gguf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_safetensors_too(dtype, tmp_path):
    weight, scale = codes().to(dtype), torch.rand(ROWS, 1)
    save_file({"L.weight": weight, "L.scale_weight": scale, "scaled_fp8": torch.empty(0)},
              tmp_path / "a.safetensors")
    values, notes = read(tmp_path / "a.safetensors")
    assert relative(values["L.weight"], weight.float() * scale) < 1e-6 and not notes


def test_rows_that_are_no_whole_blocks_are_multiplied(tmp_path):
    weight, scale = codes(24, 32), torch.rand(32)
    metadata = {"comfy.gguf.orig_shape.L.weight": [32, 24]}
    seen = write(tmp_path / "a.gguf", {"L.weight": weight, "L.weight_scale": scale}, "Q8_0",
                 metadata=metadata)
    values, _ = read(tmp_path / "a.gguf")
    expected = seen["L.weight"].reshape(32, 24) * scale.unsqueeze(1)
    assert relative(values["L.weight"], expected) < 1e-6


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("packed_type", ["Q8_0", "F16"])
@pytest.mark.parametrize("pack_to", [None, "Q8_0"])
def test_a_model_of_codes_and_scales_is_the_model(packed_type, pack_to, tmp_path):
    values, stored = {}, {}
    for name, value in tiny_flux().items():
        stored[name] = values[name] = value
        if value.ndim == 2 and "_blocks." in name:
            scale = value.abs().amax() / 400
            stored[name] = value / scale
            stored[name.replace("weight", "scale_weight")] = scale
    seen = write_gguf(tmp_path / "flux.gguf", stored | {"scaled_fp8": torch.ones(2)},
                      **comfyui_gguf_style(packed_type))
    patcher = load_diffusion_model(str(tmp_path / "flux.gguf"), pack_to=pack_to)
    for name, weight in patcher.model.diffusion_model.named_parameters():
        name = name.replace("norm.weight", "norm.scale")
        scale = stored.get(name.replace("weight", "scale_weight"), torch.tensor(1.0))
        weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        expected = torch.as_tensor(seen[name]).reshape(weight.shape) * (
            scale if "_blocks." in name and name.endswith("weight") else 1)
        assert relative(weight, expected) < (0.02 if pack_to else 1e-6)
