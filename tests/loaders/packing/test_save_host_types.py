"""Files in ComfyUI's own types are such as ComfyUI's own: it opens them without this pack, and what
is in them is the model with its LoRAs, rounded once."""
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import comfy.sd
import host_alone
import nunchaku_writer
import pytest
import torch
from checkpoint_parts import stable_diffusion
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy_kitchen.tensor import convrot_w4a4 as kitchen
from controlnets import flux_bfl
from diffusers_names import DIFFUSERS, in_diffusers_names
from encoders import ENCODERS
from encoders.encoder import hidden_states, load_encoder, small_towers, write_encoder
from encoders.encoder import random_weights as random_encoder
from families import FAMILIES, host_patcher, random_weights, relative_error, shrunken_detection
from families import run as run_family
from ggml_reference import WITHOUT_REFERENCE
from pack_api import (
    EXACT,
    GGML_FORMATS,
    HOST_TYPES,
    KEEP_TYPES,
    ROW_TYPES,
    SaveError,
    is_packed,
    load_diffusion_model,
    open_weights,
    plan_file,
    source_of_file,
    source_of_model,
)
from packed_files import write_ggml
from patched_models import flux_inputs, lora_for, packed_flux, patched, relative, run, tiny_flux
from safetensors import safe_open
from safetensors.torch import save_file
from saving import SIBLINGS, save, with_markers
from stored_files import FILES, diffusion_model, written

from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, read_marked
from featherweight.loaders.container.weight_file import PLAIN_DTYPES
from featherweight.loaders.families import FAMILIES as KNOWN_FAMILIES
from featherweight.loaders.packing import save as packing
from featherweight.loaders.packing.calibration.sensitivity import Sensitivity
from featherweight.loaders.packing.checkpoint_source import source_of_checkpoint_file
from featherweight.loaders.packing.planning.file_plan import MIXES, SaveOptions, suffix_for
from featherweight.loaders.packing.planning.plan import PlanError
from featherweight.loaders.packing.source import Source, Weight, source_of_encoders
from featherweight.loaders.packing_rules import GENERAL_RULES
from featherweight.loaders.quantizers.comfy_quant import layer_parts

pytestmark = pytest.mark.usefixtures("small_models")
each_type = pytest.mark.parametrize("kind", HOST_TYPES)
BLOCK = "double_blocks.0.img_mlp.0.weight"  # a matrix that is packed
FOUR_BITS = ("nvfp4", "asym_w4a8_int8", "convrot_w4a4")
LEAST_DB = {"int8_convrot": 40, "float8_e4m3fn": 30, "mxfp8": 29, "nvfp4": 19, "asym_w4a8_int8": 20,
            "convrot_w4a4": 18}
FEW_VALUES = "float8_e4m3fn", "compressed-tensors mxfp4"
DIFFUSION_FILES = [name for name, (load, *_) in FILES.items() if load is diffusion_model]

# text encoders of which ComfyUI reads no packed layers
NEVER_PACKED = ("clip-l", "clip-g", "clip-h", "t5-xl", "t5-base", "t5-base-gated", "t5-gemma",
                "umt5-base", "umt5-base of transformers")


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    """A small Flux in bfloat16."""
    path = tmp_path_factory.mktemp("flux") / "model.safetensors"
    floats(torch.bfloat16, path)
    return path


def stored(path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def host_values(model) -> dict[str, torch.Tensor]:
    """Name -> values of a model that ComfyUI has loaded."""
    weights = model.model.diffusion_model.state_dict()
    values = {}
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(getattr(module, "weight", None), QuantizedTensor):
            values[f"{name}.weight"] = module.weight.dequantize().float()
    return {name: tensor.float() for name, tensor in weights.items()
            if name.endswith(("weight", "bias"))} | values


def weights_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a Flux by the host's names."""
    return {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in tensors.items()}


def db(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float(-20 * torch.log10((values - expected).norm() / expected.norm()))


@each_type
def test_the_host_opens_a_file_and_holds_what_packing_gives(flux, tmp_path, kind):
    saved = save(source_of_file(flux), tmp_path / "a.safetensors", kind)
    assert saved.types[BLOCK] == kind and saved.nbytes == saved.path.stat().st_size
    lost, = re.findall(r"^Loss: [a-z ]+ \(([\d.]+) % of the weights\)\.$", saved.text, re.MULTILINE)
    assert -20 * math.log10(float(lost) / 100) > LEAST_DB[kind]
    tensors = stored(saved.path)
    model = comfy.sd.load_diffusion_model(str(saved.path))
    values = host_values(model)
    for name, weight in weights_of(tiny_flux()).items():
        weight = weight.bfloat16()
        if saved.types[name] == kind:
            settings, parts = layer_parts(ROW_TYPES[kind].pack(weight.float()))
            layer = name.removesuffix("weight")
            mark = json.loads(tensors[f"{layer}comfy_quant"].numpy().tobytes())
            assert mark == settings and settings["format"] in QUANT_ALGOS
            for part, tensor in parts.items():
                assert torch.equal(tensors[layer + part].view(-1).view(torch.uint8),
                                   tensor.view(-1).view(torch.uint8)), name
            assert db(values[name], weight.float()) > LEAST_DB[kind], name
        else:
            assert torch.equal(values[name], weight.float()), name
    losses = {name.removesuffix(".weight"): 100 * relative(values[name], tensor.bfloat16().float())
              for name, tensor in weights_of(tiny_flux()).items() if saved.types[name] == kind}
    told = dict(each.rsplit(" ", 1) for each in re.search(
        r"^The layers that lose the most, in % of the weights: (.*)$", saved.text,
        re.MULTILINE)[1].split(", "))
    assert [*told] == sorted(told, key=lambda name: -float(told[name])) and len(told) == 5
    assert float(next(iter(told.values()))) == pytest.approx(max(losses.values()), rel=0.07)
    assert all(float(told[name]) == pytest.approx(losses[name], rel=0.07) for name in told)
    exact = load_diffusion_model(str(flux))
    assert relative(run(model), run(exact)) < 0.5


def floats(dtype: torch.dtype, path: Path):
    save_file({name: tensor.to(dtype) for name, tensor in tiny_flux().items()}, path)


def scaled(dtype: torch.dtype, name: str, path: Path):
    """Codes beside scales without a mark, in one layer of each block."""
    tensors = dict(tiny_flux())
    for layer in [key.removesuffix("weight") for key in tensors if key.endswith("mlp.0.weight")]:
        codes = (tensors[f"{layer}weight"] * 2000).clamp(-400, 400).to(dtype)
        tensors |= {f"{layer}weight": codes, f"{layer}{name}": torch.tensor([0.0005])}
    save_file(tensors, path)


def svdquant(precision: str, path: Path):
    family = FAMILIES["flux-dev"]
    weights = in_diffusers_names(random_weights(family), DIFFUSERS["flux-dev"](family.config))
    nunchaku_writer.write(path, nunchaku_writer.flux(weights, precision=precision))


# in files of their own, beside DIFFUSION_FILES
SOURCES: dict[str, Callable[[Path], object]] = {
    **{str(dtype): partial(floats, dtype) for dtype in PLAIN_DTYPES.values()
       if dtype.is_floating_point},
    "fp8 without a mark": partial(scaled, torch.float8_e4m3fn, "weight_scale"),
    "scales left beside float16": partial(scaled, torch.float16, "weight_scale"),
    **{f"SVDQuant {precision}": partial(svdquant, precision) for precision in ("int4", "nvfp4")},
    **{f"GGUF {packed.name}": partial(write_ggml, packed.name) for packed in GGML_FORMATS.values()
       if packed.plain_dtype is None and packed.name not in WITHOUT_REFERENCE},
}


@pytest.mark.parametrize(("kind", "name"), [
    pytest.param(kind, name, marks=() if (row + column) % (12 if "GGUF" in name else 3) == 0
                 else pytest.mark.heavy)
    for column, kind in enumerate(HOST_TYPES)
    for row, name in enumerate([*DIFFUSION_FILES, *SOURCES])])
def test_any_file_is_saved_and_opened_by_the_host(tmp_path, kind, name):
    if name in DIFFUSION_FILES:
        path = written(name, tmp_path)[1].path
    else:
        path = tmp_path / f"model.{'gguf' if 'GGUF' in name else 'safetensors'}"
        write = SOURCES[name]
        write(path, tiny_flux()) if "GGUF" in name else write(path)
    source = source_of_file(path)
    saved = save(source, tmp_path / "a.safetensors", kind)
    values = host_values(comfy.sd.load_diffusion_model(str(saved.path)))
    assert kind in saved.types.values() and values.keys() == source.shapes.keys()
    for key, weight in source.weights.items():
        expected = weight.read(0, len(values[key]))
        packed = saved.types[key] == kind
        # blocks of random bytes have a few large values each; those of mxfp4 have few values, which
        # the one scale of float8_e4m3fn may all round far
        lost = 8 if "GGUF" in name else 1 if (kind, name) == FEW_VALUES else 0
        least = LEAST_DB[kind] - lost if packed else 45
        assert db(values[key], expected) > least, key


@each_type
def test_a_lora_is_in_the_file_and_its_share_is_told(tmp_path, kind):
    lora = lora_for(tiny_flux(), size=0.05)
    model = patched(packed_flux("Q4_K"), (lora, 0.7))
    source = source_of_model(model)
    saved = save(source, tmp_path / "a.safetensors", kind)
    share = float(saved.text.split("LoRA 1 (strength 0.7): ")[1].split("%")[0])
    assert share == pytest.approx(100, abs=8 if kind in FOUR_BITS else 2)
    weight = source.weights[BLOCK]
    expected = ROW_TYPES[kind].pack(weight.patched(0, weight.shape[0])).dequantize()
    found = open_weights(saved.path)
    assert db(host_values(comfy.sd.load_diffusion_model(str(saved.path)))[BLOCK], expected) > 15
    assert found.path == saved.path


@each_type
def test_a_file_saved_again_is_the_same_bit_for_bit(flux, tmp_path, kind):
    first = save(source_of_file(flux), tmp_path / "a.safetensors", kind)
    model = load_diffusion_model(str(first.path), host_formats=EXACT)
    of_host = comfy.sd.load_diffusion_model(str(first.path))
    assert isinstance(of_host.get_model_object(f"diffusion_model.{BLOCK}"), QuantizedTensor)
    for wanted in (kind, KEEP_TYPES):
        for number, source in enumerate((source_of_file(first.path), source_of_model(model),
                                         source_of_model(of_host))):
            assert suffix_for(source, wanted) == ".safetensors"
            again = save(source, tmp_path / f"{wanted} {number}.safetensors", wanted)
            expected, tensors = stored(first.path), stored(again.path)
            assert tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(tensors[name].view(-1).view(torch.uint8),
                                   tensor.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("mix", [mix for mix in MIXES if {*mix} <= {*HOST_TYPES}], ids="+".join)
def test_a_size_is_met_with_two_types_and_the_host_opens_the_file(flux, tmp_path, mix):
    source = source_of_file(flux)
    finest, coarsest = (plan_file(source, tmp_path / "a.safetensors", kind).nbytes for kind in mix)
    size = random.randint((3 * coarsest + finest) // 4, (coarsest + 3 * finest) // 4)
    saved = save(source, tmp_path / "a.safetensors", size, row_types=mix)
    assert 0.9 * size < saved.nbytes == saved.path.stat().st_size <= size
    assert {*mix} <= {*saved.types.values()} <= {*mix, "BF16"}
    values = host_values(comfy.sd.load_diffusion_model(str(saved.path)))
    for name, weight in source.weights.items():
        kind = saved.types[name]
        assert db(values[name], weight.read(0, len(values[name]))) > LEAST_DB.get(kind, 55), name
    with pytest.raises(PlanError, match="with the smallest types it tak"):
        save(source, tmp_path / "b.safetensors", coarsest // 2, row_types=mix)


def test_a_measured_layer_that_moves_the_output_takes_the_finer_type(tmp_path):
    source = source_of_model(packed_flux("Q8_0"))
    mix = ("int8_convrot", "nvfp4")
    packed = [name for name, kind in plan_file(source, tmp_path / "a.safetensors", mix[1]).types
              .items() if kind == mix[1]]
    moving = random.choice(packed)
    size = plan_file(source, tmp_path / "a.safetensors", mix[1]).nbytes + math.prod(
        source.shapes[moving])
    costs = {name: {"Q4_K": 1.0 if name == moving else 1e-9} for name in packed}
    sensitivity = Sensitivity(costs, {name: source.shapes[name] for name in packed}, {}, "measured")
    types = plan_file(source, tmp_path / "a.safetensors", size,
                      SaveOptions(sensitivity, row_types=mix)).types
    assert types[moving] in ("int8_convrot", "F16", "BF16")


def test_a_type_that_the_host_does_not_read_is_refused(tmp_path):
    source = source_of_model(packed_flux("Q4_K"))
    for kind in ROW_TYPES.keys() - set(HOST_TYPES):
        with pytest.raises(PlanError, match=f"^This ComfyUI does not read {kind}. Update it, or"):
            plan_file(source, tmp_path / "a.safetensors", kind)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.latent])
@pytest.mark.parametrize("kind", [pytest.param("int8_convrot", marks=pytest.mark.heavy), "nvfp4"])
def test_the_host_runs_every_family(tmp_path, monkeypatch, name, kind):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    weights = random_weights(family)
    save_file(weights, tmp_path / "model.safetensors", metadata=dict(family.metadata))
    saved = save(source_of_file(tmp_path / "model.safetensors"), tmp_path / "a.safetensors", kind)
    model = comfy.sd.load_diffusion_model(str(saved.path))
    held = host_values(model)
    packed = [key for key, type_name in saved.types.items() if type_name == kind]
    assert packed and type(model.model).__name__ == family.host_class.rpartition(".")[2]
    for key in packed:
        assert db(held[key], weights[key]) > LEAST_DB[kind] - 1, key
    exact = run_family(host_patcher(weights, family), family)
    assert relative_error(run_family(model, family), exact) < (
        0.06 if kind == "int8_convrot" else 0.2)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.heavy if name in SIBLINGS else ()) for name in ENCODERS])
@pytest.mark.parametrize("kind", ["int8_convrot", pytest.param("nvfp4", marks=pytest.mark.heavy)])
def test_the_host_loads_every_text_encoder(tmp_path, name, kind):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        weights = random_encoder(encoder)
        write_encoder(tmp_path / "encoder.gguf", encoder, weights)
        clip = load_encoder(tmp_path / "encoder.gguf", encoder)
        (source,) = source_of_encoders(clip).values()
        saved = save(with_markers(source, encoder, weights), tmp_path / "a.safetensors", kind)
        again = comfy.sd.load_clip(
            [str(saved.path)], clip_type=getattr(comfy.sd.CLIPType, encoder.clip_type.upper()),
            model_options=encoder.model_options)
        markers = encoder.markers.keys() - encoder.published(weights).keys()
        packed = sum(type_name == kind and key not in markers
                     for key, type_name in saved.types.items())
        held = [module for module in again.patcher.model.modules()
                if isinstance(getattr(module, "weight", None), QuantizedTensor)]
        assert len(held) == packed and (packed > 0) == (name not in NEVER_PACKED)
        assert ("Nothing is in" in saved.text) == (packed == 0)
        limit = (0.2 if kind == "int8_convrot" else 0.8) if packed else 0.005
        assert relative_error(hidden_states(again), hidden_states(clip)) < limit


def test_comfyui_without_the_pack_computes_files_as_its_own(flux, tmp_path):
    source = source_of_file(flux)
    files = [save(source, tmp_path / f"{kind}.safetensors", kind).path for kind in HOST_TYPES]
    shapes = {f"model.layers.0.self_attn.{name}_proj.weight": (rows, 1024)
              for name, rows in (("q", 2048), ("k", 1024), ("v", 1024))}
    shapes |= {"model.layers.0.post_attention_layernorm.weight": (1024,),
               "model.layers.0.self_attn.q_norm.weight": (128,)}
    encoder = Source({name: Weight(name, name, shape, values, lambda start, stop, values=values:
                                   values[start:stop])
                      for name, shape in shapes.items() for values in [torch.randn(shape)]})
    clip = save(encoder, tmp_path / "clip.safetensors", "mxfp8").path
    save_file(stable_diffusion(), tmp_path / "first.safetensors")
    whole = save(source_of_checkpoint_file(tmp_path / "first.safetensors"),
                 tmp_path / "whole.safetensors", "nvfp4").path
    torch.save(flux_inputs(), tmp_path / "inputs")
    script = Path(__file__).parents[2] / "support/host_alone.py"
    subprocess.run([sys.executable, script, tmp_path / "inputs", tmp_path / "out", clip, whole,
                    *files], check=True)
    outputs = torch.load(tmp_path / "out")
    assert outputs.pop("pack") == [] and outputs.pop(clip.name)["formats"] == {"", "mxfp8"}
    checkpoint = outputs.pop(whole.name)
    picture = host_alone.drawn(*comfy.sd.load_checkpoint_guess_config(str(whole))[:3])
    assert checkpoint["formats"] == {"", "nvfp4"}
    assert picture.std() > 0 and (checkpoint["drawn"] - picture).abs().max() < 1e-3
    exact = run(load_diffusion_model(str(flux)))
    for kind, out in zip(HOST_TYPES, outputs.values(), strict=True):
        settings, _ = layer_parts(ROW_TYPES[kind].pack(torch.ones(64, 256)))
        assert out["formats"] == {"", settings["format"]}
        # the first from the file that ComfyUI has saved; of weights at other addresses a CPU may
        # sum in another order
        assert all(relative(out[name], out["model"]) < 1e-6 for name in ("again", "checkpoint"))
        assert relative(out["model"], exact) < (0.2 if kind in FOUR_BITS else 0.06)


@each_type
def test_a_lora_on_a_file_of_the_same_type_arrives_as_far_as_the_type_can_hold_it(
        flux, tmp_path, kind):
    first = save(source_of_file(flux), tmp_path / "a.safetensors", kind)
    save_file(lora_for(tiny_flux(), size=0.05), tmp_path / "lora.safetensors")
    source = source_of_file(first.path, [(str(tmp_path / "lora.safetensors"), 1.0)])
    told = save(source, tmp_path / "b.safetensors", kind).text
    share = float(told.split("LoRA 1 (strength 1): ")[1].split("%")[0])
    assert 60 < share < 130 if kind in FOUR_BITS else share == pytest.approx(100, abs=2)


@each_type
def test_a_width_that_does_not_divide_stays_in_16_bits_and_is_told(tmp_path, kind):
    shapes = {"wide": (64, 256), "odd": (72, 100), "conv": (8, 16, 3, 3)}
    tensors = {f"blocks.{number}.{name}.weight": torch.randn(shape)
               for number in range(2) for name, shape in shapes.items()}
    source = Source({name: Weight(name, name, tuple(tensor.shape), tensor,
                                  lambda start, stop, tensor=tensor: tensor[start:stop].clone())
                     for name, tensor in tensors.items()})
    saved = save(source, tmp_path / "a.safetensors", kind)
    takes = ROW_TYPES[kind].takes((72, 100))
    assert [saved.types[name] for name in tensors] == [kind, kind if takes else "F16", "F16"] * 2
    if takes:  # 16 does not divide 100 columns, which are not rotated
        assert "shapes do not fit" not in saved.text
        mark = stored(saved.path)["blocks.1.odd.comfy_quant"].numpy().tobytes()
        assert b"convrot" not in mark
    else:
        assert (f"2 weights stay in 16 bits, since their shapes do not fit {kind}:"
                " blocks.0.odd.weight, blocks.1.odd.weight.") in saved.text


@pytest.mark.parametrize(("block", "expected"), [("blocks", "F32"), ("model.layers", "F16")])
def test_small_tensors_of_float32_stay_so_but_not_in_text_encoders(tmp_path, block, expected):
    """ComfyUI computes a text encoder in the dtype of its norms."""
    shapes = {f"{block}.0.self_attn.k_proj.weight": (256, 256), f"{block}.0.norm.weight": (256,)}
    source = Source({name: Weight(name, name, shape, values, lambda start, stop, values=values:
                                  values[start:stop].clone())
                     for name, shape in shapes.items() for values in [torch.randn(shape)]})
    types = save(source, tmp_path / "a.safetensors", "mxfp8").types
    assert list(types.values()) == ["mxfp8", expected]


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "nvfp4", "int8_convrot"])
def test_one_value_that_empties_rows_keeps_its_weight_plain_and_is_named(tmp_path, kind):
    rng, name, other = random.Random(kind), "blocks.0.a.weight", "blocks.0.b.weight"
    weights = {key: torch.randn(64, 256) for key in (name, other)}
    weights[name][rng.randrange(64), rng.randrange(256)] = 1e30
    source = Source({key: Weight(key, key, (64, 256), tensor,
                                 lambda start, stop, tensor=tensor: tensor[start:stop])
                     for key, tensor in weights.items()})
    saved = save(source, tmp_path / "a.safetensors", kind)
    assert saved.types == {name: "BF16", other: kind}
    assert f"{name} is BF16: its values do not fit into {kind}." in saved.text
    lost, = re.findall(r"Loss: [a-z ]+ \(([\d.]+) % of the weights\)", saved.text)
    assert float(lost) > 0.1
    assert torch.equal(stored(saved.path)[name], weights[name].bfloat16())


@each_type
def test_values_that_a_type_cannot_hold_are_in_another_within_the_size(tmp_path, kind):
    name = "blocks.0.a.weight"
    for size in (1e-41, 1e-24, 1e20, 1e30, 3e38):
        tensor = torch.randn(64, 256).clamp(-1, 1) * size
        source = Source({name: Weight(name, name, (64, 256), tensor,
                                      lambda start, stop, tensor=tensor: tensor[start:stop])})
        for wanted, options in ((kind, {}), (40_000, {"row_types": (kind,)})):
            try:
                saved = save(source, tmp_path / f"{size} {wanted}.safetensors", wanted, **options)
            except SaveError as error:
                assert wanted != kind and re.search(
                    f"'{name}' do not fit into .* in F32 the file takes", str(error))
                continue
            file = open_weights(saved.path)
            values = as_tensors(file, read_marked(file))[name]
            values = values.dequantize() if is_packed(values) else values
            assert relative(values.double(), tensor.double()) < 0.15
            is_told = f"{name} is {saved.types[name]}: its values do not fit into" in saved.text
            assert wanted != kind or is_told == (saved.types[name] != kind)
            assert wanted == kind or saved.path.stat().st_size <= wanted


@each_type
def test_a_weight_of_several_slices_is_the_one_that_is_packed_at_once(
        flux, tmp_path, monkeypatch, kind):
    save_file(lora_for(tiny_flux(), size=0.1), tmp_path / "lora.safetensors")
    loras = [(str(tmp_path / "lora.safetensors"), 1.0)]
    source = source_of_file(flux, loras)
    texts = []
    for name, limit in (("whole", packing.SLICE_VALUES), ("sliced", 20_000)):
        monkeypatch.setattr(packing, "SLICE_VALUES", limit)
        torch.manual_seed(0)
        texts.append(save(source, tmp_path / f"{name}.safetensors", kind).text.splitlines()[2:])
    whole, sliced = (stored(tmp_path / f"{name}.safetensors") for name in ("whole", "sliced"))
    assert texts[0] == texts[1] and sliced.keys() == whole.keys()
    for name in [name for name in whole if f"{name.rpartition('.')[0]}.comfy_quant" in whole]:
        if not name.endswith("bias"):
            assert torch.equal(sliced[name].view(-1).view(torch.uint8),
                               whole[name].view(-1).view(torch.uint8)), name


def test_side_models_are_refused(tmp_path):
    kind = random.choice(HOST_TYPES)
    save_file(dict(flux_bfl()), tmp_path / "net.safetensors")
    with pytest.raises(PlanError, match=f"^ComfyUI reads {kind} in diffusion models and text enc"):
        plan_file(source_of_file(tmp_path / "net.safetensors"), tmp_path / "a.safetensors", kind)


def test_the_rules_are_those_of_the_tools():
    """convert_to_quant 1.3.4, `constants.py`: names that its filters leave."""
    for name, exact, packed in (
        ("ltxv", ["transformer_blocks.0.ff.net.0.proj", "transformer_blocks.46.attn1.to_q",
                  "transformer_blocks.20.attn1.to_gate_logits"], "transformer_blocks.2.attn1.to_q"),
        ("lumina2", ["layers.0.adaLN_modulation.0"], "layers.0.attention.qkv"),
        ("qwen_image", ["transformer_blocks.0.img_mod.1"], "transformer_blocks.1.img_mod.1"),
        ("cosmos", ["blocks.0.mlp.layer1", "blocks.1.adaln_modulation_mlp.1"],
         "blocks.1.mlp.layer1"),
        ("lens", ["transformer_blocks.3.img_mod.1", "transformer_blocks.3.txt_mod.1"],
         "transformer_blocks.0.attn.img_qkv"),
        ("omnigen2", ["time_caption_embed.caption_embedder.1", "layers.0.norm1.linear"],
         "layers.0.attn.to_q"),
        ("text encoder", ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj",
                          "model.layers.1.linear_attn.in_proj_a", "visual.blocks.0.a"],
         "model.layers.1.linear_attn.in_proj_qkv"),
        ("general", ["txtfusion.layers.0.a", "tmlp.0", "token_refiner.0.a"], "blocks.0.a"),
    ):
        known = [family.packing for family in KNOWN_FAMILIES if family.packing]
        rules = next(rules for rules in (*known, GENERAL_RULES) if rules.name == name)
        shapes = {f"{layer}.weight": (512, 512) for layer in (*exact, packed)}
        shapes |= {f"transformer_blocks.{number}.x": (1,) for number in range(48)}
        assert rules.row_names(shapes, "nvfp4") == [f"{packed}.weight"], name


@pytest.mark.skipif("convrot_w4a4" not in HOST_TYPES, reason="this ComfyUI does not read it")
@pytest.mark.parametrize("product", ["int8", "int4"])
def test_convrot_w4a4_is_nearer_than_comfyuis_own_and_says_what_its_inputs_are_rounded_to(
        product, tmp_path):
    rows, columns = random.randint(1, 40) * 8, random.choice([256, 3072, 64 * 5])
    name = "double_blocks.0.img_mlp.0.weight"
    values = torch.randn(rows, columns)
    save_file({name: values}, tmp_path / "a.safetensors")
    weight = Weight(name, name, (rows, columns), values, lambda start, stop: values[start:stop])
    plan = plan_file(Source({name: weight}), tmp_path / "b.safetensors", "convrot_w4a4",
                     SaveOptions(is_int4_product=product == "int4"))
    written = stored(packing.save(plan).path)
    mark = json.loads(bytes(written[name.replace("weight", "comfy_quant")].tolist()))
    group = mark.pop("convrot_groupsize")
    assert mark == {"format": "convrot_w4a4"} | (
        {"linear_dtype": "int8"} if product == "int8" else {})  # int4 is what ComfyUI takes else
    parts = written[name], written[f"{name}_scale"]
    by_kitchen = kitchen.quantize_convrot_w4a4_weight(values, group)
    assert [part.dtype for part in parts] == [part.dtype for part in by_kitchen]
    assert [part.shape for part in parts] == [part.shape for part in by_kitchen]
    read = kitchen.dequantize_convrot_w4a4_weight(*parts, group)
    plain = kitchen.dequantize_convrot_w4a4_weight(*by_kitchen, group)
    assert db(read, values) - db(plain, values) > (2.5 if columns == 3072 else 1)
    own = as_tensors(open_weights(plan.path), read_marked(open_weights(plan.path)))[name]
    assert db(own.dequantize(), read) > 100
    inputs = torch.randn(64, columns)
    out = kitchen.convrot_w4a4_linear(inputs, *parts, convrot_groupsize=group, linear_dtype=product)
    assert 0.08 < relative(out, inputs @ read.T) < 0.2  # on a CPU of 4 bits in both cases
