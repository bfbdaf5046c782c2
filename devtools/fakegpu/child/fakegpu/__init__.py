"""The fake GPUs of this process, as tests see them: what lies on them, what was copied, what is
pinned.

Only in processes that were started with fake GPUs (see `devtools/fakegpu`). Sizes are in bytes.
"""
from typing import NamedTuple

from . import native, torch_cuda  # noqa: F401  sitecustomize uses them


class Copied(NamedTuple):
    """Bytes copied to a device from the host, to the host, on the device, and to it from other
    devices."""
    up: int
    down: int
    on: int
    between: int


def count() -> int:
    return native.driver.fake_count()


def used(device: int = 0) -> int:
    """Everything that is taken of a device: weights, activations, buffers, and the pages of dynamic
    VRAM."""
    return native.driver.fake_used(device)


def peak(device: int = 0) -> int:
    """The most that was taken at once since the last `reset`."""
    return native.driver.fake_peak(device)


def copied(device: int = 0) -> Copied:
    """Copies of tensors since the last `reset`; those inside an operator do not count."""
    return Copied(*(native.driver.fake_copied(kind, device) for kind in range(len(Copied._fields))))


def reset():
    """From here on peaks and copies are counted anew."""
    native.driver.fake_reset_peaks()
    native.driver.fake_reset_copied()


def pinned() -> int:
    """Memory of the host that is pinned."""
    return native.driver.fake_pinned()


def refused_pins() -> int:
    """How often memory could not be pinned because it may not be written; each is a warning in a
    user's log."""
    return native.driver.fake_refused_pins()


def capacity(device: int = 0) -> int:
    return native.driver.fake_capacity(device)


def set_capacity(nbytes: float, device: int = 0):
    """Make a device larger or smaller, as when other programs come and go. What lies on it
    stays."""
    native.driver.fake_set_capacity(device, int(nbytes))


def set_late(on: bool):
    """Whether copies that need not block arrive only when somebody waits for them."""
    native.device.fake_set_late(on)
