"""Packing while loading: what is held is what the packer makes of the dense values, whatever file
they come from."""
import functools
import json
import random
import re
from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch
from checkpoint_parts import MODEL, stable_diffusion
from diffusers_names import DIFFUSERS, in_diffusers_names
from encoders import ENCODERS
from encoders.encoder import (
    hidden_states,
    host_clip,
    small_towers,
)
from encoders.encoder import (
    random_weights as encoder_weights,
)
from families import FAMILIES, random_weights, relative_error
from families import run as run_family
from host_formats import ASYMMETRIC, HOST_FORMATS, in_host_format
from pack_api import (
    FORMATS,
    ROW_TYPES,
    WeightFileError,
    is_packed,
    load_checkpoint,
    load_diffusion_model,
    load_text_encoder,
    memory_summary,
    open_weights,
    pack_tensor,
    packed_tensors,
    source_of_file,
)
from patched_models import (
    LIMIT,
    dense_of,
    error_by_effect,
    flux_file,
    folder,
    lora_for,
    patched,
    relative,
    run,
    tiny_flux,
)
from recipe_process import digest
from safetensors.torch import load, load_file, save_file
from saving import save
from user_kernels import kernels_of_this_machine

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.model_summary import format_name
from featherweight.loaders.files import packed_cache
from featherweight.loaders.models import pack_on_load
from featherweight.loaders.models.diffusion import read_weights
from featherweight.loaders.progress import Progress

pytestmark = pytest.mark.usefixtures("small_models")

TYPES = [name for name in pack_on_load.LOAD_TYPES if name not in ROW_TYPES]
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
OLD = "fp8 with scale_weight"
SOURCES = (*PLAIN, *FP8, OLD, *HOST_FORMATS)
# Most of the difference to the dense model's output that a type may make on a small random one.
ERRORS = {
    "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K": 0.08, "Q4_K": 0.15, "Q3_K": 0.35, "IQ4_XS": 0.2, "NF4": 0.2
}


def stored_as(source: str, name: str,
              values: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a file keeps of one weight, and its float32 values as a reader should see them."""
    if source in PLAIN | FP8:
        stored = values.to((PLAIN | FP8)[source])
        return {name: stored}, stored.float()
    if values.ndim != 2 or values.shape[1] % 256:
        return {name: values.bfloat16()}, values.bfloat16().float()
    if source == OLD:
        scale = values.abs().amax().clamp(1e-6) / 448
        stored = (values / scale).to(torch.float8_e4m3fn)
        layer = name.removesuffix(".weight")
        return {
            name: stored,
            f"{layer}.scale_weight": scale,
            f"{layer}.scale_input": torch.tensor(0.5),
        }, stored.float() * scale
    return in_host_format(name, values, source)


def write(path, source: str, tensors: dict[str, torch.Tensor],
          prefix: str = "") -> dict[str, torch.Tensor]:
    """Write a safetensors file. Returns the dense values without prefix."""
    stored, seen = {}, {}
    for name, values in tensors.items():
        parts, seen[re.sub(r"_norm.scale$", "_norm.weight", name)] = stored_as(source, name, values)
        stored |= {prefix + part: tensor.contiguous() for part, tensor in parts.items()}
    if source == OLD:
        stored[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(stored, path)
    return seen


@functools.cache
def flux_in(source: str) -> tuple[str, dict[str, torch.Tensor]]:
    path = f"{folder().name}/{source}.safetensors"
    return path, write(path, source, tiny_flux())


@functools.cache
def packed_flux(source: str, type_name: str):
    return load_diffusion_model(flux_in(source)[0], pack_to=type_name)


@pytest.fixture(autouse=True, scope="module")
def as_a_user():
    """With the kernels of this machine; no model outlives its tests."""
    with kernels_of_this_machine():
        yield
    packed_flux.cache_clear()


def assert_same_bytes(found, values: torch.Tensor, format_name: str, differing: float = 0):
    """Whether a weight is what the packer makes of dense values; differing: the share of bytes that
    may differ."""
    assert is_packed(found) and found.params.format.name == format_name
    packed = packed_tensors(pack_tensor(values, FORMATS[format_name]))
    for tensor, wanted in zip(packed_tensors(found), packed, strict=True):
        assert (tensor != wanted).float().mean() <= differing


def weights_of(patcher) -> dict[str, torch.Tensor]:
    return {name: value.data for name, value in patcher.model.diffusion_model.named_parameters()}


ROTATED = ("convrot_w4a4", ASYMMETRIC)
PAIRS = [
    *((source, "Q8_0") for source in SOURCES), *(("BF16", type_name) for type_name in TYPES[1:])
]


@pytest.mark.parametrize(("source", "type_name"), PAIRS)
def test_every_source_is_held_as_the_packer_packs_its_values(source, type_name):
    path, seen = flux_in(source)
    found = weights_of(packed_flux(source, type_name))
    blocks = [name for name, values in seen.items() if values.ndim == 2 and "_blocks." in name]
    assert len(blocks) == 13 and found.keys() == seen.keys()
    for name, values in seen.items():
        if name in blocks:
            # of its rotated values the host rounds each product, this pack the sum alone
            assert_same_bytes(found[name], values, type_name,
                              differing=1e-3 if source in ROTATED else 0)
        else:
            # In 16 bits, which a scaled weight in fp8 and one of float32 are rounded to.
            assert relative(found[name].float(), values) < (
                1e-6 if source in ("F16", "BF16", *FP8) else 4e-3
            ), name


@pytest.mark.parametrize(("source", "type_name"), PAIRS)
def test_the_model_is_close_to_the_dense_one_and_keeps_nothing_of_the_hosts_formats(
        source, type_name):
    path, seen = flux_in(source)
    ours = packed_flux(source, type_name)
    assert (
        relative(run(ours), run(comfy.sd.load_diffusion_model_state_dict(dict(seen))))
        < ERRORS[type_name]
    )
    layers = [type(module).__mro__ for module in ours.model.diffusion_model.modules()]
    assert not any("MixedPrecisionOps" in str(kind) for kinds in layers for kind in kinds)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("type_name", ["Q4_K", "NF4"])
def test_a_lora_has_its_full_effect_beside_weights_packed_here(type_name, kind):
    ours = packed_flux("BF16", type_name)
    held = {
        name: value.dequantize() if is_packed(value) else value
        for name, value in weights_of(ours).items()
    }
    dense = comfy.sd.load_diffusion_model_state_dict(
        {name: value.float() for name, value in held.items()})
    lora = lora_for(flux_in("BF16")[1], kind)
    assert (
        error_by_effect(
            run(patched(ours, (lora, 0.8))), run(patched(dense, (lora, 0.8))), run(dense)
        )
        < LIMIT
    )


def test_each_type_is_held_in_its_own_size():
    sizes = [packed_flux("BF16", type_name).model_size() for type_name in TYPES[:5]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert sizes[0] < 0.65 * 2 * sum(values.numel() for values in flux_in("BF16")[1].values())


def test_the_node_says_what_was_packed_from_what():
    text = memory_summary(packed_flux("BF16", "Q4_K"))
    assert re.fullmatch(
        r"Q4_K \+ BF16 \+ F32, \d\.\d MB in memory, packed from BF16 in \d+ s,"
        r" loss: small \([\d.]+ % of the weights\)", text)
    assert "packed from float8_e4m3fn in" in memory_summary(packed_flux(OLD, "Q8_0"))
    assert "packed from BF16 in" in memory_summary(
        patched(packed_flux("BF16", "Q4_K"), (lora_for(tiny_flux()), 1.0))
    )


# --- what is packed already
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("format_name", ["Q4_K", "Q2_K", "INT8"])
def test_weights_that_are_packed_already_stay_bit_for_bit(format_name):
    path, _ = flux_file(format_name)
    as_it_is, ours = load_diffusion_model(path), load_diffusion_model(path, pack_to="Q8_0")
    found, expected = weights_of(ours), weights_of(as_it_is)
    packed = [name for name, value in expected.items() if is_packed(value)]
    assert len(packed) >= 18
    for name in packed:
        assert all(map(torch.equal, packed_tensors(found[name]), packed_tensors(expected[name])))
    assert re.search(rf"in memory, nothing was packed; {format_name}.* stays as in the file$",
                     memory_summary(ours))


@pytest.mark.parametrize("half", ["F16", "BF16", "F32"])
def test_what_a_gguf_holds_plain_is_packed_and_the_rest_stays(half, tmp_path):
    path = tmp_path / "model.gguf"
    seen = write_gguf(
        path, {name: values.numpy() for name, values in tiny_flux().items()},
        lambda name, values: "Q4_K" if "img_attn" in name and values.ndim == 2 else half)
    ours, kept = load_diffusion_model(str(path), pack_to="Q5_K"), load_diffusion_model(str(path))
    for name, value in weights_of(ours).items():
        if "_blocks." in name and value.ndim == 2 and "img_attn" not in name:
            assert_same_bytes(value, torch.tensor(seen[name]), "Q5_K")
        elif "img_attn" in name and value.ndim == 2:
            assert all(
                map(torch.equal, packed_tensors(value), packed_tensors(weights_of(kept)[name])))
    assert f"packed from {half} in" in memory_summary(ours) and memory_summary(ours).endswith(
        "; Q4_K stays as in the file"
    )


# --- other files
# ------------------------------------------------------------------------------------------------

def test_shards_and_a_folder_are_what_the_one_file_is(tmp_path):
    path, seen = flux_in("BF16")
    stored, expected = load_file(path), digest(packed_flux("BF16", "Q4_K"))
    names, index = [f"model-{part:05d}-of-00002.safetensors" for part in (1, 2)], {}
    for part, name in enumerate(names):
        keys = list(stored)[part::2]
        save_file({key: stored[key] for key in keys}, tmp_path / name)
        index |= dict.fromkeys(keys, name)
    assert digest(load_diffusion_model(str(tmp_path / names[1]), pack_to="Q4_K")) == expected
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert digest(load_diffusion_model(str(tmp_path), pack_to="Q4_K")) == expected


@pytest.mark.parametrize("name", ["flux-dev", "sd3.5"])
def test_parts_of_a_weight_in_diffusers_names_are_packed_as_the_whole_one(name, tmp_path):
    family = FAMILIES[name]
    weights = {key: value.bfloat16() for key, value in random_weights(family).items()}
    (tmp_path / "config.json").write_text("{}")
    parts = in_diffusers_names(weights, DIFFUSERS[name](family.config))
    save_file({key: value.contiguous().clone() for key, value in parts.items()},
              tmp_path / "model.safetensors")
    found = weights_of(load_diffusion_model(str(tmp_path), pack_to="Q8_0"))
    joined = [key for key in weights if "qkv.weight" in key]
    assert joined and not any(key in parts for key in joined)
    for key in joined:
        assert_same_bytes(found[key], weights[key], "Q8_0")


@pytest.mark.parametrize("source", ["BF16", OLD, "float8_e4m3fn"])
def test_of_a_checkpoint_the_model_is_packed_and_the_rest_stays(source, tmp_path):
    path = str(tmp_path / "checkpoint.safetensors")
    parts = stable_diffusion()
    model = {
        name.removeprefix(MODEL): values for name, values in parts.items() if name.startswith(MODEL)
    }
    seen = write(path, source, model, MODEL)
    others = {
        name: values.half() if values.ndim else values for name, values in parts.items()
        if not name.startswith(MODEL)
    }
    save_file(load(Path(path).read_bytes()) | others, path)
    found, clip, vae = load_checkpoint(path, pack_to="Q8_0")
    packed = [name for name, value in weights_of(found).items()
              if is_packed(value) and value.params.format is FORMATS["Q8_0"]]
    assert any("attn1.to_q" in name for name in packed)
    for name in packed:
        assert_same_bytes(weights_of(found)[name], seen[name], "Q8_0")
    dense = dense_of(seen)
    assert (
        relative_error(run_family(found, FAMILIES["sd1.5"]), run_family(dense, FAMILIES["sd1.5"]))
        < 0.02
    )
    as_it_is = comfy.sd.load_checkpoint_guess_config(path)
    states = (encoder.encode_from_tokens(encoder.tokenize("a feather"))
              for encoder in (clip, as_it_is[1]))
    assert torch.equal(*states)
    latent = torch.randn(1, 4, 8, 8)
    assert torch.equal(vae.decode(latent), as_it_is[2].decode(latent))
    for patcher in (found, vae.patcher):
        assert digest(patcher.cached_patcher_init[0]()) == digest(patcher)


@pytest.mark.parametrize("name", ["t5-xxl of transformers", "clip-l", "umt5-xxl of transformers"])
@pytest.mark.parametrize("source", ["F16", OLD])
def test_a_text_encoder_is_packed_with_its_table_of_tokens(name, source, tmp_path):
    encoder, path = ENCODERS[name], str(tmp_path / "encoder.safetensors")
    with small_towers(encoder):
        weights = encoder_weights(encoder)
        weights |= {
            key: torch.zeros(shape) for key, shape in encoder.markers.items() if key not in weights
        }
        seen = write(path, source, weights)
        save_file(load(Path(path).read_bytes()) | dict(encoder.extra), path)
        clip = load_text_encoder([path], encoder.clip_type, model_options=encoder.model_options,
                                 pack_to="Q8_0")
        held = {
            key: value for key, value in clip.patcher.model.named_parameters()
            if is_packed(value.data)
        }
        tables = [
            value for key, value in held.items()
            if key.endswith(("shared.weight", "token_embedding.weight"))
        ]
        assert tables and all(table.params.format is FORMATS["Q8_0"] for table in tables)
        assert relative_error(hidden_states(clip), hidden_states(host_clip(encoder, seen))) < 0.08
        assert "packed from" in memory_summary(clip.patcher)
        again = clip.patcher.cached_patcher_init[0]()
        assert digest(again) == digest(clip.patcher)


def test_of_two_text_encoders_what_is_packed_already_is_said(tmp_path):
    clip_l, t5 = ENCODERS["clip-l"], ENCODERS["t5-xxl of transformers"]
    options = {**t5.model_options, **clip_l.model_options}
    for name, encoder in (("clip.safetensors", clip_l), ("t5.safetensors", t5)):
        weights = encoder_weights(encoder)
        weights |= {
            key: torch.zeros(shape) for key, shape in encoder.markers.items() if key not in weights
        }
        write(str(tmp_path / name), "F16", weights)
    write_gguf(tmp_path / "clip.gguf", load_file(tmp_path / "clip.safetensors"),
               lambda name, values: "Q5_0" if values.ndim == 2 else "F32")
    text = memory_summary(
        load_text_encoder([str(tmp_path / "clip.gguf"),
                           str(tmp_path / "t5.safetensors")], "sd3", model_options=options,
                          pack_to="Q8_0").patcher)
    assert "packed from F16 in" in text and "Q5_0 stays as in the file" in text


def test_what_a_layer_multiplies_its_input_by_is_in_the_packed_weight(tmp_path):
    path, name = str(tmp_path / "smoothed.safetensors"), "single_blocks.0.linear2.weight"
    seen = write(path, "float8_e4m3fn", tiny_flux())
    smoothing = torch.rand(seen[name].shape[1]) + 0.5
    more = {name.replace("weight", "pre_quant_scale"): smoothing}
    save_file(load(Path(path).read_bytes()) | more, path)
    assert_same_bytes(
        weights_of(load_diffusion_model(path, pack_to="Q8_0"))[name], seen[name] * smoothing,
        "Q8_0")


# --- recipes and errors
# ------------------------------------------------------------------------------------------------

def test_the_recipe_packs_again_to_the_same_bytes():
    ours = packed_flux("BF16", "Q4_K")
    recipe, _ = ours.cached_patcher_init
    assert recipe.options["pack_to"] == "Q4_K"
    assert digest(recipe()) == digest(ours)


@pytest.mark.parametrize("type_name", ["Q4_K", "NF4", *ROW_TYPES])
def test_a_weight_that_is_no_number_is_named(type_name, tmp_path, monkeypatch):
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path / "cache"))
    name = "double_blocks.0.img_mlp.0.weight"
    tensors = {key: values.bfloat16() for key, values in tiny_flux().items()}
    tensors[name][3, 7] = float(random.choice(["nan", "inf"]))
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path)
    said = f"^broken.safetensors: '{name}' cannot be packed to {type_name}: .*NaN or inf"
    with pytest.raises(WeightFileError, match=said) as error:
        load_diffusion_model(str(path), pack_to=type_name)
    assert "\n" not in str(error.value) and ".." not in str(error.value)
    assert not (tmp_path / "cache").exists()


TIME = "time_in.in_layer.weight"


def flux_with(path, dtype, **factors: float) -> dict[str, torch.Tensor]:
    """A file of a small Flux, the weights of a layer times a factor. Returns its values."""
    tensors = {name: values.to(dtype) for name, values in tiny_flux().items()}
    for layer, factor in factors.items():
        name = f"double_blocks.0.{layer}.weight"
        tensors[name] = (tiny_flux()[name] / tiny_flux()[name].abs().max() * factor).to(dtype)
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("type_name", TYPES)
def test_a_weight_that_its_type_cannot_hold_stays_plain_and_is_told(
    type_name, tmp_path, monkeypatch, caplog
):
    dtype = random.choice([torch.float32, torch.bfloat16])
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path / "cache"))
    tensors = flux_with(tmp_path / "model.safetensors", dtype,
                        **{"img_attn.qkv": 1e-24, "img_mlp.0": 1e20})
    patcher = load_diffusion_model(str(tmp_path / "model.safetensors"), pack_to=type_name)
    found = weights_of(patcher)
    for layer in ("img_attn.qkv", "img_mlp.0"):
        name = f"double_blocks.0.{layer}.weight"
        assert format_name(found[name]) == ("NF4" if type_name == "NF4" else "BF16")
        values = found[name].dequantize() if is_packed(found[name]) else found[name]
        assert relative(values.double(), tensors[name].double()) < (
            0.15 if type_name == "NF4" else 0.004
        )
        told = f"'{name}' is BF16: its values do not fit into {type_name}"
        assert (told in caplog.text) == (type_name != "NF4")
    assert format_name(found["double_blocks.0.txt_mlp.0.weight"]) == type_name
    assert ("do not fit into" in memory_summary(patcher)) == (type_name != "NF4")
    caplog.clear()
    again = load_diffusion_model(str(tmp_path / "model.safetensors"), pack_to=type_name)
    assert "in an earlier load" in memory_summary(again)
    assert (told in caplog.text) == (type_name != "NF4")


@pytest.mark.parametrize("type_name", ["float8_e4m3fn", "nvfp4", "int8_convrot"])
def test_a_weight_of_which_one_value_empties_rows_stays_plain_and_is_told(type_name, tmp_path,
                                                                          caplog):
    name = "double_blocks.0.img_mlp.0.weight"
    tensors = {key: value.bfloat16() for key, value in tiny_flux().items()}
    rng = random.Random(type_name)
    tensors[name][tuple(rng.randrange(size) for size in tensors[name].shape)] = 1e30
    save_file(tensors, tmp_path / "model.safetensors")
    patcher = load_diffusion_model(str(tmp_path / "model.safetensors"), pack_to=type_name)
    assert f"'{name}' is BF16: its values do not fit into {type_name}" in caplog.text
    assert torch.equal(weights_of(patcher)[name].dequantize(), tensors[name])
    assert type_name in memory_summary(patcher)


def test_what_is_not_packed_stays_in_a_type_that_holds_it(tmp_path):
    tensors = {name: values.clone() for name, values in tiny_flux().items()}
    for name, size in (("txt_in.weight", 1e-12), ("img_in.weight", 1e-42), (TIME, 3.4e38)):
        tensors[name] = size * torch.linspace(-1, 1, tensors[name].numel()).view_as(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    file = open_weights(tmp_path / "model.safetensors")
    state_dict, *_ = read_weights(file, "Q4_K", Progress("reading", "packing"), frozenset())
    for name, dtype in (("txt_in.weight", torch.bfloat16), ("img_in.weight", torch.float32),
                        (TIME, torch.float32)):
        assert (
            state_dict[name].dtype == dtype
            and relative(state_dict[name].double(), tensors[name].double()) < 0.01
        )


@pytest.mark.parametrize("type_name", pack_on_load.LOAD_TYPES)
def test_rows_of_tiny_values_make_no_nan(type_name, tmp_path):
    tensors = {name: values.clone() for name, values in tiny_flux().items()}
    for name in (name for name in tensors if name.endswith("mlp.0.weight")):
        for row, size in enumerate((1e-21, 1e-24, 1e-41)):
            tensors[name][row] *= size
    save_file(tensors, tmp_path / "model.safetensors")
    found = weights_of(load_diffusion_model(str(tmp_path / "model.safetensors"), pack_to=type_name))
    for value in found.values():
        assert (value.dequantize() if is_packed(value) else value).isfinite().all()


def test_a_file_of_another_kind_is_told_as_without_packing(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightFileError, match="^model.ckpt .*diffusion model"):
        load_diffusion_model(str(path), pack_to="Q4_K")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_packed_pack_on_load_is_what_pack_py_makes_of_it(dtype, tmp_path):
    path = tmp_path / "model.safetensors"
    flux_with(path, dtype,
              **{"img_mlp.0": 1e4, "txt_attn.qkv": 1e-24 if dtype != torch.float16 else 1e-2})
    save(source_of_file(path), tmp_path / "model.gguf", "Q4_K")
    saved = weights_of(load_diffusion_model(str(tmp_path / "model.gguf")))
    loaded = weights_of(load_diffusion_model(str(path), pack_to="Q4_K"))
    assert loaded.keys() == saved.keys()
    for name, weight in loaded.items():
        values, expected = (tensor.dequantize() if is_packed(tensor) else tensor
                            for tensor in (weight, saved[name]))
        assert torch.equal(values.double(), expected.double()), name
        assert dtype != torch.float32 or format_name(weight) == format_name(saved[name]), name
