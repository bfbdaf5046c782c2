"""Versions of model files, by which ComfyUI knows that a file changed behind an unchanged name."""
import contextlib
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..container.weight_file import FileState, WeightFileError
from ..encoders.saved_tokenizer import sibling_of
from ..quantizers.sdnq import CONFIG_FILES
from .folders import MEASUREMENTS, find_paths, find_sensitivity

# file name of a shard
PART = re.compile(r"(.*-)\d{5}(-of-\d{5}\.(?:gguf|safetensors))", re.I)


class FileVersions:
    """Counts how often each model file changed on disk since first use.

    A change of what is read with it counts too: the other shards of a split file, mmproj and config
    files next to it, the tokenizer next to the folder of a text encoder.
    """

    def __init__(self):
        self._versions: dict[str, tuple[list, int]] = {}  # path -> (state, changes)

    def update(self, values: Iterable) -> int:
        """Looks at files on disk and returns how often they have changed, all together.

        The number does not depend on this machine: the host writes it into the pictures that it
        saves, and those are to be the same everywhere.

        Args:
            values: of a node's inputs; those that do not name a file or folder are ignored.
        """
        total = 0
        for path in _named_files(values):
            state = _state(path)
            last_state, changes = self._versions.get(path, (state, 0))
            if state != last_state:
                changes += 1
            self._versions[path] = state, changes
            total += changes
        return total


def _named_files(values: Iterable) -> set[str]:
    paths: set[str] = set()
    for name in values:
        if not isinstance(name, str) or not name:
            continue
        paths |= find_paths(name)
        if name.lower().endswith(MEASUREMENTS):
            with contextlib.suppress(WeightFileError):
                paths.add(find_sensitivity(name))
    return paths


def _state(path: str) -> list[tuple]:
    states = []
    # An unreadable file is reported when the node runs.
    with contextlib.suppress(OSError):
        for file in _paths_for(path):
            states.append((file, *FileState.from_status(os.stat(file))))
    return sorted(states)


def _paths_for(path: str) -> Iterable[str]:
    """Returns the files that may be read for a picked file or folder."""
    if os.path.isdir(path):
        # the tokenizer's is the same folder, but for that of a text encoder
        patterns = {(path, "*"), (path, "*/*"), (str(sibling_of(Path(path))), "*")}
        return filter(os.path.isfile, (os.path.join(parent, name) for parent, pattern in patterns
                                       for name in glob.iglob(pattern, root_dir=parent)))
    folder, name = os.path.split(path)
    names = [name]
    if part := PART.fullmatch(name):
        names = [other for other in os.listdir(folder)
                 if (match := PART.fullmatch(other)) and match.groups() == part.groups()]
    if name.lower().endswith(".gguf"):
        names += [other for other in os.listdir(folder) if "mmproj" in other.lower()]
    elif name.lower().endswith((".safetensors", ".sft")):
        names += CONFIG_FILES
    return filter(os.path.isfile, (os.path.join(folder, name) for name in names))
