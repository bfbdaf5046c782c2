"""Weights that each quantiser writes, and damaged ones, for
`tests/loaders/quantizers/test_conformance.py`: each module, named like that of the quantiser, has
`WRITERS` and `BAD`; see `base`."""
import importlib
import pkgutil

# (quantiser, module)
CASES = [(importlib.import_module(f"featherweight.loaders.quantizers.{module.name}").QUANTIZER,
          importlib.import_module(f"{__name__}.{module.name}"))
         for module in pkgutil.iter_modules(__path__) if module.name != "base"]
