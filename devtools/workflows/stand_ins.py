"""Files that stand in for those that workflows name, so that the editor misses none."""
import shutil
from collections.abc import Iterable
from pathlib import Path

from devtools.host.server import HOST
from devtools.workflows import blueprint_paths, demo_paths, example_paths
from devtools.workflows.workflow import Workflow

PICTURE = "example.png"  # comes with ComfyUI


def stand_in_files(base: Path, paths: Iterable[Path] = ()):
    """Makes empty files of every name in the notes of the examples, the demo, the blueprints and
    the workflows at `paths`, and the picture that comes with ComfyUI."""
    for path in {*example_paths(), *demo_paths(), *blueprint_paths(), *paths}:
        for file in Workflow(path).files:
            if file.endswith((".gguf", ".safetensors")):
                stand_in = base / "models" / file
                stand_in.parent.mkdir(parents=True, exist_ok=True)
                stand_in.touch()
    (base / "input").mkdir(parents=True, exist_ok=True)
    shutil.copy(HOST / "input" / PICTURE, base / "input")
