"""Dynamic VRAM, which the host uses on GPUs. For tests marked `fake_gpus(dynamic=True)`: comfy-aimdo is the real one."""
import comfy.ops
import pytest
import torch

LOAD = torch.device("cuda:0")
PAGE = 32 << 20  # bytes that comfy-aimdo takes of a device at once


def uploads(monkeypatch: pytest.MonkeyPatch) -> list:
    """The list that fills with the modules whose weights are copied to a device."""
    uploaded = []
    cast_modules = comfy.ops.cast_modules_with_vbar

    def cast(modules, *args):
        stream = cast_modules(modules, *args)
        uploaded.extend(module for module in modules if not module._prefetch["resident"])
        return stream

    monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", cast)
    return uploaded


def give_no_page(patcher):
    """Until it is loaded again none of this model's weights finds a place on its device, as when others fill it.

    A device made smaller is no such: what it has free comfy-aimdo asks only every two seconds, and acts on the last answer.
    """
    patcher.model.dynamic_vbars[patcher.load_device].set_watermark(0)
