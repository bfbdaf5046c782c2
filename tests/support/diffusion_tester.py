"""The forms in which diffusion models are published, each with a writer and the families of
`families` that are written so, and the tests of models in them."""
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.sd
import gguf
import mflux_models
import nunchaku_models
import nunchaku_writer
import pytest
import quantizer_models
import torch
from diffusers_names import wan_names, wan_shapes
from families import (
    FAMILIES,
    host_patcher,
    random_weights,
    relative_error,
    run,
    shrunken_detection,
    stable_diffusion_cpp_style,
)
from hooked import run_hooked, run_loaded
from model_table import MODELS, NEWEST
from model_tester import ModelTester, quantized_layers
from pack_api import (
    FORMATS,
    GGML_FORMATS,
    PackedLayer,
    is_packed,
    load_diffusion_model,
    load_notes,
    memory_summary,
    open_weights,
    packed_tensors,
)
from packed_files import (
    in_shards,
    write_bitsandbytes,
    write_ggml,
    write_host_format,
    write_sdnq,
)
from patched_models import LIMIT, error_by_effect, lora_for, patched
from quantizer_writers import gptq, quantized_state_dict
from safetensors.torch import load, save_file
from sdnq_writer import H4, write_folder

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.contents import file_contents
from featherweight.loaders.inspect.identify import identify
from featherweight.ops.formats.comfy_quant import ROTATION

PREFIX = "model.diffusion_model."
SAMPLING_TABLES = 1 << 16  # most bytes of what the host counts as part of the model
Writer = Callable[[Path, str], dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of files.

    write: (path, family) -> values that a reader must get, in the host's names. file: name of the
    file or folder. families: that are tried in it; more: those that take long. packs: (name,
    matrix) -> whether it is packed. told: types that a reader names. held: the most bytes in memory
    for one in the file.
    """

    write: Writer
    file: str
    families: tuple[str, ...]
    more: tuple[str, ...] = ()
    packs: Callable[[str, torch.Tensor], bool] = lambda name, matrix: matrix.shape[1] % 32 == 0
    kernels: bool = False
    told: tuple[str, ...] = ()
    held: float = 1.05


def in_host_names(write: Callable) -> Writer:
    """With a writer of weights, and what the family's file has to say beside them."""
    def written(path: Path, name: str):
        metadata = dict(FAMILIES[name].metadata)
        options = {"metadata": metadata} if path.suffix == ".gguf" else {}
        weights = random_weights(FAMILIES[name])
        values = write(path, weights, **options)
        if metadata and not options:
            file = next(path.glob("*.safetensors"), path)
            save_file(load(file.read_bytes()), file, metadata)
        return {key: torch.as_tensor(value).float().view(weights[key].shape)
                for key, value in values.items()}
    return written


def in_diffusers(write: Callable) -> Writer:
    """The same in the names of diffusers."""
    def written(path: Path, name: str):
        weights = nunchaku_models.weights_of(name)
        return nunchaku_models.in_host_names(
            name, write(path, {key: value.contiguous() for key, value in weights.items()}))
    return written


def as_in_ggml(values: torch.Tensor) -> torch.Tensor:
    """The shape in which a C program keeps a tensor: four dimensions, without leading ones."""
    values = values.flatten(0, 1) if values.ndim == 5 else values
    while values.ndim > 1 and len(values) == 1:
        values = values[0]
    return values


def write_cpp(packed_type: str, path, weights, **options):
    seen = write_gguf(path, {PREFIX + key: as_in_ggml(values) for key, values in weights.items()},
                      **stable_diffusion_cpp_style(packed_type), **options)
    return {key.removeprefix(PREFIX): values for key, values in seen.items()}


def of_nunchaku(precision: str, change=lambda model: None, **options) -> Writer:
    def written(path: Path, name: str):
        model = nunchaku_models.quantized(name, precision, **options)
        nunchaku_writer.write(path, model)
        return nunchaku_models.in_host_names(name, model.values)
    return written


def with_biases_of_zeros(path: Path, name: str):
    """Which the model does not have."""
    model = nunchaku_models.quantized(name, "int4")
    zeros = {key.replace("qweight", "bias"): torch.zeros(len(value), dtype=torch.bfloat16)
             for key, value in model.tensors.items() if key.endswith(".qweight")}
    save_file(model.tensors | zeros, path)
    return nunchaku_models.in_host_names(name, model.values)


def in_two_files(path: Path, name: str):
    model = nunchaku_models.quantized(name, "int4", is_first_version=True)
    blocks = {key: tensor for key, tensor in model.tensors.items() if "blocks." in key}
    others = {key: tensor for key, tensor in model.tensors.items() if key not in blocks}
    path.mkdir()
    save_file(blocks, path / "transformer_blocks.safetensors")
    save_file(others, path / "unquantized_layers.safetensors")
    (path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    (path / "comfy_config.json").write_text("{}")
    return nunchaku_models.in_host_names(name, model.values)


def of_nunchaku_lite(path: Path, name: str):
    """Its modulations are in order and nothing is fused, added or shifted."""
    weights = nunchaku_models.weights_of(name)
    linear = [key.removesuffix(".weight") for key, tensor in weights.items()
              if tensor.ndim == 2 and key.endswith(".weight") and "blocks." in key]
    modulations = [layer for layer in linear if "norm" in layer or "_mod" in layer]
    targets = [layer for layer in linear if layer not in modulations]
    model = nunchaku_writer.lite(weights, targets, modulations)
    path.mkdir()
    save_file(model.tensors, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": {
        "quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "int4", "targets": targets}}}))
    return nunchaku_models.in_host_names(name, model.values)


WAN_SHAPES = {"wan2.1-t2v": {"columns": 16},
              "wan2.1-i2v": {"image_dim": 1280, "added_kv_proj_dim": 256}}


def of_auto_round(path: Path, name: str):
    """Wan in diffusers' names, whose attention is quantized."""
    names = wan_names(wan_shapes(**WAN_SHAPES[name]))
    stored, values = quantized_state_dict(
        {names[key]: value for key, value in random_weights(FAMILIES[name]).items()},
        functools.partial(gptq, symmetric=True), lambda key: ".attn" not in key)
    path.mkdir()
    save_file(stored, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps({
        "_class_name": "WanTransformer3DModel",
        "quantization_config": {"quant_method": "auto-round"}}))
    return {key: values[names[key]] for key in names}


RUN = tuple(name for name, family in FAMILIES.items() if family.latent)
# The types that gguf's reference can dequantize.
GGML = [packed.name for number, packed in GGML_FORMATS.items()
        if number in gguf.quants._type_traits]
FLUX = "flux-schnell"
OF_FLUX = {"_class_name": "FluxTransformer2DModel",
           "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
BITSANDBYTES = {
    "NF4": {}, "NF4 double-quantized": {"nested": True}, "FP4": {"quant_type": "fp4"},
    "NF4 stored as bf16 in blocks of 128": {"storage": torch.bfloat16, "block_length": 128},
    "FP4 double-quantized, prefix": {"quant_type": "fp4", "nested": True, "prefix": PREFIX},
}
ROTATED = {"settings": {"use_hadamard": True, "hadamard_group_size": 64}, "rotated": (64, H4)}
SDNQ = {
    "uint4 svd": {"name": "uint4", "rank": 16, "group": 64},
    "int8": {"name": "int8"},
    "int8 transposed": {"name": "int8", "transposed": True, "rank": 4,
                        "settings": {"use_quantized_matmul": True}},
    "uint4 rotated": {"name": "uint4", "group": 64, **ROTATED},
    "int5 svd rotated": {"name": "int5", "rank": 8, **ROTATED},
    "uint4 half": {"name": "uint4", "group": 64, "scale_dtype": torch.bfloat16},
}


def in_64s(name: str, matrix: torch.Tensor) -> bool:
    return matrix.ndim == 2 and all(size % 64 == 0 for size in matrix.shape)


def in_32s(name: str, matrix: torch.Tensor) -> bool:
    return matrix.ndim in (2, 4) and matrix.shape[1] % 32 == 0


def in_blocks(name: str, matrix: torch.Tensor) -> bool:
    return ("block" in name or "layers." in name) and "adaLN" not in name


def in_attention(name: str, matrix: torch.Tensor) -> bool:
    return "_attn." in name


def in_any_shape(name: str, matrix: torch.Tensor) -> bool:
    return True


def depends(name: str, matrix: torch.Tensor) -> bool:
    """For forms of which a test of the file's own entries says it."""
    return False


FORMS = {
    **{f"GGUF {name} of stable-diffusion.cpp": Form(
        in_host_names(functools.partial(write_cpp, name)), "model.gguf",
        RUN if name == "Q4_0" else (FLUX,), packs=depends) for name in GGML},
    **{name: Form(in_host_names(functools.partial(write_bitsandbytes, "write_bnb", **options)),
                  "model.safetensors", (FLUX,), packs=in_any_shape, told=(name[:3],),
                  held=1.25 if "double" in name else 1.05)
       for name, options in BITSANDBYTES.items()},
    **{f"{name} in three files of diffusers": Form(
        in_diffusers(in_shards(functools.partial(
            write_bitsandbytes, "write_bnb", **BITSANDBYTES[name]), 3, OF_FLUX)),
        "transformer", (family,), packs=in_any_shape, held=1.25 if "double" in name else 1.05)
       for family, name in (("flux-dev", "NF4 double-quantized"), ("flux2", "NF4"),
                            ("sd3.5", "FP4"))},
    **{f"bitsandbytes' int8{prefix}": Form(
        in_host_names(functools.partial(write_bitsandbytes, "write_bnb_int8", prefix=prefix)),
        "model.safetensors", (FLUX,), packs=in_any_shape) for prefix in ("", PREFIX)},
    "bitsandbytes' int8 in diffusers' names": Form(
        in_diffusers(functools.partial(write_bitsandbytes, "write_bnb_int8")),
        "model.safetensors", ("flux-dev",), packs=in_any_shape),
    **{f"SDNQ {name}": Form(
        in_diffusers(functools.partial(write_folder, is_chosen=in_64s, **options)), "transformer",
        ("flux-dev", *{"uint4 svd": ["qwen-image"], "int8 transposed": ["z-image"]}.get(name, ())),
        packs=in_64s, told=(f"SDNQ {options['name']}",)) for name, options in SDNQ.items()},
    **{f"SDNQ {name} with convolutions": Form(
        in_host_names(functools.partial(
            write_folder, name=name.partition(" ")[0], is_chosen=in_32s, **options)),
        "transformer", ("sd1.5",), packs=in_32s, kernels=True)
       for name, options in {
           "uint4 svd": {"rank": 16},
           "uint4 rotated": {  # groups are of channels, all of which 32 divides
               "settings": {"use_hadamard": True, "hadamard_group_size": 16},
               "rotated": (16, H4)}}.items()},
    **{f"mflux {bits} bits": Form(
        lambda path, name, bits=bits: mflux_models.write_folder(name, path, bits), "transformer",
        tuple(families), packs=lambda name, matrix: matrix.shape[1] % 64 == 0,
        told=(f"MLX int{bits}",))
       for bits, families in ((4, mflux_models.NAMES), (3, ["flux-dev"]), (5, ["z-image"]),
                              (6, ["qwen-image"]), (8, ["krea2"]))},
    **{f"SVDQuant {precision}": Form(
        of_nunchaku(precision), "model.safetensors", tuple(nunchaku_writer.WRITERS),
        packs=in_blocks, told=(f"SVDQuant {precision}, rank 16",))
       for precision in ("int4", "nvfp4")},
    "SVDQuant in float16, by its first names": Form(
        of_nunchaku("int4", is_first_version=True, dtype=torch.float16), "model.safetensors",
        ("flux-dev",), packs=in_blocks),
    "SVDQuant with plain refiners": Form(
        of_nunchaku("int4", skip_refiners=True), "model.safetensors", ("z-image",),
        packs=lambda name, matrix: name.startswith("layers.") and in_blocks(name, matrix)),
    "SVDQuant with biases of zeros": Form(
        with_biases_of_zeros, "model.safetensors", ("z-image",), packs=in_blocks),
    "SVDQuant in two files": Form(in_two_files, "transformer", ("flux-dev",), packs=in_blocks),
    "Nunchaku lite": Form(of_nunchaku_lite, "transformer", ("flux-dev", "qwen-image"),
                          packs=in_blocks),
    **{name: Form(lambda path, _, name=name: quantizer_models.write_quantized_flux(path, name),
                  "transformer", (FLUX,), packs=in_blocks, held=1.06)
       for name in quantizer_models.QUANTIZED_MODELS},
    "auto-round of Wan": Form(of_auto_round, "transformer", tuple(WAN_SHAPES), packs=in_attention),
}
ROUNDED = 1e-6  # torch's own products, of weights that lie elsewhere in memory
# one for each reader
SOME_FORMS = ("GGUF Q4_K of stable-diffusion.cpp", "bitsandbytes' int8", "SDNQ uint4 svd",
              "mflux 4 bits", "SVDQuant int4", "SVDQuant in two files", "gptq", "fp8",
              "torchao int8", "NF4 in three files of diffusers")
# those that each model of `model_table` is tried in
MODEL_FORMS = {
    name: Form(in_host_names(write), file,
               (*map(MODELS.get, NEWEST), *(RUN[::5] if name == "GGUF" else ())),
               tuple(MODELS.values()), packs=packs)
    for name, write, file, packs in (
        ("GGUF", functools.partial(write_ggml, "Q8_0"), "model.gguf", depends),
        ("NF4", functools.partial(write_bitsandbytes, "write_bnb"), "model.safetensors",
         in_any_shape),
        ("int8_convrot", functools.partial(write_host_format, "int8_tensorwise", convrot=True),
         "model.safetensors", lambda name, matrix: matrix.shape[1] % ROTATION == 0),
        ("SDNQ", write_sdnq, "model", lambda name, matrix: matrix.shape[1] % 64 == 0))
}


class DiffusionTester(ModelTester):
    """The tests of diffusion models in some forms."""

    kinds = {name: name for name in RUN}
    main = FLUX
    light_kinds = RUN[::5]
    test_layers_are_the_hosts_where_its_loader_takes_them_and_it_multiplies = None

    def cases(self, with_loras):
        for name, form in self.formats.items():
            light = form.families[:1] if with_loras and form.families == RUN else form.families
            for family in dict.fromkeys([*form.families, *form.more]):
                yield pytest.param(family, name, id=f"{family}-{name}",
                                   marks=() if family in light else pytest.mark.heavy)

    def kind_of(self, format_name):
        return self.formats[format_name].families[0]

    def shrink(self, kind, monkeypatch):
        shrunken_detection(FAMILIES[kind], monkeypatch)

    def weights(self, kind):
        return random_weights(FAMILIES[kind])

    def write(self, kind, format_name, folder):
        form = self.formats[format_name]
        values = form.write(folder / form.file, kind)
        return str(folder / form.file), host_patcher(values, FAMILIES[kind])

    def write_plain(self, kind, path, dtype=torch.float32):
        save_file({name: value.to(dtype) for name, value in self.weights(kind).items()}, path,
                  dict(FAMILIES[kind].metadata) or None)
        return str(path)

    def load(self, path, pack_to=None):
        return load_diffusion_model(path, pack_to=pack_to)

    def load_dense(self, path):
        return comfy.sd.load_diffusion_model(path)

    def run(self, kind, loaded):
        return run(loaded, FAMILIES[kind])

    def network(self, loaded):
        return loaded.model.diffusion_model

    def packs(self, format_name, name, matrix):
        form = self.formats[format_name]
        return (matrix.ndim == 2 or form.kernels) and form.packs(name, matrix)

    def held(self, format_name):
        return self.formats[format_name].held

    def check_packed(self, packed, dense, path, format_name):
        assert load_notes(packed) == () and type(packed.model) is type(dense.model)
        inspection = identify(file_contents(path))
        assert not inspection.problem
        assert inspection.host == type(dense.model.model_config).__name__
        for text in self.formats[format_name].told:
            assert any(text in each for each in inspection.types)
            assert text in memory_summary(packed)
        super().check_packed(packed, dense, path, format_name)

    def check_size(self, packed, plain, path, format_name):
        if path.endswith(".gguf"):
            check_as_in_gguf(packed, path)
        else:
            super().check_size(packed, plain, path, format_name)

    def loras(self, packed, size):
        """Two LoRAs and a DoRA in their files' names."""
        values = {name: value for name, value in self.values(self.network(packed)).items()
                  if name.endswith(".weight")}
        return [(lora_for(values, kind, seed, size=size), strength)
                for seed, (kind, strength) in enumerate((("lora", 0.8), ("lora", -0.4),
                                                         ("dora", 0.5)))]

    def patched(self, loaded, patches, strength=1.0):
        return patched(loaded, *((lora, strength * part) for lora, part in patches))

    def test_a_lora_hook_is_exact(self, kind, format_name, tmp_path):
        path, dense = self.write(kind, format_name, tmp_path)
        packed, family = self.load(path), FAMILIES[kind]
        lora = lora_for({name: value for name, value in self.values(self.network(packed)).items()
                         if name.endswith(".weight")}, seed=4, size=0.1)
        (before, hooked, after), (without, expected, _) = (
            run_hooked(model, family, lora, 0.8) for model in (packed, dense))
        assert error_by_effect(hooked, expected, without) < max(LIMIT, self.limit)
        assert relative_error(after, before) < ROUNDED

    # --- a part of a model on its device ---

    def test_loading_and_unloading_again_and_again_changes_nothing(
            self, kind, format_name, tmp_path):
        packed = self.load(self.write(kind, format_name, tmp_path)[0])
        before, output = packed_bytes(packed), self.run(kind, packed)
        for _ in range(2):
            comfy.model_management.unload_all_models()
            assert same_bytes(packed_bytes(packed), before)
            assert relative_error(self.run(kind, on_another_device(packed)), output) < ROUNDED
        assert same_bytes(packed_bytes(packed), before)

    def test_a_model_that_is_loaded_in_part_gives_the_same_with_a_lora_too(
            self, kind, format_name, tmp_path):
        path, dense = self.write(kind, format_name, tmp_path)
        packed = self.load(path)
        patches, before = self.loras(packed, 0.3), packed_bytes(packed)
        for ours, theirs, share in ((packed, dense, 0.2), (
                self.patched(packed, patches), self.patched(dense, patches), 0.7)):
            expected = self.run(kind, theirs)
            budget = int(ours.model_size() * share)
            comfy.model_management.unload_all_models()
            on_another_device(ours).partially_load(ours.load_device, budget)
            assert ours.model.model_lowvram
            assert 0 < ours.model.model_loaded_weight_memory <= budget
            assert relative_error(run_loaded(ours, FAMILIES[kind]), expected) < self.limit
            ours.partially_unload(torch.device("cpu"), ours.model_size())
            assert relative_error(run_loaded(ours, FAMILIES[kind]), expected) < self.limit
            ours.detach()
            assert same_bytes(packed_bytes(packed), before)

    def test_the_host_loads_a_model_in_part_when_memory_is_short(
            self, kind, format_name, tmp_path, monkeypatch):
        path, dense = self.write(kind, format_name, tmp_path)
        packed = on_another_device(self.load(path))
        before, free = packed_bytes(packed), int(packed.model_size() * 0.7)
        management = comfy.model_management
        with monkeypatch.context() as patch:
            patch.setattr(management, "vram_state", management.VRAMState.LOW_VRAM)
            patch.setattr(management, "is_device_cpu", lambda device: False)
            patch.setattr(management, "get_free_memory", lambda device=None, torch_free_too=False:
                          (free, 0) if torch_free_too else free)
            patch.setattr(management, "minimum_inference_memory", lambda: 0)
            management.load_models_gpu([packed])
        assert packed.model.model_lowvram
        output = run_loaded(packed, FAMILIES[kind])
        assert relative_error(output, self.run(kind, dense)) < self.limit
        assert same_bytes(packed_bytes(packed), before)


def packed_bytes(patcher) -> dict[str, list[torch.Tensor]]:
    """Layer -> parts of its packed weight."""
    return {name: [part.clone() for part in packed_tensors(layer.weight)]
            for name, layer in quantized_layers(patcher.model.diffusion_model).items()}


def same_bytes(some, others) -> bool:
    return bool(some) and some.keys() == others.keys() and all(
        torch.equal(*parts) for name in some for parts in zip(some[name], others[name]))


def on_another_device(patcher):
    """Loads to a device object of its own, so that the host sees the model move although all of it
    is the CPU."""
    patcher.load_device = torch.device("cpu:0")
    return patcher


def check_as_in_gguf(patcher, path: str):
    """What the file packs is packed in the model, bytes for bytes, except small tables. Nothing
    else takes more than float32."""
    network = patcher.model.diffusion_model
    layers = {name: layer for name, layer in network.named_modules()
              if isinstance(layer, PackedLayer) and not layer.stays_plain(layer.weight)}
    expected, held = set(), 0
    for name, entry in open_weights(path).entries.items():
        layer = name.removeprefix(PREFIX).removesuffix(".weight")
        if entry.format in FORMATS and name.endswith(".weight") and layer in layers:
            expected.add(layer)
            held += entry.nbytes
        else:
            held += 4 * torch.Size(entry.shape).numel()
    assert {name for name, layer in layers.items() if is_packed(layer.weight)} == expected
    assert abs(patcher.model_size() - held) < SAMPLING_TABLES
