"""Draws the thumbnails of the example workflows as the editor shows them: `python -m
devtools.workflows.pictures [name ...]`.

It takes Chromium and `pillow`. The files that a workflow names need not be there: empty ones stand
in for them, so that the editor has nothing to complain about.
"""
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from devtools.host.browser import Browser
from devtools.host.server import HOST, Server
from devtools.workflows import FOLDER, WORKFLOWS
from devtools.workflows.parts import PICTURE

WIDTH = 720  # pixels of a thumbnail
WINDOW = (2700, 1800)  # the largest workflow fits in
# shown by what they make
TOO_LARGE = {"Featherweight demo side by side": FOLDER.parent / "demo_model" / "sheet.png"}
# Opens a workflow with its groups at the given corner of the window, small enough to fit; gives
# their size there.
OPEN = """(async (workflow, left, top) => {
  await app.loadGraphData(workflow, true, true, null)
  await new Promise(resolve => setTimeout(resolve, 1500))
  const boxes = app.graph.groups.map(group => group.boundingRect ?? group._bounding)
  const low = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])))
  const high = [0, 1].map(axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])))
  const space = [innerWidth - 2 * top, innerHeight - 2 * top]
  const scale = Math.min(1, ...[0, 1].map(axis => space[axis] / (high[axis] - low[axis])))
  app.canvas.ds.scale = scale
  app.canvas.ds.offset = [left / scale - low[0], top / scale - low[1]]
  app.canvas.deselectAll?.()
  app.canvas.setDirty(true, true)
  await new Promise(resolve => setTimeout(resolve, 1000))
  return [0, 1].map(axis => scale * (high[axis] - low[axis]))
})"""


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


def main(names: list[str]):
    paths = [FOLDER / f"{name}.json" for name in names or (make().name for make in WORKFLOWS)]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        stand_in_files(base)
        with Server(base) as server, Browser(WINDOW) as browser:
            browser.open_editor(server)
            for path in paths:
                left, top = 100, 100
                if path.stem in TOO_LARGE:
                    picture = Image.open(TOO_LARGE[path.stem])
                else:
                    size = browser.evaluate(
                        f"{OPEN}({path.read_text(encoding='utf-8')}, {left}, {top})"
                    )
                    picture = browser.screenshot(
                        left - 15, top - 15, size[0] + 30, size[1] + 30
                    ).convert("RGB")
                picture = picture.resize(
                    (WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS
                )
                picture.save(path.with_suffix(".jpg"), quality=56, optimize=True, progressive=True)
                print(
                    f"{path.stem}: {picture.size}, {path.with_suffix('.jpg').stat().st_size} bytes"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
