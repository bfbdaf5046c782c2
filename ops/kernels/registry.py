"""The backends by name. Each is imported when a device of its type is first used, because an import
may take seconds, and the compiler it needs may not be installed."""
from collections.abc import Callable

import torch

from .kernel import Backend

# The backend for each type of torch device; ROCm's are "cuda" too.
BACKENDS = {"cpu": "cpp", "cuda": "hiprtc" if torch.version.hip else "nvrtc", "mps": "metal"}
ON_REQUEST = ("metal",)  # those that nothing has run yet: used only where the user names them


def _cpp() -> Backend:
    from . import cpp_backend
    return cpp_backend.BACKEND


def _cuda() -> Backend:
    from . import cuda_backend
    return cuda_backend.BACKEND


def _metal() -> Backend:
    from . import metal_backend
    return metal_backend.BACKEND


IMPORTS: dict[str, Callable[[], Backend]] = {
    "cpp": _cpp, "nvrtc": _cuda, "hiprtc": _cuda, "metal": _metal
}


def import_backend(name: str) -> Backend:
    """Returns a backend, importing it first.

    Raises:
        KeyError: No backend has this name. The import may raise anything else.
    """
    return IMPORTS[name]()
