"""Files that are written here are read here, by gguf-py, by safetensors and by bitsandbytes, with
the same values."""
import math

import gguf
import numpy as np
import pytest
import torch
from pack_api import FORMATS, GGML_FORMATS, is_packed, open_weights, packed_tensor

from featherweight.loaders.container.weight_file import PLAIN_DTYPES
from featherweight.loaders.files.atomic_file import WriteError
from featherweight.loaders.files.gguf_writer import FILE_TYPES, file_size, gguf_writer
from featherweight.loaders.files.safetensors_writer import file_size as safetensors_size
from featherweight.loaders.files.safetensors_writer import safetensors_writer

METADATA = {
    "general.architecture": "flux", "general.quantization_version": 2, "general.file_type": 14,
    "a.number": 0.5, "an.answer": True, "a.name": "größer"
}
SHAPES = {
    "1": (256,), "2": (3, 512), "4": (2, 3, 1, 256), "5": (3, 2, 1, 4, 64), "row": (1, 256),
    "scalar": (), "none": (0,), "no rows": (0, 64), "no columns": (64, 0), "none of 3": (2, 0, 3),
    "none of 5": (0, 2, 1, 4, 64)
}


def written(path, tensors, **options):
    """tensors: name -> (shape, type, pieces)."""
    with gguf_writer(path, {name: (shape, kind) for name, (shape, kind, _) in tensors.items()},
                     METADATA, **options) as writer:
        for name, (_, kind, pieces) in tensors.items():
            writer.write(name, kind, pieces)
    return open_weights(path)


@pytest.mark.parametrize("kind", PLAIN_DTYPES)
def test_plain_tensors_of_every_shape_come_back(tmp_path, kind):
    values = {
        name: torch.arange(math.prod(shape)).view(shape).to(PLAIN_DTYPES[kind])
        for name, shape in SHAPES.items()
    }
    tensors = {name: (value.shape, kind, [value]) for name, value in values.items()}
    file = written(tmp_path / "a.gguf", tensors)
    assert (tmp_path / "a.gguf").stat().st_size == file_size(
        {name: part[:2] for name, part in tensors.items()}, METADATA
    )
    assert dict(file.metadata) == METADATA | {
        f"comfy.gguf.orig_shape.{name}": list(shape)
        for name, shape in SHAPES.items()
        if len(shape) > 4
    }
    assert list(file.entries) == list(SHAPES)
    expected = values | {"scalar": values["scalar"].view(1)}
    for name, tensor in file.state_dict().items():
        assert tensor.dtype == PLAIN_DTYPES[kind] and torch.equal(tensor, expected[name]), name
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        shape = expected[tensor.name].shape
        assert tuple(reversed(tensor.shape)) == (
            shape if len(shape) < 5 else (*shape[:3], shape[3] * shape[4])
        )
        assert tensor.n_bytes == expected[tensor.name].nbytes


EMPTY = [(0,), (0, 64), (64, 0), (2, 0, 3)]


@pytest.mark.parametrize("shape", EMPTY)
def test_an_empty_tensor_is_as_gguf_py_writes_it(tmp_path, shape):
    one = (1,), "F32", [torch.ones(1)]
    written(tmp_path / "a.gguf", {"x": one, "w": (shape, "F32", [torch.empty(shape)]), "y": one})
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "flux")
    for name in "xwy":
        writer.add_tensor(name, np.ones(shape if name == "w" else 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = ([(tensor.name, *tensor.shape, tensor.n_bytes, tensor.data.tolist())
                     for tensor in reader.tensors]
                    for reader in map(gguf.GGUFReader, (tmp_path / "a.gguf", tmp_path / "b.gguf")))
    assert ours == theirs
    assert open_weights(tmp_path / "b.gguf").state_dict()["w"].shape == shape


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("number", GGML_FORMATS)
def test_an_empty_packed_tensor_comes_back(tmp_path, number, shape):
    packed, one = GGML_FORMATS[number], ((1,), "F32", [torch.ones(1)])
    empty = packed_tensor(packed, torch.empty(0, dtype=torch.uint8), shape)
    tensors = written(tmp_path / "a.gguf",
                      {"x": one, "w": (shape, packed.name, [empty]), "y": one}).state_dict()
    assert (
        tensors["w"].params.format is packed
        and tensors["w"].shape == shape
        and tensors["y"] == 1
    )


@pytest.mark.parametrize("kind", PLAIN_DTYPES)
def test_plain_tensors_of_every_shape_come_back_from_safetensors(tmp_path, kind):
    from safetensors.torch import load_file

    values = {
        name: torch.arange(math.prod(shape)).view(shape).to(PLAIN_DTYPES[kind])
        for name, shape in SHAPES.items()
    }
    with safetensors_writer(tmp_path / "a.safetensors",
                            {name: (shape, kind) for name, shape in SHAPES.items()}, {}) as writer:
        for name, value in values.items():
            writer.write(name, kind, [value])
    for found in (load_file(tmp_path / "a.safetensors"),
                  open_weights(tmp_path / "a.safetensors").state_dict()):
        assert found.keys() == values.keys()
        assert all(found[name].dtype == value.dtype and torch.equal(found[name], value)
                   for name, value in values.items())


@pytest.mark.parametrize("number", GGML_FORMATS)
def test_packed_tensors_of_every_type_come_back_in_pieces_and_as_gguf_py_reads_them(
        tmp_path, number):
    packed = GGML_FORMATS[number]
    known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    rows = torch.randint(0, 256, packed.packed_shape((6, 512)), dtype=torch.uint8)
    pieces = [
        packed_tensor(packed, rows[first:last].contiguous(), (last - first, 512))
        for first, last in ((0, 4), (4, 6))
    ]
    one = (1,), "F32", [torch.ones(1)]
    file = written(tmp_path / "a.gguf",
                   {"x": one, "w": ((6, 512), packed.name, iter(pieces)), "y": one})
    tensor = file.state_dict()["w"]
    assert tensor.params.format is packed and torch.equal(tensor._qdata.view(6, -1), rows)
    if number in known:
        reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
        assert reader["w"].tensor_type == number and np.array_equal(reader["w"].data, rows.numpy())
        assert np.array_equal(reader["y"].data, [1.0])


def test_metadata_is_as_gguf_py_and_comfyui_gguf_want_it(tmp_path):
    written(tmp_path / "a.gguf",
            {"w": ((1, 2, 1, 2, 2), "F16", [torch.ones(1, 2, 1, 2, 2).half()])})
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    shape = reader.get_field("comfy.gguf.orig_shape.w")
    assert shape.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert [int(shape.parts[index][0]) for index in shape.data] == [1, 2, 1, 2, 2]
    assert list(reader.tensors[0].shape) == [4, 1, 2, 1]
    fields = {
        "general.architecture": gguf.GGUFValueType.STRING,
        "general.file_type": gguf.GGUFValueType.UINT32,
        "general.quantization_version": gguf.GGUFValueType.UINT32
    }
    assert {key: reader.get_field(key).types[0] for key in fields} == fields
    assert METADATA["general.quantization_version"] == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_file_types_are_those_of_llama_cpp(kind):
    names = {found.name: found.value for found in gguf.LlamaFileType}
    spellings = ("ALL_F32", f"MOSTLY_{kind}", f"MOSTLY_{kind}_S")
    assert FILE_TYPES[kind] in [names[name] for name in spellings if name in names]


def test_a_tensor_may_turn_out_to_be_of_another_type(tmp_path):
    tensors = {"a": ((2, 256), "F16"), "b": ((2, 256), "Q8_0"), "c": ((3,), "F32")}
    with gguf_writer(tmp_path / "a.gguf", tensors, METADATA) as writer:
        writer.write("a", "BF16", [torch.full((2, 256), 1e30, dtype=torch.bfloat16)])
        writer.write("b", "F16", [torch.ones(2, 256).half()])
        writer.write("c", "F32", [torch.tensor([1.0, 2, 3])])
    found = open_weights(tmp_path / "a.gguf").state_dict()
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.bfloat16, "b": torch.float16, "c": torch.float32}
    assert found["c"].tolist() == [1, 2, 3] and found["b"].eq(1).all()


def test_what_gguf_does_not_hold_is_refused_before_the_work(tmp_path):
    for tensors, message in (({"x" * 128: ((2,), "F32")}, "up to 127 bytes"),
                             ({"w": ((2, 64), "NF4")}, "cannot hold weights of the type NF4"),
                             ({"w": ((2, 100), "Q4_K")}, "cannot be divided")):
        with (
            pytest.raises(WriteError, match=message),
            gguf_writer(tmp_path / "a.gguf", tensors, {}),
        ):
            raise AssertionError("the work began")
    with gguf_writer(tmp_path / "a.gguf", {"x" * 127: ((2,), "F32")}, {}) as writer:
        writer.write("x" * 127, "F32", [torch.ones(2)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("writes", ["too little", "too much", "nothing", "out of order"])
def test_a_file_that_lacks_something_does_not_come_to_be(tmp_path, writes):
    sizes = {"too little": [2], "too much": [4], "nothing": [], "out of order": [3]}[writes]
    for writer_of in (gguf_writer, safetensors_writer):
        with pytest.raises(ValueError, match="written|bytes"), writer_of(
                tmp_path / "a", {"a": ((3,), "F32"), "b": ((3,), "F32")}, {}) as writer:
            for size in sizes:
                writer.write("b" if writes == "out of order" else "a", "F32", [torch.ones(size)])
            assert sizes != [3] or writer_of is safetensors_writer
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["NF4", "FP4"])
@pytest.mark.parametrize("shape", [(6, 128), (3, 100), (5, 7)])
def test_4_bit_weights_are_as_bitsandbytes_writes_and_reads_them(tmp_path, kind, shape):
    functional = pytest.importorskip("bitsandbytes", reason="it writes the reference").functional
    from safetensors import safe_open
    from safetensors.torch import load_file

    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(values.bfloat16(), blocksize=64,
                                            quant_type=kind.lower())
    packed = packed_tensor(FORMATS[kind], codes.view(-1), shape, scale=state.absmax.float())
    tensors = {"w.weight": (shape, kind), "b": ((3,), "BF16")}
    path = tmp_path / "a.safetensors"
    with safetensors_writer(path, tensors, {"a": "text", "plan": {"b": 1}}) as writer:
        writer.write("w.weight", kind, [packed])
        writer.write("b", "F32", [torch.tensor([1.0, 2, 3])])
    assert path.stat().st_size <= safetensors_size(
        tensors | {"b": ((3,), "F32")}, {"a": "text", "plan": {"b": 1}}
    )
    stored, reference = load_file(path), state.as_dict(packed=True)
    assert stored.keys() == {"w.weight", "b", *(f"w.weight.{part}" for part in reference)}
    assert stored["w.weight"].shape == codes.shape and torch.equal(stored["w.weight"], codes)
    assert {
        name: (stored[f"w.weight.{name}"].dtype, stored[f"w.weight.{name}"].shape)
        for name in ("absmax", "quant_map")
    } == {name: (reference[name].dtype, reference[name].shape) for name in ("absmax", "quant_map")}
    parts = {
        name.removeprefix("w.weight."): tensor for name, tensor in stored.items()
        if name.startswith("w.weight.")
    }
    read = functional.QuantState.from_dict(parts, torch.device("cpu"))
    assert (read.shape, read.blocksize, read.quant_type, read.dtype) == (
        shape,
        64,
        kind.lower(),
        torch.bfloat16,
    )
    assert torch.equal(read.code, state.code) and torch.equal(read.absmax, state.absmax)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "text", "plan": '{"b": 1}'}
    ours = open_weights(path).state_dict()
    assert is_packed(ours["w.weight"]) and torch.equal(
        ours["w.weight"].dequantize(), packed.dequantize()
    )
    assert ours["b"].tolist() == [1, 2, 3]


def test_a_packed_type_that_safetensors_does_not_hold_is_refused(tmp_path):
    with (
        pytest.raises(WriteError, match="cannot hold weights of the type Q4_K"),
        safetensors_writer(tmp_path / "a", {"w": ((2, 256), "Q4_K")}, {}),
    ):
        raise AssertionError("the work began")
