"""GGUF files: what the reader returns, by gguf's own reader, and what it says about files it
refuses."""
import gc
import os
import re
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES
from pack_api import GGML_FORMATS, WeightFileError, open_weights

from devtools.files.ggml_quantiser import SOURCE
from devtools.files.gguf_files import write_all, write_gguf
from devtools.files.gguf_types import FORK_TYPES
from featherweight.loaders.container.weight_file import PLAIN_DTYPES
from featherweight.loaders.files.gguf import PLAIN_TYPES, UNSTORED_TYPES

PACKED = [packed.name for packed in GGML_FORMATS.values()]


def random_blocks(shape, type_name) -> np.ndarray:
    """Bytes of a tensor of logical `shape`; the reader gives them no meaning."""
    block_length, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    packed_shape = (*shape[:-1], shape[-1] // block_length * block_bytes)
    return np.random.default_rng(0).integers(0, 256, packed_shape, dtype=np.uint8)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def text(value) -> bytes:
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def entry(key, kind, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(item_kind, count, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", item_kind, count) + items


def info(name, dims, ggml_type=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)


def aligned_to(alignment) -> bytes:
    return entry("general.alignment", 4, struct.pack("<I", alignment))


def build(*tensors: bytes, metadata=(), data=128, version=3, tensor_count=None, metadata_count=None,
          alignment=32) -> bytes:
    """A GGUF file put together by hand, so that each field can be wrong."""
    header = b"GGUF" + struct.pack(
        "<IQQ", version,
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if metadata_count is None else metadata_count,
    ) + b"".join(metadata) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + bytes(i % 251 for i in range(data))


# --- what is read
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("type_name", [*PLAIN_DTYPES, *PACKED])
def test_every_type_reads_as_the_bytes_that_were_written(tmp_path, type_name):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    for name, shape in {"cube": (3, 4, 512), "matrix": (4, 512), "row": (512,),
                        "other": (2, 256)}.items():
        writer.add_tensor(name, random_blocks(shape, type_name),
                          raw_dtype=GGMLQuantizationType[type_name])
    write_all(writer)

    file = open_weights(path)
    oracle = GGUFReader(path).tensors
    assert (
        list(file.entries)
        == [tensor.name for tensor in oracle]
        == ["cube", "matrix", "row", "other"]
    )
    assert file.tensor_bytes == sum(int(tensor.n_bytes) for tensor in oracle)
    for expected in oracle:
        entry_, tensor = file.entries[expected.name], file.tensor(expected.name)
        assert entry_.format == expected.tensor_type.name == type_name
        assert entry_.shape == entry_.stored_shape == tuple(reversed(expected.shape.tolist()))
        assert (entry_.offset, entry_.nbytes, entry_.part) == (
            expected.data_offset,
            expected.n_bytes,
            0,
        )
        assert (
            raw_bytes(tensor)
            == expected.data.tobytes()
            == random_blocks(entry_.shape, type_name).tobytes()
        )
        if type_name in PLAIN_DTYPES:
            assert tensor.dtype == PLAIN_DTYPES[type_name] and tuple(tensor.shape) == entry_.shape
        else:
            assert tensor.dtype == torch.uint8 and tuple(tensor.shape) == expected.data.shape


@pytest.mark.skipif(not SOURCE.is_file(), reason="llama.cpp's source is missing")
def test_every_type_of_llama_cpp_is_read_or_named_where_it_is_refused():
    header = (SOURCE.parents[1] / "include" / "ggml.h").read_text()
    types = dict(re.findall(r"^\s*(?://\s*)?GGML_TYPE_(\w+)\s*=\s*(\d+)", header, re.M))
    types = {int(number): name for name, number in types.items() if name != "COUNT"}
    known = {
        **{number: packed.name for number, packed in GGML_FORMATS.items()}, **PLAIN_TYPES,
        **UNSTORED_TYPES
    }
    assert types == {
        number: name for number, name in known.items() if name.partition(" ")[0] not in FORK_TYPES
    }


Q2_0_SHAPES = {"a": (4, 512), "b": (3, 1024), "c": (2, 128)}


def write_type_42(path, type_name, shapes=None) -> dict[str, bytes]:
    """A file of Q2_0, or of PQ2_0 with the number of Q2_0, as PrismML's first ones are. Returns the
    bytes of each tensor."""
    source = path.with_name("source.gguf")
    writer = gguf.GGUFWriter(str(source), "flux")
    data = {
        name: random_blocks(shape, type_name) for name, shape in (shapes or Q2_0_SHAPES).items()
    }
    for name, blocks in data.items():
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[type_name])
    write_all(writer)
    number = struct.pack("<I", GGMLQuantizationType[type_name])
    written = source.read_bytes()
    for tensor in GGUFReader(source).tensors:
        field = number + struct.pack("<Q", tensor.data_offset - GGUFReader(source).data_offset)
        assert written.count(field) == 1
        written = written.replace(field, struct.pack("<I", 42) + field[4:])
    path.write_bytes(written)
    return {name: blocks.tobytes() for name, blocks in data.items()}


@pytest.mark.parametrize("type_name", ["Q2_0", "PQ2_0"])
def test_both_layouts_of_type_42_are_told_apart_by_the_sizes_of_the_tensors(tmp_path, type_name):
    path = tmp_path / "model.gguf"
    data = write_type_42(path, type_name)
    file = open_weights(path)
    assert {name: entry_.format for name, entry_ in file.entries.items()} == dict.fromkeys(
        data, type_name
    )
    assert {name: raw_bytes(file.tensor(name)) for name in data} == data
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-40])  # a download that is not complete
    with pytest.raises(WeightFileError, match=r"bytes are missing: .* download it again"):
        open_weights(cut)


def test_tensors_of_type_42_that_fit_both_layouts_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_type_42(path, "PQ2_0", {"a": (1, 128), "b": (2, 256)})
    message = (r"model.gguf: its tensors of the ggml type 42 are too small to tell .* PrismML's.*"
               " Get the model in another type")
    with pytest.raises(WeightFileError, match=message):
        open_weights(path)


def test_a_file_whose_layers_rotate_their_input_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(
        build(info("x", [32]), metadata=[entry("prism.hadamard.version", 4, struct.pack("<I", 1))]))
    with pytest.raises(
            WeightFileError,
            match="model.gguf: its weights are rotated .*prism.hadamard.version.* is not rotated"):
        open_weights(path)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_read(tmp_path, version):
    path = tmp_path / "model.gguf"
    path.write_bytes(build(info("x", [32]), version=version))
    assert open_weights(str(path)).entries["x"].shape == (32,)


def test_a_tensor_without_dimensions_is_a_scalar(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build(info("x", []), info("y", [1], offset=32)))
    file = open_weights(path)
    assert file.tensor("x").shape == () and file.tensor("y").shape == (1,)


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_an_empty_tensor_is_a_name_with_a_shape(tmp_path, type_name):
    path = tmp_path / "marked.gguf"
    path.write_bytes(
        build(info("marker", [32, 0], GGMLQuantizationType[type_name]), info("a", [4], offset=0)))
    file = open_weights(path)
    assert file.entries["marker"].shape == (0, 32) and file.tensor("marker").numel() == 0
    assert file.state_dict()["marker"].shape == (0, 32)
    assert file.tensor("a").numel() == 4


def test_a_file_of_metadata_alone_is_read(tmp_path):
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(
        build(metadata=[entry("general.architecture", 8, text("llama"))], data=0, alignment=1))
    file = open_weights(path)
    assert file.entries == {} and file.tensor_bytes == 0 and file.declared_type == "llama"


def test_tensors_share_the_mapping_and_own_their_storage(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, {"a": np.ones((64, 64)), "b": np.ones((64, 64))}, lambda *_: "F32")
    file = open_weights(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = file.tensor("b"), file.tensor("b")
    assert first.data_ptr() == again.data_ptr()
    assert first.storage_offset() == 0 and first.untyped_storage().nbytes() == 64 * 64 * 4


@pytest.mark.parametrize("alignment", [1, 2, 4, 8, 64, 4096])
def test_tensors_are_aligned_in_memory_whatever_the_alignment_of_the_file(tmp_path, alignment):
    path = tmp_path / "model.gguf"
    second = -(-13 // alignment) * alignment
    tensors = info("bytes", [13], 24), info("floats", [8], 0, second)
    path.write_bytes(
        build(*tensors, metadata=[aligned_to(alignment)], data=second + 32, alignment=alignment))
    floats, oracle = open_weights(path).tensor("floats"), GGUFReader(path).tensors[1]
    assert raw_bytes(floats) == oracle.data.tobytes()
    assert floats.data_ptr() % 8 == 0


def test_misaligned_packed_rows_are_aligned_in_memory(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(
        build(info("x", [64, 3], 8, 5), metadata=[aligned_to(1)], data=5 + 3 * 68, alignment=1))
    packed = open_weights(path).tensor("x")
    assert packed.data_ptr() % 8 == 0 and raw_bytes(packed) == bytes(
        i % 251 for i in range(5, 5 + 3 * 68)
    )


def test_the_file_is_released_with_its_last_tensor(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    path = tmp_path / "model.gguf"
    write_gguf(path, {"a": np.ones((64, 64))}, lambda *_: "F32")

    def is_open():
        gc.collect()
        handles = [
            os.path.realpath(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd")
        ]
        return str(path) in Path("/proc/self/maps").read_text() or str(path) in handles

    file = open_weights(path)
    tensor = file.tensor("a").view(32, 128)[1:]
    file.metadata["general.architecture"]
    assert is_open()
    del file
    assert is_open() and tensor.sum() == 31 * 128
    del tensor
    assert not is_open()


# --- metadata
# ------------------------------------------------------------------------------------------------

def test_metadata_of_every_type_equals_ggufs(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    samples = {
        GGUFValueType.UINT8: [0, 255], GGUFValueType.INT8: [-128, 127],
        GGUFValueType.UINT16: [0, 65535], GGUFValueType.INT16: [-32768, 5],
        GGUFValueType.UINT32: [1, 2**32 - 1], GGUFValueType.INT32: [-2**31, 7],
        GGUFValueType.UINT64: [3, 2**64 - 1], GGUFValueType.INT64: [-2**63, 9],
        GGUFValueType.FLOAT32: [0.1, -1e30], GGUFValueType.FLOAT64: [0.1, float("-inf")],
        GGUFValueType.BOOL: [True, False], GGUFValueType.STRING: ["", "größe 漢字 \0 x"]
    }
    for kind, values in samples.items():
        for index, value in enumerate(values):
            writer.add_key_value(f"{kind.name}.{index}", value, kind)
        writer.add_key_value(f"{kind.name}.array", values, GGUFValueType.ARRAY, sub_type=kind)
    write_all(writer)

    metadata = open_weights(path).metadata
    fields = {
        key: field for key, field in GGUFReader(path).fields.items() if not key.startswith("GGUF.")
    }
    assert list(metadata) == list(fields) and len(metadata) == 1 + 3 * len(samples)
    for key, field in fields.items():
        assert metadata[key] == field.contents() and type(metadata[key]) is type(field.contents())


def test_odd_metadata_values_are_tolerated(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(
        build(metadata=[
            entry("author", 8, text(b"Ren\xe9")),
            entry("bool", 7, b"\x07"),
            entry("empty", 9, array(8, 0)),
            entry("", 0, b"\x01")
        ]))
    assert dict(open_weights(path).metadata) == {
        "author": "Ren\\xe9",
        "bool": True,
        "empty": [],
        "": 1,
    }


def test_a_large_vocabulary_is_decoded_only_on_access(tmp_path):
    path = tmp_path / "gemma.gguf"
    count = 262_144
    tokens = [f"token {index}" for index in range(count)]
    path.write_bytes(build(info("x", [32]), metadata=[
        entry("tokenizer.ggml.tokens", 9, array(8, count, b"".join(map(text, tokens)))),
        entry("tokenizer.ggml.scores", 9, array(6, count, np.arange(count, dtype="<f4").tobytes())),
        entry("tokenizer.ggml.token_type", 9, array(5, count, np.ones(count, "<i4").tobytes())),
        entry("general.architecture", 8, text("gemma3")),
    ]))
    tracemalloc.start()
    file = open_weights(path)
    assert (
        file.declared_type == "gemma3"
        and "tokenizer.ggml.tokens" in file.metadata
        and len(file.metadata) == 4
    )
    file.tensor("x")
    opened = tracemalloc.get_traced_memory()[1]
    assert file.metadata["tokenizer.ggml.tokens"] == tokens
    decoded = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 100_000 < 10_000_000 < decoded
    assert file.metadata["tokenizer.ggml.tokens"] is not file.metadata["tokenizer.ggml.tokens"]
    assert torch.equal(torch.tensor(file.metadata["tokenizer.ggml.scores"]),
                       torch.arange(count).float())
    assert set(file.metadata["tokenizer.ggml.token_type"]) == {1}


@pytest.mark.parametrize(
    ("architecture", "general_type", "kind"),
    [
        (None, None, ""),
        ("flux", None, "flux"),
        ("flux", "model", "flux"),
        ("llama", "adapter", "adapter"),
        ("clip", "mmproj", "mmproj"),
        (None, "model", ""),
    ],
)
def test_kind_is_the_type_or_the_architecture(tmp_path, architecture, general_type, kind):
    path = tmp_path / "model.gguf"
    stated = {"general.architecture": architecture, "general.type": general_type}
    metadata = {key: value for key, value in stated.items() if value}
    path.write_bytes(build(metadata=[entry(key, 8, text(value))
                                     for key, value in metadata.items()]))
    assert open_weights(path).declared_type == kind


# --- original shapes
# ------------------------------------------------------------------------------------------------

def original(shape, kind=5, name="x"):
    code = {4: "I", 5: "i", 6: "f", 8: "Q", 11: "q"}[kind]
    sizes = struct.pack(f"<{len(shape)}{code}", *shape)
    return [entry(f"comfy.gguf.orig_shape.{name}", 9, array(kind, len(shape), sizes))]


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_K"])
def test_five_dimensional_tensors_have_their_original_shape(tmp_path, type_name):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "wan")
    writer.add_array("comfy.gguf.orig_shape.x", [2, 3, 1, 2, 512])
    writer.add_tensor("x", random_blocks((12, 512), type_name),
                      raw_dtype=GGMLQuantizationType[type_name])
    write_all(writer)
    file, oracle = open_weights(path), GGUFReader(path).tensors[0]
    assert file.entries["x"].shape == file.entries["x"].stored_shape == (2, 3, 1, 2, 512)
    assert (
        file.tensor("x").shape[:-1] == (2, 3, 1, 2)
        and raw_bytes(file.tensor("x")) == oracle.data.tobytes()
    )


def test_rows_that_the_blocks_cross_keep_their_stored_shape(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build(info("x", [64, 9], 8), metadata=original((16, 4, 3, 3)), data=9 * 68))
    file = open_weights(path)
    assert (file.entries["x"].shape, file.entries["x"].stored_shape) == ((16, 4, 3, 3), (9, 64))
    assert file.tensor("x").shape == (9, 68)


def test_a_plain_tensor_takes_any_original_shape(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build(info("x", [32]), metadata=original((2, 4, 2, 2, 1), kind=11)))
    file = open_weights(path)
    assert file.tensor("x").shape == (2, 4, 2, 2, 1) == file.entries["x"].stored_shape


# --- split files
# ------------------------------------------------------------------------------------------------

def write_split(folder, small_first_shard=False):
    path = str(folder / "model.gguf")
    writer = gguf.GGUFWriter(path, "wan", split_max_tensors=2, small_first_shard=small_first_shard)
    writer.add_array("comfy.gguf.orig_shape.t4", [2, 1, 3, 1, 32])
    values = {
        f"t{index}": np.random.default_rng(index).normal(size=(6, 32)).astype(np.float32)
        for index in range(5)
    }
    for name, value in values.items():
        writer.add_tensor(name, value)
    write_all(writer)
    return values, sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_a_split_model_is_read_whole_from_any_of_its_files(tmp_path, small_first_shard):
    values, parts = write_split(tmp_path, small_first_shard)
    assert len(parts) == 3 + small_first_shard
    for path in parts:
        file = open_weights(path)
        assert file.path == path and list(file.paths) == parts
        assert list(file.entries) == list(values) and file.tensor_bytes == 5 * 6 * 32 * 4
        assert {entry_.part for entry_ in file.entries.values()} == set(
            range(small_first_shard, len(parts))
        )
        assert file.metadata["general.architecture"] == "wan" and file.metadata["split.no"] == 0
        assert file.entries["t4"].shape == (2, 1, 3, 1, 32)
        for name, value in values.items():
            assert file.tensor(name).view(6, 32).numpy().tobytes() == value.tobytes()


# What becomes of the second of three parts, which of them is opened, and how the message begins.
BAD_PARTS = {
    "missing": (
        lambda parts: parts[1].unlink(),
        2,
        "model-00003-of-00003.gguf: .* split into 3; missing in its folder: model-00002-of-00003"
        ".*"
        " Download all 3",
    ),
    "renamed": (
        lambda parts: parts[1].rename(parts[1].with_name("part2.gguf")),
        "part2.gguf",
        "part2.gguf: .* split into 3.* names they were published under",
    ),
    "exchanged": (
        lambda parts: parts[1].write_bytes(parts[2].read_bytes()),
        0,
        "model-00002-of-00003.gguf: by its name it is file 2 of 3, but its metadata has split.no 2",
    ),
    "cut short": (
        lambda parts: parts[1].write_bytes(parts[1].read_bytes()[:-100]),
        0,
        "model-00002-of-00003.gguf: 100 bytes are missing",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_a_split_model_with_a_bad_part_is_refused(tmp_path, case):
    spoil, opened, message = BAD_PARTS[case]
    _, parts = write_split(tmp_path)
    spoil(parts)
    with pytest.raises(WeightFileError, match=message):
        open_weights(tmp_path / opened if isinstance(opened, str) else parts[opened])


def split_metadata(number, tensors):
    return [
        entry("split.no", 2, struct.pack("<H", number)),
        entry("split.count", 2, struct.pack("<H", 2)),
        entry("split.tensors.count", 5, struct.pack("<i", tensors))
    ]


@pytest.mark.parametrize(
    ("second_name", "stated", "message"),
    [
        ("a", 2, "there are two tensors named 'a'"),
        ("b", 3, "the 2 files hold 2 tensors together, 3 are expected"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, second_name, stated, message):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(
        build(info("a", [32]), metadata=split_metadata(0, stated)))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(
        build(info(second_name, [32]), metadata=split_metadata(1, stated)))
    with pytest.raises(WeightFileError, match=f"m-0000[12]-of-00002.gguf: {message}"):
        open_weights(tmp_path / "m-00001-of-00002.gguf")


# --- what is refused
# ------------------------------------------------------------------------------------------------

HUGE = 2**64 - 1
BAD_HEADERS = {
    "version 1": (build(version=1), ["version 1", "versions 2 and 3", "newer conversion"]),
    "version 4": (build(version=4), ["version 4"]),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian", "little-endian"]),
    "only the magic": (b"GGUF", ["ends at byte 4", "download"]),
    "truncated counts": (build()[:20], ["ends at byte 20"]),
    "tensor count": (build(tensor_count=HUGE), [f"announces {HUGE} tensors", "damaged"]),
    "metadata count": (build(metadata_count=2**40), [f"announces {2**40} metadata entries"]),
    "metadata count within the file": (build(metadata_count=2, data=64), ["metadata"]),
    "key length": (
        build(metadata=[struct.pack("<Q", HUGE)]),
        ["name of metadata entry 0", str(HUGE)],
    ),
    "key beyond the end": (
        build(metadata=[struct.pack("<Q", 500)]),
        ["name of metadata entry 0", "ends at byte"],
    ),
    "key not UTF-8": (
        build(metadata=[entry(b"\xff\xfe", 0, b"\1")]),
        ["name of metadata entry 0", "not UTF-8"],
    ),
    "key twice": (
        build(metadata=[entry("a", 0, b"\1"), entry("a", 0, b"\1")]),
        ["holds 'a' twice"],
    ),
    "value type": (build(metadata=[entry("a", 13, b"\1")]), ["value 'a'", "unknown type 13"]),
    "array item type": (
        build(metadata=[entry("a", 9, array(77, 1))]),
        ["value 'a'", "unknown type 77"],
    ),
    "string length": (
        build(metadata=[entry("a", 8, struct.pack("<Q", HUGE))]),
        ["value 'a'", "ends at byte"],
    ),
    "string length, signed": (
        build(metadata=[entry("a", 8, struct.pack("<Q", 2**63))]),
        ["value 'a'", "ends at byte"],
    ),
    "array length": (
        build(metadata=[entry("a", 9, array(4, 2**62))]),
        ["value 'a'", "ends at byte"],
    ),
    "string array length": (
        build(metadata=[entry("a", 9, array(8, 2**61))]),
        [f"'a' announces {2**61} strings"],
    ),
    "string in an array": (
        build(metadata=[entry("a", 9, array(8, 2, text("x") + struct.pack("<Q", HUGE)))]),
        ["value 'a'", "ends at byte"],
    ),
    "nested arrays": (
        build(metadata=[entry("a", 9, array(9, 1, array(0, 1, b"\1")))]),
        ["'a' is an array of arrays"],
    ),
    "name not UTF-8": (build(info("a", [32]), info(b"\xc3\x28", [32])), ["tensor 1", "not UTF-8"]),
    "name length": (build(struct.pack("<Q", 2**40)), ["tensor 0", str(2**40)]),
    "name twice": (build(info("a", [16]), info("a", [16], offset=64)), ["two tensors named 'a'"]),
    "empty but vast": (build(info("a", [2**63, 0])), ["'a' of shape (0, 9223372036854775808)"]),
    "nine dimensions": (build(info("a", [2] * 9)), ["'a' has 9 dimensions", "at most 8"]),
    "many dimensions": (
        build(text("a") + struct.pack("<I", 2**32 - 1)),
        ["'a' has 4294967295 dimensions"],
    ),
    "too many elements": (build(info("a", [2**33, 2**33])), ["'a'", str(2**33), "more elements"]),
    "wrapping to zero elements": (build(info("a", [2**32, 2**32])), ["'a'", "more elements"]),
    "unknown type": (
        build(info("a", [32], 99)),
        ["'a'", "ggml type 99", "unknown", "F32", "BF16", *PACKED],
    ),
    "type not for storage": (
        build(info("a", [32], 9)),
        ["'a'", "ggml type 9 (Q8_1)", "Supported are"],
    ),
    "type of a fork": (build(info("a", [128], 143)), ["'a'", "ggml type 143 (PTQ1_0 of PrismML)"]),
    "old type": (build(info("a", [32], 31)), ["'a'", "Q4_0_4_4"]),
    "rows of odd length": (
        build(info("a", [33, 2], 8)),
        ["'a' of shape (2, 33) is Q8_0", "blocks of 32"],
    ),
    "packed scalar": (build(info("a", [], 8)), ["'a' of shape () is Q8_0"]),
    "alignment 0": (build(metadata=[aligned_to(0)]), ["general.alignment is 0", "power of two"]),
    "alignment 48": (build(metadata=[aligned_to(48)]), ["general.alignment is 48"]),
    "alignment of text": (
        build(metadata=[entry("general.alignment", 8, text("32"))]),
        ["general.alignment is '32'"],
    ),
    "offset not aligned": (build(info("a", [16], offset=4)), ["'a'", "offset 4", "alignment 32"]),
    "offset outside": (
        build(info("a", [16]), info("b", [16], offset=2**20)),
        ["'b'", str(2**20 + 96), "outside"],
    ),
    "offset wrapping": (build(info("a", [16], offset=2**64 - 32)), ["'a'", "outside"]),
    "overlap": (build(info("a", [16]), info("b", [16], offset=32)), ["'a' and 'b' overlap"]),
    "truncated data": (
        build(info("a", [32]), data=100),
        ["28 bytes are missing", "incomplete", "download it again"],
    ),
    "no data": (
        build(info("a", [32]), info("b", [32], offset=128), data=0),
        ["256 bytes are missing"],
    ),
    "original shape of other size": (
        build(info("x", [32]), metadata=original((4, 9))),
        ["[4, 9]", "32 elements"],
    ),
    "original shape with negatives": (
        build(info("x", [32]), metadata=original((-4, -8))),
        ["'x'", "[-4, -8]"],
    ),
    "original shape of floats": (
        build(info("x", [32]), metadata=original((4.0, 8.0), kind=6)),
        ["'x'", "[4.0, 8.0]"],
    ),
    "original shape of many dimensions": (
        build(info("x", [32]), metadata=original([1] * 9 + [32])),
        ["'x'"],
    ),
    "original shape of text": (
        build(info("x", [32]), metadata=[entry("comfy.gguf.orig_shape.x", 8, text("4,8"))]),
        ["'x'", "'4,8'"],
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_damage_is_refused_with_file_and_facts(tmp_path, case):
    content, facts = BAD_HEADERS[case]
    path = tmp_path / "broken model.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightFileError) as caught:
        open_weights(path)
    for fact in ["broken model.gguf: ", *facts]:
        assert fact in str(caught.value)


def test_names_in_messages_are_short_and_escaped(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build(info("\n\x1b[31m" + "x" * 5000, [32], 99)))
    with pytest.raises(WeightFileError) as caught:
        open_weights(path)
    assert (
        len(str(caught.value)) < 800
        and "\x1b" not in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_count_cannot_make_us_walk_through_the_weights(tmp_path):
    """A string array of 2 ** 25 empty strings fits into this (sparse) file of zeros."""
    path = tmp_path / "model.gguf"
    path.write_bytes(build(metadata=[entry("a", 9, array(8, 2**25))], data=0))
    os.truncate(path, 2**29)
    with pytest.raises(WeightFileError, match=f"announces {2**25} strings"):
        open_weights(path)


MISTAKEN = {
    "empty": (b"", "is empty"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "safetensors"),
    "zip": (b"PK\3\4" + bytes(60), "cannot be read as a model: the file is damaged"),
    "pickle": (b"\x80\x02}q\0.", "cannot be read as a model"),
    "web page": (b"\n<!DOCTYPE html><html>", "web page"),
    "lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
        "git-lfs pointer",
    ),
    "big-endian": (b"FUGG" + bytes(20), "big-endian"),
    "ggml": (b"tjgg" + bytes(20), "older than GGUF"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "archive"),
    "zeros": (bytes(4096), "never finished"),
    "error message": (b"Invalid username or password.\n", "it is a text file. Download"),
    "text cut within a letter": (b"x" + "é".encode() * 99, "it is a text file"),
    "one byte": (b"\xff", "begins with neither 'GGUF'"),
    "unknown": (b"\x93NUMPY\x01\x00", "begins with neither 'GGUF'"),
}


@pytest.mark.parametrize("case", MISTAKEN)
def test_other_files_under_a_models_name_are_recognised(tmp_path, case):
    content, message = MISTAKEN[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=f"model.gguf.*{re.escape(message)}"):
        open_weights(path)


def test_a_deleted_file_is_refused(tmp_path):
    with pytest.raises(WeightFileError, match="gone.gguf does not exist.*Refresh"):
        open_weights(tmp_path / "gone.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(WeightFileError, match="pipe.gguf is a folder or a device"):
        open_weights(tmp_path / "pipe.gguf")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "permissions"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch, error, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(build())

    def refuse(*_):
        raise error

    monkeypatch.setattr("featherweight.loaders.container.weight_file.MappedFile",
                        lambda *_, **__: refuse())
    with pytest.raises(WeightFileError, match=f"model.gguf.*{message}"):
        open_weights(path)
