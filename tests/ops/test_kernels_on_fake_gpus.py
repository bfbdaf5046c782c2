"""A GPU's kernels from the start of ComfyUI on: tried when there is room, taken up when they are proven.

What is tried is C++ for the CPU, which can read what lies on a fake GPU; and what is for real ones, which cannot run here.
"""
import asyncio
import logging
import shutil
import tempfile
import time

import pytest
import torch
from featherweight.nodes import FeatherweightExtension
from featherweight.ops import formats, kernels, product  # noqa: F401
from featherweight.ops.format import FORMATS
from featherweight.ops.kernels import Case, background, proving
from featherweight.ops.kernels.case_notes import add_notes
from featherweight.ops.kernels.check import random_tensors
from featherweight.ops.tensor import packed_tensor

pytestmark = pytest.mark.fake_gpus(devices=1, gib=4, late=False)
needs_a_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
UNPACK = Case("unpack", "Q4_K", torch.float32, None)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kernels, "_choices", {})
    monkeypatch.setattr(proving, "ASK_EVERY", 0.05)
    return torch.device("cuda", 0)


def weight(device):
    tensors = random_tensors(FORMATS["Q4_K"], 32, device, calm=True)
    return packed_tensor(FORMATS["Q4_K"], tensors[0], (16, 512))


def wait_until(happens, seconds=300):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


@needs_a_compiler
def test_kernels_are_tried_when_there_is_room_and_taken_up_without_a_restart(gpu, monkeypatch, caplog):
    import fakegpu

    monkeypatch.setitem(kernels.BACKENDS, "cuda", ("cpp",))
    caplog.set_level(logging.INFO, kernels.__name__)
    expected = weight("cpu").dequantize()
    fakegpu.set_capacity(fakegpu.used() + proving.LEAST_FREE // 2)
    try:
        add_notes([UNPACK], {"Q4_K": {(16, 512)}})
        kernels.start_trials([gpu])
        wait_until(lambda: kernels._choice(gpu).prover.at_work)
        for _ in range(5):
            assert torch.equal(product.unpack(weight(gpu), torch.float32).cpu(), expected)
            time.sleep(0.1)
        (line,) = [record.message for record in caplog.records]
        assert "Kernels are tried on cuda:0 (Fake GPU 0) when 1.5 GB of it are free; 0." in line
        assert kernels.used(gpu) == "torch until kernels are proven"
    finally:
        fakegpu.set_capacity(4 << 30)
    wait_until(lambda: kernels.find("unpack", gpu, FORMATS["Q4_K"], torch.float32))
    assert torch.equal(product.unpack(weight(gpu), torch.float32).cpu(), expected)
    assert kernels.used(gpu) == "cpp"
    wait_until(lambda: not kernels._choice(gpu).prover.at_work)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 3 and "cuda:0 (Fake GPU 0): 1 kernels proven, unpack" in lines[2]


def test_comfyui_tries_kernels_as_it_starts(gpu, monkeypatch, caplog):
    caplog.set_level(logging.INFO, kernels.__name__)
    monkeypatch.setattr(background, "raise_if_cancelled", background.raise_if_cancelled)  # put back after the test
    started = time.monotonic()
    asyncio.run(FeatherweightExtension().on_load())
    assert time.monotonic() - started < 1
    wait_until(lambda: "no kernel is proven" in caplog.text)
    assert "are tried on cuda:0 (Fake GPU 0) in the background" in caplog.text


def test_where_no_backend_works_a_trial_says_so_once_and_torch_works(gpu, caplog):
    caplog.set_level(logging.INFO, kernels.__name__)
    prover = kernels._choice(gpu).prover
    prover.want([UNPACK], {"Q4_K": {(16, 512)}})
    wait_until(lambda: not prover.at_work)
    assert torch.equal(product.unpack(weight(gpu), torch.float32).cpu(), weight("cpu").dequantize())
    assert kernels.used(gpu) == "torch" and [record.levelname for record in caplog.records] == ["INFO"] * 2
    assert "no kernel is proven, torch does the work" in caplog.text
    kernels._choices.clear()
    kernels._choice(gpu).prover.want([UNPACK])
    wait_until(lambda: not kernels._choice(gpu).prover.at_work)
    (line,) = [record.message for record in caplog.records[2:]]
    assert line == "[Featherweight] Packed weights on cuda:0 (Fake GPU 0) use torch."
