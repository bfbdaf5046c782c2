"""Packing to ComfyUI's own types while loading, from any file: encoded again, once."""
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import comfy.utils
import comfy.weight_adapter
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import hidden_states, small_towers
from encoders.encoder import random_weights as encoder_weights
from families import relative_error
from model_tester import layers_of_the_host
from pack_api import (
    COMFYUI,
    EXACT,
    HOST_TYPES,
    ROW_TYPES,
    is_packed,
    load_diffusion_model,
    load_text_encoder,
    memory_summary,
    open_weights,
    pack_types,
    packed_tensors,
    source_of_file,
)
from patched_models import flux_inputs, relative, run, tiny_flux
from safetensors.torch import save_file
from saving import save
from stored_files import FILES, diffusion_model, written

from devtools.files.gguf_files import write_gguf
from featherweight.loaders import progress
from featherweight.loaders.files import packed_cache
from featherweight.loaders.models import pack_on_load
from featherweight.loaders.models.pack_on_load import pack_weights
from featherweight.loaders.progress import Progress
from featherweight.loaders.quantizers.comfy_quant import row_type_of
from featherweight.ops.packing.pack_types import pack_type

pytestmark = pytest.mark.usefixtures("small_models")
each_type = pytest.mark.parametrize("type_name", ROW_TYPES)
DIFFUSION_FILES = [name for name, (load, *_) in FILES.items() if load is diffusion_model]
MATRIX = "double_blocks.0.img_mlp.0.weight"
# Most of the difference to the dense model's output that a type may make on a small random one.
ERRORS = {"int8_convrot": 0.03, "float8_e4m3fn": 0.1, "mxfp8": 0.1, "nvfp4": 0.3,
          "asym_w4a8_int8": 0.3, "convrot_w4a4": 0.4}


def weights_of(patcher) -> dict[str, torch.Tensor]:
    return {name: value.data for name, value in patcher.model.diffusion_model.named_parameters()}


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "flux-Q4_K.gguf"
    write_gguf(path, tiny_flux(), lambda name, values: "Q4_K" if "_blocks." in name
               and values.ndim == 2 and values.shape[1] % 256 == 0 else "F16")
    return path


@pytest.mark.parametrize(("family", "type_name"), [
    pytest.param(family, type_name, marks=() if type_name == "int8_convrot" or family == "Q4_K"
                 else pytest.mark.heavy)
    for family in DIFFUSION_FILES for type_name in ROW_TYPES])
def test_weights_of_every_file_are_those_that_packing_its_values_gives(type_name, family, tmp_path):
    _, file = written(family, tmp_path)
    source = source_of_file(file.path)
    found, again = weights_of(load_diffusion_model(str(file.path), pack_to=type_name)), 0
    for name, weight in source.weights.items():
        packed = found[name]
        if not is_packed(packed) or packed.params.format != _format(type_name, packed):
            continue
        again += 1
        if weight.stored_type == type_name:
            continue  # stays as it is in the file
        expected = ROW_TYPES[type_name].pack(weight.read(0, weight.shape[0]))
        for tensor, wanted in zip(packed_tensors(packed), packed_tensors(expected), strict=True):
            # of rotated values the reader of a file may round a sum in another order
            assert (tensor != wanted).float().mean() < 1e-3, name
    assert again


def _format(type_name, packed):
    shape = tuple(packed.shape)
    return pack_type(type_name).format_of(shape) if ROW_TYPES[type_name].takes(shape) else None


@each_type
def test_the_model_is_close_to_the_one_it_comes_from(type_name, tmp_path):
    save_file(tiny_flux(), tmp_path / "flux.safetensors")
    plain = load_diffusion_model(str(tmp_path / "flux.safetensors"))
    packed = load_diffusion_model(str(tmp_path / "flux.safetensors"), pack_to=type_name)
    assert relative(run(packed), run(plain)) < ERRORS[type_name]


@pytest.mark.parametrize("type_name", HOST_TYPES)
def test_comfyui_computes_it_as_the_file_that_is_saved_of_it(type_name, gguf):
    """Where its kernels run: here because it is asked to."""
    save(source_of_file(gguf), gguf.with_name("saved.safetensors"), type_name)
    saved = load_diffusion_model(str(gguf.with_name("saved.safetensors")), host_formats=COMFYUI)
    loaded = load_diffusion_model(str(gguf), pack_to=type_name, host_formats=COMFYUI)
    layer = loaded.model.diffusion_model.double_blocks[0].img_mlp[0]
    assert "MixedPrecisionOps" in str(type(layer).__mro__) and not is_packed(layer.weight)
    assert relative(run(loaded), run(saved)) < 1e-5


@each_type
def test_the_node_says_before_what_becomes_of_the_file_and_after_what_it_lost(
        type_name, gguf, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path / "kept"))
    monkeypatch.setattr(progress, "_text_sender", lambda: texts.append)
    model = load_diffusion_model(str(gguf), pack_to=type_name)
    before = [text for text in texts if "becomes" in text]
    assert re.match(rf"Q4_K, [\d.]+ [kM]B, becomes {type_name}, [\d.]+ [kM]B\npacking", before[0])
    lost = re.search(r"packed from Q4_K in \d+ s(, added loss: .* \([\d.]+ % of the weights\))",
                     memory_summary(model))[1]
    second = load_diffusion_model(str(gguf), pack_to=type_name)
    assert f"packed from Q4_K in an earlier load{lost}, kept in" in memory_summary(second)


@each_type
def test_a_weight_that_its_type_cannot_hold_stays_plain_and_is_told(type_name, tmp_path, caplog):
    tensors = dict(tiny_flux())
    tensors[MATRIX] = tensors[MATRIX] / tensors[MATRIX].abs().max() * 1e-41
    save_file(tensors, tmp_path / "flux.safetensors")
    packed = load_diffusion_model(str(tmp_path / "flux.safetensors"), pack_to=type_name)
    assert torch.equal(weights_of(packed)[MATRIX], tensors[MATRIX])
    assert f"'{MATRIX}' is F32: its values do not fit into {type_name}" in memory_summary(packed)


@each_type
def test_a_width_that_does_not_divide_stays_in_16_bits(type_name, tmp_path):
    shapes = {"wide": (64, 256), "odd": (72, 100), "conv": (8, 16, 3, 3)}
    weights = {f"blocks.{number}.{name}.weight": torch.randn(shape).bfloat16()
               for number in range(2) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "net.safetensors")
    file, held = open_weights(tmp_path / "net.safetensors"), dict(weights)
    pack_weights(file, held, type_name, Progress("packing"))
    for name, weight in weights.items():
        takes = ROW_TYPES[type_name].takes(tuple(weight.shape))
        assert is_packed(held[name]) == takes and ("wide" not in name or takes)
        assert takes or torch.equal(held[name], weight)


def test_comfyui_alone_opens_what_is_kept_and_computes_the_same(gguf, tmp_path, monkeypatch):
    """A diffusion model and a text encoder, in a process without this pack."""
    folder = tmp_path / "kept"
    monkeypatch.setenv(packed_cache.FOLDER, str(folder))
    shapes = {f"model.layers.0.self_attn.{name}_proj.weight": (rows, 1024)
              for name, rows in (("q", 2048), ("k", 1024), ("v", 1024))}
    shapes |= {"model.layers.0.post_attention_layernorm.weight": (1024,),
               "model.layers.0.self_attn.q_norm.weight": (128,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()},
              tmp_path / "encoder.safetensors")
    file = open_weights(tmp_path / "encoder.safetensors")
    pack_weights(file, file.state_dict(), "mxfp8", Progress("packing"))
    [clip] = folder.glob("*.safetensors")
    loaded, files = {}, {}
    for type_name in HOST_TYPES:
        before = set(folder.iterdir())
        loaded[type_name] = load_diffusion_model(str(gguf), pack_to=type_name,
                                                 host_formats=COMFYUI)
        [files[type_name]] = set(folder.iterdir()) - before
    torch.save(flux_inputs(), tmp_path / "inputs")
    script = Path(__file__).parents[2] / "support/host_alone.py"
    subprocess.run([sys.executable, script, tmp_path / "inputs", tmp_path / "out", clip,
                    "none", *files.values()], check=True)
    outputs = torch.load(tmp_path / "out")
    assert outputs["pack"] == [] and outputs[clip.name]["formats"] == {"", "mxfp8"}
    for type_name, model in loaded.items():
        assert relative(outputs[files[type_name].name]["model"], run(model)) < 1e-5


# --- text encoders ---

ENCODERS_READ = ("t5-xxl of transformers", "qwen3-4b", "clip-l")


@pytest.mark.parametrize(("name", "type_name"), [
    pytest.param(name, type_name, marks=() if name in ENCODERS_READ and type_name == "int8_convrot"
                 else pytest.mark.heavy) for name in ENCODERS for type_name in HOST_TYPES])
def test_a_text_encoder_has_the_hosts_layers_where_it_is_asked_for(name, type_name, tmp_path):
    encoder, path = ENCODERS[name], str(tmp_path / "encoder.safetensors")
    with small_towers(encoder):
        weights = {key: value.bfloat16() for key, value in encoder_weights(encoder).items()}
        weights |= {key: torch.zeros(shape) for key, shape in encoder.markers.items()
                    if key not in weights}
        save_file({key: value.contiguous() for key, value in weights.items()}
                  | dict(encoder.extra), path)
        own, of_the_host = (
            load_text_encoder([path], encoder.clip_type, model_options=encoder.model_options,
                              pack_to=type_name, host_formats=formats)
            for formats in (EXACT, COMFYUI))
        packed = sum(is_packed(weight.data) and row_type_of(weight.data) == type_name
                     for weight in own.patcher.model.parameters())
        theirs = layers_of_the_host(of_the_host.patcher.model)
        # tables stay this pack's; stacked experts are one weight of several of the host's
        assert bool(theirs) == bool(packed) and (name != "clip-l" or not packed)
        assert relative_error(hidden_states(of_the_host), hidden_states(own)) < 1e-3


@each_type
def test_a_lora_has_its_full_effect_on_a_text_encoder(type_name, tmp_path):
    """Whoever multiplies: the same as on the values that are held."""
    encoder, path = ENCODERS["qwen3-4b"], str(tmp_path / "encoder.safetensors")
    with small_towers(encoder):
        save_file({key: value.contiguous() for key, value in encoder_weights(encoder).items()},
                  path)
        clips = [load_text_encoder([path], encoder.clip_type, model_options=encoder.model_options,
                                   pack_to=type_name, host_formats=formats)
                 for formats in (EXACT, COMFYUI)]
        key = next(key for key, weight in clips[0].patcher.model.named_parameters()
                   if is_packed(weight.data) and row_type_of(weight.data) == type_name)
        weight = comfy.utils.get_attr(clips[0].patcher.model, key)
        change = 0.1 * torch.randn(weight.shape[0], 4), torch.randn(4, weight.shape[1])
        outputs = []
        for clip in clips:
            plain = hidden_states(clip)
            adapter = comfy.weight_adapter.LoRAAdapter(set(), (*change, 4.0, None, None, None))
            patched = clip.clone()
            patched.add_patches({key: adapter}, 1.0)
            outputs.append(hidden_states(patched) - plain)
        assert relative_error(outputs[1], outputs[0]) < 0.02


# --- the device, and the time ---

def watch_packing(monkeypatch, look: Callable[[torch.Tensor], object]):
    """Has each weight looked at before it is packed."""
    def watched(pack):
        def run(values, *arguments):
            look(values)
            return pack(values, *arguments)
        return run

    for name in ("pack_tensor", "pack_rows"):
        monkeypatch.setattr(pack_types, name, watched(getattr(pack_types, name)))


@pytest.mark.fake_gpus
@pytest.mark.parametrize("type_name", [
    pytest.param(name, marks=() if name in ("Q8_0", "NF4", "int8_convrot", "nvfp4")
                 else pytest.mark.heavy) for name in pack_on_load.LOAD_TYPES])
def test_packing_runs_on_the_device_that_computes(type_name, gguf, tmp_path, monkeypatch):
    devices, packed = set(), {}
    watch_packing(monkeypatch, lambda values: devices.add(values.device.type))
    save_file(tiny_flux(), tmp_path / "flux.safetensors")
    for kind in ("cuda", "cpu"):
        devices.clear()
        held = dict(open_weights(tmp_path / "flux.safetensors").state_dict())
        pack_weights(open_weights(tmp_path / "flux.safetensors"), held, type_name,
                     Progress("packing"), device=torch.device(kind))
        assert devices == {kind} and {value.device.type for value in held.values()} == {"cpu"}
        packed[kind] = held
    for name in packed["cpu"]:
        parts = [packed_tensors(each[name]) if is_packed(each[name]) else [each[name]]
                 for each in packed.values()]
        assert all(map(torch.equal, *parts)), name
    devices.clear()
    model = load_diffusion_model(str(tmp_path / "flux.safetensors"), pack_to=type_name)
    assert devices == {model.load_device.type} == {"cuda"}


@pytest.mark.fake_gpus
@pytest.mark.parametrize("type_name", ["Q8_0", "NF4", "int8_convrot"])
def test_a_weight_too_large_for_the_device_is_packed_on_the_cpu(type_name, tmp_path, monkeypatch,
                                                               caplog):
    save_file(tiny_flux(), tmp_path / "flux.safetensors")
    file, devices = open_weights(tmp_path / "flux.safetensors"), []

    def short(values):
        devices.append(values.device.type)
        if values.device.type == "cuda" and len(values) == 1024:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    watch_packing(monkeypatch, short)
    held = file.state_dict()
    pack_weights(file, held, type_name, Progress("packing"), device=torch.device("cuda"))
    assert devices.count("cpu") == 2 and devices.count("cuda") == 13
    assert is_packed(held[MATRIX]) and caplog.text.count("so it is packed on the CPU") == 1


def test_of_a_large_model_the_time_is_told_before(gguf, monkeypatch):
    texts, clock = [], iter(range(100000))
    monkeypatch.setattr(pack_on_load, "MANY_VALUES", 1 << 20)
    monkeypatch.setattr(pack_on_load.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress, "_text_sender", lambda: texts.append)
    load_diffusion_model(str(gguf), pack_to="int8_convrot")
    before = next(text for text in texts if "becomes" in text)
    assert re.search(r"MB, in about \d+ s\npacking", before), before
