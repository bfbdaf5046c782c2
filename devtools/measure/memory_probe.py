"""Trains a LoRA and prints as JSON what memory and time that took, in a process of its own, so that
what else a bench holds does not count. Linux only.
"""
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from devtools import ROOT

TRAINED_STEPS = 2  # that are timed


def probed(kind: str, path: Path, script: str = __file__) -> dict:
    """Returns what a script measures with a file on the CPU, such as this one.

    Args:
        kind: training-FORMAT: a dense Flux, or its shapes with random weights of that format, some
            steps of ComfyUI's node Train LoRA; training-dense: as the file. bypass-FORMAT: the same
            in its bypass mode.
        path: of the file.
        script: that calls `run` with its own kinds.
    """
    variables = {**os.environ, "HOST_ARGUMENTS": "--cpu", "PYTHONPATH": str(ROOT)}
    probe = subprocess.run([sys.executable, script, kind, str(path)], text=True,
                           capture_output=True, env=variables)
    if probe.returncode:
        raise RuntimeError(f"The memory probe failed with {path.name}:\n{probe.stderr[-2000:]}")
    return json.loads(probe.stdout.splitlines()[-1])


def run(probes: Mapping):
    """Prints what a probe of a kind finds, as JSON; kind and file are this process's arguments."""
    kind, *arguments = sys.argv[1].split("-", 1)
    print(json.dumps(probes[kind](sys.argv[2], *arguments)))


def status(field: str) -> int:
    """Bytes of one field of this process: VmHWM (peak), VmRSS (now), RssAnon (now, without file
    pages)."""
    text = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", text)[0]) * 1024


def probe_training(path: str, format_name: str, bypass: bool = False) -> dict:
    """A latent of 256 x 256 pixels and 64 tokens of text, rank 16, in bfloat16. Seconds are those
    that one thread spends computing, so that other processes do not count."""
    from devtools.measure.random_models import packed_model, random_weights
    from devtools.measure.timing import as_in_use

    import torch
    from comfy_extras.nodes_train import TrainLoraNode

    from featherweight.loaders.files.open_weights import open_weights
    from featherweight.loaders.models.diffusion import load_diffusion_model

    torch.set_num_threads(1)
    with as_in_use():
        before = status("VmRSS")
        if format_name == "dense":
            patcher = load_diffusion_model(path)
        else:
            entries = open_weights(path).entries
            shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
            weights = random_weights(shapes, format_name)

            def load(disable_dynamic=False):
                return packed_model(dict(weights))

            patcher = load()
            patcher.cached_patcher_init = load, ()
        context = patcher.model.diffusion_model.txt_in.in_features
        inputs = {
            name: options[1]["default"]
            for group in TrainLoraNode.INPUT_TYPES().values() for name, options in group.items()
            if len(options) > 1 and "default" in options[1]
        }
        text = [torch.randn(1, 64, context), {"pooled_output": torch.randn(1, 768)}]
        seconds = {}
        for steps in (1, TRAINED_STEPS + 1):  # the first loads the model
            values = {**inputs, "model": patcher, "positive": [text], "steps": steps, "rank": 16,
                      "bypass_mode": bypass}
            values["latents"] = {"samples": torch.randn(1, 16, 32, 32)}
            started = time.process_time()
            TrainLoraNode.execute(**{name: [value] for name, value in values.items()})
            seconds[steps] = time.process_time() - started
        return {
            "model_size": patcher.model_size(), "peak_growth": status("VmHWM") - before,
            "step_seconds": (seconds[TRAINED_STEPS + 1] - seconds[1]) / TRAINED_STEPS
        }


def probe_bypass(path: str, format_name: str) -> dict:
    return probe_training(path, format_name, bypass=True)


if __name__ == "__main__":
    run({"training": probe_training, "bypass": probe_bypass})
