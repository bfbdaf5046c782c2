"""What loading and running a packed model takes in memory, on a Flux with real layer sizes and fewer blocks."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.gguf_files import write_random_gguf
from devtools.tiny_models import flux_shapes

PROBE = Path(__file__).resolve().parents[2] / "devtools" / "memory_probe.py"
MB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module", params=[
    pytest.param((1, 1), id="0.5 GB"), pytest.param((4, 4), id="2 GB", marks=pytest.mark.heavy)])
def figures(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "flux.gguf"
    double_blocks, single_blocks = request.param
    shapes = flux_shapes(hidden=3072, double_blocks=double_blocks, single_blocks=single_blocks, context=4096)
    write_random_gguf(path, shapes, "Q8_0")
    result = subprocess.run([sys.executable, str(PROBE), str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    figures = json.loads(result.stdout.splitlines()[-1])
    print(figures)
    return figures


def test_the_model_holds_at_most_2_percent_more_than_the_files_tensors(figures):
    assert figures["model_size"] <= 1.02 * figures["tensor_bytes"]


def test_loading_takes_at_most_400_mb_beside_the_file(figures):
    assert figures["peak_after_load"] - figures["resident_before"] <= figures["file_bytes"] + 400 * MB
    assert figures["anonymous_growth_load"] <= 400 * MB


def test_a_step_adds_at_most_one_layers_dense_size(figures):
    assert figures["anonymous_growth_step"] <= figures["largest_dense_layer"]
