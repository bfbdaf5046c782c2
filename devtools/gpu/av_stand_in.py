"""Stands in for the package `av` on a bare machine: ComfyUI imports it and nothing there uses it.

Each name in it and in its modules is an empty class.
"""
import importlib.abc
import importlib.machinery
import sys
import types


def _empty_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _empty_class
        return module

    def exec_module(self, module):
        pass


__getattr__ = _empty_class
sys.meta_path.append(_Modules())
