"""Names of modules by which pickles look up functions and classes, and people see exceptions.

The host names the modules of a node pack after the pack's folder, which is another one on another
machine. What is pickled belongs to a module name that every process with this pack knows, and an
exception to one that is short.
"""
import sys
import types
from typing import TypeVar

_Item = TypeVar("_Item")

_PICKLE_MODULE = types.ModuleType("_featherweight_layers", __doc__)
_ERROR_MODULE = types.ModuleType("featherweight_errors", __doc__)
sys.modules |= {module.__name__: module for module in (_PICKLE_MODULE, _ERROR_MODULE)}


def stable_pickle_name(item: _Item) -> _Item:
    """Decorator: pickles find the function or class in whichever folder the pack is installed."""
    return _put(_PICKLE_MODULE, item)


def short_error_name(error: _Item) -> _Item:
    """Decorator: ComfyUI, which shows an exception's full name before its message, shows a short
    one without the pack's folder.
    """
    return _put(_ERROR_MODULE, error)


def _put(module: types.ModuleType, item: _Item) -> _Item:
    item.__module__ = module.__name__
    setattr(module, item.__qualname__, item)  # pyright: ignore[reportAttributeAccessIssue]
    return item
