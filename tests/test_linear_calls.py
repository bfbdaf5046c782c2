"""Layers, LoRAs, the patcher and side models on the calls that later ComfyUIs make."""
import subprocess
import sys

import pytest
from linear_calls import SHAPES

from devtools import ROOT

CONFORMANCE = (
    "tests/ops/test_layers.py", "tests/ops/test_host_formats.py", "tests/ops/test_experts.py",
    "tests/ops/test_convolutions.py", "tests/ops/test_gradients.py", "tests/ops/test_autocast.py",
    "tests/ops/test_compile.py", "tests/ops/test_lora.py", "tests/ops/test_patcher.py",
    "tests/ops/test_patcher_dynamic.py", "tests/ops/test_patcher_other_models.py",
    "tests/ops/test_patched_weights.py", "tests/test_side_model_nodes.py",
    "tests/loaders/test_controlnet.py", "tests/loaders/test_model_patch.py",
    "tests/loaders/test_clip_vision.py", "tests/loaders/test_vae.py",
    "tests/loaders/test_modules.py",
)


@pytest.mark.heavy
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "stock"])
def test_what_holds_on_the_calls_of_this_comfyui_holds_on_those_of_later_ones(shape):
    command = [sys.executable, "-m", "pytest", *CONFORMANCE, "-q", "--linear-calls", shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
