"""A GPU's kernels are tried when ComfyUI starts with enough free memory, and used from its next
start on.

One test tries C++ for the CPU, which can read a fake GPU's memory, the other the kernels for real
GPUs, which cannot run here.
"""
import asyncio
import logging
import shutil
import threading
import time

import pytest
import torch
from fake_gpus import CAPACITY
from patched_models import packed_flux

from featherweight.loaders.inspect.model_summary import dequantize_backend_text
from featherweight.nodes import FeatherweightExtension
from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels import background, trial_process, trial_startup
from featherweight.ops.kernels.validation import random_tensors
from featherweight.ops.layers import product
from featherweight.ops.tensor.packed_layout import packed_tensor

pytestmark = pytest.mark.fake_gpus(devices=1, late=False)
needs_a_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))),
                                      reason="needs a C++ compiler")


@pytest.fixture
def restart(monkeypatch, tmp_path, caplog):
    """restart(): returns the GPU, in the state of a new ComfyUI."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level(logging.INFO, kernels.__name__)

    def restart():
        monkeypatch.setattr(kernels, "_selectors", {})
        return torch.device("cuda", 0)
    return restart


def weight(device):
    tensors = random_tensors(FORMATS["Q4_K"], 32, device, bounded=True)
    return packed_tensor(FORMATS["Q4_K"], tensors[0], (16, 512))


def assert_dequantized(device):
    values = product.dequantize(weight(device), torch.float32)
    assert torch.equal(values.cpu(), weight("cpu").dequantize())


def wait_for(words: str, caplog, seconds=300):
    end = time.monotonic() + seconds
    while words not in caplog.text:
        assert time.monotonic() < end, caplog.text
        time.sleep(0.02)


@needs_a_compiler
@pytest.mark.usefixtures("small_models")
def test_what_a_model_asks_for_is_tried_where_memory_is_free_and_used_from_the_next_start(
        restart, monkeypatch, caplog):
    import fakegpu

    monkeypatch.setitem(kernels.PRIORITY, "cuda", ("cpp",))
    gpu = restart()
    assert dequantize_backend_text(packed_flux("Q4_K")) == "dequantised by torch"
    assert "Kernels for Q4_K are not proven on cuda:0 (Fake GPU 0) yet" in caplog.text
    fakegpu.set_capacity(fakegpu.used() + trial_process.FREE_TO_BEGIN // 2)
    try:
        kernels.start_trials([gpu])
        wait_for("cuda:0 (Fake GPU 0): no kernel is proven, torch does the work; less than 1.5 GB",
                 caplog)
        assert_dequantized(gpu)
    finally:
        fakegpu.set_capacity(CAPACITY)
    gpu = restart()
    kernels.start_trials([gpu])
    assert_dequantized(gpu)
    wait_for(" kernels proven, dequantize", caplog)
    assert kernels.find("dequantize", gpu, FORMATS["Q4_K"], torch.float32) is None
    gpu = restart()
    caplog.clear()
    assert dequantize_backend_text(packed_flux("Q4_K")) == "dequantised by cpp"
    assert_dequantized(gpu)
    assert "not proven" not in caplog.text and "wrong values" not in caplog.text


def test_comfyui_tries_kernels_as_it_starts_and_torch_works_where_none_does(
        restart, monkeypatch, caplog):
    gpu = restart()
    monkeypatch.setattr(background, "raise_if_cancelled", background.raise_if_cancelled)  # put back
    may_end, run_trial = threading.Event(), trial_startup.run_trial

    def held(*arguments):
        assert may_end.wait(300)
        return run_trial(*arguments)

    monkeypatch.setattr(trial_startup, "run_trial", held)
    asyncio.run(FeatherweightExtension().on_load())  # which does not wait for the trial
    may_end.set()
    wait_for("no kernel is proven, torch does the work", caplog)
    assert "are tried on cuda:0 (Fake GPU 0) in the background" in caplog.text
    assert_dequantized(gpu)
    assert kernels.used(gpu) == "torch"
