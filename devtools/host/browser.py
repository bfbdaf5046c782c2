"""Chromium without a window, driven by its debugging protocol, with ComfyUI's editor open in it."""
import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import websocket

from devtools.host.environment import BROWSERS
from devtools.host.server import Server, end

WINDOW = (1700, 1400)  # pixels
# No first-run dialog, and nothing of the last visit.
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False,
    "Comfy.Graph.CanvasInfo": False, "Comfy.Minimap.Visible": False,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"]
}
# Opens a workflow as a file that is dropped on the page. The editor asks for the folders before it
# frames a node whose file is missing, and so does this.
OPEN = """(async (name, text) => {
  app.graph.clear()
  await app.handleFile(new File([text], name, {type: 'application/json'}))
  await comfyAPI.api.api.getFolderPaths()
  await new Promise(done => setTimeout(done, 100))
})"""
# also inside subgraphs
NODES = "[app.graph, ...(app.graph.subgraphs?.values() ?? [])].flatMap(graph => graph.nodes)"
# nodes that no pack has
UNKNOWN = "!(node.subgraph || node.type in LiteGraph.registered_node_types)"
RED = "node.has_errors"  # unknown nodes, and those whose file is missing
COMPLAINTS = (
    "[...document.querySelectorAll('[data-testid=error-overlay], [role=dialog]')]"
    ".map(box => box.innerText)"
)


class BrowserError(Exception):
    """Chromium did not start, or the page did not do what was asked."""


def find_chromium() -> str | None:
    """The program on the PATH, or the one that `dev.py test` has fetched."""
    on_path = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    fetched = (str(path) for path in sorted(BROWSERS.glob("chromium*/*/*"))
               if os.access(path, os.X_OK) and path.name.removesuffix(".exe") in (
                   "chrome", "headless_shell", "chrome-headless-shell"))
    return next(filter(None, itertools.chain(on_path, fetched)), None)


class Browser:
    """A browser with one page, alive inside a `with` block."""

    def __enter__(self) -> "Browser":
        program = find_chromium()
        if program is None:
            raise BrowserError("There is no Chromium on the PATH.")
        width, height = WINDOW
        self.profile, self.numbers = (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True),
            itertools.count(1),
        )
        self.process = subprocess.Popen([
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", "--remote-debugging-port=0",
            f"--user-data-dir={self.profile.name}", "--remote-allow-origins=*",
            f"--window-size={width},{height}", "about:blank"
        ], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": self.profile.name})
        try:
            self._attach(self._first_tab())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        end(self.process, 20)
        self.profile.cleanup()

    def _first_tab(self) -> dict:
        """The tab that Chromium starts with, as its debugging protocol lists it."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.2)
            try:
                port = Path(self.profile.name, "DevToolsActivePort").read_text().split()[0]
                self.tabs = f"http://127.0.0.1:{port}/json"
                with urllib.request.urlopen(self.tabs) as reply:
                    return next(target for target in json.load(reply) if target["type"] == "page")
            except (OSError, IndexError, StopIteration):
                continue
        raise BrowserError(
            f"{find_chromium()} did not start. Run it with --headless=new --version to see"
            " why."
        )

    def _attach(self, tab: dict):
        """Send what follows to a tab."""
        self.tab = tab["id"]
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=120)
        self.call("Page.enable")
        self.resize(*WINDOW)

    def resize(self, width: int, height: int):
        """Give the page another size, in pixels, until the editor is closed."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (reply := json.loads(self.socket.recv())).get("id") != number:
            # whether to leave a workflow that is not saved
            if reply.get("method") == "Page.javascriptDialogOpening":
                accept = {
                    "id": next(self.numbers), "method": "Page.handleJavaScriptDialog",
                    "params": {"accept": True}
                }
                self.socket.send(json.dumps(accept))
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, once its promise is kept."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True,
                           returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60):
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := self.evaluate(expression):
                return value
            time.sleep(0.05)
        raise BrowserError(f"The page never came to {expression}.")

    def open_editor(self, server: Server, settings: Mapping[str, object] = SETTINGS):
        """Show the editor of a ComfyUI with these settings, besides those that it has."""
        server.post("/settings", settings)
        self.call("Page.navigate", url=server.url)
        self.wait_for("!!window.app?.graph && !app.extensionManager.spinner", 180)
        time.sleep(1)  # what it draws last

    def close_editor(self):
        """Go on in a new tab: an editor that is left open goes on drawing, and takes a fifth of a
        core."""
        old = self.tab
        with urllib.request.urlopen(
                urllib.request.Request(f"{self.tabs}/new?about:blank", method="PUT")) as reply:
            tab = json.load(reply)
        self.socket.close()
        self._attach(tab)
        with urllib.request.urlopen(f"{self.tabs}/close/{old}"):
            pass

    def open_workflow(self, name: str, text: str):
        """Open a workflow in the UI or the API format, as the file `name` dropped on the page."""
        self.evaluate(f"{OPEN}({json.dumps(name)}, {json.dumps(text)})")

    def prompt(self) -> dict:
        """What the editor sends to the server when it runs the open workflow."""
        return self.evaluate("app.graphToPrompt().then(prompt => prompt.output)")

    def types(self, condition: str = "true") -> list[str]:
        """Types of the open workflow's nodes for which an expression in JavaScript about `node` is
        true."""
        return self.evaluate(f"{NODES}.filter(node => {condition}).map(node => node.type)")

    def complaints(self) -> list[str]:
        """Types of the open workflow's nodes that are unknown or red, and the editor's messages
        about errors."""
        return [*self.types(UNKNOWN), *self.types(RED), *self.evaluate(COMPLAINTS)]

    def screenshot(self) -> bytes:
        """The page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", optimizeForSpeed=True)
        return base64.b64decode(shot["data"])

    def click(self, x: float, y: float, button: str = "left", times: int = 1):
        """Move the mouse to a place and click there; a second click makes it a double-click."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button,
                          clickCount=count)

    def press(self, key: str, code: str):
        """Press a key, by its name and its place on the keyboard in the words of the web."""
        text = {"text": key} if len(key) == 1 else {}
        number = {"Enter": 13, "Escape": 27}.get(key) or ord(key.upper())
        for kind, more in (("keyDown", text), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code,
                      windowsVirtualKeyCode=number, **more)

    def click_on(self, element: str):
        """Click into the middle of the element that an expression gives, once it is there and
        rests."""
        box = None
        while box != (box := self.wait_for(f"(box => box && [box.x, box.y, box.width, box.height])"
                                           f"(({element})?.getClientRects()[0])")):
            time.sleep(0.3)
        left, top, width, height = box
        self.click(left + width / 2, top + height / 2)

    def drop(self, path: Path, x: float = WINDOW[0] / 2, y: float = WINDOW[1] / 2):
        """Drop a file on the page, as from a file manager."""
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y,
                      data={"items": [], "files": [str(path)], "dragOperationsMask": 1})
