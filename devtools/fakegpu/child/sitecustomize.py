"""With this folder on PYTHONPATH, a Python that has FAKEGPU in its environment gets fake GPUs. Its
program notices nothing.

Python imports this file by itself before anything else. The driver must be there before comfy-aimdo
looks for one; torch's side waits until torch is imported, which many programs never do.
"""
import importlib.abc
import importlib.machinery
import os
import sys


class _WithTorch(importlib.abc.MetaPathFinder):
    """Finds torch as the others would, and has it know the fake GPUs once it is there."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec and spec.loader and spec.origin
        execute, torch_init = spec.loader.exec_module, spec.origin

        def exec_module(module):
            fakegpu.native.load_device(torch_init)
            execute(module)
            fakegpu.torch_cuda.install(module)

        spec.loader.exec_module = exec_module
        return spec


if "FAKEGPU" in os.environ:
    import fakegpu

    fakegpu.native.load_driver()
    sys.meta_path.insert(0, _WithTorch())
