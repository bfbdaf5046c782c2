"""What is fuzzed: `TARGETS`, by name.

A function with `@target` is one; of each quantiser with a module in `tests/support/conformance`,
`models` makes one. The pack is imported when the function is called.
"""
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..strategies import LINK, changed, split_files


@dataclass
class Target:
    """What is read, in a folder of its own.

    Attributes:
        folder: the only one that the target may touch.
        samples: well-formed inputs.
        read: takes an input, or the paths of its files; an AssertionError is a wrong result.
        own: the errors that it may raise.
        file: the name of the file that an input is; ends with a slash for a folder of several
            files; "" where an input is no file.
        longest: bytes of an input.
        changes: returns a strategy of an input with changes.
    """
    folder: Path
    samples: Sequence[bytes]
    read: Callable[[Any], Any]
    own: tuple[type[Exception], ...] = ()
    file: str = ""
    longest: int = 1 << 15
    changes: Callable[[bytes], Any] = changed
    made: list[Path] = field(default_factory=list)

    def lay_out(self, data: bytes) -> bytes | Path | list[Path]:
        """Writes the files of an input; returns what `read` takes."""
        if not self.file:
            return data
        if not self.file.endswith("/"):
            self.made = [self.folder / self.file]
            self.made[0].write_bytes(data)
            return self.made[0]
        folder = self.folder / self.file
        folder.mkdir(parents=True, exist_ok=True)
        files = split_files(data)
        for name, content in files.items():
            path = folder / os.path.basename(name)
            try:
                # a link to one file is its user's; those of a model's folder are its author's
                if content.startswith(LINK) and "config.json" in files:
                    os.symlink(content[len(LINK):].decode(), path)
                elif not path.is_symlink():
                    path.write_bytes(content)
            except (OSError, ValueError):  # no name for a file, or twice
                continue
            self.made.append(path)
        self.made.append(folder)
        return folder

    def clear(self):
        """Takes the files away."""
        for path in self.made:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
        self.made = []


@dataclass(frozen=True)
class Maker:
    """What makes a target in a folder, and what it reads."""
    reads: str
    make: Callable[[Path], Target]


TARGETS: dict[str, Maker] = {}


def target(make: Callable[[Path], Target]) -> Callable[[Path], Target]:
    """Registers a target under the name of the function, whose docstring says what is read."""
    TARGETS[make.__name__] = Maker((make.__doc__ or "").rstrip("."), make)
    return make


from . import lora, models, ray, saved, workflow  # noqa: E402, F401  each registers its targets
