"""python -m devtools.first_picture: makes docs/images/first_picture.png, the README's screenshot.

Runs the demo's workflow in ComfyUI's editor and cuts its nodes out of a screenshot. What they show
is a text in the PNG, which tests compare with what they show today.
"""
import io
import json
import tempfile
import time
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from devtools import ROOT
from devtools.demo import WORKFLOW
from devtools.files import demo_files
from devtools.host.browser import Browser
from devtools.host.server import JOINER, Server

FIRST_PICTURE = ROOT / "docs" / "images" / "first_picture.png"
FACTS = "Featherweight"  # the text in the PNG, as JSON
NODES = (404, 80, 1320, 752)  # left, top, right and bottom of the nodes on the screenshot
COLORS = 128
TEXT = "$$node-text-preview"  # the widget in which the editor shows a text of a node
QUEUE = "document.querySelector('[data-testid=queue-button]')"
SAVED = "app.graph.nodes.find(node => node.type === 'SaveImage')?.imgs?.[0]?.naturalWidth"
VALUES = """Object.fromEntries(app.graph.nodes.filter(node => node.type !== 'MarkdownNote').map(
  node => [node.type, (node.widgets ?? []).map(each => [each.name, each.value])]))"""


def shown_values(browser: Browser) -> dict[str, list]:
    """Returns type -> [name, value] of each widget, of the nodes of the open workflow."""
    return json.loads(json.dumps(browser.evaluate(VALUES), ensure_ascii=False).replace(JOINER, ""))


def save(screenshot: bytes, values: dict[str, list]):
    """Writes the picture out of a screenshot of the page."""
    info = PngInfo()
    info.add_text(FACTS, json.dumps(values))
    picture = Image.open(io.BytesIO(screenshot)).convert("RGB").crop(NODES).quantize(COLORS)
    picture.save(FIRST_PICTURE, optimize=True, pnginfo=info)


def main():
    with tempfile.TemporaryDirectory() as base:
        demo_files.make_models(Path(base))
        with Server(base) as server, Browser() as browser:
            browser.open_editor(server)
            browser.drop(WORKFLOW)
            browser.wait_for("app.graph.nodes.some(node => node.type === 'SaveImage')")
            time.sleep(5)  # until the editor has opened it: what runs before shows no image
            browser.click_on(QUEUE)
            browser.wait_for(SAVED, 1200)
            time.sleep(1)  # what it draws last
            save(browser.screenshot(), shown_values(browser))
    print(f"Done: {FIRST_PICTURE}")


if __name__ == "__main__":
    main()
