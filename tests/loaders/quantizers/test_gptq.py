"""Weights of GPTQ, AutoRound and AWQ, against small writers and against their packages."""
import importlib.util
import logging
import random
import re
import types

import pytest
import torch
from oracles import installed
from quantizer_writers import awq, gptq, quantize, save_config
from safetensors.torch import save_file

from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.gptq import QUANTIZER
from featherweight.ops.tensor.packed_layout import is_packed
from featherweight.ops.tensor.row_slicing import take_rows

V1 = {"quant_method": "gptq", "bits": 4}
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}


def weight(rows=96, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def read(folder, parts, **settings):
    """The weights of a folder with one layer, of a file where there are no settings."""
    save_file({f"L.{name}": value.contiguous() for name, value in parts.items()},
              folder / "model.safetensors")
    if settings:
        save_config(folder, **settings)
        return open_weights(folder).state_dict()
    return open_weights(folder / "model.safetensors").state_dict()


def read_weight(folder, parts, **settings):
    weights = read(folder, parts, **settings)
    assert set(weights) == {"L.weight"} and is_packed(weights["L.weight"])
    return weights["L.weight"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_values_of_gptq(bits, symmetric, dtype, tmp_path):
    parts, expected = gptq(weight(), bits, 64, symmetric=symmetric, dtype=dtype)
    packed = read_weight(tmp_path, parts, **V1)
    assert torch.equal(packed.dequantize(), expected)
    del parts["g_idx"]
    assert packed.nbytes <= 1.05 * sum(value.nbytes for value in parts.values())


@pytest.mark.parametrize("seed", range(24))
def test_values_of_gptq_of_any_width(seed, tmp_path):
    """Groups that do not divide the columns, and of which the last is short."""
    rng = random.Random(seed)
    group = rng.choice([32, 64, 128])
    columns = rng.choice([96, 192, 960, 32 * rng.randint(1, 32)])
    bits, symmetric = rng.choice([2, 3, 4, 8]), rng.random() < 0.5
    parts, expected = gptq(weight(32, columns, seed), bits, group, symmetric=symmetric)
    if rng.random() < 0.7:
        del parts["g_idx"]
    packed = read_weight(tmp_path, parts, **V1, group_size=group)
    assert torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize(("columns", "group"), [(96, 64), (192, 128), (960, 128), (384, 128),
                                                (128, 64), (256, 32), (48, 32), (96, 0)])
def test_groups_without_a_config_are_of_a_length_that_writers_offer(columns, group, tmp_path):
    parts, expected = gptq(weight(32, columns), 4, group, symmetric=True)
    del parts["g_idx"]
    assert torch.equal(read_weight(tmp_path, parts).dequantize(), expected)


@pytest.mark.parametrize(("stored_less", "settings"), [
    (1, V1), (0, V1 | {"checkpoint_format": "gptq_v2"}), (1, V1 | {"checkpoint_format": "gptq"}),
    (0, V1 | {"format": "gptq_v2"}),
    (1, AUTO_ROUND), (1, {"quant_method": "auto-round"}),
    (0, {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}),
    (0, {"quant_method": "intel/auto-round", "packing_format": "auto_round"})], ids=str)
def test_the_config_says_whether_zeros_are_stored_less_one(stored_less, settings, tmp_path):
    parts, expected = gptq(weight(), stored_less=stored_less)
    assert torch.equal(read_weight(tmp_path, parts, **settings).dequantize(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_none_is_stored_as_the_largest(bits, tmp_path):
    parts, expected = gptq(weight().abs(), bits)
    assert torch.equal(read_weight(tmp_path, parts, **V1).dequantize(), expected)


@pytest.mark.parametrize("stored_less", [0, 1])
def test_zeros_of_half_the_range_need_no_config_and_no_memory(stored_less, tmp_path):
    parts, expected = gptq(weight(), symmetric=True, stored_less=stored_less)
    packed = read_weight(tmp_path, parts)
    assert torch.equal(packed.dequantize(), expected)
    assert packed.nbytes == parts["qweight"].nbytes + parts["scales"].nbytes


def test_other_zeros_need_a_config(tmp_path):
    parts, _ = gptq(weight())
    with pytest.raises(WeightFileError, match="model.safetensors: 'L', packed by GPTQ, .* does not"
                                              " say whether zeros .* pick the folder with its"):
        read(tmp_path, parts)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_columns_of_a_group_may_lie_apart(bits, symmetric, tmp_path):
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    parts, expected = gptq(weight(), bits, symmetric=symmetric, order=order)
    packed = read_weight(tmp_path, parts, **V1)
    assert torch.equal(packed.dequantize(), expected)
    assert packed.nbytes <= 1.05 * sum(value.nbytes for value in parts.values())
    part = take_rows(packed, slice(32, 64))
    assert is_packed(part) and torch.equal(part.dequantize(), expected[32:64])


def test_the_last_group_may_be_short(tmp_path):
    values = weight(columns=160)
    parts, expected = gptq(torch.nn.functional.pad(values, (0, 32)), group=64)
    parts["qweight"], expected = parts["qweight"][:20], expected[:, :160]
    parts["g_idx"] = parts["g_idx"][:160]
    assert torch.equal(read_weight(tmp_path, parts, **V1).dequantize(), expected)
    del parts["g_idx"]
    for settings in (AUTO_ROUND, AUTO_ROUND | {"group_size": 64}):
        assert torch.equal(read_weight(tmp_path, parts, **settings).dequantize(), expected)


def test_groups_of_no_length_that_writers_offer_are_refused(tmp_path):
    parts, _ = gptq(weight(columns=160), group=16)
    parts = {"qweight": parts["qweight"], "scales": parts["scales"][:7],
             "qzeros": parts["qzeros"][:7]}
    with pytest.raises(WeightFileError, match="its 7 groups do not divide its 160 columns"):
        read(tmp_path, parts, **AUTO_ROUND)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (8, 2), (2048, 4128)])
def test_values_of_awq(symmetric, shape, tmp_path):
    parts, expected = awq(weight(*shape), group=min(32, shape[1]), symmetric=symmetric)
    packed = read_weight(tmp_path, parts)
    assert torch.equal(packed.dequantize(), expected)
    assert packed.nbytes <= 1.05 * sum(value.nbytes for value in parts.values()) or shape[1] < 32


def without(parts, name):
    return {key: value for key, value in parts.items() if key != name}


BAD = {
    "no zeros": (lambda parts: without(parts, "qzeros"), "other parts .* are missing"),
    "no scales": (lambda parts: without(parts, "scales"), "other parts .* are missing"),
    "words of another type": (lambda parts: parts | {"qweight": parts["qweight"].short()},
                              r"it has qweight int16 \(16, 96\), .* expected int32 words of GPTQ"),
    "rows missing": (lambda parts: parts | {"qweight": parts["qweight"][:, :32]},
                     "expected int32 words of GPTQ"),
    "groups missing": (lambda parts: parts | {"qzeros": parts["qzeros"][:2]},
                       "expected int32 words of GPTQ"),
    "five bits": (lambda parts: parts | {"qzeros": torch.zeros(4, 15, dtype=torch.int32)},
                  "it has 5 bits a value, expected 2, 3, 4, 8"),
    "scales of integers": (lambda parts: parts | {"scales": parts["scales"].short()},
                           "scales int16"),
    "a group out of range": (lambda parts: parts | {"g_idx": parts["g_idx"] + 1},
                             "columns do not name one of its 4 groups each"),
    "groups of other columns": (lambda parts: parts | {"g_idx": parts["g_idx"][:8]},
                                "columns do not name"),
    "no dimension": (lambda parts: parts | {"scales": torch.ones(1).half()}, "expected int32"),
    "nothing": (lambda parts: parts | {"qweight": parts["qweight"][:0]}, "expected int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_belong_together_are_a_sentence(case, tmp_path):
    change, message = BAD[case]
    with pytest.raises(WeightFileError, match=f"model.safetensors: .*{message}") as error:
        read(tmp_path, change(gptq(weight())[0]), **V1)
    assert "\n" not in str(error.value) and "'L" in str(error.value)


@pytest.mark.parametrize("sides", [("scales", "scaled_zeros"), ("wscales", "smooth_factor")])
def test_nunchakus_words_are_left_to_its_reader(sides):
    assert not QUANTIZER.is_in([f"L.{name}" for name in ("qweight", *sides)], {}, str)


def test_such_files_are_read_by_this_pack(tmp_path):
    for parts in (gptq(weight())[0], awq(weight())[0]):
        save_file({f"L.{name}": value.contiguous() for name, value in parts.items()},
                  tmp_path / "a.safetensors")
        assert needs_own_reader(str(tmp_path / "a.safetensors"))


# --- the packages themselves
# ------------------------------------------------------------------------------------------------

@pytest.mark.heavy
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("module_name", ["qlinear_torch", "qlinear_torch_zp"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(128, 64), (96, 64), (960, 128), (320, 128)])
def test_values_are_those_of_auto_round(columns, group, bits, module_name, symmetric, tmp_path,
                                        monkeypatch):
    monkeypatch.syspath_prepend(installed("auto-round==0.16.1", "loguru"))
    module = load_module(monkeypatch, f"auto_round_extension/torch/{module_name}.py")
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
    packed = read_weight(tmp_path, stored, quant_method="auto-round", packing_format=packing,
                         group_size=group)
    if columns % group == 0:  # its own layer does not run otherwise; it multiplies in float16
        identity = torch.eye(columns)
        assert torch.equal(packed.dequantize().half(), layer(identity).t().half())
    assert torch.allclose(packed.dequantize(), dense, atol=1e-6)


def load_module(monkeypatch, path):
    """A module of auto-round without the package, which imports much more than it needs."""
    folder = installed("auto-round==0.16.1", "loguru")
    source = (folder / path).read_text()
    source = re.sub(r"^from auto_round[^\n(]*\([^)]*\)|^from auto_round.*$", "", source, flags=re.M)
    module = types.ModuleType("auto_round_module")
    other = {} if path.endswith("qlinear_torch.py") else vars(
        load_module(monkeypatch, "auto_round_extension/torch/qlinear_torch.py"))
    module.__dict__.update(
        other, GenericBitPackingMixin=type("Mixin", (), {}),
        requires_generic_bit_packing=lambda bits: False,
        SUPPORTED_BITS=[2, 3, 4, 8], logger=logging.getLogger(),
        get_packing_device=lambda device: torch.device("cpu"))
    exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102  a package's own source
    return module


@pytest.mark.heavy
def test_values_are_those_of_autoawq(tmp_path):
    path = installed("autoawq==0.2.9") / "awq" / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("awq_packing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generator = torch.Generator().manual_seed(0)

    def words(*shape):
        return torch.randint(-2**31, 2**31, shape, generator=generator).int()

    codes, zeros, scales = words(256, 16), words(2, 16), torch.rand(2, 128).half() * 0.01
    packed = read_weight(tmp_path, {"qweight": codes, "qzeros": zeros, "scales": scales})
    expected = module.dequantize_gemm(codes, zeros, scales, 4, 128)
    assert torch.equal(packed.dequantize().half(), expected.t())
