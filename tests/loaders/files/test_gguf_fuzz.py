"""Damaged GGUF headers: WeightFileError or a correct file, in bounded memory and steps, never
anything else."""
import random
import struct
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES

from devtools.files.gguf_files import write_all
from featherweight.loaders.container.weight_file import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.ops.formats.base import GGML_FORMATS

# Peak of Python's own allocations over the file size, and what a handful of objects cost anyway.
MEMORY_FACTOR, MEMORY_CONSTANT = 10, 100_000
# Lines of the reader executed per byte of the file: an honest header needs about one.
STEPS_FACTOR, STEPS_CONSTANT = 10, 10_000

INTERESTING = [
    0, 1, 2, 3, 7, 8, 9, 127, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1,
    2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1
]


def honest_files(folder) -> list[tuple[bytes, int]]:
    """(content, length of the header) of files with every metadata type, every tensor type and
    original shapes."""
    metadata = {
        "tokenizer.ggml.tokens": (GGUFValueType.STRING, [f"token {index}" for index in range(20)]),
        "tokenizer.ggml.scores": (GGUFValueType.FLOAT32, [0.5] * 8),
        "bytes": (GGUFValueType.UINT8, list(range(20))),
        "bools": (GGUFValueType.BOOL, [True, False]),
        "wide": (GGUFValueType.INT64, [1, -1]),
        "comfy.gguf.orig_shape.conv.weight": (GGUFValueType.INT32, [2, 2, 1, 2, 32]),
        "comfy.gguf.orig_shape.crossed": (GGUFValueType.INT32, [64, 4]),
    }
    types = [
        "F32", "F16", "BF16", "I8", "I64", *(packed.name for packed in GGML_FORMATS.values())
    ]
    contents = []
    for index, (chosen, keys) in enumerate([(types, metadata), (["F32", "Q8_0"], {}),
                                            (["F16"], metadata)]):
        path = folder / f"honest{index}.gguf"
        writer = gguf.GGUFWriter(str(path), "flux")
        writer.add_uint32("general.alignment", 32)
        writer.add_float64("double", 0.25)
        writer.add_uint16("split.count", 1)
        for key, (kind, values) in keys.items():
            writer.add_key_value(key, values, GGUFValueType.ARRAY, sub_type=kind)
        writer.add_tensor("conv.weight", np.ones((4, 64), np.float32))
        writer.add_tensor("crossed", np.zeros((8, 34), np.uint8),
                          raw_dtype=GGMLQuantizationType.Q8_0)
        for name in chosen:
            _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
            blocks = np.random.default_rng(0).integers(0, 256, (2, nbytes), dtype=np.uint8)
            writer.add_tensor(f"blocks.0.{name}", blocks, raw_dtype=GGMLQuantizationType[name])
        write_all(writer)
        contents.append(
            (path.read_bytes(), min(entry.offset for entry in open_weights(path).entries.values())))
    return contents


def mutated(content: bytes, header: int, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = chance.randrange(min(header, len(data)) or 1)
        kind = chance.randrange(8)
        if kind == 0:
            data[at:at + 1] = bytes([(data[at] if data else 0) ^ 1 << chance.randrange(8)])
        elif kind == 1:
            data[at:at + 8] = struct.pack("<Q", chance.choice(INTERESTING))
        elif kind == 2:
            data[at:at + 4] = struct.pack("<I", chance.choice(INTERESTING) % 2**32)
        elif kind == 3:  # splice
            data[at:at + chance.randrange(40)] = chance.randbytes(chance.randrange(40))
        elif kind == 4:  # duplicate a slice
            end = at + chance.randrange(200)
            data[end:end] = data[at:end]
        elif kind == 5:  # move a slice over another
            source, length = chance.randrange(header), chance.randrange(1, 64)
            data[at:at + length] = data[source:source + length]
        elif kind == 6:
            del data[chance.randrange(len(data) + 1):]
        else:
            del data[at:at + chance.randrange(16)]
    return bytes(data)


class TooManySteps(BaseException):
    pass


def guarded(limit: int, function):
    """The result of `function`, whose lines in the pack's loaders are counted and limited."""
    steps = 0

    def trace(frame, event, _):
        nonlocal steps
        if "loaders" not in frame.f_code.co_filename:
            return None
        steps += 1
        if steps > limit:
            raise TooManySteps
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return function()
    finally:
        sys.settrace(before)


def read_everything(path):
    file = open_weights(path)
    return file, [(entry, file.tensor(name)) for name, entry in file.entries.items()]


def check(path, content: bytes) -> bool:
    """Holds the reader to its promises on `content`; returns whether it was accepted."""
    path.write_bytes(content)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        file, tensors = guarded(STEPS_CONSTANT + STEPS_FACTOR * len(content),
                                lambda: read_everything(path))
    except WeightFileError as error:
        file, tensors = None, []
        assert path.name in str(error) and len(str(error)) < 1500
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
    assert peak <= MEMORY_CONSTANT + MEMORY_FACTOR * len(content)
    end = 0
    # an empty one lies nowhere
    tensors = [(entry, tensor) for entry, tensor in tensors if entry.nbytes]
    for entry, tensor in sorted(tensors, key=lambda pair: pair[0].offset):
        assert end <= entry.offset and entry.offset + entry.nbytes <= len(content)
        end = entry.offset + entry.nbytes
        found = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert found == content[entry.offset:end]
    if file is not None:
        dict(file.metadata)
        assert isinstance(file.declared_type, str)
    return file is not None


def fuzz(folder, cases: int, seed: int) -> int:
    chance = random.Random(seed)
    honest = honest_files(folder)
    tracemalloc.start()
    try:
        assert all(check(folder / "honest.gguf", content) for content, _ in honest)
        return sum(
            check(folder / "mutated.gguf", mutated(*chance.choice(honest), chance))
            for _ in range(cases))
    finally:
        tracemalloc.stop()


def test_mutated_headers_are_refused_or_read_right(tmp_path):
    accepted = fuzz(tmp_path, 800, seed=1)
    # neither are all mutations harmless nor do all hit the first field
    assert 40 < accepted < 600


@pytest.mark.parametrize(("width", "value"), [(8, 2**64 - 1), (8, 2**40), (4, 2**32 - 1), (4, 0)])
def test_a_huge_number_at_every_byte_of_the_header(tmp_path, width, value):
    content, header = honest_files(tmp_path)[1]
    tracemalloc.start()
    try:
        for at in range(4, header - width):
            check(tmp_path / "planted.gguf",
                  content[:at] + value.to_bytes(width, "little") + content[at + width:])
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path):
    content, header = honest_files(tmp_path)[1]
    last = max(entry.offset + entry.nbytes
               for entry in open_weights(tmp_path / "honest1.gguf").entries.values())
    tracemalloc.start()
    try:
        lengths = [*range(header), *range(header, last, 16)]
        assert not any(check(tmp_path / "cut.gguf", content[:length]) for length in lengths)
        # the padding after the last tensor may be absent
        assert check(tmp_path / "cut.gguf", content[:last])
    finally:
        tracemalloc.stop()


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(10, 15))
def test_many_more_mutated_headers(tmp_path, seed):
    assert fuzz(tmp_path, 20_000, seed) > 1000
