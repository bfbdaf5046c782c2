"""Formats and references for the tests of kernels."""
import contextlib
from pathlib import Path

from devtools.measure.timing import decided_first

import ggml_reference
import precompiled
import pytest
import torch
from pack_api import (
    FORMATS,
    GGML_FORMATS,
    ROW_TYPES,
    cpp_backend,
    product,  # noqa: F401
)
from torch.utils._python_dispatch import TorchDispatchMode
from user_kernels import forget_decisions

from featherweight.ops import kernels
from featherweight.ops.formats._names import formats_of_key
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.formats.row_layout import FAMILIES, RowFormat
from featherweight.ops.kernels import kernel_source

CODEBOOKS = [FORMATS["NF4"], FORMATS["FP4"]]
BASIC_FORMATS = [*GGML_FORMATS.values(), *CODEBOOKS, INT8.of_columns(96)]
ALL_FORMATS = BASIC_FORMATS + [
    fmt.of_block_length(length) for fmt in CODEBOOKS for length in (32, 4096)
]
ONE_OF_EACH_SOURCE = {
    getattr(fmt, "family", fmt.__module__): fmt for fmt in BASIC_FORMATS}.values()
BLOCK_FORMATS, ONE_OF_EACH_BLOCK = (
    [fmt for fmt in formats if not isinstance(fmt, RowFormat)]
    for formats in (ALL_FORMATS, ONE_OF_EACH_SOURCE))
# Formats with a grid, one for each branch of the search; each further one compiles as long again.
GRID_SAMPLE = ("Q4_K", "Q3_K", "Q4_0", "Q4_1", "IQ4_XS", "NF4", "Q8_0")
CPU = torch.device("cpu")
BITS = {4: torch.int32, 2: torch.int16}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# family of rows -> further sizes of its formats, besides its own
MORE_SIZES = {
    "F8_E4M3": [(64,), (24,), (4,)], "INT8_GROUPS": [(24,)], "W4A16": [(128,)],
    "INT8_CONVROT": [(64,), (16,), (4,), (1024,)], "INT4_CONVROT": [(64,)],
    "W4A8": [(64, 8), (256, 32), (64, 4), (1024, 16)], "W4A8_SHIFTED": [(16, 16), (1024, 16)],
    "UINT2_GROUPED": [(32,)], "INT3_GROUPED": [(24,)], "UINT3_GROUPED": [(32,)],
    # group, kernel positions, rotation and its base, kinds of scales and of minima
    "SDNQ_UINT4": [(64,), (64, 1, 4), (64, 1, 8), (32, 1, 16, 4), (0, 1, 128),
                   (16, 9, 0, 2, 2, 1), (32, 1, 0, 2, 1, 3), (4, 1, 0, 2, 3, 2)],
    "SDNQ_INT8": [(64, 1, 64), (64, 1, 256, 4), (0, 1, 4096, 4)],
    "SDNQ_CODEBOOK3": [(64,), (32, 9)],
}


def row_format(name: str, sizes: tuple[int, ...] = ()) -> RowFormat:
    """Returns the example of a family with the shortest rows, three groups or so; sizes: the first
    ones, as the family's where they are left out."""
    family = FAMILIES[name]
    return family.examples((*sizes, *family.sizes[len(sizes):]))[0]


def has_new_constants(packed_format: RowFormat, seen: set) -> bool:
    """Returns whether a constant of the format's kernels has a value that is not in `seen`, and
    adds its constants there; of tables and offsets only whether there is one."""
    constants = dict(kernel_source.row_definitions(packed_format))
    group = constants["GROUP"]
    constants |= {name: name in constants and bool(constants[name])
                  for name in ("NUMBERS", "CODEBOOK", "OFFSET", "LEVELS", "ROOT",
                               "ROTATION_FACTOR")}
    constants |= {"GROUP": [bool(group), bool(group % 8), bool(group % 16)],
                  "BITS": [constants["BITS"], constants["ORDER"]]}
    values = {(name, str(value)) for name, value in constants.items()}
    is_new = not values <= seen
    seen |= values
    return is_new


ROW_FORMATS = [row_format(name, sizes)
               for name in FAMILIES for sizes in ((), *MORE_SIZES.get(name, ()))]
_SEEN: set = set()
USUAL_ROWS = [fmt for fmt in ROW_FORMATS if has_new_constants(fmt, _SEEN)]
# Formats that row types are encoded in, by their keys: one for each branch of rotations, of scales
# of rows, of a tensor and of groups, and of codes.
ENCODED_ROWS = {
    key: formats_of_key(key)[0] for row_type in ROW_TYPES.values() for key in dict.fromkeys(
        row_type.format_of((256, columns)).kernel_key for columns in (768, 192, 176, 37 * 16, 37)
        if row_type.takes((256, columns)))}


def one_of_each_search(names) -> list:
    """Returns the names as parameters; those of `GRID_SAMPLE` run always, the others are heavy."""
    return [pytest.param(name, marks=() if name in GRID_SAMPLE else pytest.mark.heavy)
            for name in names]


each_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decide_on_demand(monkeypatch):
    """As in a new process, but that calls outside of models decide on their kernels too."""
    forget_decisions(monkeypatch)
    monkeypatch.setattr(kernels, "_look_up", decided_first(kernels._look_up))


def shared_cache(tmp_path_factory) -> Path:
    """Returns a cache folder for all tests of a process that do not test the cache."""
    folder = tmp_path_factory.getbasetemp() / "user_cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def cpu_kernels(cache_folder):
    """Uses kernels of this CPU, compiled into a cache folder; every call waits for them."""
    if cpp_backend.cpp_compiler() is None:
        pytest.skip("needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.VARIABLE, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(cache_folder))
        decide_on_demand(patch)
        patch.setattr(cpp_backend, "FLAGS", precompiled.cpu_flags())
        cpp_backend._kernels.cache_clear()
        yield patch
    cpp_backend._kernels.cache_clear()


class Largest(TorchDispatchMode):
    """Keeps the most that `measure` gives of a tensor that an operation makes."""

    def __init__(self, measure):
        super().__init__()
        self.measure, self.most = measure, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and not func.is_view:
                self.most = max(self.most, self.measure(part))
        return result


def assert_same_bits(values, expected):
    """Asserts equal bit patterns; any NaN equals any NaN. values: on any device."""
    values = values.cpu()
    assert values.dtype == expected.dtype and values.shape == expected.shape
    bits = BITS[values.dtype.itemsize]
    wrong = (values.view(bits) != expected.view(bits)) & ~(values.isnan() & expected.isnan())
    assert not wrong.any(), (f"{wrong.sum()} of {wrong.numel()} values differ, the first at "
                             f"{wrong.nonzero()[0].tolist()}")


def reference(fmt, tensors) -> torch.Tensor:
    """Returns float32 values by gguf, or by bitsandbytes' definition."""
    if fmt.ggml_type is not None:
        return ggml_reference.reference(fmt, tensors[0].numpy()).flatten()
    if getattr(fmt, "family", None) in ("INT8", "INT8_ROWS"):
        values = tensors[0].view(torch.int8).float()
    else:
        codes = torch.stack([tensors[0] >> 4, tensors[0] & 15], -1).flatten().long()
        values = torch.tensor(fmt.codebook)[codes]
    return values * tensors[1].repeat_interleave(fmt.block_length)
