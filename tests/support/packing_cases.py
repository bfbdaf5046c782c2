"""The types that weights are packed to, each with what packs it, and weights and inputs for it."""
import contextlib
import functools

import pytest
import torch
from kernel_cases import GRID_SAMPLE, cpu_kernels, shared_cache
from pack_api import FORMATS, ROW_TYPES, SecondMoments

from featherweight.ops import kernels
from featherweight.ops.packing import pack_rows, pack_tensor
from featherweight.ops.packing.pack_types import pack_type

# Not those of other block lengths, which other tests may have made.
GRIDS = {name: each for name, each in FORMATS.items() if each.grid and not each.arguments}
EACH = {name: pack_type(name) for name in (*GRIDS, *ROW_TYPES)}
USUAL = (*GRID_SAMPLE, *ROW_TYPES)
# of those that error feedback packs: integers with scales and without, plain and with minima, and
# a codebook; for each further one a kernel is compiled
FEEDBACK_SAMPLE = ("Q3_K", "Q4_K", "Q8_0", "NF4", *ROW_TYPES)


def each_of(names, usual):
    """Parametrizes `name`; those that are not among `usual` are heavy."""
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=() if name in usual else pytest.mark.heavy) for name in names])


each_type = each_of(EACH, USUAL)
each_with_feedback = each_of(EACH, FEEDBACK_SAMPLE)


@pytest.fixture(scope="module", params=["torch", "kernel"])
def by(request, tmp_path_factory):
    """What searches the blocks and goes through the columns."""
    with contextlib.ExitStack() as stack:
        if request.param == "kernel":
            stack.enter_context(cpu_kernels(shared_cache(tmp_path_factory)))
            for name in GRID_SAMPLE:
                assert kernels.find("pack_blocks", torch.device("cpu"), FORMATS[name],
                                    torch.float32) is not None
        yield request.param


def in_small_slices(monkeypatch: pytest.MonkeyPatch):
    """Has two threads pack slices of seven rows of 512 columns."""
    for module in (pack_rows, pack_tensor):
        monkeypatch.setattr(module, "CPU_SLICE_VALUES", 7 * 512)
    torch.set_num_threads(2)


def weight_of(rows: int = 96, columns: int = 512, seed: int = 0) -> torch.Tensor:
    """A weight whose rows differ in size, with a column of outliers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values[:, columns // 3] *= 20
    return values * torch.rand(rows, 1, generator=generator) / 30


def normal(rows: int, columns: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 50


@functools.cache
def mix_of(columns: int) -> torch.Tensor:
    """An orthogonal matrix."""
    return torch.linalg.qr(torch.randn(columns, columns,
                                       generator=torch.Generator().manual_seed(99)))[0]


@functools.cache
def inputs(tokens: int, columns: int, seed: int = 0, power: float = 1.0) -> torch.Tensor:
    """Inputs whose spectrum falls as that of trained layers does. Shared by tests: change copies
    only."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, columns + 1) ** -power
    return torch.randn(tokens, columns, generator=generator) * spectrum @ mix_of(columns)


def moments_of(tokens: torch.Tensor, block: int | None = None) -> SecondMoments:
    """Their second moments; the second half is held out."""
    moments = SecondMoments.zeros(tokens.shape[-1], block)
    half = len(tokens) // 2
    moments.add(tokens[:half], hold_out=False)
    moments.add(tokens[half:], hold_out=True)
    return moments


def output_error(weight: torch.Tensor, packed: torch.Tensor, tokens: torch.Tensor) -> float:
    """The power of the error of a layer's output, relative to the output's."""
    off = packed.dequantize() - weight
    return float((off @ tokens.T).square().sum() / (weight @ tokens.T).square().sum())
