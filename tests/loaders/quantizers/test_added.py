"""A quantiser, a layout and a format of ComfyUI's added as .github/adding.md says are known to
everything else."""
import os
import re
import shutil
import subprocess
import sys

from devtools import ROOT

MODULE = '''
"""Reads weights that a quantiser of this test packed."""
from functools import partial

import torch

from ...ops.formats.comfy_quant import in_groups
from ...ops.formats.row_layout import Codes, Numbers, RowFamily
from ...ops.tensor.packed_layout import packed_tensor
from .base import Quantizer, layers_with
from .parts import Part

SQUARES = RowFamily("SQUARES", partial(
    in_groups, Codes(4, "low first", tuple(float(code * code) for code in range(16))),
    scale=Numbers("f16"), title="squares"), (32,))


PARTS = {"codes": Part("(N, K / 2)", (torch.uint8,)),
         "scales": Part("(N, K / 32)", (torch.float16,))}


def read(layer):
    rows, columns = layer.sizes["N"], layer.sizes["K"]
    return packed_tensor(SQUARES.of_columns(columns), layer.parts["codes"].flatten(),
                         (rows, columns), torch.float32,
                         layer.parts["scales"].flatten().view(torch.uint8))


QUANTIZER = Quantizer(name="squarer", methods={"squares": "squarer"},
                      find=layers_with(["codes"]), layouts={"squares": PARTS}, read=read)
'''
CHILD = '''
import sys, comfyui_and_pack
sys.modules["featherweight"].__path__ = [sys.argv[1]]
import torch
from safetensors.torch import save_file
from pack_api import WeightFileError
from pack_api import open_weights
from featherweight.loaders.comfyui.model_summary import title_of
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.registry import METHODS, quantizer_of
from featherweight.ops.formats._names import format_named
from pack_api import cpp_backend

path = sys.argv[1] + "/a.safetensors"
codes = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
scales = torch.rand(6, 2).half()
save_file({"L.codes": codes, "L.scales": scales}, path)
assert needs_own_reader(path) and METHODS["squares"] == "squarer"
file = open_weights(path)
assert quantizer_of(file) == "squarer"
weight = file.state_dict()["L.weight"]
numbers = torch.stack([codes & 15, codes >> 4], -1).view(6, 2, 32).float().square()
assert torch.equal(weight.dequantize(), (numbers * scales.float()[..., None]).view(6, 64))
name = weight.params.format.name
assert format_named(name) is weight.params.format and title_of(name) == "squares"
if cpp_backend.cpp_compiler() is not None:
    out = torch.empty(6, 64)
    cpp_backend._kernels().dequantize(
        weight.params.format, [weight._qdata, *weight._params.qparams], out, 0)
    assert torch.equal(out, weight.dequantize())
other = sys.argv[1] + "/b.safetensors"
save_file({"L.codes": codes, "L.scales": scales[:, :1].contiguous()}, other)
try:
    open_weights(other).state_dict()
except WeightFileError as error:
    assert ("'L', packed by squarer: it has scales of float16 (6, 1), expected (N, K / 32) of"
            " float16 with N = 6, K = 64.") in str(error), error
else:
    raise AssertionError("it was read")
print("added")
'''
RECORD = """    ComfyUIFormat(
        name="int8_halved", family=INT8_ROWS, parts={"weight": BYTES, "weight_half": ROWS_PART},
        settings=_NAMES, has_banks=False, since="9.9", read=lambda stored: stored.pack(
            INT8_ROWS, scale=stored.row_scales("weight_half") / 2)),
"""
FORMAT_CHILD = '''
import itertools, sys, comfyui_and_pack
sys.modules["featherweight"].__path__ = [sys.argv[1]]
import torch
from host_formats import mark_of, saved
from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, read_marked
from featherweight.loaders.comfyui.compute import AUTOMATIC, packed_formats
from pack_api import WeightFileError
from pack_api import open_weights
from featherweight.loaders.models.loader_choice import needs_own_reader

numbers = itertools.count()  # a file that is mapped is not written over

def read(formats, mark=None, **parts):
    path = saved(f"{sys.argv[1]}/{next(numbers)}.safetensors", {"comfy_quant": mark_of(mark or {
        "format": "int8_halved"}), **parts})
    assert needs_own_reader(path)
    file = open_weights(path)
    return as_tensors(file, read_marked(file), formats=formats)["L.weight"], file.notes

codes, scale = torch.arange(24, dtype=torch.int8).view(4, 6), torch.rand(4)
formats = packed_formats(AUTOMATIC, torch.device("cpu"))
weight, notes = read(formats, weight=codes, weight_half=scale)
assert torch.equal(weight.dequantize(), codes * (scale / 2)[:, None]) and not notes
_, notes = read(formats, {"format": "int8_halved", "new": 1}, weight=codes, weight_half=scale)
assert "'new', which this pack does not know" in str(notes), notes
for message, given, parts in (
        ("it has no weight_half, expected one number or N", formats, {"weight": codes}),
        ("needs ComfyUI 9.9 or `compute`", (), {"weight": codes, "weight_half": scale}),
        ("a convolution, expected one of int8_tensorwise", formats, {
            "weight": codes.view(4, 2, 3), "weight_half": scale})):
    try:
        read(given, **parts)
    except WeightFileError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
print("added")
'''


def pack_in(folder):
    """A copy of what reads and computes."""
    pack = folder / "pack"
    for part in ("loaders", "ops"):
        shutil.copytree(ROOT / part, pack / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "child_process.py", pack)
    return pack


def insert(path, pattern, text):
    """Puts a text before what a file has once."""
    source, count = re.subn(pattern, lambda found: text + found[0],
                            path.read_text(encoding="utf-8"))
    assert count == 1
    path.write_text(source, encoding="utf-8")


def assert_added(child, pack):
    done = subprocess.run(
        [sys.executable, "-c", child, str(pack)], capture_output=True, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(pack.parent), "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests/support"), str(ROOT)])})
    assert done.returncode == 0 and done.stdout.endswith("added\n"), done.stderr[-3000:]


def test_a_quantiser_and_a_layout_are_one_file_and_its_line_in_the_registry(tmp_path):
    pack = pack_in(tmp_path)
    (pack / "loaders/quantizers/squarer.py").write_text(MODULE)
    registry = pack / "loaders/quantizers/registry.py"
    insert(registry, r"    torchao,\n", "    squarer,\n")
    insert(registry, r"sdnq\.QUANTIZER,", "squarer.QUANTIZER, ")
    assert_added(CHILD, pack)


def test_a_format_of_comfyuis_is_one_record(tmp_path):
    pack = pack_in(tmp_path)
    insert(pack / "loaders/quantizers/comfy_quant_formats.py", r"\)\}\n# all names", RECORD)
    assert_added(FORMAT_CHILD, pack)
