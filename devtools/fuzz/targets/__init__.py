"""What is fuzzed. A target is one class in a file of this folder, and registers by being defined.

The pack is imported where a target is prepared, so that a fuzzer can watch its lines.
"""
import random
from pathlib import Path
from typing import ClassVar

from .. import mutations

TARGETS: dict[str, type["Target"]] = {}


class Target:
    """reads: what of the pack. longest: bytes of an input. own: the errors that it may raise, known
    after `prepare`."""

    name: ClassVar[str]
    reads: ClassVar[str]
    longest: ClassVar[int] = 1 << 15
    own: tuple[type[Exception], ...] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            TARGETS[cls.name] = cls

    def __init__(self, folder: Path):
        """folder: an empty one, the only one that the target may touch."""
        self.folder = folder

    def prepare(self) -> list[bytes]:
        """Import what is fuzzed; give honest inputs."""
        raise NotImplementedError

    def damaged(self, data: bytes, chance: random.Random) -> bytes:
        return mutations.bytes_damaged(data, chance)

    def lay_out(self, data: bytes):
        """Put files where `read` finds them, before anybody watches."""

    def clear(self):
        """Take them away."""

    def read(self, data: bytes):
        """What the pack does with an input. AssertionError: it came to a wrong end."""
        raise NotImplementedError


from . import cache_files, lora, ray, text, weights, workflow  # noqa: E402, F401  each registers its targets
