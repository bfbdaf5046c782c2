"""python3 dev.py serve: ComfyUI with this pack, the demo's small models and its workflows."""
import argparse
import shutil
import sys
import time
from pathlib import Path

from devtools import ROOT
from devtools.demo import make_mix
from devtools.files import demo_files
from devtools.host.server import Server, ServerError
from devtools.workflows import FOLDER

EDITOR_FOLDER = Path("user") / "default" / "workflows"  # of what the editor lists as workflows


def make_files(base: Path):
    """Writes the models and workflows of the demo below `base`, those that are not there."""
    types = demo_files.recipes()
    models = base / "models"
    if not all((models / "diffusion_models" / demo_files.MODELS[name]).exists() for name in types):
        print("Packing the model", flush=True)
        demo_files.make_models(base, types)
    if "NF4" in types and not (models / "checkpoints" / demo_files.CHECKPOINT_NAME).exists():
        demo_files.make_checkpoint(base)
    (base / EDITOR_FOLDER).mkdir(parents=True, exist_ok=True)
    for workflow in FOLDER.glob("Featherweight demo*.json"):
        shutil.copy(workflow, base / EDITOR_FOLDER)


def main(arguments: list[str]) -> int:
    """Serves until the user ends it. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dev.py serve", description="Open ComfyUI with this pack on 127.0.0.1: a small model"
        " in every packing and workflows that draw with it.")
    parser.add_argument("--gpu", action="store_true",
                        help="let ComfyUI use a GPU instead of the CPU")
    parser.add_argument("--base", type=Path, default=ROOT / ".dev" / "demo",
                        help="folder for models, workflows and pictures")
    options = parser.parse_args(arguments)
    make_files(options.base)
    print("Starting ComfyUI" + ("" if options.gpu else " on the CPU"), flush=True)
    try:
        with Server(options.base, cpu=not options.gpu) as server:
            if not (server.base / "models" / "diffusion_models"
                    / demo_files.MODELS[demo_files.MIX]).exists():
                print("Packing the model to a size", flush=True)
                make_mix(server)
            print(f"\nOpen {server.url} in a browser. The workflows are in its sidebar, under"
                  f" Workflows (key w).\nFiles are in {server.base}. Ctrl-C ends it.", flush=True)
            while server.process.poll() is None:
                time.sleep(0.5)
        print(f"Failed: ComfyUI ended. Its log: {server.log_path}")
        return 1
    except ServerError as error:
        print(f"Failed: {error}")
        return 1
    except KeyboardInterrupt:
        print("\nEnded.")
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
