"""The text encoders that tests run, by name: each module here has some in its `ENCODERS`."""
import importlib
import pkgutil

ENCODERS = {}
for _module in pkgutil.iter_modules(__path__):
    ENCODERS |= getattr(importlib.import_module(f"{__name__}.{_module.name}"), "ENCODERS", {})
