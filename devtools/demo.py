"""python3 dev.py demo: a shipped example workflow, on the real server, with a small packed model."""
import argparse
import importlib.util
import json
import re
import sys
import time
from pathlib import Path

from safetensors.numpy import save_file

from devtools import tiny_models
from devtools.gguf_files import write_gguf, write_random_gguf
from devtools.server import ROOT, Run, Server, ServerError
from devtools.workflow import to_api

WORKFLOW = ROOT / "example_workflows" / "Featherweight demo.json"
LOADER = "FeatherweightLoadDiffusionModel"
MODEL_NAME = "featherweight_demo_Q8_0.gguf"
ENCODER_NAME = "featherweight_demo_clip_l_Q8_0.gguf"
VAE_NAME = "featherweight_demo_vae.safetensors"
LORA_WORKFLOW = ROOT / "example_workflows" / "Featherweight demo two LoRAs.json"
# file -> arguments of `tiny_models.flux_lora`: one in the trainers' naming for the first half, one in PEFT's for the second
LORAS = {
    "featherweight_demo_lora_1.safetensors": dict(seed=11, part="double_blocks", layer="lora_unet_{flat}",
                                                  down=".lora_down.weight", up=".lora_up.weight"),
    "featherweight_demo_lora_2.safetensors": dict(seed=12, part="single_blocks", layer="diffusion_model.{name}",
                                                  down=".lora_A.weight", up=".lora_B.weight"),
}
NF4_WORKFLOW = ROOT / "example_workflows" / "Featherweight demo NF4 checkpoint.json"
CHECKPOINT_NAME = "featherweight_demo_nf4.safetensors"
# The line our loader logs for each file it loads.
LOADED = re.compile(r"\[Featherweight\] (?P<file>.+): (?P<tensors>\d+) tensors \((?P<formats>[^)]*)\), "
                    r"(?P<disk>\d+) bytes on disk, (?P<held>\d+) bytes held")


def make_models(base: Path):
    """Write the files the demo workflow names into `base`/models; it takes a moment and is always up to date."""
    model, vae = base / "models" / "diffusion_models" / MODEL_NAME, base / "models" / "vae" / VAE_NAME
    encoder = base / "models" / "text_encoders" / ENCODER_NAME
    for path in (model, vae, encoder):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(model, tiny_models.flux(context=768), lambda name, values: "Q8_0" if values.ndim == 2 else "F32")
    write_random_gguf(encoder, tiny_models.clip_l_shapes(), "Q8_0", architecture=None)
    save_file(tiny_models.autoencoder(), vae)
    loras = base / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    for name, arguments in LORAS.items():
        save_file(tiny_models.flux_lora(**arguments), loras / name)


def make_checkpoint(base: Path, name: str = CHECKPOINT_NAME, with_vae: bool = True) -> Path:
    """Write the NF4 checkpoint of `NF4_WORKFLOW`, which takes the `bitsandbytes` package. Returns its path."""
    import torch  # heavy, and not needed by the demo itself
    from safetensors.torch import load_file, save_file as save_tensors

    from devtools.bnb_files import write_bnb

    path = base / "models" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bnb(path, {name: torch.from_numpy(value) for name, value in tiny_models.flux().items()},
              prefix="model.diffusion_model.")
    if with_vae:
        vae = {f"vae.{name}": torch.from_numpy(value) for name, value in tiny_models.autoencoder().items()}
        save_tensors(load_file(path) | vae, path)
    return path


def run_workflow(server: Server, on_progress=None, workflow: Path = WORKFLOW) -> tuple[Run, dict]:
    """Queue a shipped workflow as it is; return its run and its API form."""
    prompt = to_api(json.loads(workflow.read_text(encoding="utf-8")), server.object_info())
    return server.queue(prompt, on_progress), prompt


def report(server: Server, run: Run, prompt: dict) -> dict:
    """What the demo measured: the model's file, formats, bytes on disk and held in memory, seconds per step."""
    sampler = next(node for node, spec in prompt.items() if spec["class_type"] == "KSampler")
    line = next(LOADED.finditer(server.log()), None)
    if line is None:
        raise ServerError(f"The loader reported nothing about the model; see {server.log_path}.")
    formats = {name: int(count) for name, count in (part.split() for part in line["formats"].split(", "))}
    device = server.system_stats()["devices"][0]["name"]
    return {"file": line["file"], "tensors": int(line["tensors"]), "formats": formats,
            "bytes_on_disk": int(line["disk"]), "bytes_held": int(line["held"]),
            "seconds_per_step": run.seconds_per_step(sampler), "device": device}


def _as_text(facts: dict) -> str:
    formats = ", ".join(f"{count} in {name}" for name, count in facts["formats"].items())
    return "\n".join([
        f"  model            {facts['file']}",
        f"  tensors          {facts['tensors']}: {formats}",
        f"  on disk          {facts['bytes_on_disk'] / 1e6:.1f} MB",
        f"  held in memory   {facts['bytes_held'] / 1e6:.1f} MB, packed",
        f"  speed            {facts['seconds_per_step']:.2f} s per step on {facts['device']}",
    ])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py demo", description="Make a picture on the real ComfyUI server.")
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI use a GPU instead of the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="folder for picture and report")
    options = parser.parse_args(arguments)
    base, started = ROOT / ".dev" / "demo", time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    make_models(base)
    if importlib.util.find_spec("bitsandbytes"):
        make_checkpoint(base)

    nodes = json.loads(WORKFLOW.read_text(encoding="utf-8"))["nodes"]
    samplers = {str(node["id"]) for node in nodes if node["type"] == "KSampler"}

    def show(node_id, value, maximum):
        if maximum and node_id in samplers:
            print(f"  step {value}/{maximum}", flush=True)

    print("Starting ComfyUI" + ("" if options.gpu else " on the CPU"), flush=True)
    try:
        with Server(base, cpu=not options.gpu) as server:
            print(f"Running \"{WORKFLOW.relative_to(ROOT)}\"", flush=True)
            run, prompt = run_workflow(server, show)
            entry = next(output["images"][0] for output in run.outputs.values() if "images" in output)
            picture = options.output / "picture.png"
            picture.write_bytes(server.image(entry))
            facts = report(server, run, prompt)
    except (ServerError, ValueError) as error:
        print(f"Failed: {error}")
        return 1
    text = _as_text(facts)
    (options.output / "report.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (options.output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nDone: {picture} ({time.monotonic() - started:.0f} s, report beside it)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
