"""ComfyUI's own quantised formats as packed weights, against comfy-kitchen, which writes them."""

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from host_formats import asymmetric_parts, asymmetric_values, awq_weight, mark_of
from pack_api import is_packed, open_weights, packed_operations, packed_tensors, product
from safetensors.torch import save_file

from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors
from featherweight.loaders.quantizers.comfy_quant import pack_parts, shifted_bias
from featherweight.loaders.quantizers.comfy_quant_formats import COMFYUI_FORMATS
from featherweight.loaders.quantizers.parts import PartError
from featherweight.ops.formats._names import format_named
from featherweight.ops.tensor.row_slicing import dense, join_rows, take_rows

ROWS, COLUMNS = 160, 512
FP8 = {"scale": "recalculate"}
# name -> (format, settings, how the kitchen writes it)
WRITTEN = {
    "fp8 E4M3": ("float8_e4m3fn", {}, FP8),
    "fp8 E5M2": ("float8_e5m2", {}, FP8),
    "mxfp8": ("mxfp8", {}, {}),
    "nvfp4": ("nvfp4", {}, {}),
    "int8 of a tensor": ("int8_tensorwise", {}, {}),
    "int8 of rows": ("int8_tensorwise", {}, {"per_channel": True}),
    "int8, rotated": ("int8_tensorwise", {"convrot": True}, {"per_channel": True, "convrot": True}),
    "int8, rotated by 64": (
        "int8_tensorwise", {"params": {"convrot": True, "convrot_groupsize": 64}},
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64}),
    "int4, rotated": ("convrot_w4a4", {}, {}),
}
ROTATED = ("int8, rotated", "int8, rotated by 64", "int4, rotated")


@pytest.fixture
def weight():
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02


def written(name, weight):
    """The settings, the parts that a file holds, and the kitchen's own values in float32."""
    format_name, settings, options = WRITTEN[name]
    if format_name not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no format {format_name}")
    layout = QUANT_ALGOS[format_name]["comfy_tensor_layout"]
    quantised = QuantizedTensor.from_float(weight, layout, **options)
    return ({"format": format_name} | settings, quantised.state_dict("weight"),
            quantised.dequantize())


@pytest.mark.parametrize("name", WRITTEN)
def test_values_are_those_of_the_writer(name, weight):
    settings, parts, expected = written(name, weight)
    packed = pack_parts(settings, parts)
    values = product.dequantize(packed, torch.float32)
    if name in ROTATED:  # the kitchen rounds each product of its sum, this pack the sum alone
        assert (values - expected).abs().max() < 1e-6 * expected.abs().max()
    else:
        assert torch.equal(values, expected)
    half = product.dequantize(packed, torch.bfloat16)
    assert torch.equal(half, values.bfloat16())


@pytest.mark.parametrize("name", ROTATED)
def test_a_rotated_value_is_rounded_once(name, weight):
    settings, parts, _ = written(name, weight)
    packed = pack_parts(settings, parts)
    codes = parts["weight"].view(torch.int8)
    if name == "int4, rotated":
        codes = torch.stack([codes << 4 >> 4, codes >> 4], -1).view(ROWS, COLUMNS)
    group = 64 if "64" in name else 256
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]],
                      dtype=torch.float64) / 2
    rotation = torch.ones(1, 1, dtype=torch.float64)
    while len(rotation) < group:
        rotation = torch.kron(rotation, h4)
    exact = (codes.double().view(-1, group) @ rotation).view(ROWS, COLUMNS)
    exact *= parts["weight_scale"].double().view(-1, 1)
    assert torch.equal(product.dequantize(packed, torch.float32), exact.float())


@pytest.mark.parametrize("name", WRITTEN)
def test_a_weight_is_the_files_bytes_and_moves_by_rows(name, weight):
    settings, parts, _ = written(name, weight)
    packed = pack_parts(settings, parts)
    assert packed._qdata.data_ptr() == parts["weight"].data_ptr()
    assert packed.nbytes < 1.05 * sum(part.nbytes for part in parts.values())
    assert format_named(packed.params.format.name) is packed.params.format
    values = packed.dequantize()
    part = take_rows(packed, slice(5, 20))
    assert is_packed(part) and torch.equal(part.dequantize(), values[5:20])
    joined = join_rows([take_rows(packed, slice(20, 30)), part])
    assert is_packed(joined)
    assert torch.equal(joined.dequantize(), torch.cat([values[20:30], values[5:20]]))
    ids = torch.tensor([[3, 100], [7, 3]])
    assert torch.equal(product.embedding(ids, packed, torch.float32), values[ids])


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_product_is_that_of_the_values(name, tokens, weight):
    settings, parts, _ = written(name, weight)
    packed = pack_parts(settings, parts)
    input = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(1))
    expected = input.double() @ packed.dequantize().double().T
    out = product.linear(input, packed)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [(150, 512), (150, 500), (160, 500)])
def test_a_layer_takes_a_weight_without_its_padding(name, shape, weight):
    settings, parts, expected = written(name, weight[:shape[0], :shape[1]])
    packed = pack_parts(settings, parts)
    assert packed.shape != shape == expected.shape
    layer = packed_operations().Linear(shape[1], shape[0], bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": packed})
    assert layer.weight.shape == shape
    assert is_packed(layer.weight) == (shape[1] == COLUMNS)
    assert torch.equal(dense(layer.weight), expected)
    input = torch.randn(3, shape[1])
    torch.testing.assert_close(layer(input), input @ expected.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="the model expects"):
        packed_operations().Linear(shape[1], 90, bias=False, dtype=torch.float32).load_state_dict(
            {"weight": packed})


TABLE = tuple(index**3 / 512 for index in range(-8, 8))
# how asym_w4a8_int8 can be stored: settings, what `asymmetric_parts` makes, the format
ASYMMETRIC_CASES = {
    "levels of kitchen's": ({}, {}, "W4A8_512"),
    "levels of its own": ({}, {"codebook": TABLE}, "W4A8_TABLE_512"),
    "integers": ({}, {"codebook": None}, "W4A8_INTEGERS_512"),
    "added numbers": ({}, {"codebook": None}, "W4A8_SHIFTED_512"),
    "added numbers of float32": ({}, {"codebook": None}, "W4A8_SHIFTED_FLOAT_512"),
    "6 bits": ({}, {"bits": 6}, "W6A8_512"),
    "6 bits of 32 columns": ({"group_size": 32, "convrot_groupsize": 64},
                             {"bits": 6, "level_group": 32}, "W6A8_512_64_32"),
    "8 columns": ({"params": {"group_size": 8}}, {"level_group": 8}, "W4A8_512_256_8"),
}


def asymmetric(case):
    """The settings, the parts that a file holds, the values and the name of the format."""
    settings, options, format_name = ASYMMETRIC_CASES[case]
    parts = asymmetric_parts(ROWS, COLUMNS, **options)
    if "SHIFTED" in format_name:
        added = torch.rand(COLUMNS // 16, ROWS, generator=torch.Generator().manual_seed(0)) * 0.1
        parts["weight_correction"] = added if "FLOAT" in format_name else added.bfloat16()
    nested = settings.get("params", settings)
    values = asymmetric_values(parts, nested.get("group_size", 16),
                               nested.get("convrot_groupsize", 256))
    return {"format": "asym_w4a8_int8"} | settings, parts, values, format_name


@pytest.mark.parametrize("case", ASYMMETRIC_CASES)
def test_asymmetric_values_are_those_of_the_formula(case):
    settings, parts, expected, format_name = asymmetric(case)
    packed = pack_parts(settings, parts)
    assert packed.params.format.name == format_name
    assert format_named(format_name) is packed.params.format
    values = product.dequantize(packed, torch.float32)
    assert (values - expected).abs().max() < 4e-7 * expected.abs().max()
    assert torch.equal(product.dequantize(packed, torch.bfloat16), values.bfloat16())
    input = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(1))
    out = product.linear(input, packed)
    assert (out - input @ expected.T).abs().max() < 1e-5 * out.abs().max()
    assert packed.nbytes <= 1.05 * sum(part.nbytes for part in parts.values())
    values = packed.dequantize()
    joined = join_rows([take_rows(packed, slice(20, 30)), take_rows(packed, slice(5, 20))])
    assert is_packed(joined)
    assert torch.equal(joined.dequantize(), torch.cat([values[20:30], values[5:20]]))


def test_weights_of_different_tables_are_joined_packed():
    weights = [pack_parts({"format": "asym_w4a8_int8"},
                          asymmetric_parts(8, COLUMNS, codebook=tuple(level * factor
                                                                      for level in TABLE)))
               for factor in (1, 0.5)]
    joined = join_rows(weights)
    assert is_packed(joined)
    assert torch.equal(joined.dequantize(), torch.cat([weight.dequantize() for weight in weights]))


@pytest.mark.parametrize(("settings", "changes", "reason"), [
    ({}, {"weight_s_rel": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "s_rel of float8_e4m3fn"),
    ({}, {"weight_s_rel": None}, "it has no weight_s_rel"),
    ({}, {"weight_s_channel": torch.ones(3)}, r"weight_s_channel of float32 \(3,\)"),
    ({}, {"weight_codebook": torch.ones(8)}, r"weight_codebook of float32 \(8,\)"),
    ({"group_size": 24}, {}, "bits a value"), ({"group_size": "x"}, {}, "bits a value"),
    ({"convrot_groupsize": 8}, {}, "groups of 8"),
])
def test_asymmetric_parts_that_do_not_belong_together_are_a_sentence(settings, changes, reason):
    parts = asymmetric_parts(ROWS, COLUMNS) | changes
    parts = {name: part for name, part in parts.items() if part is not None}
    with pytest.raises(PartError, match=reason):
        pack_parts({"format": "asym_w4a8_int8"} | settings, parts)


@pytest.mark.parametrize("zeros", ["weight_zeros", "weight_zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_awq_values_are_those_of_the_formula(dtype, zeros):
    parts, expected = awq_weight(ROWS, COLUMNS, dtype)
    parts[zeros] = parts.pop("weight_zeros")
    packed = pack_parts({"format": "awq_w4a16"}, parts)
    assert torch.equal(packed.dequantize(), expected)
    assert packed.nbytes == sum(part.nbytes for part in parts.values())
    assert format_named(packed.params.format.name) is packed.params.format
    assert torch.equal(take_rows(packed, slice(3, 9)).dequantize(), expected[3:9])
    for changes in ({"weight_scale": torch.ones(7, ROWS)}, {zeros: parts[zeros].double()}):
        with pytest.raises(PartError, match="weight_(zeros|scale) "):
            pack_parts({"format": "awq_w4a16"}, parts | changes)


def test_scales_of_groups_in_float32_are_left_to_the_host():
    parts = asymmetric_parts(ROWS, COLUMNS)
    parts["weight_s_rel"] = parts["weight_s_rel"].float()
    assert pack_parts({"format": "asym_w4a8_int8"}, parts) is None


@pytest.mark.parametrize("name", ["nvfp4", "fp8 E4M3", "int8 of rows"])
def test_factors_of_the_input_become_those_of_the_columns(name, weight):
    settings, parts, expected = written(name, weight)
    factors = torch.rand(COLUMNS) + 0.5
    packed = pack_parts(settings, parts | {"pre_quant_scale": factors})
    assert is_packed(packed) and torch.equal(packed.dequantize(), expected * factors)
    assert format_named(packed.params.format.name) is packed.params.format
    assert packed.nbytes < 1.05 * (sum(part.nbytes for part in parts.values()) + factors.nbytes)
    joined = join_rows([take_rows(packed, slice(9, 30)), take_rows(packed, slice(0, 5))])
    assert is_packed(joined)
    assert torch.equal(joined.dequantize(), torch.cat([packed.dequantize()[9:30],
                                                       packed.dequantize()[:5]]))
    input = torch.randn(3, COLUMNS)
    out = product.linear(input, packed)
    assert (out - (input * factors) @ expected.T).abs().max() < 1e-5 * out.abs().max()
    for wrong in (factors[:COLUMNS // 2], torch.ones(2 * COLUMNS)):
        with pytest.raises(PartError, match="pre_quant_scale is float32"):
            pack_parts(settings, parts | {"pre_quant_scale": wrong})


def test_factors_leave_out_the_columns_of_the_padding(weight):
    settings, parts, expected = written("nvfp4", weight[:, :500])
    factors = torch.rand(500) + 0.5
    packed = pack_parts(settings, parts | {"pre_quant_scale": factors})
    assert torch.equal(packed.dequantize()[:, :500], expected * factors)


def float8(weight):
    return weight.clamp(-1, 1).mul(400).to(torch.float8_e4m3fn)


def test_scales_of_rows_and_of_blocks(weight):
    codes, rows = float8(weight), torch.rand(ROWS) + 0.5
    expected = codes.float() * rows[:, None]
    for shape in ((ROWS,), (ROWS, 1)):
        parts = {"weight": codes, "weight_scale": rows.view(shape)}
        for name in ("float8_e4m3fn_rowwise", "float8_e4m3fn"):
            assert torch.equal(pack_parts({"format": name}, parts).dequantize(), expected)
    blocks = torch.rand(ROWS // 16, COLUMNS // 64) + 0.5
    expected = codes.float() * blocks.repeat_interleave(16, 0).repeat_interleave(64, 1)
    parts = {"weight": codes, "weight_scale": blocks}
    packed = pack_parts({"format": "float8_e4m3fn_blockwise"}, parts)
    assert torch.equal(packed.dequantize(), expected)
    columns = torch.rand(ROWS, COLUMNS // 64, 1) + 0.5
    parts = {"weight": codes, "weight_scale": columns}
    packed = pack_parts({"format": "float8_e4m3fn_block3d"}, parts)
    assert torch.equal(packed.dequantize(),
                       codes.float() * columns.squeeze(2).repeat_interleave(64, 1))
    codes = (weight * 1000).round().clamp(-127, 127).to(torch.int8)
    parts = {"weight": codes, "weight_scale": blocks[:, ::2]}
    packed = pack_parts({"format": "int8_blockwise"}, parts)
    assert torch.equal(packed.dequantize(), codes.float() * blocks[:, ::2].repeat_interleave(
        16, 0).repeat_interleave(128, 1))


def test_scales_of_a_square_weight_belong_to_its_rows():
    """ComfyUI takes a scale of (N,) for one of the columns."""
    codes = torch.randint(-127, 128, (32, 32), dtype=torch.int8)
    scale = torch.rand(32)
    packed = pack_parts({"format": "int8_tensorwise"}, {"weight": codes, "weight_scale": scale})
    assert torch.equal(packed.dequantize(), codes.float() * scale[:, None])


def test_the_marker_of_int8_fast_names_no_format(weight):
    settings, parts, expected = written("int8, rotated", weight)
    del settings["format"]
    packed = pack_parts(settings | {"per_row": True, "convrot_groupsize": 256}, parts)
    assert (packed.dequantize() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_every_byte_of_fp8_has_its_value():
    for name, dtype in (("float8_e4m3fn", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)):
        codes = torch.arange(256).to(torch.uint8).view(1, 256).view(dtype)
        parts = {"weight": codes, "weight_scale": torch.tensor(0.75)}
        packed = pack_parts({"format": name}, parts)
        torch.testing.assert_close(packed.dequantize(), codes.float() * 0.75, rtol=0, atol=0,
                                   equal_nan=True)


def test_a_device_without_fp8_and_int8_products_computes_all_formats(weight, monkeypatch):
    packed = {name: pack_parts(*written(name, weight)[:2]) for name in WRITTEN}
    expected = {name: product.dequantize(one, torch.float32) for name, one in packed.items()}
    for one in packed.values():  # as on a device that was not used before
        one.params.format._constants.clear()
        assert all(tensor.dtype in (torch.uint8, torch.float32) for tensor in packed_tensors(one))

    def refused(*args, **kwargs):
        raise NotImplementedError("this device has no such product")

    monkeypatch.setattr(torch, "_int_mm", refused)
    monkeypatch.setattr(torch, "_scaled_mm", refused)
    for name, one in packed.items():
        assert torch.equal(product.dequantize(one, torch.float32), expected[name])


FP8 = torch.zeros(64, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("settings", "changes", "reason"), [
    ({"format": "float8_e4m3fn"}, {"weight_scale": None}, "it has no weight_scale"),
    ({"format": "float8_e4m3fn"}, {"weight": FP8, "weight_scale": torch.ones(7)},
     r"weight_scale of float32 \(7,\), expected one number or N numbers of any .* with N = 64"),
    ({"format": "float8_e4m3fn"}, {"weight": FP8.char()},
     "weight of int8 .* of float8_e4m3fn, float8_e5m2 or uint8"),
    ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100}, {}, "groups of 100"),
    ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "x"}, {}, "groups of 0"),
    ({"format": "nvfp4"}, {"weight_scale_2": torch.ones(1)}, r"weight_scale of float32 \(64,\)"),
    ({"format": "nvfp4"}, {"weight_scale_2": torch.ones(1), "weight_scale": FP8},
     r"its weight_scale is .*, expected \(128, 8\)"),
    ({"format": "mxfp8"}, {"weight": FP8, "weight_scale": None}, "it has no weight_scale"),
    ({"format": "float8_e4m3fn_blockwise"}, {"weight": FP8, "weight_scale": torch.ones(3, 3)},
     r"\(3, 3\), which do not divide a weight of \(64, 64\)"),
    ({"format": "int8_tensorwise"}, {"weight": torch.zeros(4, 4)},
     r"it has weight of float32 \(4, 4\), expected \(N, K\) of int8 or uint8"),
])
def test_parts_that_do_not_belong_together_are_a_sentence(settings, changes, reason):
    parts = {"weight": torch.zeros(64, 64, dtype=torch.int8), "weight_scale": torch.ones(64)}
    parts = {name: part for name, part in (parts | changes).items() if part is not None}
    with pytest.raises(PartError, match=reason):
        pack_parts(settings, parts)


def test_a_part_that_would_be_left_out_is_left_to_the_host():
    parts = {"weight": torch.zeros(64, 64, dtype=torch.int8), "weight_scale": torch.ones(64)}
    assert pack_parts({"format": "int8_tensorwise"}, parts | {"weight_correction": parts["weight"]}
                      ) is None
    assert pack_parts({"format": "another"}, parts) is None


def test_every_format_of_the_host_is_read():
    assert not set(QUANT_ALGOS) - set(COMFYUI_FORMATS)


def test_a_file_of_all_formats_becomes_packed_tensors(weight, tmp_path):
    tensors, expected = {}, {}
    for number, name in enumerate(WRITTEN):
        settings, parts, expected[f"{number}.weight"] = written(name, weight)
        tensors |= {f"{number}.{part}": value for part, value in parts.items()}
        tensors[f"{number}.comfy_quant"] = mark_of(settings)
        tensors[f"{number}.input_scale"] = torch.tensor(2.0)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    file = open_weights(str(path))
    weights = as_tensors(file, file.state_dict())
    assert set(weights) == set(expected) and all(map(is_packed, weights.values()))
    for name, values in expected.items():
        torch.testing.assert_close(weights[name].dequantize(), values, rtol=1e-5, atol=1e-7)


# --- svdquant_w4a4

SHIFT = 0.171875


def svdquant_parts(dtype=torch.bfloat16, rank=8):
    """The parts of a natural svdquant_w4a4, and the values of its weight with and without the low
    rank, float32."""
    rows, columns = 256, 128
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(columns // 64, rows, generator=generator) * 0.01).to(dtype)
    smooth = (torch.rand(columns, generator=generator) + 0.5).to(dtype)
    down = (torch.randn(columns, rank, generator=generator) * 0.05).to(dtype)
    up = (torch.randn(rows, rank, generator=generator) * 0.05).to(dtype)
    parts = {"weight": codes[:, ::2] & 15 | codes[:, 1::2] << 4, "weight_scale": scale,
             "smooth_factor": smooth, "proj_down": down, "proj_up": up}
    main = codes.float() * scale.t().repeat_interleave(64, 1).float() / smooth.float()
    return parts, main + up.float() @ down.float().t(), main


def in_tiles(parts):
    """The same in the kitchen's tiles."""
    rows, half = parts["weight"].shape
    codes = parts["weight"].view(rows // 128, 32, 4, half // 32, 32).permute(0, 3, 1, 2, 4)
    return parts | {
        "weight": codes.reshape(rows // 128, half // 32, 32, 128),
        "weight_scale": parts["weight_scale"].view(half // 32, rows // 128, 128).transpose(
            0, 1).contiguous(),
        "proj_up": parts["proj_up"].view(rows // 128, 128, -1).transpose(1, 2).contiguous()}


SVDQUANT = {"format": "svdquant_w4a4"}
FORMS = {"natural": dict, "tiles": in_tiles, "long names": lambda parts: {
    name if name.startswith("weight") else f"weight_{name}": part for name, part in parts.items()}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_svdquant_has_its_values_in_every_form(form, dtype):
    parts, expected, _ = svdquant_parts(dtype)
    packed = pack_parts(SVDQUANT, FORMS[form](parts))
    assert is_packed(packed) and packed.shape == (256, 128)
    assert (packed.dequantize() - expected).abs().max() < 1e-6
    without = {name: part for name, part in parts.items() if "proj" not in name}
    assert pack_parts(SVDQUANT, without).params.format.name.startswith("SVDQUANT_INT4")


def test_tiles_of_svdquant_are_those_of_the_kitchen():
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.svdquant")
    if not hasattr(kitchen, "_tile_packed_weight_to_row_major"):
        pytest.skip("this comfy-kitchen has no tiles")
    parts, _, _ = svdquant_parts()
    tiles = in_tiles(parts)
    assert torch.equal(kitchen._tile_packed_weight_to_row_major(tiles["weight"]), parts["weight"])
    assert torch.equal(kitchen._tile_packed_scales_to_natural(tiles["weight_scale"]),
                       parts["weight_scale"])
    assert torch.equal(kitchen._tile_packed_lora_up_to_natural(tiles["proj_up"]), parts["proj_up"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_unsigned", [False, True])
def test_a_shift_of_svdquant_goes_into_the_bias(form, is_unsigned, tmp_path):
    parts, expected, main = svdquant_parts()
    settings, bias = SVDQUANT | {"act_unsigned": is_unsigned}, torch.randn(256)
    tensors = {f"a.{name}": part.contiguous() for name, part in FORMS[form](parts).items()}
    tensors["a.comfy_quant"] = mark_of(settings)
    path = tmp_path / "model.safetensors"
    save_file(tensors | {"a.bias": bias}, path)
    file = open_weights(path)
    out = as_tensors(file, file.state_dict(), formats=COMFYUI_FORMATS)
    assert set(out) == {"a.weight", "a.bias"}
    assert (out["a.weight"].dequantize() - expected).abs().max() < 1e-6
    shifted = bias + main.sum(1) * SHIFT if is_unsigned else bias
    assert (out["a.bias"] - shifted).abs().max() < 1e-6
    if is_unsigned:
        save_file(tensors, tmp_path / "without.safetensors")
        file = open_weights(tmp_path / "without.safetensors")
        with pytest.raises(ValueError, match="svdquant_w4a4: act_unsigned needs a bias"):
            as_tensors(file, file.state_dict(), formats=COMFYUI_FORMATS)


@pytest.mark.parametrize("bias", [
    torch.ones(0), torch.ones(1), torch.ones(()), torch.ones(128), torch.ones(256, 1),
    torch.ones(256).int()], ids=lambda bias: f"{tuple(bias.shape)} {bias.dtype}")
def test_another_bias_than_a_shift_needs_is_a_sentence(bias):
    parts, _, _ = svdquant_parts()
    with pytest.raises(PartError, match="its bias is .*, expected 256 numbers"):
        shifted_bias(pack_parts(SVDQUANT | {"act_unsigned": True}, parts), bias)


@pytest.mark.parametrize(("part", "tensor"), [
    ("smooth_factor", torch.ones(64).bfloat16()), ("weight_scale", torch.ones(2, 128).bfloat16()),
    ("weight_scale", torch.ones(2, 256)), ("weight_scale", torch.ones(1, 2, 256).bfloat16()),
    ("weight_scale", torch.ones(()).bfloat16()), ("proj_up", torch.ones(256, 3).bfloat16()),
    ("proj_down", torch.ones(64, 8).bfloat16()), ("weight", torch.ones(2, 2, 3, 4).char())])
def test_parts_of_svdquant_that_do_not_fit_are_named(part, tensor):
    parts, _, _ = svdquant_parts()
    with pytest.raises(PartError, match=f"it has {part} of .*, expected"):
        pack_parts(SVDQUANT, parts | {part: tensor})
    with pytest.raises(PartError, match="it has no smooth_factor"):
        pack_parts(SVDQUANT, {"weight": parts["weight"], "weight_scale": parts["weight_scale"]})


@pytest.mark.parametrize("settings", [{}, {"act_unsigned": True}])
@pytest.mark.parametrize("left_out", [(), ("proj_down", "proj_up")])
def test_svdquant_takes_no_further_factors_of_the_input(left_out, settings):
    parts = {name: part for name, part in svdquant_parts()[0].items() if name not in left_out}
    with pytest.raises(PartError, match="its pre_quant_scale is"):
        pack_parts(SVDQUANT | settings, parts | {"pre_quant_scale": torch.ones(128)})
