"""Dynamic VRAM, which the host uses on GPUs. For tests marked `fake_gpus(dynamic=True)`:
comfy-aimdo is the real one."""
import time

import comfy.ops
import pytest
import torch


def wait_until_free():
    """Waits until comfy-aimdo knows that the GPUs have room again.

    It looks at a GPU's memory every two seconds, and where an earlier test had made the GPU small
    it drops pages until then.
    """
    from comfy_aimdo.model_vbar import ModelVBAR, vbar_fault, vbar_unpin  # older hosts have none

    end = time.monotonic() + 10
    for device in range(torch.cuda.device_count()):
        pages = ModelVBAR(1, device)
        page = pages.alloc(1)
        pages.prioritize()
        while vbar_fault(page) is None:
            assert time.monotonic() < end, f"cuda:{device} has no room"
            time.sleep(0.05)
            pages.prioritize()  # a page fault that fails lowers the watermark
        vbar_unpin(page)


def uploads(monkeypatch: pytest.MonkeyPatch) -> list:
    """The list that fills with the modules whose weights are copied to a device."""
    wait_until_free()
    uploaded = []
    cast_modules = comfy.ops.cast_modules_with_vbar

    def cast(modules, *args):
        stream = cast_modules(modules, *args)
        uploaded.extend(module for module in modules if not module._prefetch["resident"])
        return stream

    monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", cast)
    return uploaded
