"""Module name under which pickles look up our functions and classes.

The host names the modules of a node pack after the pack's folder, which is another one on another
machine. So what is pickled belongs to one module name, which every process that has imported this
pack knows.
"""
import sys
import types
from typing import TypeVar

_Item = TypeVar("_Item")

_PICKLE_MODULE = types.ModuleType("_featherweight_layers", __doc__)
sys.modules[_PICKLE_MODULE.__name__] = _PICKLE_MODULE


def stable_pickle_name(item: _Item) -> _Item:
    """Decorator: pickles find the function or class in whichever folder the pack is installed."""
    item.__module__ = _PICKLE_MODULE.__name__
    setattr(_PICKLE_MODULE, item.__qualname__, item)  # pyright: ignore[reportAttributeAccessIssue]
    return item
