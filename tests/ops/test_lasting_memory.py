"""What outlives a block of a model is allocated where the host does not record allocations."""
import contextlib
import gc
import weakref

import comfy.model_prefetch
import pytest
import torch
from pack_api import FORMATS, packed_tensor, product, random_tensors
from patched_layers import COLUMNS, patches_for
from torch.utils._python_dispatch import TorchDispatchMode

from featherweight.ops.formats import bits
from featherweight.ops.formats.rotation import rotation_signs
from featherweight.ops.patches.layer_patches import build_patches

CPU = torch.device("cpu")


@pytest.fixture
def recording(monkeypatch):
    """A host that records allocations, as those from 0.38 on do."""
    class Recording(TorchDispatchMode):
        paused = 0

        def __init__(self):
            super().__init__()
            self.recorded = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(value, torch.Tensor) and not self.paused:
                    self.recorded.append((str(func), weakref.ref(value)))
            return out

        def outliving(self):
            names = self.alive()
            if names:  # in a cycle, or for good
                gc.collect()
                names = self.alive()
            return names

        def alive(self):
            return [name for name, value in self.recorded if value() is not None]

    mode = Recording()

    @contextlib.contextmanager
    def pause():
        mode.paused += 1
        yield
        mode.paused -= 1

    monkeypatch.setattr(comfy.model_prefetch, "pause_malloc_graph", pause, raising=False)
    return mode


def forget_tables():
    for cached in (bits.shifts, rotation_signs):
        cached.cache_clear()
    for packed_format in FORMATS.values():
        packed_format._constants.clear()


@pytest.mark.parametrize("format_name", sorted(
    name for name, packed_format in FORMATS.items()
    if COLUMNS % packed_format.block_length == 0 or packed_format.block_length == COLUMNS))
def test_a_format_leaves_no_recorded_memory_behind(format_name, recording):
    packed_format = FORMATS[format_name]
    blocks = 8 * COLUMNS // packed_format.block_length
    data, *qparams = random_tensors(packed_format, blocks, CPU, bounded=True)
    weight = packed_tensor(packed_format, data, (8, COLUMNS), torch.float32, *qparams)
    forget_tables()
    input = torch.randn(3, COLUMNS)
    with torch.no_grad(), recording:
        # the operator itself would hide what it does from the mode
        product._linear(*product.operands(input, weight, None, None))
    assert recording.outliving() == []


def test_the_factors_of_a_lora_are_cast_where_nothing_is_recorded(recording):
    patches = build_patches("weight", patches_for("lora", torch.empty(8, COLUMNS)),
                            torch.Size((8, COLUMNS)), CPU, torch.float32)
    input = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    with recording:
        patches.branch(input)
    assert recording.outliving() == [] and patches.low_rank.down.dtype == torch.bfloat16
    with recording:
        kept = torch.ones(3)
    assert recording.outliving() and len(kept) == 3
