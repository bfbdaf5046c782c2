"""Dynamic VRAM, which the host uses on GPUs: the real one on fake GPUs, else with comfy_aimdo replaced by plain CPU memory."""
import contextlib
import itertools
import weakref

import comfy.model_management
import comfy.ops
import comfy.pinned_memory
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import pytest
import torch
from comfy.model_patcher import ModelPatcherDynamic
from fake_gpus import ON_FAKE_GPUS
from featherweight.ops.patcher import adopt

LOAD = torch.device("cuda:0" if ON_FAKE_GPUS else "cpu:0")  # not the CPU, as far as the stubs tell the host
ROOM_TO_COMPUTE = 32 << 20  # bytes of a small model's activations, and of the buffers that weights travel through


class Slot:
    """Device memory of one module, gone with the slot."""

    fits = True

    def __init__(self, vbar, size):
        self.vbar = vbar
        self.memory = torch.zeros(size, dtype=torch.uint8)

    def __del__(self):
        self.memory.random_()


class ModelVBAR:
    """All slots lie on one page: what was uploaded is there as long as the page's signature is the same."""

    signatures = itertools.count(1)

    def __init__(self, size, device):
        self.slots = weakref.WeakSet()
        self.signature = next(self.signatures)

    def alloc(self, size):
        slot = Slot(self, size)
        self.slots.add(slot)
        return slot

    def prioritize(self):
        pass

    def loaded_size(self):
        return sum(slot.memory.nbytes for slot in self.slots)

    def free_memory(self, size):
        """Throws everything out, whatever it was asked for."""
        for slot in self.slots:
            slot.memory.random_()
        self.signature = next(self.signatures)
        return self.loaded_size()


class HostBuffer:
    size = 0

    def __init__(self, *args):
        pass


def install(monkeypatch: pytest.MonkeyPatch) -> list:
    """Put the stubs in, where there is no GPU. Returns the list that fills with the modules whose weights are uploaded."""
    uploaded = []
    cast_bias_weight, cast_modules = comfy.ops.cast_bias_weight, comfy.ops.cast_modules_with_vbar

    def cast(module, input=None, dtype=None, device=None, bias_dtype=None, **kwargs):
        dtype = input.dtype if dtype is None else dtype
        return cast_bias_weight(module, None, dtype, LOAD, bias_dtype or dtype, **kwargs)

    def cast_with_vbar(modules, *args):
        stream = cast_modules(modules, *args)
        uploaded.extend(module for module in modules if not module._prefetch["resident"])
        return stream

    monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", cast_with_vbar)
    if ON_FAKE_GPUS:
        return uploaded
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", ModelVBAR)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda slot: slot.vbar.signature if slot.fits else None)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", lambda slot: None)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda slot, device: slot.memory)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    monkeypatch.setattr(comfy.pinned_memory, "get_pin", lambda module, subset="weights": None)
    monkeypatch.setattr(comfy.pinned_memory, "pin_memory", lambda module, subset="weights", size=None: False)
    return uploaded


@contextlib.contextmanager
def full_device(patcher):
    """The device has no memory left to keep this model's weights."""
    if ON_FAKE_GPUS:
        import fakegpu

        patcher.partially_unload(torch.device("cpu"), 1e12)
        before = fakegpu.capacity()
        fakegpu.set_capacity(fakegpu.used() + ROOM_TO_COMPUTE)
        yield
        fakegpu.set_capacity(before)
        return
    slots = list(patcher.model.dynamic_vbars[LOAD].slots)
    for slot in slots:
        slot.fits = False
    yield
    for slot in slots:
        slot.fits = True


def dynamic(patcher):
    """The patcher the host would have made of this freshly loaded model on a GPU, or has made."""
    if ON_FAKE_GPUS:
        assert patcher.is_dynamic()
        return patcher
    result = adopt(ModelPatcherDynamic(patcher.model, load_device=LOAD, offload_device=torch.device("cpu")))
    result.cached_patcher_init = patcher.cached_patcher_init
    return result
