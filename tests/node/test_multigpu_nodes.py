"""Nodes under ComfyUI-MultiGPU's ids: where they place what they load, and what they say where they
cannot."""
import re
import shutil

import comfy.model_management
import pytest
import torch
from checkpoint_parts import checkpoint_shapes
from fake_gpus import CAPACITY
from gpu_memory import lies_on
from model_folders import use_folder
from pack_nodes import node_list
from patched_models import flux_file, flux_inputs
from safetensors.torch import save_file

import nodes as host_nodes
from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf, write_random_gguf
from featherweight.nodes.legacy.distorch import GIB

pytestmark = pytest.mark.fake_gpus

CPU, FIRST, SECOND = map(torch.device, ("cpu", "cuda:0", "cuda:1"))
NODES = {node.GET_SCHEMA().node_id: node for node in node_list()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, VAE and checkpoint in the host's folders."""
    base = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        use_folder(base, patch, "vae_approx")
        shutil.copy(flux_file("Q8_0")[0], base / "flux.gguf")
        write_gguf(base / "vae.gguf", tiny_models.autoencoder(), lambda name, values: "F16")
        for half in ("encoder", "decoder"):
            found = {
                name.partition(".")[2]: torch.from_numpy(value)
                for name, value in tiny_models.autoencoder().items()
                if name.startswith(f"taesd_{half}.")
            }
            save_file(found, base / f"taef1_{half}.safetensors")
        write_random_gguf(base / "checkpoint.gguf", checkpoint_shapes(), "Q8_0", None)
        yield base


@pytest.fixture(autouse=True)
def nothing_stays_loaded(texts):
    yield
    comfy.model_management.unload_all_models()


def run(node_id, **inputs):
    return NODES[node_id].execute(**inputs)


def step(patcher) -> torch.Tensor:
    comfy.model_management.load_models_gpu([patcher])
    inputs = {name: value.to(patcher.load_device) for name, value in flux_inputs().items()}
    with torch.no_grad():
        return patcher.model.apply_model(**inputs).float().cpu()


@pytest.fixture(scope="module")
def expected(models):
    patcher, = run("UnetLoaderGGUF", unet_name="flux.gguf")
    return patcher.model_size(), step(patcher)


DISTORCH2, DISTORCH = "UnetLoaderGGUFDisTorch2MultiGPU", "UnetLoaderGGUFDisTorchMultiGPU"
HALF, ALL = "half of it", "all of it"
# Node, its inputs (virtual VRAM in parts of the model) -> where it computes, which part stays
# there, each store and its part.
PLACED = [
    ("UnetLoaderGGUFMultiGPU", {"device": "cuda:1"}, (SECOND, None, {})),
    ("UnetLoaderGGUFAdvancedMultiGPU", {"device": "cpu",
                                        "dequant_dtype": "target"}, (CPU, None, {})),
    (DISTORCH2, {"compute_device": "cuda:0", "virtual_vram_gb": HALF}, (FIRST, .5, {})),
    (DISTORCH2, {"compute_device": "cuda:1", "virtual_vram_gb": ALL,
                 "donor_device": "cuda:0"}, (SECOND, 0, {FIRST: 1})),
    (DISTORCH2, {"compute_device": "cpu", "virtual_vram_gb": HALF}, (CPU, None, {})),
    (DISTORCH2, {}, (FIRST, 0, {})),  # 4 GiB, where an API file leaves it out
    (DISTORCH, {}, (FIRST, None, {})),  # and there none
    (DISTORCH, {"device": "cuda:0", "virtual_vram_gb": HALF,
                "use_other_vram": True}, (FIRST, .5, {SECOND: .5})),
    (DISTORCH2, {
        "virtual_vram_gb": HALF, "expert_mode_allocations": "cuda:0,30%;cuda:1,30%;cpu,40%",
        "eject_models": True
    }, (FIRST, .3, {})),
    (DISTORCH2, {"expert_mode_allocations": "cuda:0,1mb;cuda:2,512k;cuda:1,1mb;cpu,*"},
     (FIRST, 1 << 20, {})),
    (DISTORCH, {
        "device": "cuda:1", "virtual_vram_gb": HALF,
        "expert_mode_allocations": "cuda:1,40%;cuda:0,30%;cuda:2,30%"
    }, (SECOND, .4, {})),
    ("UNETLoaderDisTorch2MultiGPU", {"weight_dtype": "fp8_e4m3fn",
                                     "virtual_vram_gb": HALF}, (FIRST, .5, {}))
]


@pytest.mark.parametrize(("node_id", "inputs", "where"), PLACED)
def test_weights_lie_where_the_inputs_say_and_the_picture_is_the_same(
    node_id, inputs, where, expected, texts
):
    size, picture = expected
    amounts = {HALF: size / 2 / GIB, ALL: size / GIB}
    patcher, = run(node_id, unet_name="flux.gguf",
                   **{name: amounts.get(value, value) for name, value in inputs.items()})
    device, kept, stores = where
    assert patcher.load_device == device and len(texts) == 1 and "There is no" not in texts[0]
    placement = getattr(patcher, "placement", None)
    assert (placement is None) == (kept is None)
    assert torch.equal(step(patcher), picture)
    if placement is not None:
        kept, *amounts = (part * size if part <= 1 else part for part in (kept, *stores.values()))
        assert (
            placement.gpu_bytes == pytest.approx(kept, abs=2)
            and lies_on(patcher.model, str(device)) <= kept + 200_000
        )
        assert dict(placement.stores) == {
            store: pytest.approx(amount, abs=2) for store, amount in zip(stores, amounts)
        }
        assert [store for store, _ in placement.stores] == list(stores)
        assert all(
            lies_on(patcher.model, str(store)) <= amount for store, amount in zip(stores, amounts))
        assert "on cuda" in texts[0]


def test_a_loader_says_where_the_weights_will_lie_and_then_where_they_do(
        expected, texts):
    patcher, = run(DISTORCH, unet_name="flux.gguf", device="cuda:0", use_other_vram=True,
                   virtual_vram_gb=expected[0] * .75 / GIB)
    held, planned = texts[0].splitlines()
    assert (
        ", 4.0 MB in memory" in held
        and planned == "at most 1.0 of 4.0 MB on cuda:0, 3.0 MB on cuda:1"
    )
    clone = patcher.clone()
    step(clone)
    clone.cleanup()
    first, placed, copied = texts[-1].splitlines()
    assert first == held
    assert re.fullmatch(
        r"0\.9 of 4\.0 MB on cuda:0, 3\.\d MB on cuda:1", placed)
    assert copied.startswith("3.1 MB copied per step")


SAID = [
    ({"compute_device": "cuda:9"},
     "There is no device cuda:9 here (found: gpu:0, gpu:1, gpu:2, cpu), so the default one is used."
     ),
    ({"donor_device": "cuda:9"},
     "There is no device cuda:9 here (found: gpu:0, gpu:1, gpu:2, cpu), so the cpu is used."),
    ({"compute_device": "cuda:0", "donor_device": "cuda:0"},
     "The donor cuda:0 is the device that computes, so everything stays there."),
    ({"expert_mode_allocations": "cuda:0,lots"},
     "expert_mode_allocations cannot be read at 'cuda:0,lots': expected a device and an amount, as"
     " in cuda:0,2.5gb;cpu,*. virtual_vram_gb is used."),
    ({"expert_mode_allocations": "cuda:0,1mb;cuda:1,1mb;cpu,*"},
     "expert_mode_allocations is used only for what stays on cuda:0: what it gives to other GPUs is"
     " kept in main memory; to keep weights on another GPU, clear it and use virtual_vram_gb with a"
     " donor."),
    ({"virtual_vram_gb": -1.0},
     "virtual_vram_gb is -1, which is below 0; it is treated as 0, so everything stays on cuda:0.")
]


@pytest.mark.parametrize(("inputs", "sentence"), SAID)
def test_what_cannot_be_is_said_in_a_sentence_and_the_model_runs(inputs, sentence, expected, texts):
    patcher, = run(DISTORCH2, unet_name="flux.gguf", **inputs)
    assert sentence in texts[0].splitlines()
    assert torch.equal(step(patcher), expected[1])


def test_an_expert_string_that_is_null_is_none(expected, texts):
    run(DISTORCH2, unet_name="flux.gguf", expert_mode_allocations="None")  # as the host writes it
    assert "cannot be read" not in texts[0]


@pytest.mark.parametrize(("inputs", "asked"), [
    ({"virtual_vram_gb": 0.0001}, "virtual_vram_gb"),
    ({"expert_mode_allocations": "cuda:0,90%;cpu,10%"}, "expert_mode_allocations")])
def test_more_than_the_gpu_has_is_told_by_what_was_written_on_the_node(
        inputs, asked, expected, texts):
    import fakegpu

    fakegpu.set_capacity(1 << 20)
    run(DISTORCH2, unet_name="flux.gguf", **inputs)
    fakegpu.set_capacity(CAPACITY)
    sentence = (
        rf"{asked} leaves 3\.\d MB on the device that computes, but cuda:0 has 1\.0 MB in total;"
        r" ComfyUI keeps as much there as fits\."
    )
    assert re.search(f"^{sentence}$", texts[0], re.M)


@pytest.mark.parametrize(
    ("device", "expected_device"),
    [("cuda:1", SECOND), ("cpu", CPU), ("cuda:9", FIRST), (None, FIRST)]
)
def test_a_vae_decodes_where_its_node_says(device, expected_device, models):
    vae, = run("VAELoaderMultiGPU", vae_name="vae.gguf", **({"device": device} if device else {}))
    plain, = run("VaeGGUF", vae_name="vae.gguf")
    assert vae.device == vae.patcher.load_device == expected_device
    latent = torch.linspace(-1, 1, 16 * 64).reshape(1, 16, 8, 8)
    assert torch.equal(vae.decode(latent).cpu(), plain.decode(latent).cpu())


@pytest.mark.parametrize(("name", "latent", "device", "expected_device"), [
    ("taef1", torch.zeros(1, 16, 4, 4), "cuda:1", SECOND),
    ("taef1", torch.zeros(1, 16, 4, 4), "cpu", CPU),
    ("pixel_space", torch.zeros(1, 3, 8, 8), None, FIRST)])
def test_so_does_one_that_is_no_file(name, latent, device, expected_device, models):
    vae, = run("VAELoaderMultiGPU", vae_name=name, **({"device": device} if device else {}))
    plain, = host_nodes.VAELoader().load_vae(name)
    assert vae.device == vae.patcher.load_device == expected_device
    assert torch.equal(vae.decode(latent).cpu(), plain.decode(latent).cpu())
    assert all(weight.device == CPU for weight in vae.first_stage_model.parameters()) == (
        expected_device == CPU
    )


def test_the_weights_of_a_vae_lie_elsewhere_too(models):
    vae, = run("VAELoaderDisTorch2MultiGPU", vae_name="vae.gguf", compute_device="cuda:1")
    assert vae.patcher.placement.gpu_bytes == 0 and vae.first_stage_model is vae.patcher.model


def test_each_part_of_a_checkpoint_has_its_device(models):
    model, clip, vae = run("CheckpointLoaderAdvancedMultiGPU", ckpt_name="checkpoint.gguf",
                           unet_device="cuda:1", clip_device="cpu", vae_device="cuda:0")
    assert [model.load_device, clip.patcher.load_device, vae.device] == [SECOND, CPU, FIRST]
    model, clip, vae = run("CheckpointLoaderAdvancedDisTorch2MultiGPU", ckpt_name="checkpoint.gguf",
                           unet_compute_device="cuda:1", unet_virtual_vram_gb=0.0,
                           unet_donor_device="cpu", clip_compute_device="cuda:0",
                           clip_virtual_vram_gb=2.0, clip_donor_device="cuda:1", vae_device="cpu",
                           unet_expert_mode_allocations="cuda:1,1kb;cpu,*")
    assert model.load_device == SECOND and model.placement.gpu_bytes == 1024 and vae.device == CPU
    assert clip.patcher.placement.gpu_bytes == 0 and dict(clip.patcher.placement.stores).keys() == {
        SECOND
    }
    assert clip.cond_stage_model is clip.patcher.model


def test_devices_are_offered_by_torchs_names_and_the_first_gpu_is_the_default():
    for input in NODES[DISTORCH2].GET_SCHEMA().inputs:
        if input.id in ("compute_device", "donor_device"):
            assert input.options == ["cpu", "cuda:0", "cuda:1", "cuda:2"]
            assert input.default == ("cpu" if input.id == "donor_device" else "cuda:0")
