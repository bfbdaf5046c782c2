"""Versions of model files, by which ComfyUI knows that a file changed behind an unchanged name."""
import contextlib
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..container.weight_file import FileState, WeightFileError
from ..encoders.saved_tokenizer import sibling_of
from ..files.scale_map import scale_map
from ..quantizers.sdnq import CONFIG_FILES
from .folders import MEASUREMENTS, find_paths, find_sensitivity, imatrix_of, sensitivities_of

PEFT_CONFIG = "adapter_config.json"  # next to a LoRA
# file name of a shard
PART = re.compile(r"(.*-)\d{5}(-of-\d{5}\.(?:gguf|safetensors))", re.I)


class FileVersions:
    """Counts how often what each name of a model file means has changed on disk since first use.

    Another file of that name counts, in whatever folder, and a change of what is read with it: the
    other shards of a split file, mmproj, scales and config files next to it, the tokenizer next to
    the folder of a text encoder.
    """

    def __init__(self):
        self._versions: dict[tuple[str, bool], tuple[list, int]] = {}  # -> (state, changes)

    def update(self, values: Iterable, measured: bool = False) -> int:
        """Looks at files on disk and returns how often they have changed, all together.

        The number does not depend on this machine: the host writes it into the pictures that it
        saves, and those are to be the same everywhere.

        Args:
            values: of a node's inputs; those that do not name a file or folder are ignored.
            measured: whether measurements count that have the name of a model.
        """
        total = 0
        for name in {value for value in values if isinstance(value, str) and value}:
            state = sorted(entry for path in _files_named(name)
                           for entry in _state(path, measured))
            last_state, changes = self._versions.get((name, measured), (state, 0))
            if last_state and state != last_state:
                changes += 1
            self._versions[name, measured] = state, changes
            total += changes
        return total


def _files_named(name: str) -> set[str]:
    paths = set(find_paths(name))
    if name.lower().endswith(MEASUREMENTS):
        with contextlib.suppress(WeightFileError):
            paths.add(find_sensitivity(name))
    return paths


def _state(path: str, measured: bool) -> list[tuple]:
    states = []
    # An unreadable file is reported when the node runs.
    with contextlib.suppress(OSError):
        measurements = (*sensitivities_of(path)[:1], imatrix_of(path)) if measured else ()
        for file in filter(None, (*_paths_for(path), *measurements)):
            states.append((file, *FileState.from_status(os.stat(file))))
    return states


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
        names += (*CONFIG_FILES, PEFT_CONFIG)
    paths = [*(os.path.join(folder, name) for name in names), scale_map(path) or ""]
    return map(str, filter(os.path.isfile, paths))
