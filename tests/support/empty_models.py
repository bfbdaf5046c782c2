"""Empty files with the names of models, so that ComfyUI lists them."""
import itertools
import re
from pathlib import Path

FOLDERS = ("diffusion_models", "text_encoders", "checkpoints", "vae", "loras")
NAME = re.compile(r'"([^"/][^"]*\.(?:gguf|safetensors|sft))"')


def touch(base: Path, folder: str, name: str):
    path = base / "models" / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def touch_named(base: Path, workflow: str):
    """Makes an empty file of every name in a workflow's JSON, in each folder of models."""
    for name, folder in itertools.product(NAME.findall(workflow.replace(r"\\", "/")), FOLDERS):
        touch(base, folder, name)
