"""Workflows as nodes with the values that matter, and the same as the editor saves them.

The slots and widgets of each node, and the values that are not stated, come from the real server.
"""
import itertools
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from devtools.host.environment import HOST_VERSION
from devtools.host.server import PACK
from devtools.workflows.api_format import has_control, is_widget

OWN_VERSION = "0.1.0"  # which the workflows are written for
# Pixels of the editor
WIDTH, NOTE_WIDTH = 380, 460
TITLE, GAP, MARGIN, HEADING = 30, 30, 20, 50  # of a node; between nodes; around a group; its title
LINE, AROUND_TEXT = 16, 40  # of the text that a node shows when it has run; above and below it
# Lines of that text.
TEXT_LINES = {
    "FeatherweightLoadDiffusionModel": 3,
    "FeatherweightLoadTextEncoder": 3,
    "FeatherweightLoadCheckpoint": 6,
    "FeatherweightPlaceModel": 3,
    "FeatherweightPlaceTextEncoder": 3,
}
TALL = {
    "CLIPTextEncode": 160,
    "SaveImage": 420,
    "PreviewAny": 280,
    "FeatherweightApplyLora": 290,
    "LoadImage": 330,
    "PreviewImage": 300,
    "TextEncodeQwenImageEditPlus": 200,
    "SaveVideo": 380,
    "FeatherweightCheckLora": 640,
    "FeatherweightMeasureSensitivity": 475,
    "FeatherweightSavePackedModel": 470,
    "FeatherweightInspectModelFile": 720,
    "FeatherweightRunOnRay": 360,
    "StringConcatenate": 200,
}
PICTURE_SIZE = ("width", "height")
VIDEO_SIZE = (*PICTURE_SIZE, "length")
LORA = ("lora_name", "strength_model", "strength_clip")
# The widgets that people set from run to run, by the type of their node, in the order of a form.
CONTROLS = {
    "CLIPTextEncode": ("text",),
    "TextEncodeQwenImageEditPlus": ("prompt",),
    "FeatherweightRunOnRay": ("count", "texts"),
    "LoadImage": ("image",),
    "EmptyLatentImage": PICTURE_SIZE,
    "EmptySD3LatentImage": PICTURE_SIZE,
    "EmptyHunyuanLatentVideo": VIDEO_SIZE,
    "EmptyLTXVLatentVideo": VIDEO_SIZE,
    "Wan22ImageToVideoLatent": VIDEO_SIZE,
    "WanVaceToVideo": (*VIDEO_SIZE, "strength"),
    "LTXVEmptyLatentAudio": ("frames_number",),
    "RandomNoise": ("noise_seed",),
    "KSampler": ("seed", "steps", "cfg"),
    "KSamplerAdvanced": ("noise_seed", "steps", "end_at_step", "start_at_step", "cfg"),
    "FluxGuidance": ("guidance",),
    "LoraLoader": LORA,
    "LoraLoaderModelOnly": LORA,
    "FeatherweightApplyLora": LORA,
    "FeatherweightSavePackedModel": ("type", "size_gb", "filename_prefix", "folder"),
}
# What people read in place of the names of widgets and outputs, where spaces would not do.
WORDS = {
    "lora_name": "LoRA",
    "strength_model": "LoRA strength",
    "strength_clip": "LoRA strength",
    "noise_seed": "seed",
    "end_at_step": "switch at step",
    "start_at_step": "switch at step",
    "model_name": "diffusion model",
    "text_encoder_1": "text encoder",
    "checkpoint_name": "checkpoint",
    "vae_name": "VAE",
    "size_gb": "size in GB",
    "STRING": "report",
}
SAVERS = ("SaveImage", "SaveVideo")


class File(NamedTuple):
    """folder: below ComfyUI/models. repository, path: on Hugging Face; without, the workflow's text
    says where it comes from.
    size: as a reader sees it. saved_as: its name or place in `folder`, where that is not the end of
    `path`."""

    folder: str
    repository: str
    path: str
    size: str = ""
    saved_as: str = ""

    @property
    def name(self) -> str:
        return self.saved_as or self.path.rpartition("/")[2]

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repository}/resolve/main/{self.path}"


@dataclass(eq=False)
class Node:
    """inputs: values of widgets, or a Node or (Node, output) that an input is linked to. files:
    those that its widgets name."""

    type: str
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    files: tuple[File, ...] = ()


@dataclass
class Workflow:
    """columns: from left to right, each with groups of nodes by their titles, from the top. A node
    comes after those that it is linked to. about, memory, change, licence: the note's text, in
    Markdown."""

    name: str
    columns: list[dict[str, list[Node]]]
    about: str
    memory: str
    change: str
    licence: str = ""

    @property
    def nodes(self) -> list[Node]:
        return [node for column in self.columns for group in column.values() for node in group]

    @property
    def numbers(self) -> dict[Node, int]:
        """Node -> its id in the editor. The first is the note's."""
        return {node: index for index, node in enumerate(self.nodes, start=2)}

    @property
    def saves(self) -> list[Node]:
        """The nodes whose pictures app mode shows. None if there are several samplers, whose
        settings no form could tell apart."""
        types = [node.type for node in self.nodes]
        return [node for node in self.nodes
                if node.type in SAVERS and types.count("KSampler") < 2]

    @property
    def files(self) -> list[File]:
        return list(dict.fromkeys(file for node in self.nodes for file in node.files))

    @property
    def note(self) -> str:
        links = "\n".join(map(_download, filter(lambda file: file.repository, self.files)))
        parts = (
            f"# {self.name}",
            self.about,
            f"```\n{_tree(self.files)}\n```",
            f"**Memory.** {self.memory}",
            f"**To change.** {self.change}",
            self.licence,
            links and f"**Download**\n\n{links}",
        )
        return "\n\n".join(part.strip() for part in parts if part)


def settings(nodes: list[Node]) -> Iterator[tuple[Node, str]]:
    """The widgets that people set from run to run, in the order of a form."""
    for type, widgets in CONTROLS.items():
        for node in (node for node in nodes if node.type == type):
            yield from ((node, widget) for widget in widgets if _is_set(node, widget))


def form(widgets: Iterable[tuple[Node, str]]) -> dict[str, list[tuple[Node, str]]]:
    """Label -> its widgets: more than one if they are the same setting of several nodes.

    Raises ValueError if two different values have the same label; a title "…: …" of the node tells
    them apart.
    """
    fields = {}
    for node, widget in widgets:
        same = fields.setdefault(label(node, widget), [])
        same.append((node, widget))
        first, first_widget = same[0]
        if node.inputs.get(widget) != first.inputs.get(first_widget):
            raise ValueError(f"Two widgets are called {label(node, widget)}.")
    return fields


def _is_set(node: Node, widget: str) -> bool:
    """Whether people set it: not what is linked, nor a cfg of 1, which stays, nor what is left as
    it comes, but for seeds and strengths."""
    value = node.inputs.get(widget)
    if value is None:
        return widget in ("seed", "noise_seed", "strength_model")
    return not isinstance(value, (Node, tuple)) and (widget, value) != ("cfg", 1.0)


def label(node: Node, widget: str) -> str:
    """What a form calls a widget: a text by the title of its node, others with what follows the
    title's colon."""
    if widget in ("text", "prompt"):
        return node.title.lower()
    _, colon, detail = node.title.partition(": ")
    return WORDS.get(widget, widget.replace("_", " ")) + colon + detail


def _download(file: File) -> str:
    """A link; the editor itself has a button for safetensors only."""
    name = file.path.rpartition("/")[2]
    return f"- [{file.name}]({file.url})" + (
        f", renamed from `{name}`" if name != file.name else ""
    )


def _tree(files: list[File]) -> str:
    """The folders that the files belong into, drawn as a tree."""
    models = {}
    for file in files:
        below = models
        for part in (file.folder, *file.name.split("/")):
            above, below = below, below.setdefault(part, {})
        if "." in part:  # not a folder
            above[part] = file.size
    return "\n".join(["ComfyUI/", "└── models/", *_branches(models, "    ")])


def _branches(entries: dict, indent: str) -> Iterator[str]:
    for index, (name, below) in enumerate(entries.items(), start=1):
        branch, further = ("└── ", "    ") if index == len(entries) else ("├── ", "│   ")
        if isinstance(below, dict):
            yield f"{indent}{branch}{name}/"
            yield from _branches(below, indent + further)
        else:
            yield f"{indent}{branch}{name}" + (f"   {below}" if below else "")


def as_ui(workflow: Workflow, object_info: dict) -> dict:
    """The workflow as the editor saves it, format 0.4."""
    nodes, links, groups = [note_node(workflow)], [], []
    number = workflow.numbers
    fields = form(settings(workflow.nodes)) if workflow.saves else {}
    for column, left in zip(workflow.columns, itertools.count(0, WIDTH + 3 * MARGIN)):
        top = 0
        for title, group in column.items():
            start, top = top, top + HEADING
            for node in group:
                nodes.append(_node(node, number, links, object_info, [left, top + TITLE], fields))
                top += TITLE + nodes[-1]["size"][1] + GAP
            top += MARGIN - GAP
            bounds = [left - MARGIN, start, WIDTH + 2 * MARGIN, top - start]
            groups.append(
                {
                    "id": len(groups) + 1,
                    "title": title,
                    "bounding": bounds,
                    "color": "#3f789e",
                    "font_size": 24,
                    "flags": {},
                }
            )
            top += MARGIN
    for link, source, output, *_ in links:
        nodes[source - 1]["outputs"][output]["links"].append(link)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{workflow.name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"ds": {"scale": 0.7, "offset": [NOTE_WIDTH + 140, 120]}}
        | ({"linearData": _app(workflow, fields)} if workflow.saves else {}),
        "version": 0.4,
    }


def _app(workflow: Workflow, fields: dict[str, list[tuple[Node, str]]]) -> dict:
    """What the editor's app mode shows: settings of one node each, and what is saved."""
    number = workflow.numbers
    return {
        "inputs": [[number[node], widget] for (node, widget), *others in fields.values()
                   if not others],
        "outputs": [number[node] for node in workflow.saves],
    }


def note_node(workflow: Workflow) -> dict:
    lines = sum(1 + len(line) // 75 for line in workflow.note.splitlines())
    return {
        "id": 1,
        "type": "MarkdownNote",
        "pos": [-NOTE_WIDTH - 2 * MARGIN, TITLE],
        "size": [NOTE_WIDTH, 100 + 12 * lines],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [workflow.note],
        "color": "#222",
        "bgcolor": "#000",
        "title": "About this workflow",
    }


def widget_slot(name: str, input_type: str | list) -> dict:
    """The input slot of a widget. input_type: its type, or the choices of a combo."""
    input_type = "COMBO" if isinstance(input_type, list) else input_type
    return {"name": name, "type": input_type, "widget": {"name": name}, "link": None}


def _node(
    node: Node,
    number: dict[Node, int],
    links: list,
    object_info: dict,
    position: list[int],
    fields: dict[str, list[tuple[Node, str]]],
) -> dict:
    """The node as the editor saves it, with the labels of a form's fields; its links are added to
    `links`."""
    labels = {widget: text for text, widgets in fields.items() for owner, widget in widgets
              if owner is node and text != widget}
    info = object_info[node.type]
    inputs = info["input"]["required"] | info["input"].get("optional", {})
    unknown = node.inputs.keys() - inputs.keys()
    if unknown:
        raise ValueError(f"{node.type} has no input {', '.join(unknown)}.")
    slots, values = [], []
    for name, (kind, *options) in inputs.items():
        options = options[0] if options else {}
        widget = is_widget(kind, options)
        given = node.inputs.get(name)
        linked = isinstance(given, (Node, tuple))
        if widget:
            unset = options.get("default", "" if kind == "STRING" else 0)
            if kind == "COMFY_DYNAMICCOMBO_V3":
                unset = options["options"][0]["key"]
            values.append(unset if given is None or linked else given)
            if has_control(name, options):
                values.append("randomize" if given is None else "fixed")
            if options.get("image_upload"):
                values.append("image")  # the button that uploads one
            if not linked:
                continue
        link = None
        if linked:
            source, output = given if isinstance(given, tuple) else (given, 0)
            link = len(links) + 1
            links.append(
                [
                    link,
                    number[source],
                    output,
                    number[node],
                    len(slots),
                    object_info[source.type]["output"][output],
                ]
            )
        slots.append(
            {"name": name, "type": kind, "link": link}
            | ({"widget": {"name": name}} if widget else {})
        )
    outputs = [
        {"name": name, "type": kind, "links": []}
        for name, kind in zip(info["output_name"], info["output"])
    ]
    height = 6 + 20 * max(len(slots), len(outputs)) + (8 + 24 * len(values) if values else 0)
    if lines := TEXT_LINES.get(node.type):
        height += LINE * lines + AROUND_TEXT
    slots += [
        widget_slot(name, inputs[name][0]) | {"label": text} for name, text in labels.items()
    ]
    own = node.type.startswith("Featherweight")
    properties = {
        "Node name for S&R": node.type,
        "cnr_id": "featherweight" if own else "comfy-core",
        "ver": OWN_VERSION if own else HOST_VERSION,
    }
    if models := [file for file in node.files if file.repository]:
        properties["models"] = [
            {"name": file.name, "url": file.url, "directory": file.folder} for file in models
        ]
    entry = {
        "id": number[node],
        "type": node.type,
        "pos": position,
        "size": [WIDTH, TALL.get(node.type, height)],
        "flags": {},
        "order": number[node] - 1,
        "mode": 0,
        "inputs": slots,
        "outputs": outputs,
        "properties": properties,
        "widgets_values": values,
    }
    return entry | ({"title": node.title} if node.title else {})
