"""Dynamic VRAM, which the host uses on GPUs. For tests marked `fake_gpus(dynamic=True)`:
comfy-aimdo is the real one."""
import comfy.ops
import pytest


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
