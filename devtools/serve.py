"""python3 dev.py serve: ComfyUI with this pack, the demo's small models and its workflows."""
import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from devtools import ROOT
from devtools.demo import MIX_WORKFLOW, make_mix
from devtools.files import demo_files
from devtools.host.server import Server, ServerError
from devtools.workflows import demo_paths

EDITOR_FOLDER = Path("user") / "default" / "workflows"  # of what the editor lists as workflows
MIX_FILE = f"diffusion_models/{demo_files.MODELS[demo_files.MIX]}"
# Nodes of the workflow that makes the mix, those that take long -> what they do.
LONG_NODES = {"FeatherweightMeasureSensitivity": "measuring",
              "FeatherweightSavePackedModel": "packing"}


def copy_workflows(base: Path):
    """Puts the demo's workflows where the editor lists them."""
    (base / EDITOR_FOLDER).mkdir(parents=True, exist_ok=True)
    for workflow in demo_paths():
        shutil.copy(workflow, base / EDITOR_FOLDER)


def missing_files(base: Path) -> dict[str, Callable[[Path], object] | None]:
    """Returns file below `base`/models that is not there -> what writes it, None for the mix."""
    types = demo_files.recipes()
    files = {**demo_files.writers(types), MIX_FILE: None}
    if "NF4" in types:
        files |= {f"checkpoints/{demo_files.CHECKPOINT_NAME}": demo_files.write_checkpoint}
    missing = {name: write for name, write in files.items()
               if not (base / "models" / name).exists()}
    return dict(sorted(missing.items(), key=lambda item: item[1] is None))  # from files before it


def make_files(server: Server):
    """Makes the models of the workflows that are not there, while the server runs."""
    missing = missing_files(server.base)
    if not missing:
        return
    print("Making the models of the workflows:", flush=True)
    for number, (name, write) in enumerate(missing.items(), 1):
        line = f"  [{number} of {len(missing)}] {name}"
        print(line if write else f"{line} takes a minute; what you run meanwhile waits", flush=True)
        path = server.base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if write is None:
            make_mix(server, quarters_printer(line))
        else:
            part = path.with_name(f"{path.name}.part")  # ComfyUI does not list it
            write(part)
            os.replace(part, path)
    print("All models are there. The key r shows them in an editor that is open.", flush=True)


def quarters_printer(line: str) -> Callable[[str, int, int], None]:
    """Returns the function that a run of the mix's workflow calls for each step. It prints each
    quarter of its long nodes."""
    workflow = json.loads(MIX_WORKFLOW.read_text(encoding="utf-8"))
    nodes = {str(node["id"]): LONG_NODES.get(node["type"]) for node in workflow["nodes"]}
    shown = set()

    def show(node: str, value: int, maximum: int):
        percent = 25 * (4 * value // maximum) if maximum else 0
        text = f"{line}: {nodes.get(node)}, {percent} %"
        if percent and nodes.get(node) and text not in shown:
            shown.add(text)
            print(text, flush=True)

    return show


def handle_signals():
    """Has SIGTERM and the end of the terminal do what Ctrl-C does, and the first of them alone."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
               if hasattr(signal, name)]
    numbers = [number for number in numbers  # a shell's background and `nohup` ignore some
               if signal.getsignal(number) is not signal.SIG_IGN]

    def end(*_):
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, end)


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
    copy_workflows(options.base)
    print("Starting ComfyUI" + ("" if options.gpu else " on the CPU"), flush=True)
    try:
        handle_signals()
        with Server(options.base, cpu=not options.gpu) as server:
            print(f"\nOpen {server.url} in a browser. The workflows are in its sidebar, under"
                  f" Workflows (key w).\nFiles are in {server.base}. Ctrl-C ends it.", flush=True)
            try:
                make_files(server)
            except ServerError as error:
                print(f"Note: {MIX_FILE} is not made: {error}\n`python3 dev.py serve` makes it when"
                      " it is started again.", flush=True)
            while not server.has_ended():
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
