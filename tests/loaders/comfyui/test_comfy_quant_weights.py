"""Layers in ComfyUI's own quantised formats: those that this ComfyUI does not read are a sentence
in every loader."""
import json
import random

import psutil
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from host_formats import ASYMMETRIC, HOST_FORMATS, asymmetric_parts, in_host_format, mark_of
from pack_api import (
    COMFYUI,
    EXACT,
    WeightFileError,
    load_checkpoint,
    load_diffusion_model,
    load_text_encoder,
    source_of_file,
)
from patched_models import tiny_flux
from safetensors.torch import save_file

from featherweight.loaders.models import loader_choice
from featherweight.loaders.models.loader_choice import has_plain_fp8, needs_own_reader
from featherweight.loaders.models.vae import load_vae

pytestmark = pytest.mark.usefixtures("small_models")

LAYER = "single_blocks.0.linear2"
CHECKPOINT = "model.diffusion_model."
LOADERS = {
    "diffusion model": load_diffusion_model,
    "diffusion model, packed": lambda path: load_diffusion_model(path, pack_to="Q8_0"),
    "diffusion model, packed into a file": source_of_file,
    "checkpoint": load_checkpoint,
    "checkpoint, packed": lambda path: load_checkpoint(path, pack_to="Q8_0"),
    "text encoder": lambda path: load_text_encoder([path]),
    "text encoder, packed": lambda path: load_text_encoder([path], pack_to="Q8_0"),
    "VAE": load_vae,
}


def write_flux(path, parts: dict[str, torch.Tensor], settings=None, prefix: str = "",
               metadata=None) -> str:
    """Write a small Flux with one layer in these parts. settings: what `comfy_quant` says of it;
    None: no such tensor."""
    tensors = {
        name: values.bfloat16() for name, values in tiny_flux().items() if name != f"{LAYER}.weight"
    }
    tensors |= {f"{LAYER}.{part}": values for part, values in parts.items()}
    if settings is not None:
        tensors[f"{LAYER}.comfy_quant"] = mark_of(settings)
    save_file({prefix + name: values.contiguous() for name, values in tensors.items()}, path,
              metadata)
    return str(path)


UNREAD = "is in a quantized format that this ComfyUI does not read"


def error_of(load, path) -> str:
    with pytest.raises(WeightFileError) as caught:
        load(path)
    message = str(caught.value)
    assert UNREAD in message
    assert message.endswith("Update ComfyUI, or get another conversion.")
    return message


@pytest.mark.parametrize("loader", LOADERS)
def test_a_format_that_no_host_reads_is_named_by_every_loader(loader, tmp_path):
    prefix = CHECKPOINT if "checkpoint" in loader else ""
    parts = {"weight": torch.zeros(256, 640, dtype=torch.int8), "weight_scale": torch.ones(20, 256)}
    path = write_flux(tmp_path / "model.safetensors", parts, {"format": "int4_columnwise"}, prefix)
    message = error_of(LOADERS[loader], path)
    assert "model.safetensors" in message and "'int4_columnwise'" in message


@pytest.mark.skipif(ASYMMETRIC in QUANT_ALGOS, reason="this ComfyUI reads it")
def test_a_format_of_a_newer_host_says_what_reads_it(tmp_path):
    path = write_flux(tmp_path / "model.safetensors", asymmetric_parts(256, 1280),
                      {"format": ASYMMETRIC})
    message = error_of(lambda path: load_diffusion_model(path, host_formats=COMFYUI), path)
    needed = "ComfyUI 0.33 or `compute` at automatic or exact"
    assert f"('{ASYMMETRIC}', which needs {needed})" in message
    load_diffusion_model(path)


def test_a_format_named_in_the_metadata_is_found_too(tmp_path):
    layers = {LAYER: {"format": "int8_columnwise"}, "gone": {"format": "x"}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    parts = {"weight": torch.zeros(256, 1280, dtype=torch.int8), "weight_scale": torch.ones(2, 10)}
    path = write_flux(tmp_path / "model.safetensors", parts, metadata=metadata)
    assert "'int8_columnwise'" in error_of(load_diffusion_model, path)


@pytest.mark.parametrize("metadata", [
    {}, {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "float8_e4m3fn"}}})}])
def test_fp8_that_metadata_marks_is_not_plain(metadata, tmp_path):
    parts = {"weight": torch.zeros(256, 1280, dtype=torch.float8_e4m3fn),
             "weight_scale": torch.ones(())}
    path = write_flux(tmp_path / "model.safetensors", parts, metadata=metadata)
    assert has_plain_fp8(path) is not bool(metadata)


@pytest.mark.parametrize(("loader", "text"), [
    *((loader, "{") for loader in LOADERS),
    *(("diffusion model", text) for text in ("{}", "[1]", '{"layers": []}'))])
def test_damaged_metadata_is_a_sentence_of_every_loader(loader, text, tmp_path):
    path = write_flux(tmp_path / "model.safetensors", {"weight": torch.zeros(256, 1280)},
                      metadata={"_quantization_metadata": text})
    with pytest.raises(WeightFileError, match="model.safetensors: its metadata _quantization_met"):
        LOADERS[loader](path)


NO_OBJECT = "its comfy_quant is not a JSON object"
NO_GROUPS = "int8_tensorwise: columns are rotated in groups of 0 of 1280"
DAMAGED_SETTINGS = [
    ({"format": None}, "its comfy_quant names no format"),
    ([1], NO_OBJECT), (b"", NO_OBJECT), (bytes(40), NO_OBJECT),
    (b'{"format": "int8_te', NO_OBJECT), (b"null", NO_OBJECT),
    ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "many"}, NO_GROUPS),
    (b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": Infinity}', NO_GROUPS),
    ({"format": "float8_e4m3fn"}, "float8_e4m3fn: it has weight of int8 (256, 1280), expected "),
]


@pytest.mark.parametrize(("loader", "settings", "reason"), [
    *((loader, {"convrot": True, "rows": True}, "its comfy_quant names no format")
      for loader in LOADERS),
    *(("diffusion model", *case) for case in DAMAGED_SETTINGS)])
def test_damaged_settings_are_a_sentence_of_every_loader(loader, settings, reason, tmp_path):
    prefix = CHECKPOINT if "checkpoint" in loader else ""
    parts = {"weight": torch.zeros(256, 1280, dtype=torch.int8), "weight_scale": torch.ones(256, 1)}
    path = write_flux(tmp_path / "model.safetensors", parts, settings, prefix)
    with pytest.raises(WeightFileError) as caught:
        LOADERS[loader](path)
    message = str(caught.value)
    assert reason in message and f"{LAYER}.weight'" in message
    assert UNREAD not in message and message.endswith("another conversion.")


def test_the_name_of_a_format_is_cut(tmp_path):
    parts = {"weight": torch.zeros(256, 1280, dtype=torch.int8), "weight_scale": torch.ones(256, 1)}
    path = write_flux(tmp_path / "model.safetensors", parts, {"format": "a" * 5000})
    message = error_of(load_diffusion_model, path)
    assert "'aaa" in message and len(message) < 500


@pytest.mark.parametrize("loader", ["diffusion model", "diffusion model, packed"])
def test_a_part_that_the_host_would_leave_out_is_named(loader, tmp_path):
    parts = {"weight": torch.zeros(256, 1280, dtype=torch.int8), "weight_scale": torch.ones(256, 1),
             "weight_correction": torch.ones(80, 256)}
    path = write_flux(tmp_path / "model.safetensors", parts, {"format": "int8_tensorwise"})
    assert "(int8_tensorwise with 'weight_correction')" in error_of(LOADERS[loader], path)


def test_an_unread_format_beside_packed_layers_is_named(tmp_path):
    bnb_files = pytest.importorskip("devtools.files.bnb_files",
                                    reason="bitsandbytes writes the file")
    name = "double_blocks.0.img_attn.proj"
    parts, _ = bnb_files.quantised(tiny_flux()[f"{name}.weight"], "nf4")
    tensors = {
        key: values for key, values in tiny_flux().items()
        if key not in (f"{name}.weight", f"{LAYER}.weight")
    }
    tensors |= {f"{name}.weight{part}": values for part, values in parts.items()}
    tensors |= {f"{LAYER}.weight": torch.zeros(256, 640, dtype=torch.int8),
                f"{LAYER}.comfy_quant": mark_of({"format": "mxfp4"})}
    path = str(tmp_path / "model.safetensors")
    save_file({key: values.contiguous() for key, values in tensors.items()}, path)
    assert "'mxfp4'" in error_of(load_diffusion_model, path)


@pytest.mark.parametrize("in_metadata", [False, True])
@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_what_the_host_reads_is_left_to_it(format_name, in_metadata, tmp_path):
    parts, _ = in_host_format("weight", tiny_flux()[f"{LAYER}.weight"], format_name)
    del parts["comfy_quant"]
    parts["input_scale"] = torch.tensor(0.5)  # which no format needs, and many files have
    settings = {"format": format_name}
    metadata = (
        {"_quantization_metadata": json.dumps({"layers": {LAYER: settings}})}
        if in_metadata
        else None
    )
    path = write_flux(tmp_path / "model.safetensors", parts, None if in_metadata else settings,
                      metadata=metadata)
    assert not needs_own_reader(path)


def test_a_fault_while_a_file_is_looked_at_is_not_taken_for_a_format(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault of this pack")

    path = write_flux(tmp_path / "model.safetensors", {}, None)
    assert not needs_own_reader(path)
    monkeypatch.setattr(loader_choice, "has_quantized_weights", fail)
    with pytest.raises(RuntimeError, match="a fault of this pack"):
        needs_own_reader(path)


# it is mapped twice: by the package safetensors, then by torch
@pytest.mark.parametrize("maps", [0, 1], ids=["not at all", "not by torch"])
def test_a_file_that_cannot_be_mapped_is_a_sentence(maps, tmp_path):
    resource = pytest.importorskip("resource")  # a limit of POSIX
    path, nbytes = tmp_path / "model.safetensors", 4 << 30
    header = json.dumps({"a": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}})
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(file.tell() + nbytes)  # sparse
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (used + maps * nbytes, limits[1]))
    try:
        assert needs_own_reader(str(path)) and not has_plain_fp8(str(path))
        with pytest.raises(WeightFileError, match="model.safetensors cannot be read"):
            if maps:
                resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
            load_diffusion_model(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("host_formats", [EXACT, COMFYUI])
@pytest.mark.parametrize("shape", [(), (64,), (64, 0), (0, 64)])
def test_codes_that_are_no_matrix_are_a_sentence(shape, host_formats, tmp_path):
    format_name = random.choice(["int8_tensorwise", "nvfp4", "float8_e4m3fn"])
    parts, _ = in_host_format("weight", tiny_flux()[f"{LAYER}.weight"], format_name)
    parts["weight"] = torch.zeros(shape, dtype=torch.uint8).view(parts["weight"].dtype)
    del parts["comfy_quant"]
    path = write_flux(tmp_path / "model.safetensors", parts, {"format": format_name})
    with pytest.raises(WeightFileError, match="expected rows of codes") as error:
        load_diffusion_model(path, host_formats=host_formats)
    assert LAYER in str(error.value) and "Update" not in str(error.value)


@pytest.mark.parametrize(("settings", "columns"), [
    ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1 << 16}, 1 << 16),
    ({"format": "convrot_w4a4", "convrot_groupsize": 1 << 16}, 1 << 16),
    ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1 << 14}, 1 << 14)])
def test_a_rotation_that_would_take_gigabytes_is_a_sentence(settings, columns, tmp_path):
    stored = columns // 2 if "w4a4" in settings["format"] else columns
    parts = {"weight": torch.zeros(1, stored, dtype=torch.int8), "weight_scale": torch.ones(1)}
    path = write_flux(tmp_path / "model.safetensors", parts, settings)
    with pytest.raises(WeightFileError, match="columns are rotated in groups of"):
        load_diffusion_model(path)
