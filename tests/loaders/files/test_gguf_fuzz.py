"""Damaged GGUF headers: WeightFileError or a correct file, in bounded memory and steps, never
anything else."""
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES
from pack_api import WeightFileError, open_weights

from devtools.files.gguf_files import write_all

# Peak of Python's own allocations over the file size, and what a handful of objects cost anyway.
MEMORY_FACTOR, MEMORY_CONSTANT = 10, 100_000
# Lines of the reader executed per byte of the file: an honest header needs about one.
STEPS_FACTOR, STEPS_CONSTANT = 10, 10_000


def honest_file(path) -> tuple[bytes, int]:
    """Writes a file with arrays, two types and an original shape; returns its content and the
    length of its header."""
    writer = gguf.GGUFWriter(str(path), "flux")
    writer.add_uint32("general.alignment", 32)
    writer.add_float64("double", 0.25)
    writer.add_uint16("split.count", 1)
    for key, kind, values in (
            ("tokens", GGUFValueType.STRING, ["a", "bc"]),
            ("comfy.gguf.orig_shape.conv.weight", GGUFValueType.INT32, [2, 2, 1, 2, 32])):
        writer.add_key_value(key, values, GGUFValueType.ARRAY, sub_type=kind)
    writer.add_tensor("conv.weight", np.ones((4, 64), np.float32))
    writer.add_tensor("crossed", np.zeros((8, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    for name in ("F32", "Q8_0"):
        _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        blocks = np.random.default_rng(0).integers(0, 256, (2, nbytes), dtype=np.uint8)
        writer.add_tensor(f"blocks.0.{name}", blocks, raw_dtype=GGMLQuantizationType[name])
    write_all(writer)
    return path.read_bytes(), min(entry.offset for entry in open_weights(path).entries.values())


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


@pytest.mark.parametrize(("width", "value"), [(8, 2**64 - 1), (8, 2**40), (4, 2**32 - 1), (4, 0)])
def test_a_huge_number_at_every_byte_of_the_header(tmp_path, width, value):
    content, header = honest_file(tmp_path / "honest.gguf")
    tracemalloc.start()
    try:
        for at in range(4, header - width):
            check(tmp_path / "planted.gguf",
                  content[:at] + value.to_bytes(width, "little") + content[at + width:])
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path):
    content, header = honest_file(tmp_path / "honest.gguf")
    last = max(entry.offset + entry.nbytes
               for entry in open_weights(tmp_path / "honest.gguf").entries.values())
    tracemalloc.start()
    try:
        lengths = [*range(header), *range(header, last, 16)]
        assert not any(check(tmp_path / "cut.gguf", content[:length]) for length in lengths)
        # the padding after the last tensor may be absent
        assert check(tmp_path / "cut.gguf", content[:last])
    finally:
        tracemalloc.stop()
