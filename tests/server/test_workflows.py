"""The example workflows: they fit the server's nodes, say where their files belong, and make pictures with small models."""
import functools
import io
import json

import comfy.utils
import numpy as np
import pytest
import torch
from families import FAMILIES, random_weights
from PIL import Image
from safetensors.torch import save_file

from devtools import demo, tiny_models
from devtools.demo_workflows import WORKFLOWS as DEMO_WORKFLOWS
from devtools.gguf_files import write_gguf
from devtools.server import ROOT
from devtools.workflow import AFTER_GENERATE, NOTES, WIDGET_TYPES, to_api
from devtools.workflows import WORKFLOWS, as_ui

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
DEMOS = [path for path in EXAMPLES if path.stem.startswith("Featherweight demo")]  # other tests of this folder run them
SOURCE = "https://huggingface.co/"
SIZES = {"hidden": 256, "double_blocks": 1, "single_blocks": 1, "context": 1024}  # 1024: what LotusConditioning gives


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


def schema_inputs(info) -> dict[str, tuple]:
    """Name -> (type or list of choices, options) of the inputs of a node, in the order of the editor."""
    inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
    return {name: (kind, options[0] if options else {}) for name, (kind, *options) in inputs.items()}


def is_widget(kind, options) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def widget_values(node, info) -> dict[str, object]:
    """Name -> value of the widgets; fails where their number is not that of the schema."""
    values, found = list(node["widgets_values"]), {}
    for name, (kind, options) in schema_inputs(info).items():
        if is_widget(kind, options):
            assert values, f"{node['type']} has no value for {name}"
            found[name] = values.pop(0)
            if options.get("control_after_generate"):
                assert values.pop(0) in AFTER_GENERATE
    assert not values, f"{node['type']} has values of no widget"
    return found


def is_file(value) -> bool:
    return isinstance(value, str) and (value.endswith((".safetensors", ".gguf")) or "/" in value)


def note_of(workflow) -> str:
    return next(node for node in workflow["nodes"] if node["type"] in NOTES)["widgets_values"][0]


def files_of(workflow) -> dict[str, str]:
    """Path below `models` -> folder of the host (the first part of the path), by the tree that the note draws."""
    found, parents = {}, []
    for line in note_of(workflow).splitlines():
        indent, branch, name = line.partition("── ")
        if not branch:
            continue
        parents[len(indent) // 4:] = [name.split("   ")[0].rstrip("/")]
        if len(parents) > 2:
            found["/".join(parents[1:])] = parents[1]
    return found


def where(name, workflow) -> str:
    """The path below `models` of a file that a loader names."""
    return next((path for path, folder in files_of(workflow).items() if path == f"{folder}/{name}"), "")


@each(EXAMPLES)
def test_nodes_and_links_fit_the_servers_nodes(path, object_info):
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {link: (source, output, target, slot, kind) for link, source, output, target, slot, kind in workflow["links"]}
    assert workflow["version"] == 0.4 and len(nodes) + 1 == len(workflow["nodes"]) and len(links) == len(workflow["links"])
    assert workflow["last_node_id"] == max(nodes) and workflow["last_link_id"] == max(links)
    linked_inputs = {(node["id"], slot): entry["link"] for node in nodes.values()
                     for slot, entry in enumerate(node["inputs"]) if entry["link"] is not None}
    linked_outputs = {(node["id"], slot): entry["links"] for node in nodes.values()
                      for slot, entry in enumerate(node["outputs"]) if entry["links"]}
    assert linked_inputs == {(target, slot): link for link, (_, _, target, slot, _) in links.items()}
    assert {link: place for place, of_output in linked_outputs.items() for link in of_output} == {
        link: (source, output) for link, (source, output, *_) in links.items()}
    for source, output, target, slot, kind in links.values():
        entry = nodes[target]["inputs"][slot]
        wanted, _ = schema_inputs(object_info[nodes[target]["type"]])[entry["name"]]
        assert object_info[nodes[source]["type"]]["output"][output] == kind and wanted in (kind, "*")
    for node in nodes.values():
        given = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        needed = object_info[node["type"]]["input"].get("required", {})
        inputs = schema_inputs(object_info[node["type"]])
        assert given >= {name for name in needed if not is_widget(*inputs[name])}


@each(EXAMPLES)
def test_widgets_hold_values_that_the_server_takes(path, object_info):
    for node in read(path)["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = schema_inputs(object_info[node["type"]])
        for name, value in widget_values(node, object_info[node["type"]]).items():
            kind, options = inputs[name]
            if isinstance(kind, list) or kind == "COMBO":
                assert value in (kind if isinstance(kind, list) else options["options"]) or is_file(value), (node["type"], name)
            elif kind in ("INT", "FLOAT"):
                assert isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(value, bool)
                assert options.get("min", value) <= value <= options.get("max", value), (node["type"], name)
            else:
                assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind]), (node["type"], name)


@each(EXAMPLES)
def test_the_note_says_where_each_file_belongs(path, server):
    workflow, folders = read(path), set(server.get_json("/models"))
    named = {value for node in workflow["nodes"] if node["type"] not in NOTES for value in node["widgets_values"]
             if is_file(value)}
    assert named and set(files_of(workflow).values()) <= folders
    for name in named:
        assert where(name, workflow), name
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):  # what the editor offers to download
            assert where(model["name"], workflow) == f"{model['directory']}/{model['name']}"
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith(SOURCE) and f"[{model['name']}]({model['url']})" in note_of(workflow)


@each(EXAMPLES)
def test_the_thumbnail_is_a_small_picture(path):
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 60_000 and Image.open(thumbnail).format == "JPEG"


def test_workflows_are_what_their_description_gives(object_info):
    written = {workflow.name: as_ui(workflow, object_info) for workflow in (make() for make in WORKFLOWS + DEMO_WORKFLOWS)}
    assert {path.stem for path in EXAMPLES} == set(written)
    for name, workflow in written.items():
        path = ROOT / "example_workflows" / f"{name}.json"
        assert workflow == read(path), "run `python -m devtools.workflows` and `python -m devtools.demo_workflows`"


# Small models in place of the files that the workflows name.

@functools.cache
def flux() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in tiny_models.flux(**SIZES).items()}


def autoencoder(channels: int = tiny_models.LATENT_CHANNELS) -> dict[str, torch.Tensor]:
    values = {name: torch.from_numpy(value) for name, value in tiny_models.autoencoder().items()}
    for name, axis in {"taesd_decoder.1.weight": 1, "taesd_encoder.14.weight": 0, "taesd_encoder.14.bias": 0}.items():
        values[name] = values[name].narrow(axis, 0, channels).contiguous()
    return values


def write_nf4(path, weights=None, keep=None):
    from devtools.bnb_files import write_bnb  # takes the bitsandbytes package
    write_bnb(path, weights or flux(), keep=keep)


def write_nf4_checkpoint(path):
    weights = {f"model.diffusion_model.{name}": value for name, value in flux().items()}
    vae = {f"vae.{name}": value for name, value in autoencoder().items()}
    write_nf4(path, weights | vae, keep=lambda name, value: value.ndim != 2 or name.startswith("vae."))


def write_nf4_folder(path):
    """As diffusers saves a model: its own names, with q, k and v apart, and a config."""
    names = comfy.utils.flux_to_diffusers({"depth": SIZES["double_blocks"], "depth_single_blocks": SIZES["single_blocks"],
                                           "hidden_size": SIZES["hidden"]})
    source = {name.replace("_norm.scale", "_norm.weight"): value for name, value in flux().items()}  # the table's spelling
    weights, done = {}, set()
    for name, target in names.items():
        layer, part, swap = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        if layer in source and (layer, part) not in done:  # the host knows two names of some layers
            done.add((layer, part))
            value = source[layer] if part is None else source[layer].narrow(*part)
            weights[name] = (swap(value) if swap else value).contiguous()
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}))
    write_nf4(path / "diffusion_pytorch_model.safetensors", weights)


def write_flux_gguf(path):
    write_gguf(path, flux(), lambda name, values: "Q4_K" if values.ndim == 2 else "F32")


def write_stable_diffusion_gguf(path):
    """As stable-diffusion.cpp: matrices packed, everything else in F16, nothing said about the architecture."""
    weights = {f"model.diffusion_model.{name}": value for name, value in random_weights(FAMILIES["sd1.5"]).items()}
    weights |= {f"first_stage_model.{name}": value for name, value in autoencoder(channels=4).items()}
    generator = torch.Generator().manual_seed(1)
    for name, shape in tiny_models.clip_l_shapes().items():
        value = torch.randn(shape, generator=generator) * 0.03 + ("norm" in name and name.endswith("weight"))
        weights[f"cond_stage_model.transformer.{name}"] = value
    write_gguf(path, weights, lambda name, values: "Q8_0" if values.ndim == 2 else "F16", architecture=None)


def write_vae(path):
    save_file(autoencoder(), path)


def write_lora(path, part):
    """In the trainers' naming for one part of the model, in PEFT's for the other."""
    naming = {"double_blocks": ("lora_unet_{flat}", ".lora_down.weight", ".lora_up.weight"),
              "single_blocks": ("diffusion_model.{name}", ".lora_A.weight", ".lora_B.weight")}
    lora = tiny_models.flux_lora(11, part, *naming[part], context=SIZES["context"])
    save_file({name: torch.from_numpy(value) for name, value in lora.items()}, path)


STAND_INS = {
    "flux1-dev-bnb-nf4-v2.safetensors": write_nf4_checkpoint,
    "flux1-dev-bnb_nf4.safetensors": write_nf4,
    "flux.1-dev-nf4-pkg/transformer": write_nf4_folder,
    "flux1-dev-Q4_K_S.gguf": write_flux_gguf,
    "stable-diffusion-v1-5-pruned-emaonly-Q8_0.gguf": write_stable_diffusion_gguf,
    "ae.safetensors": write_vae,
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": functools.partial(write_lora, part="double_blocks"),
    "FLUX-dev-lora-add_details.safetensors": functools.partial(write_lora, part="single_blocks"),
}
# Flux's text encoder T5-XXL exists in one size, 4.8 billion weights: its conditioning comes from a node that needs none.
NEEDS_T5 = "flux"


def run_small(server, path, object_info):
    """Run a workflow on stand-ins for its files, with a small picture and two steps. Returns the run and the prompt."""
    workflow = read(path)
    prompt = to_api(workflow, object_info)
    for node in prompt.values():
        if node["class_type"] == "CLIPTextEncode" and NEEDS_T5 in path.stem.lower():
            node.update(class_type="LotusConditioning", inputs={})
        values = node["inputs"]
        values |= {name: small for name, small in {"width": 128, "height": 128, "steps": 2}.items() if name in values}
    for name in {value for node in prompt.values() for value in node["inputs"].values() if is_file(value)} & set(STAND_INS):
        place = server.base / "models" / where(name, workflow)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            STAND_INS[name](place)
    return server.queue(prompt), prompt


def pixels(server, run):
    entry = next(entry for output in run.outputs.values() for entry in output.get("images", []) if entry["type"] == "output")
    return np.asarray(Image.open(io.BytesIO(server.image(entry))), dtype=np.float32)


@each([path for path in EXAMPLES if path not in DEMOS])
def test_it_makes_a_picture_with_small_models_and_for_flux_without_the_text_encoder(path, server, object_info):
    if "NF4" in path.stem or "4-bit" in path.stem:
        pytest.importorskip("bitsandbytes", reason="it writes the files")
    run, prompt = run_small(server, path, object_info)
    picture = pixels(server, run)
    assert picture.shape == (128, 128, 3) and picture.std(axis=(0, 1)).max() > 5
    model = next(name for node in prompt.values() for name in node["inputs"].values() if is_file(name) and name in STAND_INS)
    assert model.rpartition("/")[2] in {line["file"] for line in demo.LOADED.finditer(server.log())}
    for node, spec in prompt.items():
        if spec["class_type"] == "PreviewAny":
            assert "This LoRA for Flux.1 fits" in run.outputs[node]["text"][0]
