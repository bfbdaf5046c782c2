"""The fake GPUs themselves: what a real one would refuse, count or leave to whoever forgets to
wait."""
import mmap

import numpy as np
import pytest
import torch
from fake_gpus import CAPACITY
from gpu_memory import empty_gpus

pytestmark = pytest.mark.fake_gpus(dynamic=True)
MIB = 1 << 20
READ_ONLY = 8  # cudaHostRegisterReadOnly


def megabytes(count: int, device="cpu") -> torch.Tensor:
    return torch.full((count * MIB,), 7, dtype=torch.uint8, device=device)


@pytest.fixture(autouse=True)
def counters():
    with empty_gpus() as fakegpu:
        torch.cuda.synchronize()
        fakegpu.reset()
        yield fakegpu
        fakegpu.set_late(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_computing_gives_the_bits_of_the_cpu(dtype):
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.GroupNorm(2, 32),
                                torch.nn.SiLU(), torch.nn.Flatten(2), torch.nn.LayerNorm(36),
                                torch.nn.RMSNorm(36), torch.nn.Linear(36, 64)).to(dtype)
    input = torch.randn(2, 16, 8, 8).to(dtype)

    def output(device):
        values = model.to(device)(input.to(device))
        return torch.nn.functional.scaled_dot_product_attention(values, values, values)

    expected, found = output("cpu"), output("cuda:1")
    assert found.device == torch.device("cuda:1") and torch.equal(found.cpu(), expected)


def test_tensors_of_two_devices_do_not_meet():
    for other in (torch.ones(2, device="cuda:1"), torch.ones(2)):
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2, device="cuda:0") + other


def test_what_is_used_is_counted(counters):
    before = counters.used(0), counters.used(1)
    held = megabytes(3, "cuda:1")
    assert (counters.used(0), counters.used(1)) == (before[0], before[1] + 3 * MIB)
    assert torch.cuda.mem_get_info(1)[0] == CAPACITY - counters.used(1)
    del held
    assert counters.used(1) == before[1] and counters.peak(1) >= before[1] + 3 * MIB


@pytest.mark.fake_gpus  # in dynamic VRAM the pages of models make room
def test_more_than_there_is_does_not_fit_and_loses_nothing(counters):
    held = megabytes(2, "cuda")
    counters.set_capacity(counters.used() + 4 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(5 * MIB, dtype=torch.uint8, device="cuda")
    assert torch.equal(held.cpu(), megabytes(2)) and megabytes(4, "cuda").numel() == 4 * MIB


def test_new_memory_holds_no_number():
    assert (
        torch.empty(1000, device="cuda").isnan().all()
        and torch.empty(9, device="cuda", dtype=torch.bfloat16).isnan().all()
    )


def test_copies_are_counted_by_where_they_go(counters):
    up = megabytes(1).to("cuda:0")
    up.clone()
    up.to("cuda:1")
    up.cpu()
    up + up
    assert counters.copied(0) == (MIB, MIB, MIB, 0) and counters.copied(1) == (0, 0, 0, MIB)


def test_a_file_mapped_for_reading_cannot_be_pinned_unless_the_driver_is_told(counters, tmp_path):
    before, refused = counters.pinned(), counters.refused_pins()
    pinned = megabytes(1).pin_memory()
    assert pinned.is_pinned() and counters.pinned() == before + MIB
    (tmp_path / "file").write_bytes(bytes(MIB))
    pin, unpin = torch.cuda.cudart().cudaHostRegister, torch.cuda.cudart().cudaHostUnregister
    with (
        open(tmp_path / "file", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        assert (
            pin(address, MIB, 1) != 0
            and counters.refused_pins() == refused + 1
            and counters.pinned() == before + MIB
        )
        assert (
            pin(address, MIB, 1 | READ_ONLY) == 0
            and counters.pinned() == before + 2 * MIB
            and unpin(address) == 0
        )
    del pinned
    assert counters.pinned() == before


# --- late copies ---


@pytest.fixture
def copying():
    """A stream, and a tensor that is being filled in it from pinned memory."""
    stream, target = (
        torch.cuda.Stream("cuda:0"),
        torch.zeros(MIB, dtype=torch.uint8, device="cuda:0"),
    )
    source = megabytes(1).pin_memory()
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    return stream, target, source


def arrived(target) -> bool:
    return bool((target == 7).all())  # computed in the stream of the caller


def test_nothing_has_arrived_where_nobody_waits(copying):
    assert not arrived(copying[1])


WAITS = {
    "for the stream": lambda stream: torch.cuda.current_stream().wait_stream(stream),
    "for an event": lambda stream: torch.cuda.current_stream().wait_event(stream.record_event()),
    "for the device": lambda stream: torch.cuda.synchronize(),
    "on the host": lambda stream: stream.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS)
def test_all_has_arrived_after_a_wait(copying, wait):
    WAITS[wait](copying[0])
    assert arrived(copying[1])


def test_work_in_the_same_stream_comes_after_the_copy(copying):
    stream, target, _ = copying
    with torch.cuda.stream(stream):
        assert arrived(target)


def test_a_wait_for_something_else_does_not_help(copying):
    other = torch.cuda.Stream("cuda:0")
    torch.cuda.current_stream().wait_stream(other)
    assert not arrived(copying[1])


def test_an_event_stands_for_what_came_before_it(copying):
    stream, target, source = copying
    event, later = stream.record_event(), torch.zeros_like(target)
    with torch.cuda.stream(stream):
        later.copy_(source, non_blocking=True)
    torch.cuda.current_stream().wait_event(event)
    assert arrived(target) and not arrived(later)


def test_copies_that_block_have_arrived(copying):
    stream, target, source = copying
    with torch.cuda.stream(stream):
        from_pageable, from_pinned = (
            source.clone().to("cuda:0", non_blocking=True),
            source.to("cuda:0"),
        )
    assert arrived(from_pageable) and arrived(from_pinned)


def test_the_host_waits_for_what_it_reads(copying):
    target = torch.full((MIB,), 7, dtype=torch.uint8, device="cuda:0")
    host = torch.zeros(MIB, dtype=torch.uint8).pin_memory()
    host.copy_(target, non_blocking=True)
    assert not arrived(host)
    torch.cuda.current_stream().synchronize()
    assert arrived(host)


# --- comfy-aimdo ---


def test_dynamic_vram_takes_its_pages_of_the_device_and_gives_them_back(counters):
    from comfy_aimdo.model_vbar import ModelVBAR, vbar_fault, vbar_unpin

    before, vbar = counters.used(), ModelVBAR(256 * MIB, 0)
    slots = [vbar.alloc(20 * MIB) for _ in range(5)]
    for slot in slots:
        assert vbar_fault(slot) is not None
        vbar_unpin(slot)
    assert counters.used() - before == vbar.loaded_size() >= 100 * MIB
    assert vbar.free_memory(1 << 30) >= 100 * MIB
    assert counters.used() == before
