"""Blueprints in a workflow, with the nodes that their descriptions say to connect."""
import json
from pathlib import Path

from devtools.workflows.api_format import has_control, is_widget

CHECKPOINT = "stable-diffusion-xl-base-1.0-Q8_0.gguf"
SAVERS = {"IMAGE": ("SaveImage", "images"), "VIDEO": ("SaveVideo", "video")}


def as_workflow(path: Path, object_info: dict) -> dict:
    """Returns a workflow that runs the blueprint."""
    written = json.loads(path.read_text(encoding="utf-8"))
    return _Builder(written, object_info).workflow()


class _Builder:
    """A node's inputs are linked to (node, output)."""

    def __init__(self, written: dict, object_info: dict):
        self.definitions, self.object_info = written["definitions"], object_info
        self.host, = written["nodes"]
        for slot in self.host["outputs"]:
            slot["links"] = []
        self.nodes, self.links = [self.host], []
        # the editor changes ids inside that are those of nodes outside
        inside, = self.definitions["subgraphs"]
        self.most = max(node["id"] for node in inside["nodes"])

    def workflow(self) -> dict:
        outputs = {slot["name"]: (self.host, index)
                   for index, slot in enumerate(self.host["outputs"])}
        for slot in self.host["inputs"]:
            if slot["type"] == "IMAGE":
                self.link((self.add("LoadImage"), 0), self.host, slot)
        if "MODEL" in outputs:
            self.draw(outputs)
        for name, (node, index) in outputs.items():
            if saver := SAVERS.get(node["outputs"][index]["type"]):
                self.add(saver[0], **{saver[1]: (node, index)})
            elif name == "report":
                self.add("PreviewAny", source=(node, index))
            elif name == "path":
                self.add("FeatherweightInspectModelFile", path=(node, index))
        return {"last_node_id": self.most + len(self.nodes), "last_link_id": len(self.links),
                "nodes": self.nodes, "links": self.links, "version": 0.4,
                "definitions": self.definitions}

    def draw(self, outputs: dict[str, tuple]):
        """Draw with the model that the subgraph returns: of a checkpoint that it is given, with the
        encoder that it returns; or one that it loads, which is a Flux."""
        if "CLIP" in outputs:
            load = self.add("FeatherweightLoadCheckpoint", checkpoint_name=CHECKPOINT)
            for index, slot in enumerate(self.host["inputs"][:2]):
                self.link((load, index), self.host, slot)
            clip, vae = outputs["CLIP"], (load, 2)
            latent = self.add("EmptyLatentImage")
        else:
            clip = self.add("CLIPLoader"), 0
            vae = self.add("VAELoader", vae_name="ae.safetensors"), 0
            latent = self.add("EmptySD3LatentImage")
        text = self.add("CLIPTextEncode", clip=clip, text="a feather")
        sampler = self.add("KSampler", model=outputs["MODEL"], positive=(text, 0),
                           negative=(text, 0), latent_image=(latent, 0), cfg=1.0)
        decode = self.add("VAEDecode", samples=(sampler, 0), vae=vae)
        self.add("SaveImage", images=(decode, 0))

    def add(self, type: str, **given) -> dict:
        """Add a node with these links and values; others have the values of the server."""
        info, slots, values = self.object_info[type], [], []
        for name, (kind, *options) in {**info["input"]["required"],
                                       **info["input"].get("optional", {})}.items():
            options = options[0] if options else {}
            linked = isinstance(given.get(name), tuple)
            if is_widget(kind, options) and not options.get("image_upload"):  # one that is there
                choices = kind if isinstance(kind, list) else options.get("options", [])
                first = next(iter(choices), 0 if kind == "INT" else "")
                default = options.get("default", first["key"] if isinstance(first, dict) else first)
                values.append(default if linked else given.get(name, default))
                values += ["fixed"] * has_control(name, options)
            if linked:
                widget = {"widget": {"name": name}} if is_widget(kind, options) else {}
                slots.append({"name": name, "type": kind, "link": None, **widget})
        outputs = [{"name": name, "type": kind, "links": []}
                   for name, kind in zip(info["output_name"], info["output"])]
        node = {"id": self.most + len(self.nodes), "type": type, "pos": [0, 0], "size": [300, 200],
                "flags": {}, "order": 0, "mode": 0, "inputs": slots, "outputs": outputs,
                "properties": {}, "widgets_values": values}
        self.nodes.append(node)
        for slot in slots:
            self.link(given[slot["name"]], node, slot)
        return node

    def link(self, source: tuple[dict, int], target: dict, slot: dict):
        """Connect an output of a node with an input of another."""
        node, output = source
        slot["link"] = number = len(self.links) + 1
        node["outputs"][output]["links"].append(number)
        self.links.append([number, node["id"], output, target["id"],
                           target["inputs"].index(slot), node["outputs"][output]["type"]])
