"""Files that stand in for those of the example workflows, so that the editor misses none."""
import shutil
from pathlib import Path

from devtools.host.server import HOST
from devtools.workflows import WORKFLOWS
from devtools.workflows.parts import PICTURE


def stand_in_files(base: Path):
    """Empty files of every name that the workflows use, and the picture that comes with ComfyUI."""
    for file in (
        file
        for make in WORKFLOWS
        for file in make().files
        if file.name.endswith((".gguf", ".safetensors"))
    ):
        path = base / "models" / file.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (base / "input").mkdir()
    shutil.copy(HOST / "input" / PICTURE, base / "input")
