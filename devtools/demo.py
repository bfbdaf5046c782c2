"""python3 dev.py demo: one prompt drawn by the same small model in every packing, on the real
server."""
import argparse
import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo_model import scenes
from devtools import ROOT
from devtools.demo_sheet import save, sheet
from devtools.files import demo_files
from devtools.host.server import Run, Server, ServerError
from devtools.workflows import DEMO, DEMO_FOLDER
from devtools.workflows.api_format import to_api
from devtools.workflows.workflow import Workflow

WORKFLOW = DEMO_FOLDER / f"{DEMO}.json"
SIDE_BY_SIDE = DEMO_FOLDER / f"{DEMO} side by side.json"
LORA_WORKFLOW = DEMO_FOLDER / f"{DEMO} two LoRAs.json"
NF4_WORKFLOW = DEMO_FOLDER / f"{DEMO} NF4 checkpoint.json"
TRAINING = DEMO_FOLDER / f"{DEMO} train a LoRA.json"
MIX_WORKFLOW = DEMO_FOLDER / f"{DEMO} packed to a size.json"
_DEMO = Workflow(WORKFLOW)
PROMPT = _DEMO.types("CLIPTextEncode")[0]["widgets_values"][0]
STEPS = _DEMO.types("KSampler")[0]["widgets_values"][2]
LOADER = "FeatherweightLoadDiffusionModel"
MODEL_NAME = demo_files.MODELS["Q8_0"]
# The line our loader logs for each file it loads.
LOADED = re.compile(
    r"\[Featherweight\] (?P<file>.+): (?P<tensors>\d+) tensors \((?P<formats>[^)]*)\), "
    r"(?P<disk>\d+) bytes on disk, (?P<held>\d+) bytes in memory")


def run_workflow(server: Server, on_progress=None, workflow: Path = WORKFLOW) -> tuple[Run, dict]:
    """Queue a shipped workflow as it is; return its run and its API form."""
    prompt = to_api(json.loads(workflow.read_text(encoding="utf-8")), server.object_info())
    return server.queue(prompt, on_progress), prompt


def make_mix(server: Server, on_progress=None, **values) -> Run:
    """Run the workflow that measures the dense model and saves it to a size, here that of the file
    of Q4_K, and put what it saves among the models. The files F16 and Q4_K must be there. values:
    of widgets by their names, other than the shipped.
    """
    models, saved = (server.base / folder / "diffusion_models" for folder in ("models", "output"))
    prompt = to_api(json.loads(MIX_WORKFLOW.read_text(encoding="utf-8")), server.object_info())
    values["size_gb"] = (models / demo_files.MODELS["Q4_K"]).stat().st_size / 1e9
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in values.items() if name in node["inputs"]}
    before = set(saved.glob("*.gguf"))
    run = server.queue(prompt, on_progress)
    made, = set(saved.glob("*.gguf")) - before
    made.replace(models / demo_files.MODELS[demo_files.MIX])
    return run


def draw_all(server: Server, prompt: str, seed: int, on_progress=None) -> dict[str, dict]:
    """Run the workflow that draws side by side. Returns, by the title of each picture, the picture
    and what it took.

    Models that need the package `bitsandbytes`, which wrote no file where it is missing, are left
    out.
    """
    workflow = json.loads(SIDE_BY_SIDE.read_text(encoding="utf-8"))
    titles = {
        str(node["id"]): node["title"] for node in workflow["nodes"]
        if node["type"] == "PreviewImage"
    }
    graph = to_api(workflow, server.object_info())
    if not demo_files.has_bitsandbytes():
        graph, titles = without(graph, titles, demo_files.MODELS["NF4"])
    for node in graph.values():
        if "text" in node["inputs"]:
            node["inputs"]["text"] = prompt
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] = seed
    run = server.queue(graph, on_progress)
    held = {line["file"]: int(line["held"]) for line in LOADED.finditer(server.log())}
    results = {}
    for node, title in sorted(titles.items(), key=lambda pair: int(pair[0])):
        picture = np.asarray(
            Image.open(io.BytesIO(server.image(run.outputs[node]["images"][0]))).convert("RGB"))
        sampler = upstream(graph, upstream(graph, node, "images"), "samples")
        model = upstream(graph, sampler, "model")
        while "model" in graph[model]["inputs"]:
            model = upstream(graph, model, "model")
        file = next(value for value in graph[model]["inputs"].values()
                    if value in demo_files.MODELS.values())
        results[title] = {"picture": picture, "bytes": held.get(file) or dense_bytes(server),
                          "seconds": run.seconds_per_step(sampler) * STEPS}
    for title, result in results.items():
        dense = results["dense" + "".join(title.partition(" + ")[1:])]  # with the same LoRAs
        result["dense"] = difference(result["picture"], dense["picture"])
    return results


def upstream(graph: dict, node: str, name: str) -> str:
    return graph[node]["inputs"][name][0]


def without(graph: dict, titles: dict, file: str) -> tuple[dict, dict]:
    """The graph without the node that names a file, and without everything that needs that."""
    gone = {node for node, spec in graph.items() if file in spec["inputs"].values()}
    while more := {node for node, spec in graph.items() if node not in gone and any(
            isinstance(value, list) and value[0] in gone for value in spec["inputs"].values())}:
        gone |= more
    return ({node: spec for node, spec in graph.items() if node not in gone},
            {node: title for node, title in titles.items() if node not in gone})


def dense_bytes(server: Server) -> int:
    """What ComfyUI holds of the dense model: on a CPU it makes float32 of a float16 file. The host
    logs each model's dtype."""
    parts = server.log().split("model weight dtype torch.")[1:]
    dtype = next(
        re.split(r"\W", part, maxsplit=1)[0] for part in parts
        if not any(line["file"] in demo_files.MODELS.values() for line in LOADED.finditer(part)))
    return (
        sum(value.numel() for value in demo_files.flux().values()) * getattr(torch, dtype).itemsize
    )


def difference(picture: np.ndarray, dense: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio in dB; None for equal pictures."""
    error = np.square(picture.astype(np.float64) - dense).mean()
    return 10 * np.log10(255**2 / error) if error else None


def as_text(results: dict[str, dict]) -> str:
    width = max(map(len, results))
    lines = [f"  {'':<{width}} {'memory':>8}   {'seconds':>8}   {'from dense':>10}"]
    for title, result in results.items():
        off = (
            "-"
            if title.startswith("dense")
            else "equal"
            if result["dense"] is None
            else f"{result['dense']:.1f} dB"
        )
        lines.append(
            f"  {title:<{width}} {result['bytes'] / 1e6:5.1f} MB   {result['seconds']:8.2f}"
            f"   {off:>10}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    words = "; ".join(f"{name}: {', '.join(values)}" for name, values in scenes.CHOICES.items())
    parser = argparse.ArgumentParser(
        prog="dev.py demo", epilog=f"The model knows these words. {words}.",
        description="Draw a prompt on the real ComfyUI server with the same small model in every "
        "packing, side by side.")
    parser.add_argument("--prompt", default=PROMPT, help="what to draw; by default %(default)r")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives another picture")
    parser.add_argument("--gpu", action="store_true",
                        help="let ComfyUI use a GPU instead of the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output",
                        help="folder for sheet and report")
    options = parser.parse_args(arguments)
    base, started = ROOT / ".dev" / "demo", time.monotonic()
    if not scenes.asked_for(options.prompt):
        print(
            f"Note: the prompt has no word that the model knows, so it draws anything. It knows"
            f" {', '.join(scenes.WORDS)}."
        )
    options.output.mkdir(parents=True, exist_ok=True)
    print("Packing the model", flush=True)
    types = demo_files.recipes()
    demo_files.make_models(base, types)
    if "NF4" in types:
        demo_files.make_checkpoint(base)
    else:
        print(
            "Note: the NF4 pictures are left out, the package bitsandbytes that writes such files"
            " is not installed."
        )

    nodes = json.loads(SIDE_BY_SIDE.read_text(encoding="utf-8"))["nodes"]
    samplers = {str(node["id"]) for node in nodes if node["type"] == "KSampler"}
    drawn = 0

    def show(node_id, value, maximum):
        nonlocal drawn
        if maximum and value == maximum and node_id in samplers:
            drawn += 1
            print(f"  picture {drawn}", flush=True)

    print("Starting ComfyUI" + ("" if options.gpu else " on the CPU"), flush=True)
    try:
        with Server(base, cpu=not options.gpu) as server:
            print(f"Running \"{MIX_WORKFLOW.relative_to(ROOT)}\"", flush=True)
            make_mix(server)
            print(f"Running \"{SIDE_BY_SIDE.relative_to(ROOT)}\"", flush=True)
            results = draw_all(server, options.prompt, options.seed, show)
            device = server.system_stats()["devices"][0]["name"]
    except (ServerError, ValueError) as error:
        print(f"Failed: {error}")
        return 1
    path = options.output / "sheet.png"
    save(sheet(results, options.prompt), results, path)
    text = as_text(results)
    facts = {
        title: {name: value for name, value in result.items() if name != "picture"}
        for title, result in results.items()
    }
    facts = {"prompt": options.prompt, "seed": options.seed, "device": device, "models": facts}
    (options.output / "report.json").write_text(
        json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (options.output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nDone: {path} ({time.monotonic() - started:.0f} s, report in the same folder)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
