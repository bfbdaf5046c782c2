"""What a workflow's file says: its nodes, and the parts of its note."""
import json
import re
from pathlib import Path

from devtools.workflows.api_format import NOTES

FILES = " Files, in ComfyUI/models: "  # what a blueprint's description ends with


class Workflow:
    """An example or a blueprint.

    graph: the file's JSON. nodes: those of its subgraphs too, without the note.
    """

    def __init__(self, path: Path):
        self.name = path.stem
        self.graph = json.loads(path.read_text(encoding="utf-8"))
        self.subgraphs = self.graph.get("definitions", {}).get("subgraphs", [])
        nodes = [node for graph in (self.graph, *self.subgraphs) for node in graph["nodes"]]
        notes = [node["widgets_values"][0] for node in nodes if node["type"] in NOTES]
        if len(notes) != 1:
            raise ValueError(f"{path.name} has {len(notes)} notes, expected one.")
        self.note = notes[0]
        shown = {subgraph["id"] for subgraph in self.subgraphs}
        self.nodes = [node for node in nodes if node["type"] not in NOTES | shown]

    @property
    def about(self) -> str:
        """The note's first paragraph below its heading."""
        return " ".join(self.note.split("\n\n")[1].split())

    @property
    def memory(self) -> str:
        """The note's paragraph on memory, without its title."""
        return self.note.partition("**Memory.** ")[2].partition("\n\n")[0]

    @property
    def card(self) -> str:
        """What the paragraph on memory says first that it takes: "10 GB card", "24 GB of RAM", or
        nothing."""
        if card := self.figure(r"^(?:Fits|For) an? (\d+ GB card)"):
            return card
        memory = self.figure(r"^Needs no GPU\. Have (\d+ GB) of main memory")
        return memory and f"{memory} of RAM"

    @property
    def description(self) -> tuple[str, list[str]]:
        """What a blueprint does, and its files with their folders."""
        text, _, files = self.graph["extra"]["BlueprintDescription"].partition(FILES)
        return text, files.removesuffix(".").split(", ")

    @property
    def models(self) -> list[dict]:
        """Name, address and folder of each file that the editor offers to download."""
        return [model for node in self.nodes for model in node["properties"].get("models", [])]

    @property
    def files(self) -> dict[str, str]:
        """Path below `models` -> size, as in "6.8 GB" or empty, by the tree that the note draws."""
        files, parents = {}, []
        for line in self.note.splitlines():
            indent, branch, name = line.partition("── ")
            if not branch:
                continue
            name, _, size = name.partition("   ")
            parents[len(indent) // 4:] = [name.rstrip("/")]
            if len(parents) > 2:
                files["/".join(parents[1:])] = size
        return {path: size for path, size in files.items()
                if not any(other.startswith(f"{path}/") for other in files)}

    def types(self, *types: str) -> list[dict]:
        """The nodes of these types."""
        return [node for node in self.nodes if node["type"] in types]

    def figure(self, pattern: str) -> str:
        """The group of a pattern in the paragraph on memory, empty if that does not match."""
        match = re.search(pattern, self.memory)
        return match[1] if match else ""
