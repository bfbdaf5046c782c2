"""Names by which a pickle finds what is ours.

The host names the modules of a node pack by the pack's folder, which lies elsewhere on another
machine. What is pickled is found under one name in every process that has imported this pack.
"""
import sys
import types

_FOUND_IN = types.ModuleType("_featherweight_layers", __doc__)
sys.modules[_FOUND_IN.__name__] = _FOUND_IN


def stable_pickle_name(item):
    """A function or class that pickles find wherever the pack lies; to be used as a decorator."""
    item.__module__ = _FOUND_IN.__name__
    setattr(_FOUND_IN, item.__qualname__, item)
    return item
