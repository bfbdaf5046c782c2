"""What loading and running takes in memory: a Flux with real layer sizes and fewer blocks, a whole
one, and a whole T5-XXL."""
import sys
from pathlib import Path

from devtools.measure.memory_probe import probed

import memory_probe_models
import pytest
import torch
from safetensors.torch import save_file

from devtools.files.gguf_files import write_random_gguf
from devtools.files.tiny_models import flux_shapes

MB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module", params=[
    pytest.param((1, 1), id="0.5 GB"), pytest.param((4, 4), id="2 GB", marks=pytest.mark.heavy)])
def figures(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "flux.gguf"
    double_blocks, single_blocks = request.param
    shapes = flux_shapes(hidden=3072, double_blocks=double_blocks, single_blocks=single_blocks,
                         context=4096)
    write_random_gguf(path, shapes, "Q8_0")
    return probed_once("model", path)


def probed_once(kind: str, path: Path) -> dict:
    """What the probe measures with a file, which is deleted."""
    try:
        figures = probed(kind, path, memory_probe_models.__file__)
    finally:
        path.unlink()
    print(figures)
    return figures


def test_the_model_holds_at_most_2_percent_more_than_the_files_tensors(figures):
    assert figures["model_size"] <= 1.02 * figures["tensor_bytes"]


def test_loading_takes_at_most_400_mb_beside_the_file(figures):
    assert (
        figures["peak_after_load"] - figures["resident_before"] <= figures["file_bytes"] + 400 * MB
    )
    assert figures["anonymous_growth_load"] <= 400 * MB


def test_a_step_adds_at_most_one_layers_dense_size(figures):
    assert figures["anonymous_growth_step"] <= figures["largest_dense_layer"]


@pytest.mark.parametrize(("hidden", "type_name", "spare"), [
    pytest.param(1536, "Q8_0", 64 * MB, id="270 MB"),
    pytest.param(3072, "Q4_K", 300 * MB, id="1 GB", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("kind", ["packing", "loaded"])
def test_packing_takes_two_dense_tensors_beside_what_is_held(
        kind, hidden, type_name, spare, tmp_path):
    """Without letting go of what was read, the whole file would be in memory next to the
    result; a model that is loaded is there anyway."""
    path, some = tmp_path / "flux.safetensors", (torch.randn(1 << 20) * 0.02).bfloat16()
    shapes = {name: torch.Size(shape) for name, shape in flux_shapes(hidden, 1, 1, 4096).items()}
    save_file({name: some.repeat(-(-shape.numel() // len(some)))[:shape.numel()].view(shape).clone()
               for name, shape in shapes.items()}, path)
    figures = probed_once(f"{kind}-{type_name}", path)
    allowed = figures["model_size"] + 2 * figures["largest_dense_tensor"] + spare
    assert (
        figures["peak_growth"] <= allowed < figures["model_size"] + figures["tensor_bytes"] - spare
    )
    assert figures["model_size"] <= 0.6 * figures["tensor_bytes"]


def t5_xxl_shapes() -> dict[str, tuple]:
    """T5-XXL's encoder in llama.cpp's names: 4.76 billion values."""
    shapes = {
        "token_embd.weight": (32128, 4096), "enc.output_norm.weight": (4096,),
        "enc.blk.0.attn_rel_b.weight": (32, 64)
    }
    for layer in range(24):
        parts = {f"attn_{part}": (4096, 4096) for part in "qkvo"} | {
            "attn_norm": (4096,),
            "ffn_norm": (4096,),
        }
        parts |= {"ffn_gate": (10240, 4096), "ffn_up": (10240, 4096), "ffn_down": (4096, 10240)}
        shapes |= {f"enc.blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


@pytest.mark.heavy
def test_a_t5_xxl_takes_its_file_and_half_a_gigabyte_and_keeps_its_weights_where_they_are(tmp_path):
    path = tmp_path / "t5-xxl.gguf"
    write_random_gguf(path, t5_xxl_shapes(), "Q4_K", architecture="t5encoder")
    figures = probed_once("encoder", path)
    assert figures["model_size"] <= 1.02 * figures["file_bytes"]
    assert (
        figures["peak_after_load"] <= figures["resident_before"] + figures["file_bytes"] + 500 * MB
    )
    assert (
        figures["peak_after_encoding"]
        <= figures["resident_before"] + figures["file_bytes"] + 500 * MB
    )
    # activations and the scratch
    assert figures["weights_moved"] == 0 and figures["anonymous_growth"] <= 300 * MB


def check_memory_of_a_picture(figures: dict, parameters: float, bits: float):
    assert figures["file_bytes"] == pytest.approx(parameters * bits / 8, rel=0.02)
    assert figures["model_size"] <= 1.02 * figures["file_bytes"]
    assert figures["peak"] <= figures["file_bytes"] + 1.5e9
    assert figures["finite"]


@pytest.mark.heavy
@pytest.mark.parametrize(("type_name", "bits"), [("Q4_K", 4.5), ("Q8_0", 8.5)])
def test_a_flux_dev_of_12_billion_parameters_makes_a_step_in_its_file_and_1_5_gb(
        type_name, bits, tmp_path):
    path = tmp_path / "flux-dev.gguf"
    write_random_gguf(path, flux_shapes(3072, 19, 38, 4096, guidance=True, pooled_text=True),
                      type_name)
    check_memory_of_a_picture(probed_once("picture", path), 11.9e9, bits)
