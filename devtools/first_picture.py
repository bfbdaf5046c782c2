"""python -m devtools.first_picture: cuts docs/images/first_picture.png, the README's screenshot,
out of the one that tests/server/test_browser.py leaves in .dev/screenshots."""
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from devtools import ROOT

SCREENSHOT = ROOT / ".dev" / "screenshots" / "picture.png"
FIRST_PICTURE = ROOT / "docs" / "images" / "first_picture.png"
WORKFLOW = (404, 80, 1320, 752)  # left, top, right and bottom of the demo's workflow on it

if __name__ == "__main__":
    picture = Image.open(SCREENSHOT).convert("RGB").crop(WORKFLOW).quantize(128)
    info = PngInfo()  # what the nodes on it show
    info.add_text("Featherweight", SCREENSHOT.with_suffix(".json").read_text(encoding="utf-8"))
    picture.save(FIRST_PICTURE, optimize=True, pnginfo=info)
