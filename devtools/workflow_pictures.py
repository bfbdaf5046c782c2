"""Draws the thumbnails of the example workflows as the editor shows them: `python -m devtools.workflow_pictures [name ...]`.

It takes Chromium and `pillow`. The files that a workflow names need not be there: empty ones stand in for them, so that the
editor has nothing to complain about.
"""
import base64
import io
import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket
from PIL import Image

from devtools import demo_files, demo_workflows
from devtools.server import Server
from devtools.workflows import FOLDER, WORKFLOWS

WIDTH = 720  # pixels of a thumbnail
WINDOW = (1700, 1400)
TOO_LARGE = {"Featherweight demo side by side": FOLDER.parent / "demo_model" / "sheet.png"}  # shown by what they make
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasInfo": False, "Comfy.Minimap.Visible": False}
# Opens a workflow with its groups at the given corner of the window, small enough to fit; gives their size there.
OPEN = """(async (workflow, left, top) => {
  await app.loadGraphData(workflow, true, true, null)
  await new Promise(resolve => setTimeout(resolve, 1500))
  const boxes = app.graph.groups.map(group => group.boundingRect ?? group._bounding)
  const low = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])))
  const high = [0, 1].map(axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])))
  const scale = Math.min(1, ...[0, 1].map(axis => ([innerWidth, innerHeight][axis] - 2 * top) / (high[axis] - low[axis])))
  app.canvas.ds.scale = scale
  app.canvas.ds.offset = [left / scale - low[0], top / scale - low[1]]
  app.canvas.deselectAll?.()
  app.canvas.setDirty(true, true)
  await new Promise(resolve => setTimeout(resolve, 1000))
  return [0, 1].map(axis => scale * (high[axis] - low[axis]))
})"""


class Browser:
    """Chromium without a window, alive inside a `with` block, driven by its debugging protocol."""

    def __enter__(self) -> "Browser":
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if program is None:
            raise SystemExit("Failed: there is no Chromium on the PATH.")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.profile, self.numbers = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), itertools.count(1)
        self.process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             f"--remote-debugging-port={port}", f"--user-data-dir={self.profile.name}", "--remote-allow-origins=*",
             f"--window-size={WINDOW[0]},{WINDOW[1]}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            time.sleep(0.2)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as reply:
                    page = next(target for target in json.load(reply) if target["type"] == "page")
                break
            except (OSError, StopIteration):
                continue
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=120)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.profile.cleanup()

    def call(self, method: str, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (reply := json.loads(self.socket.recv())).get("id") != number:
            continue
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def wait_for(self, expression: str):
        for _ in range(300):
            if self.evaluate(expression):
                return
            time.sleep(0.2)
        raise RuntimeError(f"The page never came to {expression}.")

    def screenshot(self, left: float, top: float, width: float, height: float) -> Image.Image:
        clip = {"x": left, "y": top, "width": width, "height": height, "scale": 1}
        return Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot", format="png", clip=clip)["data"])))


def stand_in_files(base: Path):
    """Empty files of every name that the workflows use."""
    for node in (node for make in WORKFLOWS for node in make().nodes):
        for file in node.files:
            path = base / "models" / file.folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for folder, names in demo_files.FILES.items():
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (base / "models" / folder / name).touch()


def main(names: list[str]):
    paths = [FOLDER / f"{name}.json" for name in names or (make().name for make in WORKFLOWS + demo_workflows.WORKFLOWS)]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        stand_in_files(base)
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(SETTINGS))
        with Server(base) as server, Browser() as browser:
            browser.call("Page.navigate", url=server.url)
            browser.wait_for("!!(window.app?.graph && window.app.canvas && document.querySelector('#graph-canvas'))")
            time.sleep(3)
            for path in paths:
                left, top = 100, 100
                if path.stem in TOO_LARGE:
                    picture = Image.open(TOO_LARGE[path.stem])
                else:
                    size = browser.evaluate(f"{OPEN}({path.read_text(encoding='utf-8')}, {left}, {top})")
                    picture = browser.screenshot(left - 15, top - 15, size[0] + 30, size[1] + 30).convert("RGB")
                picture = picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)
                picture.save(path.with_suffix(".jpg"), quality=80, optimize=True)
                print(f"{path.stem}: {picture.size}, {path.with_suffix('.jpg').stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
