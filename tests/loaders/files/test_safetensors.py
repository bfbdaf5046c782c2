"""safetensors files: what the reader makes of those that the real bitsandbytes writes, and of
damaged ones."""
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from pack_api import FORMATS, WeightFileError, is_packed, open_weights, packed_tensors
from safetensors.torch import load_file, save_file

from devtools.files.bnb_files import quantised, write_bnb, write_bnb_int8
from featherweight.loaders.files.safetensors import SafetensorsFile

functional = pytest.importorskip("bitsandbytes.functional")


def random(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if is_packed(tensor) else tensor.float()


def parts_of(shape=(16, 64), nested=False, quant_type="nf4", **others) -> dict[str, torch.Tensor]:
    """The tensors of a file of one 4-bit weight `a.weight`."""
    parts, _ = quantised(random(*shape), quant_type, nested=nested)
    return {f"a.weight{part}": tensor for part, tensor in parts.items()} | others


def text(string: str) -> torch.Tensor:
    return torch.tensor(list(string.encode()), dtype=torch.uint8)


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

@pytest.mark.parametrize(("write", "options", "layout"), [
    (write_bnb, {}, FORMATS["NF4"].of_block_length(64)), (write_bnb_int8, {}, None),
    (write_bnb, {"quant_type": "fp4", "block_length": 4096}, FORMATS["FP4"].of_block_length(4096)),
])
def test_weights_keep_names_and_shapes_beside_other_tensors(write, options, layout, tmp_path):
    tensors = {"a.weight": random(24, 256), "b.weight": random(10, 96), "b.bias": random(10)}
    seen = write(tmp_path / "a.safetensors", tensors, prefix="model.diffusion_model.", **options)
    found = open_weights(tmp_path / "a.safetensors").state_dict()
    assert set(found) == {f"model.diffusion_model.{name}" for name in seen}
    for name, expected in seen.items():
        tensor = found[f"model.diffusion_model.{name}"]
        assert tensor.shape == expected.shape and torch.equal(values_of(tensor), expected)
        assert is_packed(tensor) == name.endswith(".weight")
        assert layout in (None, tensor.params.format if is_packed(tensor) else layout)


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


def test_metadata_entries_and_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(parts_of() | {"b": torch.zeros(0, 3), "c": random(2, 3)}, str(path),
              {"format": "pt", "note": "x"})
    file = open_weights(path)
    assert type(file) is SafetensorsFile and dict(file.metadata) == {
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
    del file  # Windows removes no file that is mapped
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


# --- bad input
# ------------------------------------------------------------------------------------------------

INT8 = {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4)}

@pytest.mark.parametrize(("name", "message"), [
    ("a.mlp.experts.gate_up_proj_blocks", "experts quantized in MXFP4, which is not supported"),
])
def test_weights_of_quantisers_that_are_not_supported_are_named(name, message, tmp_path):
    path = saved(tmp_path / "bad.safetensors", {name: torch.zeros(2, 2, dtype=torch.uint8)})
    with pytest.raises(WeightFileError, match=f"^bad.safetensors: '{name}.*{message}.*[.]$"):
        open_weights(path).state_dict()


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
