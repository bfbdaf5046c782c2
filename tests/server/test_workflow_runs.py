"""The example workflows and the blueprints run, node for node, on small files in place of those
that they name."""
import io
import json
import re

import av
import numpy as np
import pytest
from blueprint_workflows import as_workflow
from PIL import Image
from workflow_files import FILES, FIXED, TEXT

from devtools import demo
from devtools.host.server import Server
from devtools.workflows import BLUEPRINT_FOLDER, blueprint_paths, example_paths
from devtools.workflows.api_format import NOTES, to_api

SAVER = "FeatherweightSavePackedModel"
ALL = {
    path: path.read_text(encoding="utf-8")
    for path in (*example_paths(), *blueprint_paths())
}
EXAMPLES, SAVING = ([path for path, text in ALL.items() if (SAVER in text) == saves]
                    for saves in (False, True))
SMALL = {"width": 128, "height": 128, "steps": 2, "length": 9, "frames_number": 9, "x": 16, "y": 16,
         "sigmas": "1.0, 0.5, 0.0"}
# Options of *pack to* with which a small file is not packed: ComfyUI may read it.
UNPACKED = ("no change", "fit this GPU")
READERS = ("CLIPTextEncode", "TextEncodeQwenImageEditPlus")
STAND_INS = f'''
import comfy.model_detection
import torch

detect = comfy.model_detection.detect_unet_config


def detect_shrunken(*args, **kwargs):
    config = detect(*args, **kwargs)
    if config is not None:
        config.update({FIXED}.get(config.get("image_model"), {{}}))
    return config


comfy.model_detection.detect_unet_config = detect_shrunken


class StandInText:
    """What a text encoder gives, as random values. With a picture: as a reference too."""
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {{"max": 9999}})
        return {{"required": {{"width": number, "pooled": number}},
                "optional": {{"vae": ("VAE",), "image1": ("IMAGE",)}}}}

    def run(self, width, pooled, vae=None, image1=None):
        generator = torch.Generator().manual_seed(width)
        extra = {{"pooled_output": torch.randn(1, pooled, generator=generator)}} if pooled else {{}}
        if vae is not None:
            extra["reference_latents"] = [vae.encode(image1)]
        return [[torch.randn(1, 7, width, generator=generator), extra]],


NODE_CLASS_MAPPINGS = {{"StandInText": StandInText}}
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    (base / "input").mkdir()
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (160, 160)).save(base / "input" / "example.png")
    with Server(base, extra_custom_nodes={"stand_ins": STAND_INS}) as running:
        yield running


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


def read(path, object_info):
    """A workflow. A blueprint comes with the nodes that its description says to connect."""
    if path.parent == BLUEPRINT_FOLDER:
        return as_workflow(path, object_info)
    return json.loads(path.read_text(encoding="utf-8"))


def write_files(workflow, folder):
    """The files that its loaders name, each in the folder that the loader looks in. Returns their
    names."""
    folders = {
        "FeatherweightLoadCheckpoint": "checkpoints",
        "FeatherweightLoadDiffusionModel": "diffusion_models",
        "FeatherweightInspectModelFile": "diffusion_models", "VAELoader": "vae"
    }
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    none = NOTES | {subgraph["id"] for subgraph in subgraphs}
    written = []
    for node in (node for graph in (workflow, *subgraphs) for node in graph["nodes"]
                 if node["type"] not in none):
        places = {
            model["name"]: model["directory"] for model in node["properties"].get("models", [])
        }
        for name in set(map(str, node["widgets_values"])) & FILES.keys():
            path = folder / (places.get(name) or folders[node["type"]]) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                FILES[name](path)
            written.append(name)
    return written


def small(workflow, object_info, files):
    """As the server takes it, with small sizes and few steps, and text of random values where the
    encoder has one size."""
    prompt = to_api(workflow, object_info)
    text = next(
        (sizes for start, sizes in TEXT.items() if any(name.startswith(start) for name in files)),
        None)
    for node in prompt.values():
        values = node["inputs"]
        if text and node["class_type"] in READERS:
            pictures = {name: values[name] for name in ("vae", "image1") if name in values}
            node.update(class_type="StandInText",
                        inputs={"width": text[0], "pooled": text[1], **pictures})
        elif node["class_type"] == "FluxKontextImageScale":  # about a million pixels
            node.update(
                class_type="ImageScale", inputs={
                    "image": values["image"], "upscale_method": "area", "width": 128, "height": 128,
                    "crop": "center"
                })
        elif node["class_type"] == "KSamplerAdvanced":
            continue  # a part of four steps
        else:
            values |= {
                name: value for name, value in SMALL.items()
                if name in values and not isinstance(values[name], list)
            }
    return prompt


NOT_SMALL = {
    "MiniMax-H3 GGUF video with sound",  # its text encoder comes with a VAE of one size, 5 GB
    "Z-Image Turbo on Ray",  # tests/cluster runs the node; the nodes before it are the first's
}
BY_COMFYUI = "int8_convrot is ComfyUI's there, which rounds the inputs of its layers"
NOT_ON_FAKE_GPUS = {  # why
    "Stable Diffusion LCM on a CPU":
        "one colour of one pixel is another by 1 of 255: operators there do not see how a part of a"
        " tensor lies in memory",
    "Stable Diffusion train a LoRA": "they have no gradient of the loss",
    "Flux.1 dev GGUF packed to int8": BY_COMFYUI,
    "Load and Pack Model (Featherweight)": BY_COMFYUI,
}


def marks_of(name: str) -> list:
    why = NOT_ON_FAKE_GPUS.get(name)
    return [pytest.mark.not_on_fake_gpus(reason=why)] if why else []


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=marks_of(path.stem))
        for path in EXAMPLES if path.stem not in NOT_SMALL
    ],
    ids=lambda path: path.stem,
)
def test_it_runs_with_small_models(path, server, object_info):
    if "NF4" in path.stem:
        pytest.importorskip("bitsandbytes", reason="it writes the files")
    workflow = read(path, object_info)
    files = write_files(workflow, server.base / "models")
    prompt = small(workflow, object_info, files)
    before = len(server.log())
    run = server.queue(prompt)
    entry = run.pictures[0]
    if entry["filename"].endswith(".png"):
        frames = [server.pixels(run)]
    else:
        with av.open(io.BytesIO(server.image(entry))) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
            assert ("sound" in path.stem) == bool(video.streams.audio)
        assert len(frames) == 9
    assert {frame.shape for frame in frames} == {(128, 128, 3)} and max(
        frame.std(axis=(0, 1)).max() for frame in frames
    ) > 2

    packed = {name.rpartition("/")[2] for name in files
              if "nf4" in name or name.startswith("svdq") or name.endswith(".gguf")}
    packed |= {
        name for spec in prompt.values()
        if spec["inputs"].get("pack_to", UNPACKED[0]) not in UNPACKED
        for name in map(spec["inputs"].get, ("model_name", "control_net_name")) if name
    }
    # another workflow may have loaded it
    added = {
        line["file"]: int(line["held"]) - int(line["disk"])
        for line in demo.LOADED.finditer(server.log())
    }
    assert packed <= added.keys()
    if "module" in path.stem:
        module, = (name for name in files if "module" in name)
        model, = (spec["inputs"]["model_name"] for spec in prompt.values()
                  if spec["inputs"].get("module_name") == module)
        size = (server.base / "models" / "diffusion_models" / module).stat().st_size
        assert added[model] > size / 2
    assert "lora key not loaded" not in server.log()[before:]
    for node, spec in prompt.items():
        if spec["class_type"] in ("PreviewAny", "FeatherweightCheckLora"):
            assert " fits: all " in run.outputs[node]["text"][0]


@pytest.mark.not_on_fake_gpus(
    dynamic=True, reason="with --fp32-unet a bf16 file stays bf16 in dynamic VRAM, and float32 on"
    " the CPU, so that what is not packed is saved as BF16 and F16")
@pytest.mark.parametrize("path", SAVING, ids=lambda path: path.stem)
def test_it_saves_a_model_that_loads_with_small_models(path, server, object_info):
    workflow = read(path, object_info)
    files = write_files(workflow, server.base / "models")
    prompt = small(workflow, object_info, files)
    run = server.queue(prompt)
    (node, saver), = ((node, spec) for node, spec in prompt.items() if spec["class_type"] == SAVER)
    report = run.outputs[node]["text"][0]
    loras = [name for name in files if "lora" in name]
    report, _, card = report.partition("For the model card")
    assert bool(loras) == ("LoRA" in path.stem)
    assert len(loras) == report.count("% of it is kept") == card.count("% of it is kept")
    shares = [float(share) for share in re.findall(r"([\d.]+)% of it is kept", report)]
    assert all(98 < share < 102 for share in shares), report
    written, = (
        server.base / "output" /
        "diffusion_models").glob(f"{saver['inputs']['filename_prefix'].rpartition('/')[2]}*")
    title = "Z-Image" if path.stem.startswith("Z-Image") else "Flux.1"
    again = {
        "1": {"class_type": "FeatherweightInspectModelFile", "inputs": {"file_name": written.name}}
    }
    assert title in server.queue(again).outputs["1"]["text"][0].splitlines()[0]
