"""The report on a saved file: whole, in short for the node, and for its model card."""
from dataclasses import dataclass
from pathlib import Path

from ..byte_sizes import size_text
from .planning.plan import DIGITS


@dataclass(frozen=True)
class Saved:
    """A file that was written.

    made_from: names of the files of its model and LoRAs. seconds: since its plan began. types:
    name -> type, as written. table: a line for each type. shares: of the types, in one line.
    losses: sentences on what is lost, and how much of each LoRA arrived. notes: these, and what
    people should know. layers: lines on the layers that lose the most.
    """

    path: Path
    nbytes: int
    made_from: list[str]
    seconds: float
    types: dict[str, str]
    table: str
    shares: str
    losses: list[str]
    notes: list[str]
    layers: list[str]

    def __str__(self) -> str:
        return f"{self.path}: {size_text(self.nbytes, DIGITS)} in {self.seconds:.0f} s"

    @property
    def text(self) -> str:
        """All of it in short lines."""
        return "\n".join([self.path.name, self._size, self.table, *self.notes, *self.layers])

    @property
    def short_text(self) -> str:
        """What the node shows: the types in one line, and no layers."""
        return "\n".join([self.path.name, self._size, self.shares, *self.notes])

    @property
    def card(self) -> str:
        """Markdown for the model card, where the file is shared."""
        others = " with Featherweight or ComfyUI-GGUF" if self.path.suffix == ".gguf" else (
            " with Featherweight" if "NF4" in self.types.values() else "")
        return "\n- ".join([
            "For the model card, below the name of the base model and its license:\n",
            f"File: {self.path.name}, {size_text(self.nbytes, DIGITS)} ({self.shares}).",
            f"Made from {', '.join(self.made_from)}, with Featherweight for ComfyUI.",
            *self.losses,
            f"It needs ComfyUI{others}, and the other files of the base model."])

    @property
    def _size(self) -> str:
        return f"{size_text(self.nbytes, DIGITS)}, written in {self.seconds:.0f} s"
