"""Writes the example workflows of full-size models: `python -m devtools.workflows`, from the root.

A workflow is stated here as nodes with the values that matter, in groups. The slots and widgets of each node, and the values
that are not stated, come from the real server.
"""
import itertools
import json
import tempfile
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from devtools.server import PACK, ROOT, Server
from devtools.workflow import WIDGET_TYPES

FOLDER = ROOT / "example_workflows"
HOST_VERSION, OWN_VERSION = "0.30.0", "0.1.0"
# Pixels of the editor
WIDTH, NOTE_WIDTH = 380, 460
TITLE, GAP, MARGIN, HEADING = 30, 30, 20, 50  # of a node; between nodes; around a group; its title
TALL = {"CLIPTextEncode": 160, "SaveImage": 420, "PreviewImage": 280, "PreviewAny": 200, "FeatherweightApplyLora": 290,
        "FeatherweightCheckLora": 520}

PACKAGE = "flux.1-dev-nf4-pkg"

FEATHER = "a white feather resting on a brass balance scale, soft morning light, shallow depth of field"
LICENCE = "Flux.1 dev is for non-commercial use; see its licence."


class File(NamedTuple):
    """folder: below ComfyUI/models. repository, path: on Hugging Face."""

    folder: str
    repository: str
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repository}/resolve/main/{self.path}"


CLIP_L = File("text_encoders", "comfyanonymous/flux_text_encoders", "clip_l.safetensors")
T5_FP8 = File("text_encoders", "comfyanonymous/flux_text_encoders", "t5xxl_fp8_e4m3fn_scaled.safetensors")
T5_GGUF = File("text_encoders", "city96/t5-v1_1-xxl-encoder-gguf", "t5-v1_1-xxl-encoder-Q4_K_M.gguf")
FLUX_VAE = File("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/ae.safetensors")
FLUX_NF4 = File("checkpoints", "lllyasviel/flux1-dev-bnb-nf4", "flux1-dev-bnb-nf4-v2.safetensors")
FLUX_NF4_MODEL = File("diffusion_models", "InvokeAI/flux_dev", "transformer/bnb_nf4/flux1-dev-bnb_nf4.safetensors")
FLUX_GGUF = File("diffusion_models", "city96/FLUX.1-dev-gguf", "flux1-dev-Q4_K_S.gguf")
HYPER_LORA = File("loras", "ByteDance/Hyper-SD", "Hyper-FLUX.1-dev-8steps-lora.safetensors")
DETAIL_LORA = File("loras", "Shakker-Labs/FLUX.1-dev-LoRA-add-details", "FLUX-dev-lora-add_details.safetensors")
SD15_GGUF = File("checkpoints", "second-state/stable-diffusion-v1-5-GGUF", "stable-diffusion-v1-5-pruned-emaonly-Q8_0.gguf")


@dataclass(eq=False)
class Node:
    """inputs: values of widgets, and for the other inputs a Node or (Node, output). files: those that its widgets name."""

    type: str
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    files: tuple[File, ...] = ()


@dataclass
class Workflow:
    """columns: from left to right, each with groups of nodes by their titles, from the top. A node comes after those that it
    is linked to."""

    name: str
    note: str
    columns: list[dict[str, list[Node]]]

    @property
    def nodes(self) -> list[Node]:
        return [node for column in self.columns for group in column.values() for node in group]


def as_ui(workflow: Workflow, object_info: dict) -> dict:
    """The workflow as the editor saves it, format 0.4."""
    nodes, links, groups = [_note(workflow)], [], []
    number = {node: index for index, node in enumerate(workflow.nodes, start=2)}
    for column, left in zip(workflow.columns, itertools.count(0, WIDTH + 3 * MARGIN)):
        top = 0
        for title, group in column.items():
            start, top = top, top + HEADING
            for node in group:
                nodes.append(_node(node, number, links, object_info, [left, top + TITLE]))
                top += TITLE + nodes[-1]["size"][1] + GAP
            top += MARGIN - GAP
            bounds = [left - MARGIN, start, WIDTH + 2 * MARGIN, top - start]
            groups.append({"id": len(groups) + 1, "title": title, "bounding": bounds, "color": "#3f789e", "font_size": 24,
                           "flags": {}})
            top += MARGIN
    for link, source, output, *_ in links:
        nodes[source - 1]["outputs"][output]["links"].append(link)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{workflow.name}")), "revision": 0,
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": groups,
        "config": {}, "extra": {"ds": {"scale": 0.7, "offset": [NOTE_WIDTH + 140, 120]}}, "version": 0.4,
    }


def _note(workflow: Workflow) -> dict:
    files = dict.fromkeys(file for node in workflow.nodes for file in node.files)
    links = "\n".join(f"- [{file.name}]({file.url})" for file in files)  # the editor has a button for safetensors only
    download = f"\n\n**Download**\n\n{links}" if files else ""
    lines = len(files) + sum(1 + len(line) // 75 for line in workflow.note.splitlines())
    return {
        "id": 1, "type": "MarkdownNote", "pos": [-NOTE_WIDTH - 2 * MARGIN, TITLE], "size": [NOTE_WIDTH, 100 + 12 * lines],
        "flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": [], "properties": {},
        "widgets_values": [f"# {workflow.name}\n\n{workflow.note.strip()}{download}"],
        "color": "#222", "bgcolor": "#000", "title": "About this workflow",
    }


def _node(node: Node, number: dict[Node, int], links: list, object_info: dict, position: list[int]) -> dict:
    """The node as the editor saves it; its links are added to `links`."""
    info = object_info[node.type]
    inputs = info["input"]["required"] | info["input"].get("optional", {})
    unknown = node.inputs.keys() - inputs.keys()
    if unknown:
        raise ValueError(f"{node.type} has no input {', '.join(unknown)}.")
    slots, values = [], []
    for name, (kind, *options) in inputs.items():
        if isinstance(kind, list) or kind in WIDGET_TYPES:
            options = options[0] if options else {}
            values.append(node.inputs[name] if name in node.inputs else options["default"])
            if options.get("control_after_generate"):
                values.append("fixed" if name in node.inputs else "randomize")
            continue
        link = None
        if name in node.inputs:
            source, output = node.inputs[name] if isinstance(node.inputs[name], tuple) else (node.inputs[name], 0)
            link = len(links) + 1
            links.append([link, number[source], output, number[node], len(slots), object_info[source.type]["output"][output]])
        slots.append({"name": name, "type": kind, "link": link})
    outputs = [{"name": name, "type": kind, "links": []} for name, kind in zip(info["output_name"], info["output"])]
    height = 6 + 20 * max(len(slots), len(outputs)) + (8 + 24 * len(values) if values else 0)
    own = node.type.startswith("Featherweight")
    properties = {"Node name for S&R": node.type, "cnr_id": "featherweight" if own else "comfy-core",
                  "ver": OWN_VERSION if own else HOST_VERSION}
    if node.files:
        properties["models"] = [{"name": file.name, "url": file.url, "directory": file.folder}
                                for file in node.files]
    entry = {"id": number[node], "type": node.type, "pos": position, "size": [WIDTH, TALL.get(node.type, height)], "flags": {},
             "order": number[node] - 1, "mode": 0, "inputs": slots, "outputs": outputs, "properties": properties,
             "widgets_values": values}
    return entry | ({"title": node.title} if node.title else {})


def flux(name: str, note: str, loaders: dict[str, list[Node]], model, clip, vae, steps: int = 20) -> Workflow:
    """Text to image with Flux. loaders: the first column. model, clip, vae: a Node or (Node, output)."""
    prompt = Node("CLIPTextEncode", {"text": FEATHER, "clip": clip}, "Prompt")
    guidance = Node("FluxGuidance", {"conditioning": prompt, "guidance": 3.5})
    negative = Node("ConditioningZeroOut", {"conditioning": prompt}, "No negative prompt (Flux has none)")
    size = Node("EmptySD3LatentImage", {"width": 1024, "height": 1024}, "Size of the picture")
    sampler = Node("KSampler", {"model": model, "positive": guidance, "negative": negative, "latent_image": size,
                                "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"})
    decode = Node("VAEDecode", {"samples": sampler, "vae": vae})
    save = Node("SaveImage", {"images": decode, "filename_prefix": "featherweight"})
    return Workflow(name, note, [
        loaders, {"Prompt and size": [prompt, guidance, negative, size]}, {"Picture": [sampler, decode, save]}])


def checkpoint(file: File) -> Node:
    return Node("FeatherweightLoadCheckpoint", {"checkpoint_name": file.name}, files=(file,))


def diffusion_model(file: File) -> Node:
    return Node("FeatherweightLoadDiffusionModel", {"model_name": file.name}, files=(file,))


def flux_encoders(t5: File) -> Node:
    return Node("FeatherweightLoadTextEncoder",
                {"text_encoder_1": CLIP_L.name, "text_encoder_2": t5.name, "type": "flux"}, files=(CLIP_L, t5))


def flux_vae() -> Node:
    return Node("VAELoader", {"vae_name": FLUX_VAE.name}, files=(FLUX_VAE,))


def nf4_all_in_one() -> Workflow:
    load = checkpoint(FLUX_NF4)
    return flux("Flux.1 dev NF4 all-in-one", f"""
Model, text encoders and VAE in one file. The weights of the model are NF4 and stay packed while it runs; the T5 is fp8.

```
ComfyUI/
└── models/
    └── checkpoints/
        └── {FLUX_NF4.name}   12.0 GB
```

**Memory.** The text encoders (CLIP-L 0.2 GB, T5 4.8 GB) run first and make room. The model takes 6.7 GB, and ComfyUI sets \
1.1 GB aside for the computation at 1024 × 1024. On a card of 8 GB it keeps the part that does not fit in main memory, by \
itself.

**To change.** The prompt; width and height; steps; guidance (2 to 4: lower looks more natural, higher follows the prompt \
more closely). Keep cfg at 1. Any other NF4 or FP4 checkpoint of Flux works in the loader, the older v1 file too.

{LICENCE}
""", {"Load": [load]}, (load, 0), (load, 1), (load, 2))


def nf4_with_two_loras() -> Workflow:
    load = checkpoint(FLUX_NF4)
    first = Node("LoraLoader", {"model": (load, 0), "clip": (load, 1), "lora_name": HYPER_LORA.name,
                                "strength_model": 0.125}, "Load LoRA: 8 steps are enough", files=(HYPER_LORA,))
    second = Node("FeatherweightApplyLora", {"model": (first, 0), "clip": (first, 1), "lora_name": DETAIL_LORA.name},
                  files=(DETAIL_LORA,))
    report = Node("PreviewAny", {"source": (second, 2)}, "Whether the second LoRA fits")
    return flux("Flux.1 dev NF4 with two LoRAs", f"""
Two LoRAs on a packed model, exactly: the packed weights are not changed, so nothing is rounded and a moved strength costs \
no reload. ComfyUI's own **Load LoRA** and **Apply LoRA (Featherweight)** mix freely, in any order and number.

```
ComfyUI/
└── models/
    ├── checkpoints/
    │   └── {FLUX_NF4.name}   12.0 GB
    └── loras/
        ├── {HYPER_LORA.name}
        └── {DETAIL_LORA.name}
```

**Memory.** The text encoders (5.0 GB) run first and make room. The model takes 6.7 GB, the LoRAs the size of their files, \
and ComfyUI sets 1.1 GB aside for the computation at 1024 × 1024.

**To change.** The LoRAs and their strengths. The first one is made for 8 steps at a strength of 0.125: without it, set \
steps to 20. `block_weights` of the second gives each block a strength of its own, such as `single=0.5` or `double.0-9=0`; \
its help page (press **?**) has the list. Keep cfg at 1.

{LICENCE}
""", {"Load": [load], "Two LoRAs": [first, second, report]}, (second, 0), (second, 1), (load, 2), steps=8)


def nf4_unet_only() -> Workflow:
    model, encoders, vae = diffusion_model(FLUX_NF4_MODEL), flux_encoders(T5_FP8), flux_vae()
    return flux("Flux.1 dev NF4 UNet-only", f"""
An NF4 file that holds only the diffusion model, with text encoders and VAE from files of their own: they are shared with \
other Flux workflows, and each can be of any kind.

```
ComfyUI/
└── models/
    ├── diffusion_models/
    │   └── {FLUX_NF4_MODEL.name}   6.7 GB
    ├── text_encoders/
    │   ├── {CLIP_L.name}   0.2 GB
    │   └── {T5_FP8.name}   4.8 GB
    └── vae/
        └── {FLUX_VAE.name}   0.3 GB
```

**Memory.** The text encoders (5.0 GB) run first and make room. The model takes 6.7 GB, and ComfyUI sets 1.1 GB aside for \
the computation at 1024 × 1024.

**To change.** With little main memory, take a GGUF of the T5 in place of the fp8 file: Q4_K_M has 2.9 GB. `device: cpu` \
of the text encoder (among its advanced inputs) leaves the card to the model. Keep cfg at 1.

{LICENCE}
""", {"Load": [model, encoders, vae]}, model, encoders, vae)


def nf4_package() -> Workflow:
    encoders = Node("FeatherweightLoadTextEncoder", {
        "text_encoder_1": CLIP_L.name, "text_encoder_2": f"{PACKAGE}/text_encoder_2", "type": "flux"},
        "Load Text Encoder: CLIP-L and a 4-bit T5", files=(CLIP_L,))
    model = Node("FeatherweightLoadDiffusionModel", {"model_name": f"{PACKAGE}/transformer"})
    vae = flux_vae()
    return flux("Flux.1 dev 4-bit package on 8 GB", f"""
Text encoder and model as diffusers saves them, both in 4 bits: folders, not files. The prompt is encoded first, then the \
text encoder makes room for the model.

Get the two folders, from inside `ComfyUI/models`:

```
hf download hf-internal-testing/{PACKAGE} --include "text_encoder_2/*" --local-dir text_encoders/{PACKAGE}
hf download hf-internal-testing/{PACKAGE} --include "transformer/*" --local-dir diffusion_models/{PACKAGE}
```

```
ComfyUI/
└── models/
    ├── text_encoders/
    │   ├── {CLIP_L.name}
    │   └── {PACKAGE}/
    │       └── text_encoder_2/
    ├── diffusion_models/
    │   └── {PACKAGE}/
    │       └── transformer/
    └── vae/
        └── {FLUX_VAE.name}
```

**Memory.** A T5 in NF4 takes 2.9 GB; up to 6.3 GB where its feed-forward outputs were left in 32 bits, as transformers \
does by default. The model takes 6.7 GB, and ComfyUI sets 1.1 GB aside for the computation at 1024 × 1024, 0.6 GB at 768 × \
768. What does not fit on the card stays in main memory, by itself.

**To change.** Any folder with a `config.json` that diffusers or transformers saved in NF4, FP4 or int8. A whole package \
goes into `models/diffusers`, for **Load Checkpoint (Featherweight)**. Keep cfg at 1.

{LICENCE}
""", {"Load": [encoders, model, vae]}, model, encoders, vae)


def gguf_with_gguf_t5() -> Workflow:
    model, encoders, vae = diffusion_model(FLUX_GGUF), flux_encoders(T5_GGUF), flux_vae()
    return flux("Flux.1 dev GGUF with GGUF T5", f"""
Model and T5 as GGUF, both kept packed while they run; CLIP-L and the VAE are ordinary files.

```
ComfyUI/
└── models/
    ├── diffusion_models/
    │   └── {FLUX_GGUF.name}   6.8 GB
    ├── text_encoders/
    │   ├── {CLIP_L.name}   0.2 GB
    │   └── {T5_GGUF.name}   2.9 GB
    └── vae/
        └── {FLUX_VAE.name}   0.3 GB
```

**Memory.** A GGUF takes the size of its file. The text encoders (3.1 GB) run first and make room for the model; ComfyUI \
sets 1.1 GB aside for the computation at 1024 × 1024. The 11.9 billion weights of the model take 12.6 GB as Q8_0, 9.8 GB \
as Q6_K, 8.2 GB as Q5_K, 6.7 GB as Q4_K, 5.1 GB as Q3_K: choose the largest that fits on the card with 1.1 GB to spare.

**To change.** Any GGUF of any model that ComfyUI knows, with the text encoder and VAE that belong to it, and their \
`type`. Keep cfg at 1 for Flux.

{LICENCE}
""", {"Load": [model, encoders, vae]}, model, encoders, vae)


def stable_diffusion_gguf() -> Workflow:
    load = checkpoint(SD15_GGUF)
    prompt = Node("CLIPTextEncode", {"text": FEATHER, "clip": (load, 1)}, "Prompt")
    negative = Node("CLIPTextEncode", {"text": "blurry, low quality, text, watermark", "clip": (load, 1)}, "Negative prompt")
    size = Node("EmptyLatentImage", {"width": 512, "height": 512}, "Size of the picture")
    sampler = Node("KSampler", {"model": (load, 0), "positive": prompt, "negative": negative, "latent_image": size, "steps": 25,
                                "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"})
    decode = Node("VAEDecode", {"samples": sampler, "vae": (load, 2)})
    save = Node("SaveImage", {"images": decode, "filename_prefix": "featherweight"})
    return Workflow("Stable Diffusion GGUF all-in-one", f"""
A whole checkpoint (model, text encoder, VAE) as one GGUF, as stable-diffusion.cpp writes it.

```
ComfyUI/
└── models/
    └── checkpoints/
        └── {SD15_GGUF.name}   1.8 GB
```

**Memory.** The model takes 1.5 GB, the text encoder 0.1 GB, the VAE 0.2 GB: it runs on a card of 4 GB. Only matrices are \
packed in such a file, the convolutions are 16 bits wide, so that Q4_0 is little smaller: 1.6 GB.

**To change.** Another checkpoint of SD1.5 as GGUF. To make one from a checkpoint you have, with the program of \
stable-diffusion.cpp:

```
sd -M convert -m model.safetensors -o model-Q8_0.gguf --type q8_0
```

A GGUF that holds only the UNet belongs into **Load Diffusion Model (Featherweight)**.
""", [{"Load": [load]}, {"Prompt and size": [prompt, negative, size]}, {"Picture": [sampler, decode, save]}])


WORKFLOWS = (nf4_all_in_one, nf4_with_two_loras, nf4_unet_only, nf4_package, gguf_with_gguf_t5, stable_diffusion_gguf)


def write(workflows):
    """Write the workflows that these functions make into the examples."""
    with tempfile.TemporaryDirectory() as base, Server(base) as server:
        object_info = server.object_info()
    for workflow in (make() for make in workflows):
        text = json.dumps(as_ui(workflow, object_info), indent=2, ensure_ascii=False) + "\n"
        (FOLDER / f"{workflow.name}.json").write_text(text, encoding="utf-8")
        print(workflow.name)


if __name__ == "__main__":
    write(WORKFLOWS)
