"""README's table: for each size of card one model, with all its files.

`python -m devtools.workflows.recommended` prints it.
"""
import re
from dataclasses import dataclass

from devtools.measure import model_sizes

from devtools import markdown_table
from devtools.workflows import FOLDER
from devtools.workflows.workflow import Workflow
from featherweight.loaders.packing.planning.for_device import Memory, step_memory, workspace_bytes

FOLDERS = ("diffusion_models", "text_encoders", "vae")
TITLES = ("card", "model and type", "diffusion model", "text encoder", "VAE", "template")


@dataclass(frozen=True)
class Recommended:
    """A model for a card.

    Attributes:
        example: the name of the workflow whose files it has.
        model: its name in `model_sizes`.
        title: its own.
        larger: a larger diffusion model of the same repository, and its size, in its place.
    """

    example: str
    model: str
    title: str
    larger: tuple[str, str] | None = None

    @property
    def files(self) -> dict[str, tuple[str, str, str]]:
        """Folder -> name, size as in "6.8 GB", and address."""
        workflow = Workflow(FOLDER / f"{self.example}.json")
        links = dict(re.findall(r"^- \[(.*?)\]\((.*?)\)", workflow.note, re.M))
        files = {}
        for path, size in workflow.files.items():
            folder, _, name = path.partition("/")
            files[folder] = name, size, links[name]
        if self.larger:
            name, _, link = files[FOLDERS[0]]
            files[FOLDERS[0]] = *self.larger, link.replace(name, self.larger[0])
        return files

    @property
    def type(self) -> str:
        """The type that the name of the diffusion model says."""
        match = re.search(r"-(Q\d_[K0])", self.files[FOLDERS[0]][0])
        assert match, self.example
        return match[1]

    def copied(self, gib: int) -> float:
        """Returns the GB that have no room on a card: 0 where the whole model stays on it."""
        model = next(model for model in model_sizes.MODELS if model.name == self.model)
        step = model.config and step_memory(model.config())
        room = Memory(gib).for_model(step[0] if step else None, workspace_bytes(model.shapes()))
        return max(0, float(self.files[FOLDERS[0]][1].split()[0]) - room / model_sizes.GB)


_FIRST = Recommended("Start here - Z-Image Turbo GGUF", "Z-Image", "Z-Image Turbo")
_KREA = "Krea 2 Turbo GGUF", "Krea 2", "Krea 2 Turbo"
RECOMMENDED = {  # GiB of a card -> what it gets
    6: _FIRST,
    8: _FIRST,
    10: Recommended(*_KREA),
    12: Recommended(*_KREA, ("Krea-2-Turbo-Q5_K_M.gguf", "8.9 GB")),
    16: Recommended("Qwen-Image GGUF", "Qwen-Image, Qwen-Image-Edit", "Qwen-Image"),
    24: Recommended("FLUX.2 dev GGUF", "Flux.2 dev", "FLUX.2 dev"),
}


def table() -> str:
    """Returns the rows, a card in each."""
    rows = []
    for gib, row in RECOMMENDED.items():
        copied = row.copied(gib)
        note = f", {copied:.1f} GB of it copied in each step" if copied else ""
        cells = [f"[{name.rpartition('.')[0]}]({link}), {size}"
                 for name, size, link in (row.files[folder] for folder in FOLDERS)]
        rows.append((f"{gib} GB", f"{row.title}, {row.type}{note}", *cells, f"*{row.example}*"))
    return markdown_table(TITLES, rows)


if __name__ == "__main__":
    print(table())
