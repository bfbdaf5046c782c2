"""Weights whose rows a type's blocks do not divide, as ComfyUI-GGUF's files of SD1, SDXL and Wan
have them, are saved anew."""
import gguf
import numpy as np
import pytest
import torch
from pack_api import KEEP_TYPES, source_of_file
from saving import save, values_in

from devtools.files.gguf_files import pack, write_all

CONVOLUTION, LINEAR = (
    "input_blocks.1.0.in_layers.2.weight",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
)
SHAPES = {CONVOLUTION: (64, 32, 3, 3), LINEAR: (64, 320)}


@pytest.fixture(params=["Q4_K", "Q8_0"])
def reshaped(request, tmp_path):
    """(path of a file with both weights as (n/256, 256), its type)."""
    path, random = tmp_path / "source.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "sdxl")
    for name, shape in SHAPES.items():
        rows = random.standard_normal(shape, dtype=np.float32).reshape(-1, 256)
        writer.add_array(f"comfy.gguf.orig_shape.{name}", [*shape])
        writer.add_tensor(name, pack(rows, request.param),
                          raw_dtype=gguf.GGMLQuantizationType[request.param])
    writer.add_tensor("label_emb.0.0.weight", random.standard_normal((64, 64)).astype(np.float16))
    write_all(writer)
    return path, request.param


def read_by_gguf_py(path) -> dict[str, torch.Tensor]:
    """In the shapes that the metadata gives."""
    reader, found = gguf.GGUFReader(path), {}
    for tensor in reader.tensors:
        field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = field.contents() if field else [int(size) for size in reversed(tensor.shape)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(values, np.float32)).reshape(shape)
    return found


@pytest.mark.parametrize("same", [True, False])
def test_unpatched_they_are_saved_as_they_came_and_every_reader_reads_them(
        reshaped, tmp_path, same):
    path, kind = reshaped
    saved = save(source_of_file(path), tmp_path / "a.gguf", kind if same else KEEP_TYPES)
    assert saved.types[CONVOLUTION] == kind and saved.types[LINEAR] == kind
    before, ours, theirs = values_in(path), values_in(saved.path), read_by_gguf_py(saved.path)
    assert before.keys() == ours.keys() == theirs.keys()
    for name, values in before.items():
        assert torch.equal(ours[name], values) and torch.equal(theirs[name], values), name


@pytest.mark.parametrize("wanted", ["Q4_K", "Q8_0", KEEP_TYPES, 100_000])
def test_with_a_patch_they_are_saved_in_a_type_that_fits_their_rows(reshaped, tmp_path, wanted):
    path, _ = reshaped
    source, change = source_of_file(path), {}
    for name, shape in SHAPES.items():
        change[name] = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1
        source.weights[name].patches = ((1.0, ("diff", (change[name],)), 1.0, None, None),)
    saved = save(source, tmp_path / "a.gguf", wanted)
    before, ours, theirs = values_in(path), values_in(saved.path), read_by_gguf_py(saved.path)
    for name, added in change.items():
        expected = before[name] + added
        assert (
            torch.equal(ours[name], theirs[name])
            and (ours[name] - expected).norm() < 0.1 * expected.norm()
        ), name
    assert saved.types[CONVOLUTION] in ("F16", "BF16")
