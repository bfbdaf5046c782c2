"""What a model needs in a step is decided before it: a step meets no case that no load decided."""
import contextlib

import comfy.cli_args
import comfy.model_management
import families
import patched_models
import pytest
import torch
from families import FAMILIES, comfyui_gguf_style, random_weights
from hooked import run_hooked
from pack_api import load_diffusion_model
from patched_models import flux_file, flux_inputs, lora_for, packed_flux, patched, tiny_flux
from small_encoders import encode, lora_for_t5, patched_clip, small_t5
from torch_kernels import unchecked_kernels
from user_kernels import undecided

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.compute import DTYPE_FLAGS
from featherweight.ops import cpu_features, kernels
from featherweight.ops.kernels import Case, cuda_backend

KINDS = [None, "lora", "dora", "loha"]
RUN = [name for name, family in FAMILIES.items() if family.latent]


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch, tmp_path):
    """All kernels, on a CPU that computes in bfloat16."""
    for flag in DTYPE_FLAGS:
        monkeypatch.setattr(comfy.cli_args.args, flag, False, raising=False)
    monkeypatch.setattr(cpu_features, "multiplies_bfloat16", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unchecked_kernels(monkeypatch)


@contextlib.contextmanager
def deciding_in_loads_alone():
    """Inside this block a CPU decides nothing when it is first needed."""
    decide = kernels.decide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "decide", lambda device, needed, *room: (
            decide(device, needed, *room) if room else None))
        yield
    assert kernels._found and not undecided


def step(patcher, arguments=None):
    """A step after ComfyUI has loaded the model."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    with deciding_in_loads_alone():
        patched_models.step(patcher, arguments)


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in RUN[::3] else pytest.mark.heavy) for name in RUN])
def test_of_every_family_with_a_dora(name, tmp_path, monkeypatch):
    family, path = FAMILIES[name], tmp_path / "model.gguf"
    families.shrunken_detection(family, monkeypatch)
    weights = random_weights(family)
    write_gguf(path, weights, **comfyui_gguf_style(), metadata=family.metadata)
    model = load_diffusion_model(str(path))
    matrices = {key: values for key, values in weights.items() if values.ndim == 2}
    lora = lora_for(matrices, "dora", layer_name=lambda key: f"diffusion_model.{key}")
    step(model, families.inputs(family))
    step(patched(model, (lora, 1.0)), families.inputs(family))


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize(("format_name", "compute"), [
    *(("Q4_K", compute) for compute in ("exact", "fast", "int8", "float32")),
    ("IQ4_NL", "int8"), ("int8_tensorwise", "exact"), ("int8_tensorwise", "fast"),
    ("float8_e4m3fn", "exact"), ("float8_e4m3fn", "fast"), ("BF16", "fast"), ("BF16", "float32")])
def test_of_every_kind_of_format_and_patch(format_name, compute):
    path, values = flux_file(format_name)
    model = load_diffusion_model(path, compute=compute)
    for kind in KINDS:
        step(model if kind is None else patched(model, (lora_for(values, kind), 1.0)))


@pytest.mark.usefixtures("small_models")
def test_of_two_models_of_different_dtypes_in_turn():
    path, _ = flux_file("Q4_K")
    models = [load_diffusion_model(path, compute=compute) for compute in ("exact", "float32")]
    assert len({model.model.get_dtype_inference() for model in models}) == 2
    for model in models * 2:
        step(model)


@pytest.mark.usefixtures("small_models")
def test_of_a_model_that_computes_in_another_dtype_than_it_was_loaded_for():
    model = packed_flux("Q4_K").clone()
    step(model)
    model.set_model_compute_dtype(torch.float16)
    step(model)


@pytest.mark.usefixtures("small_models")
def test_of_a_hook_that_brings_a_dora_while_a_model_runs(monkeypatch):
    family = FAMILIES["flux-dev"]
    families.shrunken_detection(family, monkeypatch)
    path, values = flux_file("Q4_K")
    with deciding_in_loads_alone():
        run_hooked(load_diffusion_model(path), family, lora_for(values, "dora"), 1.0)


@pytest.mark.fake_gpus(devices=2, late=False)
@pytest.mark.usefixtures("small_models")
def test_of_a_clone_on_a_second_device(monkeypatch):
    host = pytest.importorskip("comfy_extras.nodes_multigpu",
                               reason="this ComfyUI has no nodes that choose devices")
    unchecked_kernels(monkeypatch, "cuda")
    first = load_diffusion_model(flux_file("Q4_K")[0])
    second = host.SelectModelDeviceNode.execute(first, "gpu:1")[0]
    for index, model in enumerate((first, second)):
        step(model, {name: value.to(model.load_device) if torch.is_tensor(value) else value
                     for name, value in flux_inputs().items()})
        assert index in {device.index for _, device, *_ in kernels._found}


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_text_encoder(kind):
    clip, values = small_t5("Q4_K", 2)
    if kind:
        clip = patched_clip(clip, (lora_for_t5(values, kind), 1.0))
    comfy.model_management.load_models_gpu([clip.patcher], force_full_load=True)
    with deciding_in_loads_alone():
        encode(clip)


# seconds, see docs/performance.md: a GPU's process starts, and a kernel is compiled and checked
START, EXACT, PRODUCT = 10, 0.5, 0.9


@pytest.mark.usefixtures("small_models")
def test_the_first_load_of_a_usual_file_waits_for_few_kernels(tmp_path, monkeypatch):
    needed, path = {}, tmp_path / "q4_k_m.gguf"
    write_gguf(path, {name: values.numpy() for name, values in tiny_flux().items()},
               lambda name, values: "BF16" if "_in" in name else "F32" if values.ndim < 2 else
               "Q6_K" if "mlp" in name else "Q4_K")
    monkeypatch.setattr(kernels, "decide", lambda device, found, makes_room=False:
                        needed.update(dict.fromkeys(found)))
    load_diffusion_model(str(path))
    found = [kernel for capability, packed_format, dtype in needed if capability != "attention"
             for kernel in Case.of(capability, packed_format, dtype).kernels(
                 cuda_backend.BACKEND, packed_format)]
    assert {"Q4_K", "Q6_K"} <= {each[1].name for each in needed if each[1]}
    exact = sum(kernel.capability != "linear" for kernel in found)
    assert START + exact * EXACT + (len(found) - exact) * PRODUCT <= 30
