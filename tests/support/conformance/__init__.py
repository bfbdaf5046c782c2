"""Weights that each quantiser writes, and damaged ones: name of the quantiser -> a module of
`WRITERS` and `BAD`, for `tests/loaders/quantizers/test_conformance.py`."""
import importlib
import pkgutil

_MODULES = [importlib.import_module(f"{__name__}.{module.name}")
            for module in pkgutil.iter_modules(__path__) if module.name != "base"]
CASES = {module.QUANTIZER.name: module for module in _MODULES}
