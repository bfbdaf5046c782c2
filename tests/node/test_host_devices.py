"""The host's nodes that choose devices, on packed models with LoRAs: the same bits wherever, and
the weights where it says."""
import comfy.model_management
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from encoders import ENCODERS
from encoders.encoder import hidden_states, load_encoder, random_weights, write_encoder
from gpu_memory import sample
from pack_api import PackedLayer
from patched_models import (
    LIMIT,
    dense_flux,
    error_by_effect,
    flux_file,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
)

from featherweight.ops.patcher import PackedPatcher

ON_GPUS = [pytest.param(kind, marks=pytest.mark.fake_gpus(dynamic=kind == "dynamic"))
               for kind in ("static", "dynamic")]
GPU_OF = {"gpu:1": 1, "gpu:7": 0}  # what is chosen -> where it computes

pytestmark = [pytest.mark.usefixtures("small_models"), pytest.mark.parametrize("vram", ON_GPUS)]


@pytest.fixture
def host():
    """The host's nodes."""
    return pytest.importorskip("comfy_extras.nodes_multigpu",
                               reason="this ComfyUI has no nodes that choose devices")


def used() -> list[int]:
    """Bytes of each GPU when no model lies on it."""
    import fakegpu

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return [fakegpu.used(index) for index in range(fakegpu.count())]


def taken(used_before: list[int]) -> list[int]:
    """The GPUs of which a model has taken memory."""
    import fakegpu

    return [
        index for index, before in enumerate(used_before) if fakegpu.used(index) > before + 100_000
    ]


@pytest.fixture(scope="module")
def always_one_thread():
    """With more the last bits are others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# a GGUF; NF4 beside a format of the host's, computed by the host and by us
FORMATS = ("Q4_K", "float8_e4m3fn", "mxfp8 exact")


def cases(*choices: tuple[str, str]):
    """Parametrizes a test by a format and by (device, where LoRAs are put on: before the node or
    after it). Choosing devices does not depend on the format: all are usual for the first format,
    the last choice for the others."""
    return pytest.mark.parametrize(("model", "device", "loras"), [
        pytest.param(name, *choice, marks=() if name == FORMATS[0] or choice == choices[-1] else
                     pytest.mark.heavy) for name in FORMATS for choice in choices
    ], indirect=["model"])


@pytest.fixture(scope="module")
def model(request, always_one_thread):
    """(packed model, a function that puts two LoRAs on, what the packed model gives with them)"""
    values = flux_file(request.param)[1]
    # a DoRA takes long, since it changes the weight itself
    few = {name: value for name, value in values.items() if "linear1" in name or "img_mod" in name}
    loras = [(lora_for(values, seed=1), 0.8), (lora_for(few, "dora", seed=2), 0.5)]
    packed, dense = packed_flux(request.param), dense_flux(request.param)
    reference = sample(patched(packed, *loras))
    assert error_by_effect(reference, sample(patched(dense, *loras)), sample(dense)) < LIMIT
    return packed, lambda patcher: patched(patcher, *loras), reference


@cases(("gpu:1", "after"), ("cpu", "after"), ("gpu:7", "before"), ("gpu:1", "before"))
def test_a_model_computes_where_it_is_told_with_its_loras(model, host, vram, device, loras):
    packed, with_loras, reference = model
    before = used()
    chosen = packed if loras == "after" else with_loras(packed)
    chosen = host.SelectModelDeviceNode.execute(chosen, device)[0]
    chosen = with_loras(chosen) if loras == "after" else chosen
    assert isinstance(chosen, PackedPatcher) and chosen.is_dynamic() == (
        vram == "dynamic" and device != "cpu"
    )
    assert torch.equal(sample(chosen), reference)
    assert taken(before) == ([] if device == "cpu" else [GPU_OF[device]])


@cases(("default", "before"), ("gpu:1", "after"))
def test_two_gpus_share_a_model_with_loras(model, host, vram, device, loras):
    packed, with_loras, reference = model
    before = used()
    shared = host.SelectModelDeviceNode.execute(packed, device)[0]
    shared = shared if loras == "after" else with_loras(shared)
    shared = host.MultiGPUCFGSplitNode.execute(shared, 2)[0]
    shared = with_loras(shared) if loras == "after" else shared
    other, = shared.get_additional_models_with_key("multigpu")
    assert (
        len(packed_layers(other)) == len(packed_layers(packed))
        and other.load_device != shared.load_device
    )
    for _ in range(2):
        assert torch.equal(sample(shared), reference)
    assert taken(before) == [0, 1]


def states(clip) -> torch.Tensor:
    """What an encoder gives, computed where it is loaded."""
    clip.cond_stage_model.set_clip_options({"execution_device": clip.patcher.load_device})
    return hidden_states(clip).cpu()


@pytest.mark.parametrize("device", ["gpu:1", "cpu", "gpu:7"])
def test_a_text_encoder_computes_where_it_is_told_with_its_lora(host, vram, device, tmp_path):
    encoder = ENCODERS["t5-xxl"]
    write_encoder(tmp_path / "encoder.gguf", encoder, random_weights(encoder))
    clip = load_encoder(tmp_path / "encoder.gguf", encoder)
    without, generator = states(clip), torch.Generator().manual_seed(1)
    patches = {}
    for name, layer in clip.cond_stage_model.named_modules():
        if isinstance(layer, PackedLayer) and layer.has_branch and layer.weight.ndim == 2:
            rows, columns = layer.weight.shape
            up, down = (
                torch.randn(rows, 4, generator=generator),
                torch.randn(4, columns, generator=generator),
            )
            patches[f"{name}.weight"] = LoRAAdapter(
                set(), (up, down * 0.2 * columns ** -0.5, 4.0, None, None, None))
    with_lora = clip.clone()
    with_lora.add_patches(patches, 1.0)
    expected = states(with_lora)
    assert not torch.equal(expected, without)
    before = used()
    chosen = host.SelectCLIPDeviceNode.execute(with_lora, device)[0]
    assert isinstance(chosen.patcher, PackedPatcher)
    assert torch.equal(states(chosen), expected)
    assert taken(before) == ([] if device == "cpu" else [GPU_OF[device]])
    assert torch.equal(states(clip), without)
