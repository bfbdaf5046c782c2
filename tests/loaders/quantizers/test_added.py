"""A quantiser and a layout added as .github/adding.md says are known to everything else."""
import os
import re
import shutil
import subprocess
import sys
import textwrap

from devtools import ROOT

MODULE = '''
"""Reads weights that a quantiser of this test packed."""
from functools import partial

import torch

from ...ops.formats.comfyui import in_groups
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
from featherweight.loaders.container.weight_file import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.comfyui.model_summary import title_of
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.registry import METHODS, quantizer_of
from featherweight.ops.formats._names import format_named
from featherweight.ops.kernels import cpp_backend

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


def test_a_quantiser_and_a_layout_are_one_file_and_its_line_in_the_registry(tmp_path):
    pack = tmp_path / "pack"
    for folder in ("loaders", "ops"):
        shutil.copytree(ROOT / folder, pack / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "child_process.py", pack)
    (pack / "loaders/quantizers/squarer.py").write_text(MODULE)
    registry = pack / "loaders/quantizers/registry.py"
    text = registry.read_text(encoding="utf-8")
    text = text.replace("    sdnq,\n", "    sdnq,\n    squarer,\n", 1)
    text, count = re.subn(r"sdnq\.QUANTIZER,", "sdnq.QUANTIZER, squarer.QUANTIZER,", text)
    assert count == 1
    registry.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(pack)], capture_output=True, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests/support"), str(ROOT)])})
    assert done.returncode == 0 and done.stdout.endswith("added\n"), done.stderr[-3000:]
