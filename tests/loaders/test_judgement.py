"""What a file holds is judged once: each fault is named or refused, whoever reads the file and
whatever it becomes, and no writer is blamed who did not write it."""
import json
import random
import re

import comfy.sd
import pytest
import torch
from checkpoint_parts import MODEL
from controlnets import flux_bfl
from encoders import ENCODERS
from encoders.encoder import load_encoder, random_weights
from host_formats import HOST_FORMATS, in_host_format, mark_of
from marked_flux import flux_in, weight_error, write
from pack_api import (
    WeightFileError,
    load_checkpoint,
    load_diffusion_model,
    load_notes,
    load_text_encoder,
    source_of_file,
)
from patched_models import flux_inputs, run, tiny_flux
from published_forms import of_black_forest_labs, plain_fp8
from quantizer_models import write_quantized_flux
from quantizer_writers import svdquant
from safetensors.torch import save_file
from saving import save
from small_encoders import encode, t5_file

from featherweight.loaders.comfyui import finite_output
from featherweight.loaders.comfyui.load_check import patcher_of
from featherweight.loaders.inspect import inspect
from featherweight.loaders.inspect.inspection_text import inspection_text
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.models.pack_model import pack_model
from featherweight.loaders.models.pack_on_load import LOAD_TYPES
from featherweight.loaders.refusals.read_anyway import VARIABLE

pytestmark = pytest.mark.usefixtures("small_models")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OTHER_WRITERS = re.compile("transformers|ModelOpt|Black Forest|LightX2V|bitsandbytes|SDNQ|GPTQ")
SETTINGS = "_quantization_metadata"
NAMED = "{layer}"  # stands for the layer that a fault is in


def matrices(weights) -> list[str]:
    """Names of the matrices whose layers a quantizer takes."""
    return [name for name, weight in weights.items() if weight.ndim == 2
            and re.search(r"_blocks\.|block\.0\.\S+DenseReluDense", name)]


class Faulty:
    """A file's tensors with a fault.

    Attributes:
        tensors, metadata: of the file.
        layers: those with the fault.
    """

    def __init__(self, weights):
        dtype = random.choice([torch.bfloat16, torch.float16, torch.float32])
        self.tensors = {name: weight.to(dtype) for name, weight in weights.items()}
        self.weights, self.metadata, self.layers = weights, {}, []
        names = matrices(weights)
        self.drawn = random.choice([names, [random.choice(names)]])

    def put(self, name: str, weight: torch.Tensor):
        self.tensors[name] = weight.contiguous()
        self.layers.append(name.removesuffix(".weight"))

    def put_all_in(self, format_name: str, **settings) -> dict[str, dict]:
        """Puts matrices into a format of ComfyUI's; returns their settings, which stay apart."""
        layers = {}
        for name in matrices(self.weights):
            parts, _ = in_host_format(name, self.weights[name].float(), format_name, **settings)
            layer = name.removesuffix(".weight")
            layers[layer] = json.loads(bytes(parts.pop(f"{layer}.comfy_quant").tolist()))
            self.put(name, parts.pop(name))
            self.tensors |= parts
        return layers


def codes_without_scales(file: Faulty):
    put_codes(file, random.choice([E4M3, E5M2]))


def bytes_without_scales(file: Faulty):
    put_codes(file, random.choice([torch.int8, torch.uint8]))


def put_codes(file: Faulty, kind: torch.dtype):
    most = 127 if kind in (torch.int8, torch.uint8) else torch.finfo(kind).max
    for name in file.drawn:
        weight = file.weights[name].float()
        weight = weight.abs() if kind == torch.uint8 else weight
        file.put(name, (weight / weight.abs().max() * most).to(kind))


def codes_as_floats(file: Faulty):
    for name in file.drawn:
        weight = file.weights[name].float()
        file.put(name, (weight / weight.abs().max() * 448).to(E4M3).to(
            random.choice([torch.bfloat16, torch.float32])))


def whole_numbers(file: Faulty):
    name = random.choice(file.drawn)
    whole = (file.weights[name] * 1000).clamp(-200, 200)
    file.put(name, whole.to(random.choice([torch.int32, torch.int64])))


def scales_that_are_not_finite(file: Faulty):
    layers = file.put_all_in(random.choice(["float8_e4m3fn", "int8_tensorwise"]))
    layer = random.choice(list(layers))
    file.layers = [layer]
    scale = file.tensors[f"{layer}.weight_scale"].clone()
    scale.view(-1)[-1] = random.choice([float("nan"), float("inf")])
    file.tensors[f"{layer}.weight_scale"] = scale
    file.tensors |= {f"{name}.comfy_quant": mark_of(given) for name, given in layers.items()}


def contradiction(file: Faulty):
    layers = file.put_all_in("int8_tensorwise", **random.choice([{}, {"convrot": True}]))
    layer = random.choice(list(layers))
    file.layers = [layer]
    file.tensors |= {f"{name}.comfy_quant": mark_of(given) for name, given in layers.items()}
    layers[layer] = random.choice([
        {"format": "float8_e4m3fn"},
        {"format": "int8_tensorwise", "convrot": "convrot" not in layers[layer]}])
    file.metadata[SETTINGS] = json.dumps({"layers": layers})


def nvfp4_without_marks(file: Faulty):
    file.put_all_in("nvfp4")


def rotation_under_other_names(file: Faulty):
    layers = file.put_all_in("int8_tensorwise", convrot=True)
    file.metadata = random.choice([
        {SETTINGS: json.dumps({"layers": {f"other.{layer}x": each
                                          for layer, each in layers.items()}})},
        {"convrot": "true"}, {"recipe": json.dumps({"rotation": "hadamard", "steps": 4})}])


def int8_without_marks(file: Faulty):
    file.put_all_in("int8_tensorwise", **random.choice([{}, {"convrot": True}]))


def zeros(file: Faulty):
    name = random.choice(file.drawn)
    file.put(name, torch.zeros_like(file.tensors[name]))


REFUSED = {
    codes_without_scales: rf"'{NAMED}.weight' holds codes without their scales",
    bytes_without_scales: rf"'{NAMED}.weight' holds codes without their scales",
    codes_as_floats: rf"'{NAMED}.weight' holds codes without their scales",
    whole_numbers: rf"'{NAMED}.weight' is int\d+ .*expected floats",
    scales_that_are_not_finite: rf"'{NAMED}.weight_scale' is not finite",
    contradiction: rf"'{NAMED}.weight' is in .* by its metadata and in .* by its comfy_quant",
    nvfp4_without_marks: rf"'{NAMED}' is in nvfp4 without its comfy_quant",
    rotation_under_other_names: rf"'{NAMED}' has no comfy_quant, and the metadata says",
}
TOLD = {
    int8_without_marks: rf"'{NAMED}'.* no comfy_quant and no other mark, and (is|are) read as int8"
                        " that is not rotated. If images are noise, the file has lost its header",
    zeros: rf"'{NAMED}.weight'.* holds? nothing but zeros",
}
# what a file of torch, whose marks ComfyUI does not read, and a model in memory still show
OF_VALUES = (codes_without_scales, bytes_without_scales, codes_as_floats, whole_numbers, zeros)


def written(path, weights, fault, prefix: str = "") -> Faulty:
    file = Faulty(weights)
    fault(file)
    tensors = {f"{prefix}{name}": weight for name, weight in file.tensors.items()}
    file.metadata = {key: text.replace('"layers": {', '"layers": {') for key, text in
                     file.metadata.items()}
    if prefix and SETTINGS in file.metadata:
        layers = json.loads(file.metadata[SETTINGS])["layers"]
        file.metadata[SETTINGS] = json.dumps(
            {"layers": {f"{prefix}{layer}": each for layer, each in layers.items()}})
    file.layers = [f"{prefix}{layer}" for layer in file.layers]
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, file.metadata or None)
    return file


def notes_of(part) -> str:
    return " ".join(load_notes(patcher_of(part)))


def packed(path) -> str:
    return notes_of(load_diffusion_model(str(path), pack_to=random.choice(LOAD_TYPES)))


def inspected(path) -> str:
    inspection, = inspect(path)
    return inspection_text(inspection)


def saved(path) -> str:
    source = source_of_file(path)
    save(source, path.with_name("saved.gguf"), "Q8_0")
    return " ".join(source.notes)


def with_pack_model(path) -> str:
    model = comfy.sd.load_diffusion_model(str(path))
    return notes_of(pack_model(model, random.choice(["Q8_0", "NF4"])))


PATHS = {  # name -> (which files, what loads them and returns what is told)
    "as it is": ("model", lambda path: notes_of(load_diffusion_model(str(path)))),
    "packed": ("model", packed), "inspect": ("model", inspected), "save": ("model", saved),
    "checkpoint": ("checkpoint", lambda path: notes_of(load_checkpoint(
        str(path), output_clip=False, output_vae=False,
        pack_to=random.choice([None, "Q8_0"]))[0])),
    "encoder": ("encoder", lambda path: notes_of(load_text_encoder(
        [str(path)], "sd3", model_options=t5_file("Q8_0", 1, 256)[2]))),
    "packed encoder": ("encoder", lambda path: notes_of(load_text_encoder(
        [str(path)], "sd3", model_options=t5_file("Q8_0", 1, 256)[2], pack_to="Q8_0"))),
    ".pt": (".pt", lambda path: notes_of(load_diffusion_model(str(path)))),
    "Pack Model": ("model", with_pack_model),
}


def weights_of(kind: str):
    if kind != "encoder":
        return tiny_flux()
    markers = {name: torch.zeros(shape) for name, shape in ENCODERS["t5-xxl"].markers.items()}
    return t5_file("Q8_0", 1, 256)[1] | markers


@pytest.mark.parametrize("path_name", PATHS)
@pytest.mark.parametrize("fault", [*REFUSED, *TOLD], ids=lambda fault: fault.__name__)
def test_a_fault_is_refused_or_named_on_every_path(fault, path_name, tmp_path):
    if fault is nvfp4_without_marks and "nvfp4" not in HOST_FORMATS:
        pytest.skip("ComfyUI 0.4 has no nvfp4")
    if path_name in (".pt", "Pack Model") and fault not in OF_VALUES:
        pytest.skip("ComfyUI's own loader has dropped the marks and scales")
    kind, load = PATHS[path_name]
    path = tmp_path / ("a.pt" if kind == ".pt" else "a.safetensors")
    file = written(path, weights_of(kind), fault, MODEL if kind == "checkpoint" else "")
    try:
        text, is_refused = load(path), False
    except WeightFileError as error:
        text, is_refused = str(error), True
    inside = "|".join(map(re.escape, file.layers)).replace(re.escape(MODEL), "(?:.*)")
    pattern = (REFUSED | TOLD)[fault].replace(NAMED, f"(?:{inside})")
    if path_name == "Pack Model" and fault is whole_numbers:  # ComfyUI has made floats of them
        pattern = "holds codes without their scales"
    assert re.search(pattern, text), text
    assert not OTHER_WRITERS.search(text), text
    assert is_refused == (fault in REFUSED and path_name != "inspect"), text


@pytest.mark.parametrize("path_name", ["as it is", "checkpoint", "encoder", ".pt"])
def test_weights_that_are_not_finite_are_named_by_the_first_step(path_name, tmp_path, monkeypatch):
    kind = PATHS[path_name][0]
    weights, prefix = weights_of(kind), MODEL if kind == "checkpoint" else ""
    name = random.choice(matrices(weights))
    weights = {key: weight.clone() for key, weight in weights.items()}
    weights[name].view(-1)[-1] = random.choice([float("nan"), float("inf")])
    path = tmp_path / ("a.pt" if kind == ".pt" else "a.safetensors")
    tensors = {f"{prefix}{key}": weight for key, weight in weights.items()}
    torch.save(tensors, path) if kind == ".pt" else save_file(tensors, path)
    if kind == "encoder":
        loaded = load_text_encoder([str(path)], "sd3", model_options=t5_file("Q8_0", 1, 256)[2])
        step = encode
    else:
        load = load_checkpoint if kind == "checkpoint" else load_diffusion_model
        loaded, step = load(str(path)), run
        loaded = loaded[0] if kind == "checkpoint" else loaded
    with pytest.raises(WeightFileError, match=f"^{path.name}: '{re.escape(name)}' has values that"
                                              " are not finite, so the output of the model is not"):
        step(loaded)
    monkeypatch.setenv(VARIABLE, "1")
    assert not step(loaded).isfinite().all()


def test_a_step_of_good_weights_whose_input_is_not_finite_blames_no_file(tmp_path, monkeypatch):
    save_file(tiny_flux(), tmp_path / "a.safetensors")
    patcher = load_diffusion_model(str(tmp_path / "a.safetensors"))
    inputs = flux_inputs() | {"x": torch.full((1, 16, 8, 8), float("nan"))}
    looks = []
    monkeypatch.setattr(finite_output, "_patched_weights", lambda module: looks.append(1) or {})
    for _ in range(3):
        assert run(patcher, inputs).isnan().any()
    assert len(looks) == 1  # all weights are read, once


def test_the_owner_can_load_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    for fault in (codes_without_scales, nvfp4_without_marks, rotation_under_other_names):
        path = tmp_path / f"{fault.__name__}.safetensors"
        written(path, tiny_flux(), fault)
        load_diffusion_model(str(path), pack_to=random.choice([None, "Q8_0"]))


def of_modelopt(weights):
    """Scales in rows without a mark, as ModelOpt writes a file for ComfyUI's names."""
    tensors = {name: weight.bfloat16() for name, weight in weights.items()}
    for name in matrices(weights):
        layer = name.removesuffix(".weight")
        parts, _ = svdquant(weights[name].float(), smoothed=False)
        tensors |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()
                    if not part.startswith("svdquant")}
    return tensors


GOOD = {
    "plain fp8 of small values": lambda: plain_fp8(tiny_flux(), random).tensors,
    "F16 norms": lambda: {name: weight.half() for name, weight in tiny_flux().items()},
    "nvfp4 of Black Forest Labs": lambda: of_black_forest_labs("nvfp4")(
        tiny_flux(), random).tensors,
    "nvfp4 of ModelOpt": lambda: of_modelopt(tiny_flux()),
    "fp8 of Black Forest Labs": lambda: of_black_forest_labs("fp8")(tiny_flux(), random).tensors,
}


@pytest.mark.parametrize("pack_to", [None, "Q8_0"])
@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_loads_without_a_note(name, pack_to, tmp_path):
    save_file(GOOD[name](), tmp_path / "a.safetensors")
    assert notes_of(load_diffusion_model(str(tmp_path / "a.safetensors"), pack_to=pack_to)) == ""


@pytest.mark.parametrize("family", ["modelopt svdquant", "compressed-tensors nvfp4"])
def test_a_good_folder_loads_without_a_note(family, tmp_path):
    write_quantized_flux(tmp_path / "transformer", family)
    assert notes_of(load_diffusion_model(str(tmp_path / "transformer"))) == ""


def test_a_table_of_positions_may_be_zeros_and_whole_numbers_beside_it(tmp_path):
    encoder, table = ENCODERS["clip-l"], "text_model.embeddings.position_embedding.weight"
    weights = random_weights(encoder)
    weights |= {table: torch.zeros_like(weights[table]),
                "text_model.embeddings.position_ids": torch.arange(len(weights[table]))[None]}
    save_file(weights, tmp_path / "a.safetensors")
    assert notes_of(load_encoder(tmp_path / "a.safetensors", encoder)) == ""


def test_a_controlnet_whose_convolutions_are_still_zeros_loads_without_a_note(tmp_path):
    weights = {name: torch.zeros_like(weight) if "controlnet_blocks" in name else weight
               for name, weight in flux_bfl().items()}
    assert any(not weight.any() for weight in weights.values())
    save_file(weights, tmp_path / "a.safetensors")
    assert notes_of(load_controlnet(str(tmp_path / "a.safetensors"))) == ""


@pytest.mark.parametrize("pack_to", [None, "Q8_0"])
@pytest.mark.parametrize("place", ["marks", "metadata"])
def test_a_boolean_of_a_mark_may_be_a_text(place, pack_to, tmp_path):
    for group in (0, 64):
        stored, settings, values = flux_in("int8_tensorwise", group)
        for given in settings.values():
            given["convrot"] = random.choice(["true", "True"] if group else ["false", "False"])
        path = write(tmp_path / f"{group}.safetensors", stored, **{
            "layers" if place == "metadata" else "marks": settings})
        assert weight_error(load_diffusion_model(path, pack_to=pack_to), values) < (
            0.02 if pack_to else 1e-5)


def with_map(path, change=lambda scales: scales) -> dict[str, torch.Tensor]:
    """Writes a Flux as HunyuanVideo's fp8 is, and its scales; returns its values."""
    values = {name: weight.bfloat16() for name, weight in tiny_flux().items()}
    tensors, scales = dict(values), {}
    for name in matrices(values):
        scale = values[name].float().abs().max() / 448
        tensors[name] = (values[name].float() / scale).to(E4M3)
        values[name] = tensors[name].float() * scale
        scales[name.removesuffix(".weight")] = scale
    torch.save({"module": change(scales)}, path.with_name(f"{path.stem}_map.pt"))
    if path.suffix == ".pt":
        torch.save({"module": tensors}, path)
    else:
        save_file(tensors, path)
    return {name: value.float() for name, value in values.items()}


@pytest.mark.parametrize("pack_to", [None, "Q8_0"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_scales_in_a_file_next_to_their_codes_are_read(suffix, pack_to, tmp_path):
    values = with_map(tmp_path / f"a{suffix}")
    patcher = load_diffusion_model(str(tmp_path / f"a{suffix}"), pack_to=pack_to)
    assert weight_error(patcher, values) < (0.02 if pack_to else 1e-5)


@pytest.mark.parametrize("change", [
    lambda scales: scales | {"other": torch.ones(())},
    lambda scales: dict(list(scales.items())[1:]),
    lambda scales: dict.fromkeys(scales, torch.ones(2)),
    lambda scales: dict.fromkeys(scales, float("nan"))], ids=["more", "fewer", "two", "nan"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_scales_next_to_codes_that_are_not_theirs_are_not_used_and_named(change, suffix, tmp_path):
    with_map(tmp_path / f"a{suffix}", change)
    with pytest.raises(WeightFileError, match="holds codes without their scales, and so do .*, and"
                                              " a_map.pt next to it is not used: it"):
        load_diffusion_model(str(tmp_path / f"a{suffix}"))
