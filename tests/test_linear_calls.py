"""Layers, LoRAs, the patcher and side models on the calls that later ComfyUIs make."""
import subprocess
import sys

import pytest
from linear_calls import SHAPES

from devtools import ROOT

CONFORMANCE = (
    *(f"tests/ops/layers/test_{name}.py" for name in (
        "packed_layers", "comfy_quant_layers", "experts", "gradients", "autocast", "compile")),
    *(f"tests/ops/patches/test_{name}.py" for name in ("lora_on_convolutions", "lora")),
    *(f"tests/ops/patcher/test_{name}.py" for name in (
        "patcher", "dynamic_vram", "other_models", "patched_weights")),
    *(f"tests/loaders/models/test_{name}.py" for name in (
        "controlnet", "model_patch", "clip_vision", "vae", "module_files")),
    "tests/node/test_side_model_nodes.py",
)


@pytest.mark.heavy
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "stock"])
def test_what_holds_on_the_calls_of_this_comfyui_holds_on_those_of_later_ones(shape):
    command = [sys.executable, "-m", "pytest", *CONFORMANCE, "-q", "--linear-calls", shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
