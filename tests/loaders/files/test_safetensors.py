"""safetensors files: what the reader makes of those that the real bitsandbytes writes, and of
damaged ones."""
import gc
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from devtools.files.bnb_files import quantised, write_bnb, write_bnb_int8
from featherweight.loaders.files.container import CONTAINERS, WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.files.safetensors import SafetensorsFile
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.tensor.packed_layout import is_packed, packed_tensors

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = {
    "whole rows": (24, 256), "blocks cross rows": (10, 96), "a short last block": (7, 72),
    "less than a block": (3, 4)
}
STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def random(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if is_packed(tensor) else tensor.float()


def parts_of(shape=(16, 64), nested=False, quant_type="nf4", **others) -> dict[str, torch.Tensor]:
    """The tensors of a file of one 4-bit weight `a.weight`."""
    parts, _ = quantised(random(*shape), quant_type, nested=nested)
    return {f"a.weight{part}": tensor for part, tensor in parts.items()} | others


def with_state(parts: dict, without=(), **fields) -> dict[str, torch.Tensor]:
    key = next(key for key in parts if ".quant_state." in key)
    state = json.loads(bytes(parts[key].tolist())) | fields
    for field in without:
        del state[field]
    return parts | {key: text(json.dumps(state))}


def text(string: str) -> torch.Tensor:
    return torch.tensor(list(string.encode()), dtype=torch.uint8)


def without(parts: dict, *keys) -> dict[str, torch.Tensor]:
    assert set(keys) <= set(parts)
    return {key: tensor for key, tensor in parts.items() if key not in keys}


def saved(path: Path, tensors: dict) -> Path:
    save_file(tensors, str(path))
    return path


def build(header, data: bytes = bytes(64)) -> bytes:
    """A file put together by hand. header: JSON text, or what to make it of."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def info(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# --- bitsandbytes' files
# --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("block_length", [64, 128, 4096])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes(tmp_path, quant_type, nested, block_length, storage):
    shapes = {
        name: shape for name, shape in SHAPES.items()
        if shape[0] * shape[1] % (2 * storage.itemsize) == 0
    }
    tensors = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    seen = write_bnb(tmp_path / "a.safetensors", tensors | {"norm.scale": random(9)}, quant_type,
                     block_length, nested, storage, prefix="model.diffusion_model.")
    found = open_weights(tmp_path / "a.safetensors").state_dict()
    assert set(found) == {f"model.diffusion_model.{name}" for name in seen}
    for name, expected in seen.items():
        tensor = found[f"model.diffusion_model.{name}"]
        assert tensor.shape == expected.shape and torch.equal(values_of(tensor), expected)
        assert is_packed(tensor) == name.endswith(".weight")
        if is_packed(tensor):
            assert tensor.layout_cls.format is FORMATS[quant_type.upper()].of_block_length(
                block_length
            )


def test_values_of_an_odd_number_of_codes(tmp_path):
    seen = write_bnb(tmp_path / "a.safetensors", {"a.weight": random(5, 45)})
    assert torch.equal(
        open_weights(tmp_path / "a.safetensors").state_dict()["a.weight"].dequantize(),
        seen["a.weight"])


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_values_equal_bitsandbytes_dequantize_of_the_state_in_the_file(tmp_path, nested):
    write_bnb(tmp_path / "a.safetensors", {"a.weight": random(600, 256)}, nested=nested)
    stored = load_file(tmp_path / "a.safetensors")
    state = functional.QuantState.from_dict(
        {
            key.removeprefix("a.weight."): tensor
            for key, tensor in stored.items() if key != "a.weight"
        }, torch.device("cpu"))
    expected = functional.dequantize_4bit(stored["a.weight"], state)
    assert torch.equal(
        open_weights(tmp_path / "a.safetensors").state_dict()["a.weight"].dequantize(), expected)


@pytest.mark.parametrize(
    ("block_length", "nested", "limit"),
    [(64, False, 1.02), (128, False, 1.02), (64, True, 1.1), (128, True, 1.05)],
)
def test_bytes_held_by_the_bytes_of_the_file(tmp_path, block_length, nested, limit):
    path = tmp_path / "a.safetensors"
    write_bnb(path, {f"{layer}.weight": random(512, 1024) for layer in "ab"},
              block_length=block_length, nested=nested)
    found = open_weights(path).state_dict().values()
    assert sum(
        part.nbytes for tensor in found for part in packed_tensors(tensor)
    ) <= limit * os.path.getsize(path)


def test_codes_and_plain_tensors_are_the_pages_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_bnb(
        path, {
            "a.weight": random(64, 64), "b.weight": random(64, 64), "b.bias": random(3).half(),
            "c.bias": random(5)
        })
    file = open_weights(path)
    first, again = file.state_dict(), file.state_dict()
    # the case that is easily copied
    assert {file.entries[name].offset % 8 for name in ("a.weight", "b.weight")} != {0}
    for name, tensor in first.items():
        pairs = (
            zip(*map(packed_tensors, (tensor, again[name])))
            if is_packed(tensor)
            else [(tensor, again[name])]
        )
        assert all(one.data_ptr() == other.data_ptr() for one, other in pairs), name


def test_a_file_of_mixed_layers_is_decided_key_by_key(tmp_path):
    host = {
        "fp8.weight": random(8, 8).to(torch.float8_e4m3fn), "fp8.weight_scale": torch.tensor(0.5),
        "fp8.comfy_quant": text('{"format": "float8_e4m3fn"}'), "half.weight": random(4, 4).half(),
        "nvfp4.weight": torch.zeros(16, 8, dtype=torch.uint8),
        "nvfp4.weight_scale_2": torch.tensor(1.0), "ids": torch.arange(3),
        "flags": torch.tensor([True, False]), "scalar": torch.tensor(2, dtype=torch.bfloat16)
    }
    parts = parts_of() | {
        f"t5.{key}": tensor for key, tensor in parts_of((4, 256), True, "fp4").items()
    }
    found = open_weights(saved(tmp_path / "a.safetensors", parts | host)).state_dict()
    assert {name for name, tensor in found.items() if is_packed(tensor)} == {
        "a.weight",
        "t5.a.weight",
    }
    assert set(found) == {"a.weight", "t5.a.weight", *host}
    for name, tensor in host.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8),
                           tensor.view(-1).view(torch.uint8))


def test_int8_is_packed(tmp_path):
    seen = write_bnb_int8(tmp_path / "a.safetensors",
                          {"a.weight": random(8, 16), "a.bias": random(8)}, prefix="m.")
    found = open_weights(tmp_path / "a.safetensors").state_dict()
    assert set(found) == {"m.a.weight", "m.a.bias"} and is_packed(found["m.a.weight"])
    assert torch.equal(found["m.a.weight"].dequantize(), seen["a.weight"])


def test_int8_scales_beside_the_weight_are_read_too(tmp_path):
    values, scales = torch.ones(4, 8, dtype=torch.int8), random(4).abs()
    found = open_weights(
        saved(tmp_path / "a.safetensors",
              {"a.weight": values, "a.weight.SCB": scales})).state_dict()
    assert torch.equal(
        found["a.weight"].dequantize(), (scales / 127)[:, None].expand(4, 8)
    ) and set(found) == {"a.weight"}


def test_metadata_entries_and_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(parts_of() | {"b": torch.zeros(0, 3), "c": random(2, 3)}, str(path),
              {"format": "pt", "note": "x"})
    file = open_weights(path)
    assert type(file) is SafetensorsFile is CONTAINERS[b"{"] and dict(file.metadata) == {
        "format": "pt",
        "note": "x",
    }
    stored = load_file(path)
    assert set(file.entries) == set(stored) and file.tensor_bytes == sum(
        tensor.nbytes for tensor in stored.values()
    )
    assert (
        file.paths == (path,) == (file.path,)
        and file.entries["c"].shape == (2, 3)
        and file.entries["c"].format == "F32"
    )
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in stored.items())
    assert file.state_dict()["b"].shape == (0, 3)


def test_a_split_model_is_opened_by_any_of_its_files(tmp_path):
    parts = parts_of() | {"b.weight": random(4, 4)}
    for number, keys in enumerate(
        [["a.weight", "b.weight"], [key for key in parts if key.startswith("a.weight.")]], 1):
        save_file({key: parts[key] for key in keys},
                  str(tmp_path / f"m-0000{number}-of-00002.safetensors"))
    for number in (1, 2):
        file = open_weights(tmp_path / f"m-0000{number}-of-00002.safetensors")
        assert set(file.state_dict()) == {"a.weight", "b.weight"} and len(file.paths) == 2
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(
            WeightFileError,
            match="^m-00002-of-00002.safetensors .*missing in its folder: m-00001-of-00002"):
        open_weights(tmp_path / "m-00002-of-00002.safetensors")
    with pytest.raises(WeightFileError, match="does not exist"):
        open_weights(tmp_path / "m-00001-of-00002.safetensors")


def test_one_tensor_in_two_files_is_refused(tmp_path):
    for number in (1, 2):
        save_file({"a": random(4)}, str(tmp_path / f"m-0000{number}-of-00002.safetensors"))
    with pytest.raises(
            WeightFileError,
            match="m-00002-of-00002.safetensors: 'a' is in m-00001-of-00002.safetensors too"):
        open_weights(tmp_path / "m-00001-of-00002.safetensors")


def test_the_file_is_released_with_its_last_tensor(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    path = saved(tmp_path / "a.safetensors", parts_of())
    tensors = open_weights(path).state_dict()
    assert str(path) in Path("/proc/self/maps").read_text()
    del tensors
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


# --- bad input
# ------------------------------------------------------------------------------------------------

NF4_STATE = "a.weight.quant_state.bitsandbytes__nf4"
INT8 = {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4)}

BAD_WEIGHTS = {
    "no absmax": (
        without(parts_of(), "a.weight.absmax"),
        "'a.weight.absmax' is missing, the scales of 'a.weight'",
    ),
    "no quant_map": (
        without(parts_of(), "a.weight.quant_map"),
        "'a.weight.quant_map' is missing, the codebook",
    ),
    "no quant_state": (
        without(parts_of(), NF4_STATE),
        "'a.weight.absmax' is part of a bitsandbytes 4-bit weight",
    ),
    "codes alone": (
        {"a.weight": parts_of()["a.weight"]},
        "'a.weight' holds 4-bit codes .* its quant_state is missing",
    ),
    "no codes": (without(parts_of(), "a.weight"), "'a.weight' is missing, but its"),
    "absmax too short": (
        parts_of(**{"a.weight.absmax": random(15)}),
        "absmax' has 15 scales, .* has 16 blocks of 64",
    ),
    "absmax too long": (parts_of(**{"a.weight.absmax": random(17)}), "absmax' has 17 scales"),
    "absmax of integers": (
        parts_of(**{"a.weight.absmax": torch.arange(16)}),
        "absmax' has the type I64, expected F32",
    ),
    "another codebook": (
        parts_of(**{"a.weight.quant_map": random(16)}),
        "quant_map' is not the codebook of nf4",
    ),
    "fp4's codebook": (
        parts_of(**{"a.weight.quant_map": parts_of(quant_type="fp4")["a.weight.quant_map"]}),
        "not the codebook of nf4",
    ),
    "a short codebook": (parts_of(**{"a.weight.quant_map": random(8)}), "not the codebook"),
    "not JSON": (parts_of(**{NF4_STATE: text("{'a': 1")}), f"'{NF4_STATE}' is not a JSON object"),
    "not text": (
        parts_of(**{NF4_STATE: torch.tensor([255, 254], dtype=torch.uint8)}),
        "not a JSON object",
    ),
    "deep JSON": (parts_of(**{NF4_STATE: text("[" * 100000)}), "not a JSON object"),
    "a JSON list": (parts_of(**{NF4_STATE: text("[]")}), "not a JSON object"),
    "an empty quant_state": (
        parts_of(**{NF4_STATE: torch.zeros(0, dtype=torch.uint8)}),
        "not a JSON object",
    ),
    "no shape": (with_state(parts_of(), without=["shape"]), f"'{NF4_STATE}' has no shape"),
    "no block size": (
        with_state(parts_of(), without=["blocksize", "shape"]),
        "has no blocksize and no shape",
    ),
    "no quant_type": (with_state(parts_of(), without=["quant_type"]), "has no quant_type"),
    "a larger shape": (
        with_state(parts_of(), shape=[16, 128]),
        r"the shape \[16, 128\], for which 1024 bytes of codes are expected, but it has 512",
    ),
    "a smaller shape": (
        with_state(parts_of(), shape=[16, 62]),
        "496 bytes of codes are expected, but it has 512",
    ),
    "a shape of null": (with_state(parts_of(), shape=None), "has shape None"),
    "an empty shape": (with_state(parts_of(), shape=[]), r"has shape \[\]"),
    "a negative shape": (with_state(parts_of(), shape=[-16, -64]), "has shape"),
    "a shape of floats": (with_state(parts_of(), shape=[16.0, 64]), "has shape"),
    "a shape of text": (with_state(parts_of(), shape="16x64"), "has shape '16x64'"),
    "an immense shape": (with_state(parts_of(), shape=[10**4000, 10**4000]), "has shape"),
    "another block size": (
        with_state(parts_of(), blocksize=128),
        "has 16 scales, .* has 8 blocks of 128",
    ),
    "an odd block size": (
        with_state(parts_of(), blocksize=65),
        "has blocksize 65; bitsandbytes writes 32, 64",
    ),
    "a block size of text": (with_state(parts_of(), blocksize="64"), "has blocksize '64'"),
    "another quant_type inside": (
        with_state(parts_of(), quant_type="fp4"),
        "contains quant_type 'fp4'",
    ),
    "an unknown quant_type": (
        without(parts_of(), NF4_STATE)
        | {"a.weight.quant_state.bitsandbytes__nf3": parts_of()[NF4_STATE]},
        "names the quant_type 'nf3'; expected nf4 or fp4",
    ),
    "two quant_states": (
        parts_of()
        | {
            "a.weight.quant_state.bitsandbytes__fp4": with_state(parts_of(), quant_type="fp4")[
                NF4_STATE
            ]
        },
        "'a.weight' has two quant_states",
    ),
    "codes of another type": (
        parts_of(**{"a.weight": torch.zeros(512, 1, dtype=torch.int8)}),
        "'a.weight' has the type I8",
    ),
    "no nested scales": (
        without(parts_of(nested=True), "a.weight.nested_absmax"),
        "'a.weight.nested_absmax' is missing",
    ),
    "no nested codebook": (
        without(parts_of(nested=True), "a.weight.nested_quant_map"),
        "'a.weight.nested_quant_map' is missing",
    ),
    "no nested offset": (
        with_state(parts_of(nested=True), without=["nested_offset"]),
        "256 and nested_offset None",
    ),
    "a nested offset of NaN": (
        with_state(parts_of(nested=True), nested_offset=float("nan")),
        "nested_offset nan",
    ),
    "no nested block size": (
        with_state(parts_of(nested=True), without=["nested_blocksize"]),
        "nested_blocksize None",
    ),
    "nested scales too long": (
        parts_of(nested=True, **{"a.weight.nested_absmax": random(2)}),
        "has 2 nested_absmax",
    ),
    "a short nested codebook": (
        parts_of(nested=True, **{"a.weight.nested_quant_map": random(16)}),
        "16 values in its nested",
    ),
    "nested parts of plain scales": (
        parts_of(**{"a.weight.nested_absmax": random(1)}),
        "'a.weight.nested_absmax' is part of",
    ),
    "a lone absmax": (
        {"b.weight.absmax": random(4)},
        "'b.weight.absmax' is part of a bitsandbytes 4-bit weight",
    ),
    "a lone quant_map": ({"b.weight.quant_map": random(16)}, "'b.weight.quant_map' is part of"),
    "lone scales of int8": (
        {"a.SCB": random(4)},
        "'a.weight', to which 'a.SCB' belongs, is missing",
    ),
    "int8 scales of another length": (
        INT8 | {"a.SCB": torch.ones(5)},
        "'a.SCB' has 5 scales of type F32, but 'a.weight' has 4 rows",
    ),
    "a quant_state of scales": (
        parts_of() | {"a.weight.absmax.quant_state.bitsandbytes__nf4": text("{}")},
        "'a.weight.absmax.quant_state",
    ),
    "int8 scales of floats": (INT8 | {"a.weight": random(4, 8)}, r"is F32 \[4, 8\], expected I8"),
    "int8 in tiles": (INT8 | {"a.weight_format": torch.tensor(2, dtype=torch.uint8)}, "tiles"),
    "a lone weight_format": (
        {"a.weight_format": torch.tensor(0, dtype=torch.uint8)},
        "'a.weight_format' is part of",
    ),
    "int8 of two quantisers": (
        INT8 | {"a.comfy_quant": text("{}")},
        "'a.weight' has both 'a.SCB' and 'a.comfy_quant'",
    ),
    "GPTQ": (
        {"a.qweight": torch.zeros(2, 2, dtype=torch.int32), "a.g_idx": torch.arange(2)},
        "GPTQ or AWQ whose other parts",
    ),
    "AWQ": ({"a.qzeros": torch.zeros(2, 2, dtype=torch.int32)}, "GPTQ or AWQ"),
    "nunchaku": (
        {"a.qweight": torch.zeros(2, 2, dtype=torch.int8), "a.wscales": random(2)},
        "'a', quantised by Nunchaku, has a qweight of .* multiples of 128",
    ),
    "quanto": ({"a.weight._data": torch.zeros(2, 2, dtype=torch.int8)}, "quanto"),
    "torchao": ({"a._weight_qdata": torch.zeros(2, 2, dtype=torch.int8)}, "torchao"),
    "torchao without codes": ({"a._weight_scale": random(2)}, "torchao whose _weight_qdata"),
    "MXFP4": ({"a.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 2, dtype=torch.uint8)},
              "experts quantised in MXFP4, which is not supported"),
    "HQQ": ({"a.W_q": torch.zeros(2, 2, dtype=torch.uint8)}, "HQQ"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit_together_are_named(tmp_path, case):
    tensors, message = BAD_WEIGHTS[case]
    file = open_weights(saved(tmp_path / "bad.safetensors", tensors))
    with pytest.raises(WeightFileError, match=message) as error:
        file.state_dict()
    assert (
        str(error.value).startswith("bad.safetensors: ")
        and "\n" not in str(error.value)
        and len(str(error.value)) < 500
    )


BAD_FILES = {
    "empty": (b"", "is empty"),
    "a few bytes": (b"\x10\0\0\0", "it begins with"),
    "no tensors": (build({}), "without a tensor"),
    "a header cut short": (build({"a": info()})[:20], "the header should end at byte"),
    "an immense header": (
        struct.pack("<Q", (1 << 32) - 1) + b"{}",
        "the header should end at byte",
    ),
    "not JSON": (build(b'{"a": }'), "the header is not valid JSON"),
    "not UTF-8": (build(b'{"\xff": 1}'), "the header is not valid JSON"),
    "deep JSON": (build(b'{"a":' + b"[" * 100000), "the header is not valid JSON"),
    "a name twice": (build(b'{"a": 1, "a": 1}'), "a name is in it twice"),
    "metadata of another type": (
        build({"__metadata__": [], "a": info()}),
        "not a JSON object of tensors",
    ),
    "a number for a tensor": (build({"a": 3}), "the description of 'a' is 3"),
    "no offsets": (build({"a": {"dtype": "F32", "shape": [4]}}), "the description of 'a'"),
    "three offsets": (build({"a": info(offsets=(0, 8, 16))}), "the description of 'a'"),
    "a negative offset": (build({"a": info(offsets=(-16, 0))}), "the description of 'a'"),
    "a shape of text": (build({"a": info(shape="4")}), "the description of 'a'"),
    "an immense shape": (build({"a": info(shape=(1 << 40, 1 << 40))}), "the description of 'a'"),
    "an immense empty shape": (
        build({"a": info(shape=(0, 1 << 59, 1 << 59), offsets=(0, 0))}),
        "the description of 'a'",
    ),
    "an unknown type": (build({"a": info("F6_E2M3")}), "'a' has the type 'F6_E2M3'.*Supported are"),
    "a type of another kind": (build({"a": info(["F32"])}), "has the type"),
    "a shape of other bytes": (
        build({"a": info(shape=(5,))}),
        r"shape \[5\] takes 20 bytes, but its data_offsets span 16",
    ),
    "data cut short": (build({"a": info()}, bytes(15)), "'a' should end at byte"),
    "tensors that overlap": (
        build({"a": info(), "b": info(offsets=(8, 24))}),
        "'a' and 'b' overlap",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_file_is_refused(tmp_path, case):
    content, message = BAD_FILES[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(WeightFileError, match=message) as error:
        open_weights(tmp_path / "bad.safetensors")
    assert (
        str(error.value).startswith("bad.safetensors")
        and "\n" not in str(error.value)
        and len(str(error.value)) < 500
    )


def test_every_file_cut_short_is_refused(tmp_path):
    path = saved(tmp_path / "bad.safetensors", parts_of((4, 64)))
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(WeightFileError):
            open_weights(path)


def test_a_deleted_file_is_named(tmp_path):
    with pytest.raises(WeightFileError, match="gone.safetensors does not exist"):
        open_weights(tmp_path / "gone.safetensors")


def test_random_damage_gives_our_error_or_a_model(tmp_path):
    path = saved(tmp_path / "bad.safetensors",
                 parts_of((4, 64), nested=True) | INT8 | {"c.weight": random(4, 4)})
    content, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(content)
        for position in torch.randint(len(damaged), (3,), generator=generator).tolist():
            damaged[position] = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            open_weights(path).state_dict()
        except WeightFileError as error:
            assert "\n" not in str(error)
