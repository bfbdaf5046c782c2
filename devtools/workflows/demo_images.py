"""python -m devtools.workflows.demo_images: generates the images on the covers of the demo's
workflows, `demo_model/cover_images.png`, on the real server. The training takes some minutes.
"""
import json
import tempfile
from pathlib import Path

from PIL import Image

from devtools import ROOT
from devtools.demo import TRAINING
from devtools.files import demo_files
from devtools.host.server import Server
from devtools.workflows import DEMO, FOLDER
from devtools.workflows.api_format import to_api

SHEET = ROOT / "demo_model" / "cover_images.png"
SIDE = 128
TITLES = ("1", "2", "3", "4", "without", "with")  # the images in a row: one of each text, a LoRA


def on_ray(server: Server) -> list[Image.Image]:
    """Returns what the workflow on Ray gives: an image of each of its texts, in one ComfyUI."""
    path = FOLDER / f"{DEMO} on Ray.json"
    graph = to_api(json.loads(path.read_text(encoding="utf-8")), server.object_info())
    number = next(number for number, node in graph.items()
                  if node["class_type"] == "FeatherweightRunOnRay")
    node = graph.pop(number)
    images = []
    for shift, text in enumerate(node["inputs"]["texts"].splitlines()):
        for part in graph.values():
            inputs = part["inputs"]
            if part["class_type"] == "SaveImage":
                inputs["images"] = node["inputs"]["images"]
            if part["class_type"] == "CLIPTextEncode":
                inputs["text"] = text
            if part["class_type"] == "KSampler":
                inputs["seed"] += bool(shift)
        run = server.queue(graph)
        images.append(Image.fromarray(server.pixels(run).astype("uint8")))
    return images


def trained(server: Server) -> list[Image.Image]:
    """Returns the images without and with the LoRA that the workflow trains."""
    graph = to_api(json.loads(TRAINING.read_text(encoding="utf-8")), server.object_info())
    run = server.queue(graph, timeout=1800)
    nodes = [next(number for number, node in graph.items() if node["class_type"] == node_type)
             for node_type in ("PreviewImage", "SaveImage")]
    return [Image.fromarray(server.pixels(run, node).astype("uint8")) for node in nodes]


def main():
    with tempfile.TemporaryDirectory() as folder:
        demo_files.make_models(Path(folder), ("Q8_0", "Q4_K"))
        with Server(Path(folder)) as server:
            images = [*on_ray(server), *trained(server)]
    sheet = Image.new("RGB", (SIDE * len(images), SIDE))
    for number, image in enumerate(images):
        sheet.paste(image, (number * SIDE, 0))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
