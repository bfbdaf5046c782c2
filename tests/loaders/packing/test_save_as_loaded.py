"""What is saved of a model is what its file holds, whatever dtype ComfyUI loaded it in."""
import comfy.cli_args
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple
from diffusers_names import DIFFUSERS, in_diffusers_names
from families import FAMILIES, random_weights, shrunken_detection
from pack_api import (
    KEEP_TYPES,
    is_packed,
    load_checkpoint,
    load_diffusion_model,
    load_notes,
    open_weights,
    source_of_model,
)
from patched_models import lora_for, patched, tiny_flux
from safetensors.torch import save_file
from saving import save

from devtools.files.gguf_files import write_gguf

pytestmark = pytest.mark.usefixtures("small_models")
FLAGS = ("fp8_e4m3fn_unet", "fp8_e5m2_unet", "bf16_unet", "fp16_unet", "fp32_unet")
BIAS, OUTER = "img_in.bias", "img_in.weight"


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "fp32_unet", False)


def rounding_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a small Flux, whose norms too are no values of fewer bits."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
            for name, tensor in tiny_flux(seed).items()}


def write(path, kind: str, seed: int = 0) -> str:
    tensors = rounding_weights(seed)
    if kind == "GGUF":
        arrays = {name: value.numpy() for name, value in tensors.items()}
        write_gguf(path.with_suffix(".gguf"), arrays,
                   lambda name, value: "Q8_0" if name.endswith("qkv.weight") else
                   "BF16" if name == OUTER else "F32")
        return str(path.with_suffix(".gguf"))
    prefix = "model.diffusion_model." if kind == "checkpoint" else ""
    dtype = torch.bfloat16 if kind != "float16" else torch.float16
    save_file({prefix + key: value.to(dtype) for key, value in tensors.items()},
              path.with_suffix(".safetensors"))
    return str(path.with_suffix(".safetensors"))


def load(path: str, kind: str):
    if kind == "checkpoint":
        return load_checkpoint(path, output_clip=False, output_vae=False)[0]
    if kind == "host":
        return comfy.sd.load_diffusion_model(path)
    return load_diffusion_model(path, pack_to="Q8_0" if kind == "pack to" else None)


def bits(path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name in the host -> type in a file, and its bytes."""
    found = {}
    file = open_weights(path)
    for name, entry in file.entries.items():
        name = name.removeprefix("model.diffusion_model.").replace("_norm.scale", "_norm.weight")
        found[name] = entry.format, file.tensor(entry.name).reshape(-1).view(torch.uint8)
    return found


def values(path) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("model.diffusion_model.").replace("_norm.scale", "_norm.weight"):
        tensor.dequantize() if is_packed(tensor) else tensor.float()
        for name, tensor in open_weights(path).state_dict().items()
    }


@pytest.mark.parametrize(("flag", "kind"), [
    *((flag, "bfloat16") for flag in FLAGS), *(("fp8_e4m3fn_unet", kind) for kind in (
        "GGUF", "float16", "checkpoint", "host"))])
def test_every_tensor_is_the_files_bit_for_bit_whatever_dtype_a_flag_chose(
        tmp_path, monkeypatch, flag, kind):
    monkeypatch.setattr(comfy.cli_args.args, flag, True)
    path = write(tmp_path / "model", kind)
    saved = save(source_of_model(load(path, kind)), tmp_path / "saved.gguf", KEEP_TYPES)
    expected, found = bits(path), bits(saved.path)
    assert found.keys() == expected.keys()
    for name, (type_name, data) in expected.items():
        assert found[name][0] == type_name and torch.equal(found[name][1], data), name
    assert "as ComfyUI has" not in saved.text


@pytest.mark.parametrize("wanted", [KEEP_TYPES, "Q8_0", "NF4"])
def test_what_a_packing_loader_left_plain_is_the_files(tmp_path, monkeypatch, wanted):
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    path = write(tmp_path / "model", "bfloat16")
    name = "saved.safetensors" if wanted == "NF4" else "saved.gguf"
    saved = save(source_of_model(load(path, "pack to")), tmp_path / name, wanted)
    expected, found, plain = values(path), values(saved.path), 0
    for name, tensor in expected.items():
        if saved.types[name] in ("F32", "BF16"):
            plain += 1
            assert torch.equal(found[name], tensor), name
    assert plain > 20 and saved.types[BIAS] in ("F32", "BF16")


def test_a_lora_is_added_to_the_files_values(tmp_path, monkeypatch):
    path = write(tmp_path / "model", "bfloat16")
    lora = lora_for({OUTER: rounding_weights()[OUTER]}, size=0.1)
    exact = source_of_model(patched(load(path, "bfloat16"), (lora, 1.0))).weights[OUTER]
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    rounded = source_of_model(patched(load(path, "bfloat16"), (lora, 1.0))).weights[OUTER]
    assert torch.equal(exact.patched(0, 256), rounded.patched(0, 256))
    assert not torch.equal(rounded.patched(0, 256), rounded.read(0, 256))


def test_the_values_of_a_merged_model_that_fp8_rounded_are_told(tmp_path, monkeypatch):
    paths = [write(tmp_path / name, "bfloat16", seed) for seed, name in enumerate("ab")]
    merged = ModelMergeSimple().merge(*(load(path, "bfloat16") for path in paths), 0.5)[0]
    assert source_of_model(merged).notes == []
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    merged = ModelMergeSimple().merge(*(load(path, "bfloat16") for path in paths), 0.5)[0]
    note, = source_of_model(merged).notes
    assert note.startswith("44 weights are merged with another model's as ComfyUI has them")


def test_a_file_that_is_gone_or_changed_is_told_and_the_models_values_are_saved(
        tmp_path, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    path = write(tmp_path / "model", "bfloat16")
    model = load(path, "bfloat16")
    write(tmp_path / "model", "bfloat16", seed=1)
    changed = save(source_of_model(model), tmp_path / "changed.gguf", KEEP_TYPES)
    (tmp_path / "model.safetensors").unlink()
    gone = save(source_of_model(model), tmp_path / "gone.gguf", KEEP_TYPES)
    start = "44 weights are saved as ComfyUI has them (F8_E4M3), not as they were loaded: "
    assert f"{start}model.safetensors was changed since" in changed.text
    assert f"{start}model.safetensors is no longer there" in gone.text
    held = model.model.diffusion_model.state_dict()
    for saved in (changed, gone):
        assert all(torch.equal(tensor, held[name].float())
                   for name, tensor in values(saved.path).items())


def test_a_file_that_changes_while_it_is_saved_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    path = write(tmp_path / "model", "bfloat16")
    source = source_of_model(load(path, "bfloat16"))
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(ValueError, match="model.safetensors"):
        save(source, tmp_path / "saved.gguf", KEEP_TYPES)


@pytest.mark.parametrize(("name", "names"), [
    *((name, "host") for name, family in FAMILIES.items() if family.latent),
    # the host itself does not read the other two from one file
    *((name, "diffusers") for name in DIFFUSERS if name not in ("flux2", "chroma"))])
def test_every_family_loads_without_notes_and_is_saved_as_its_file_is(
        tmp_path, monkeypatch, name, names):
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    weights = {key: value.bfloat16() for key, value in random_weights(family).items()}
    stored = weights
    if names == "diffusers":
        stored = in_diffusers_names(weights, DIFFUSERS[name](family.config))
        stored = {key: value.contiguous() for key, value in stored.items()}
    save_file(stored, tmp_path / "model.safetensors", metadata=dict(family.metadata))
    model = load_diffusion_model(str(tmp_path / "model.safetensors"))
    assert load_notes(model) == ()
    source = source_of_model(model)
    for key, value in weights.items():
        weight = source.weights[key]
        assert torch.equal(weight.read(0, len(value)), value.float()), key
    assert source.notes == []
