"""The backends by name, each imported when a device of its kind is first used: one may take
seconds, or not be installed."""
from collections.abc import Callable

from .kernel import Backend

# Backends for each kind of torch device (ROCm's are "cuda" too), the one to prefer first.
PRIORITY: dict[str, tuple[str,
                          ...]] = {"cpu": ("cpp",), "cuda": ("triton", "nvrtc"), "mps": ("metal",)}


def _cpp() -> Backend:
    from . import cpp_backend
    return cpp_backend.BACKEND


def _triton() -> Backend:
    from . import triton_backend
    return triton_backend.BACKEND


def _nvrtc() -> Backend:
    from . import nvrtc_backend
    return nvrtc_backend.BACKEND


def _metal() -> Backend:
    from . import metal_backend
    return metal_backend.BACKEND


IMPORTS: dict[str, Callable[[], Backend]] = {
    "cpp": _cpp, "triton": _triton, "nvrtc": _nvrtc, "metal": _metal
}


def import_backend(name: str) -> Backend:
    """Raises KeyError for an unknown name, and what importing the backend raises."""
    return IMPORTS[name]()
