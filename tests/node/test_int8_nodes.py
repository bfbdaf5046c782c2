"""`compute` of the loader nodes, from the node to the model's output."""
import logging
import shutil

from devtools.measure.weights import snr

import pytest
import torch
from families import deep_clone
from model_folders import use_folder
from patched_models import flux_file, lora_for, packed_layers, patched
from patched_models import run as run_with

from featherweight.nodes.load_checkpoint import LoadCheckpoint
from featherweight.nodes.load_diffusion_model import LoadDiffusionModel
from featherweight.ops.layers import fast_on_cpu

NODES = [LoadDiffusionModel, LoadCheckpoint]

pytestmark = pytest.mark.usefixtures("small_models")
needs_vnni = pytest.mark.skipif(not fast_on_cpu.multiplies_integers(torch.device("cpu")),
                                reason="the CPU has no units for int8")


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch):
    monkeypatch.setattr(fast_on_cpu, "MIN_TOKENS_WITHOUT_KERNEL", fast_on_cpu.MIN_TOKENS)


@pytest.fixture(params=["Q8_0", "Q4_K"])
def values(request):
    """The values in the file."""
    return flux_file(request.param)[1]


@pytest.fixture
def name(request, values, tmp_path, monkeypatch):
    """Of a small Flux that lies where both nodes look."""
    use_folder(tmp_path, monkeypatch, "checkpoints")
    shutil.copy(flux_file(request.node.callspec.params["values"])[0], tmp_path / "flux.gguf")
    return "flux.gguf"


def run(patcher):
    """What a step takes away, with tokens enough for products in whole numbers."""
    generator = torch.Generator().manual_seed(5)
    latent, text = (torch.randn(shape, generator=generator)
                    for shape in ((1, 16, 32, 32), (1, 80, 256)))
    return latent - run_with(patcher, {"x": latent, "t": torch.tensor([0.5]), "c_crossattn": text})


def computes(patcher):
    return {layer.compute for layer in packed_layers(patcher)}


@needs_vnni
@pytest.mark.parametrize("node", NODES)
def test_int8_is_near_exact_and_exact_is_the_default(name, node):
    default, exact, whole = (node.execute(name, **options)[0]
                             for options in ({}, {"compute": "exact"}, {"compute": "int8"}))
    expected, got = run(exact), run(whole)
    assert torch.equal(run(default), expected)
    assert 25 < snr(got, expected) < 60


@needs_vnni
def test_a_lora_on_an_int8_model_has_the_effect_it_has_on_an_exact_one(name, values):
    exact, whole = (LoadDiffusionModel.execute(name, compute=compute)[0]
                    for compute in ("exact", "int8"))
    lora = lora_for(values)
    error = snr(run(whole), run(exact))
    for strength in (1.0, 0.5):
        assert (
            snr(run(patched(whole, (lora, strength))), run(patched(exact, (lora, strength))))
            > error - 3
        )


@pytest.mark.parametrize("node", NODES)
def test_copies_and_models_built_again_compute_alike(name, node):
    patcher = node.execute(name, compute="int8")[0]
    build, arguments = patcher.cached_patcher_init
    for copy in (patcher, patcher.clone(), deep_clone(patcher),
                 build(*arguments, disable_dynamic=True)):
        assert computes(copy) == {"fast"}
    assert computes(node.execute(name)[0]) == {"exact"}


@pytest.mark.parametrize("node", NODES)
def test_a_device_without_int8_units_is_named_once_and_computes_exactly(
        name, node, monkeypatch, caplog):
    monkeypatch.setattr(fast_on_cpu, "multiplies_integers", lambda device: False)
    patcher = node.execute(name, compute="int8")[0]
    lines = [record.message for record in caplog.records if "compute is fast" in record.message]
    assert len(lines) == 1 and "as with exact: cpu has no int8 units" in lines[0]
    assert torch.equal(run(patcher), run(node.execute(name)[0]))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        node.execute(name, compute="exact")
    assert "int8" not in caplog.text
