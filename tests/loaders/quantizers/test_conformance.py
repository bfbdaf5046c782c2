"""What every quantiser of the registry must do, by the weights in `tests/support/conformance`."""
import datetime
import random
import re
from dataclasses import replace

import pytest
import torch
from conformance import CASES
from conformance.base import changed, save
from pack_api import WeightFileError, is_packed, open_weights

from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.parts import REAL, WHOLE
from featherweight.loaders.quantizers.registry import QUANTIZERS, quantizer_of
from featherweight.ops.formats._names import format_named
from featherweight.ops.tensor.row_slicing import take_rows

QUOTED = "'L"  # what names of the layer and of its tensors begin with
WRITERS = [pytest.param(quantizer, write, id=f"{quantizer.name}: {case}")
           for quantizer, cases in CASES for case, write in cases.WRITERS.items()]
BAD = [pytest.param(quantizer, *bad, id=f"{quantizer.name}: {case}")
       for quantizer, cases in CASES for case, bad in cases.BAD.items()]


def test_every_quantizer_of_the_registry_has_weights_and_damaged_ones_here():
    named = {quantizer.name for quantizer, cases in CASES if cases.WRITERS and cases.BAD}
    assert named == {quantizer.name for quantizer in QUANTIZERS if quantizer.in_file}


@pytest.mark.parametrize(("quantizer", "write"), WRITERS)
def test_a_weight_becomes_one_packed_tensor_of_the_values_that_its_writer_means(quantizer, write,
                                                                                tmp_path):
    written = write()
    file = open_weights(save(tmp_path, written))
    assert needs_own_reader(str(tmp_path / "model.safetensors"))
    tracked = []
    weights = file.state_dict(lambda names: tracked.append(names) or names)
    assert len(tracked) == 1  # a second loop would be the next stage of the progress bar
    names = {quantizer.name, *quantizer.methods.values()}
    assert (quantizer_of(file) in names) == written.has_own_marks
    if written.bias is not None:
        assert torch.equal(weights.pop("L.bias").float(), written.bias)
    assert weights.keys() == {"L.weight"}
    packed, values = weights["L.weight"], written.values
    assert is_packed(packed) and packed.shape == values.shape
    assert (packed.dequantize() - values).abs().max() <= written.error * values.abs().max()
    layout = packed.params.format
    assert format_named(layout.name) is layout
    if written.held is not None:
        counted = [part for name, part in written.parts.items() if name not in written.uncounted]
        assert packed.nbytes <= written.held * sum(part.nbytes for part in counted)
    start = len(values) // 3
    some = slice(start, start + max(1, len(values) // 2))
    for index in (some, torch.tensor([len(values) - 1, 0])):
        rows = take_rows(packed, index)
        assert is_packed(rows) == written.whole_rows or len(rows) == len(values)
        rows = rows.dequantize() if is_packed(rows) else rows
        # a CPU may sum the low rank of fewer rows in another order
        difference = (rows - packed.dequantize()[index]).abs().max()
        assert difference <= 1e-6 * values.abs().max()


def index_parts():
    """The parts for which a file may choose any integer dtype, and the cases that have them."""
    for quantizer, cases in CASES:
        names = {name: None for layout in quantizer.layouts.values()
                 for name, part in layout.items() if part.dtypes in (WHOLE, REAL)}
        for name in names:
            writers = {case: write for case, write in cases.WRITERS.items()
                       if name in write().parts}
            yield pytest.param(name, writers, id=f"{quantizer.name}: {name}")


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize(("name", "writers"), index_parts())
def test_indices_mean_the_same_in_every_integer_dtype(name, writers, dtype, tmp_path):
    case = random.Random(f"{datetime.date.today()} {dtype}").choice([*writers])
    read = []
    for each in (torch.int32, dtype):
        written = writers[case]()
        values, limits = written.parts[name], torch.iinfo(each)
        if limits.min <= values.min() and values.max() <= limits.max:
            written = replace(written, parts={**written.parts, name: values.to(each)})
        folder = tmp_path / str(len(read))
        folder.mkdir()
        read.append(open_weights(save(folder, written)).state_dict()["L.weight"].dequantize())
    assert torch.equal(*read), case


@pytest.mark.parametrize(("quantizer", "write", "change", "message"), BAD)
def test_parts_that_do_not_belong_together_are_a_sentence_with_file_and_layer(
        quantizer, write, change, message, tmp_path):
    written = write()
    path = save(tmp_path, replace(written, parts=changed(written.parts, change)))
    with pytest.raises(WeightFileError) as error:
        open_weights(path).state_dict()
    text, folder = str(error.value), f"{path.name}/" if path.is_dir() else ""
    if not message.startswith("'"):
        message = rf"'L(\.weight)?', packed by {quantizer.name}.*{message}"
    assert re.match(rf"{folder}model\.safetensors: .*{message}", text), text
    assert re.search(r"\. [A-Z].*\.$", text)  # what to do
    # leftovers without the parts that tell a quantiser do not choose the reader
    assert needs_own_reader(str(tmp_path / "model.safetensors")) or " is part of a" in text
    assert QUOTED in text and "\n" not in text and len(text) < 500
