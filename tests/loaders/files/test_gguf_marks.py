"""Weights of GGUF files in ComfyUI's own formats, by metadata as molbal's ComfyUI-GGUF writes it,
and by tensors as in safetensors."""
import json
import random
import re

import gguf
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import (
    hidden_states,
    host_clip,
    load_encoder,
    random_weights,
    small_towers,
    text_model,
)
from families import FAMILIES, host_patcher, relative_error
from families import random_weights as family_weights
from families import run as run_family
from kernel_writer import write_kernel
from pack_api import (
    AUTOMATIC,
    COMFYUI,
    PackedLayer,
    WeightFileError,
    is_comfy_quantized,
    is_packed,
    load_diffusion_model,
    open_weights,
)
from patched_models import (
    LIMIT,
    adapter,
    dense_of,
    error_by_effect,
    kohya,
    lora_for,
    packed_layers,
    patched,
    relative,
    run,
    tiny_flux,
)

from devtools.files.gguf_files import gguf_writer, write_all
from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, read_marked
from featherweight.loaders.comfyui.contents import file_contents
from featherweight.loaders.quantizers.registry import quantizer_of

TYPES = {torch.int8: gguf.GGMLQuantizationType.I8, torch.float16: gguf.GGMLQuantizationType.F16,
         torch.float32: gguf.GGMLQuantizationType.F32}
H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
ROWS = random.Random(5)
SHAPES = [(ROWS.randrange(1, 40), 256 * ROWS.randrange(1, 4)) for _ in range(3)]


def rotation(size):
    power = torch.ones(1, 1).double()
    while len(power) < size:
        power = torch.kron(power, H4)
    return power / size**0.5


def q8_cr(weight, size=256, is_rotated=True):
    """The parts of a weight, its mark and its values, as the writer's `quantize_int8_convrot`."""
    matrix = rotation(size) if is_rotated else torch.eye(size).double()
    rotated = (weight.double().view(len(weight), -1, size) @ matrix.T).view(weight.shape)
    scale = (rotated.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127).float()
    codes = (rotated / scale).round().clamp(-128, 127)
    values = ((codes * scale.double()).view(len(weight), -1, size) @ matrix).view(weight.shape)
    mark = {"format": "int8_tensorwise", "convrot": True, "weight_rotated": is_rotated,
            "per_row": True, "convrot_groupsize": size}
    return {"weight": codes.char(), "weight_scale": scale}, mark, values.float()


def q4_cr(weight, size=256):
    """The same of `quantize_int4_cr_w4a4`."""
    matrix = rotation(size)
    rotated = (weight.double().view(len(weight), -1, size) @ matrix.T).view(weight.shape)
    scale = (rotated.abs().amax(1).clamp_min(1e-10) / 7).half()
    codes = (rotated / scale.double()[:, None]).round().clamp(-7, 7)
    values = (codes * scale.double()[:, None]).view(len(weight), -1, size) @ matrix
    codes = codes.int()
    packed = (codes[:, ::2] & 15 | (codes[:, 1::2] & 15) << 4).to(torch.uint8).view(torch.int8)
    mark = {"format": "int4_cr", "backing": "w4a4", "convrot_groupsize": size,
            "quant_group_size": 64, "orig_shape": list(weight.shape), "sym": True}
    return {"weight": packed, "weight_scale": scale}, mark, values.view(weight.shape).float()


WRITERS = {"Q8_CR": q8_cr, "Q8_CR of 64": lambda weight: q8_cr(weight, 64),
           "Q8_CR that is not rotated": lambda weight: q8_cr(weight, is_rotated=False),
           "Q4_CR": q4_cr}


def write(path, tensors, marks=None, original=None):
    """marks: name of a weight -> settings or text in the metadata. original: -> its shape there."""
    writer = gguf_writer(path, "flux")
    for name, shape in (original or {}).items():
        writer.add_key_value(f"comfy.gguf.orig_shape.{name}", list(shape),
                             gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.INT64)
    for name, mark in (marks or {}).items():
        writer.add_string(f"comfy.gguf.quant.{name}",
                          mark if isinstance(mark, str) else json.dumps(mark))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy(), raw_dtype=TYPES[tensor.dtype])
    write_all(writer)
    return str(path)


def named(layer, parts):
    return {f"{layer}.{name}": part for name, part in parts.items()}


def bytes_of(settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.int8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", WRITERS)
def test_marks_in_the_metadata_mean_what_their_writer_means(case, shape, tmp_path):
    parts, mark, values = WRITERS[case](torch.randn(shape) * 0.02)
    file = open_weights(write(tmp_path / "a.gguf", named("L", parts), {"L.weight": mark}))
    weights = as_tensors(file, read_marked(file))
    assert weights.keys() == {"L.weight"} and is_packed(weights["L.weight"])
    assert (weights["L.weight"].dequantize() - values).abs().max() <= 1e-6 * values.abs().max()
    assert weights["L.weight"].nbytes <= parts["weight"].nbytes + 4 * shape[0]
    assert quantizer_of(file) == "ComfyUI's own formats"
    assert file_contents(tmp_path / "a.gguf").tensors.keys() == {"L.weight"}


@pytest.mark.parametrize("case", ["Q8_CR", "Q4_CR"])
def test_marks_in_tensors_of_i8_mean_the_same(case, tmp_path):
    parts, mark, values = WRITERS[case](torch.randn(12, 512) * 0.02)
    mark = {"format": "int8_tensorwise" if case == "Q8_CR" else "convrot_w4a4", "convrot": True}
    tensors = named("L", {**parts, "comfy_quant": bytes_of(mark)})
    file = open_weights(write(tmp_path / "a.gguf", tensors))
    weight, = as_tensors(file, read_marked(file)).values()
    assert (weight.dequantize() - values).abs().max() <= 1e-6 * values.abs().max()
    assert quantizer_of(file) == "ComfyUI's own formats"


def marked_flux(case, path):
    """Writes a Flux. Returns the path, its values, the host's model of them, and how many weights
    are marked."""
    stored, values, marks = {}, {}, {}
    for name, tensor in tiny_flux().items():
        stored[name] = values[name] = tensor
        if tensor.ndim == 2 and tensor.shape[1] % 256 == 0 and "_blocks." in name:
            parts, marks[name], values[name] = WRITERS[case](tensor)
            stored |= named(name.removesuffix(".weight"), parts)
    dense = dense_of(values)
    return write(path, stored, marks), values, dense, len(marks)


@pytest.mark.parametrize("case", ["Q8_CR", "Q4_CR"])
def test_a_model_draws_what_its_dense_values_draw_and_takes_loras(case, tmp_path):
    path, values, dense, marked = marked_flux(case, tmp_path / "model.gguf")
    ours = load_diffusion_model(path)
    assert len(packed_layers(ours)) >= marked > 8
    assert relative(run(ours), run(dense)) < 1e-5
    loras = [(lora_for(values, seed=1), 0.8), (lora_for(values, "dora", seed=2), 0.5)]
    expected = run(patched(dense, *loras))
    assert error_by_effect(run(patched(ours, *loras)), expected, run(dense)) < LIMIT


@pytest.mark.parametrize("by", [AUTOMATIC, COMFYUI])
def test_who_computes_the_layers_is_a_choice_as_for_safetensors(by, tmp_path):
    path, _, dense, marked = marked_flux("Q8_CR", tmp_path / "model.gguf")
    ours = load_diffusion_model(path, host_formats=by)
    by_host = sum(map(is_comfy_quantized, ours.model.diffusion_model.parameters()))
    assert by_host == (marked if by == COMFYUI else 0)
    # ComfyUI's product quantises the inputs of layers
    assert relative(run(ours), run(dense)) < (0.03 if by == COMFYUI else 1e-5)


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("name", ["t5-xxl", "qwen2.5-vl-7b", "llama-3-8b"])
def test_a_text_encoder_in_the_hosts_names_gives_the_states_of_its_dense_values(name, tmp_path):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        stored = {marker: torch.zeros(shape) for marker, shape in encoder.markers.items()}
        values, marks = {}, {}
        for weight, tensor in random_weights(encoder).items():
            stored[weight] = values[weight] = tensor.float()
            size = next((size for size in (256, 64, 16) if tensor.shape[-1] % size == 0), 0)
            if tensor.ndim == 2 and size and "visual" not in weight and (
                    "mlp." in weight or "attn." in weight or ".layer." in weight) and (
                    "relative" not in weight):
                parts, marks[weight], values[weight] = q8_cr(tensor.float(), size)
                stored |= named(weight.removesuffix(".weight"), parts)
        extra = {key: value for key, value in encoder.extra.items() if value.dtype in TYPES}
        path = write(tmp_path / "model.gguf", stored | extra, marks)
        packed = load_encoder(path, encoder)
        layers = [module for module in text_model(packed).transformer.modules()
                  if isinstance(module, PackedLayer) and is_packed(module.weight)]
        assert len(layers) >= len(marks) >= 10
        expected = hidden_states(host_clip(encoder, values))
        assert relative_error(hidden_states(packed), expected) < 1e-4


GOOD, MARK, _ = q8_cr(torch.ones(8, 256))
FOUR, MARK_OF_FOUR, _ = q4_cr(torch.ones(8, 256))
# case -> (parts, mark, what the message says)
BAD = {
    "text": (GOOD, "no JSON", "is not a JSON object"),
    "a list": (GOOD, "[1]", "is not a JSON object"),
    "nothing": (GOOD, "null", "is not a JSON object"),
    "deep lists": (GOOD, "[" * 100_000, "is not a JSON object"),
    "many lists": (GOOD, '{"format": [' + "[]," * 9999 + "[]]}", "is not a JSON object"),
    "no format": (GOOD, {"convrot": True}, "names no format"),
    "a format that is a number": (GOOD, {"format": 8}, "names no format"),
    "an unknown format": (GOOD, {"format": "int3_x"}, "'int3_x'"),
    "the older int4": (FOUR, MARK_OF_FOUR | {"backing": "awq"}, "has given up"),
    "the oldest int4": (FOUR, {"format": "int4_pytorch"}, "has given up"),
    "int4 of another shape": (FOUR, MARK_OF_FOUR | {"orig_shape": [8, 512]}, "has the shape"),
    "int4 of no shape": (FOUR, MARK_OF_FOUR | {"orig_shape": "x"}, "has the shape 'x'"),
    "int4 of vectors": ({**FOUR, "weight": FOUR["weight"].view(-1)}, MARK_OF_FOUR, "which are"),
    "no scale": ({"weight": GOOD["weight"]}, MARK, "has no weight_scale"),
    "scales of other rows": ({**GOOD, "weight_scale": torch.ones(7, 1)}, MARK,
                             r"weight_scale of float32 \(7, 1\)"),
    "scales of integers": ({**GOOD, "weight_scale": torch.ones(8).char()}, MARK,
                           "weight_scale of int8"),
    "codes of float32": ({**GOOD, "weight": torch.ones(8, 256)}, MARK, "int8_tensorwise: it has"),
    "codes of one dimension": ({**GOOD, "weight": GOOD["weight"].view(-1)}, MARK, "expected rows"),
    "a rotation of 48": (GOOD, MARK | {"convrot_groupsize": 48}, "groups of 48"),
    "a rotation of gigabytes": (GOOD, MARK | {"convrot_groupsize": 1 << 40}, "groups of 1099"),
    "another mark beside it": ({**GOOD, "comfy_quant": bytes_of({"format": "convrot_w4a4"})}, MARK,
                               "by its metadata and in 'convrot_w4a4'"),
    "a damaged mark beside it": ({"weight": GOOD["weight"], "comfy_quant": bytes_of(3)}, None,
                                 "is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_marks_are_a_sentence_with_the_files_name(case, tmp_path):
    parts, mark, message = BAD[case]
    marks = None if mark is None else {"L.weight": mark}
    path = write(tmp_path / "model.gguf", named("L", parts), marks)
    with pytest.raises(WeightFileError) as error:
        file = open_weights(path)
        weights = as_tensors(file, read_marked(file))
        assert weights.keys() == {"L.weight"}
    text = str(error.value)
    assert re.match(rf"model\.gguf: .*{message}", text) and "L.weight" in text, text
    assert re.search(r"\. [A-Z].*\.$", text) and "\n" not in text and len(text) < 500


def test_a_mark_of_no_weight_is_a_sentence(tmp_path):
    path = write(tmp_path / "model.gguf", named("L", GOOD), {"L.bias": MARK})
    with pytest.raises(WeightFileError, match=r"model.gguf: .*'comfy.gguf.quant.L.bias' names no"):
        open_weights(path)


def test_a_mark_of_a_layer_that_the_file_has_not_is_noted(tmp_path):
    path = write(tmp_path / "model.gguf", named("L", GOOD), {"L.weight": MARK, "M.weight": MARK})
    file = open_weights(path)
    assert as_tensors(file, read_marked(file)).keys() == {"L.weight"}
    assert "'M'" in file.notes[0]


def test_other_weights_of_i8_with_scales_are_read_as_before(tmp_path):
    codes, scale = torch.randint(-127, 128, (8, 64), dtype=torch.int8), torch.rand(8, 1)
    path = write(tmp_path / "a.gguf", {"L.weight": codes, "L.weight_scale": scale})
    weight, = open_weights(path).state_dict().values()
    assert torch.equal(weight.dequantize(), codes.float() * scale)


@pytest.mark.parametrize("group", [0, 16])
def test_a_kernel_of_five_dimensions_has_its_original_shape(group, tmp_path):
    shape = (6, 32, 2, 3, 3)
    parts, values = write_kernel(torch.randn(shape) * 0.02, group=group)
    parts["comfy_quant"] = parts["comfy_quant"].view(torch.int8)
    parts["weight_scale"] = parts["weight_scale"].flatten()
    flat = parts | {"weight": parts["weight"].flatten(2)}
    path = write(tmp_path / "a.gguf", named("L", flat), original={"L.weight": shape})
    file = open_weights(path)
    weight, = as_tensors(file, read_marked(file)).values()
    assert is_packed(weight) and weight.shape == shape
    assert (weight.dequantize() - values).abs().max() <= 1e-6 * values.abs().max()


@pytest.mark.parametrize("shape", [(6, 32, 2, 3), (1 << 62, 4), (-6, -576), (6, 0), (0,)])
def test_an_original_shape_of_other_values_is_a_sentence(shape, tmp_path):
    parts, _ = write_kernel(torch.randn(6, 32, 2, 3, 3))
    flat = {"weight": parts["weight"].flatten(2)}
    path = write(tmp_path / "model.gguf", named("L", flat), original={"L.weight": shape})
    with pytest.raises(WeightFileError, match="^model.gguf: the metadata gives tensor 'L.weight'"):
        open_weights(path)


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("kind", ["lora", "locon", "loha"])
def test_loras_on_convolutions_of_an_original_shape_are_exact(kind, tmp_path):
    family = FAMILIES["sdxl"]
    values = family_weights(family)
    kernels = [name for name, value in values.items() if value.ndim == 4
               and value.numel() % 256 == 0 and name.startswith("input_blocks")]
    values = values | {name: values[name].half().float() for name in kernels}
    stored = values | {name: values[name].half().view(-1, 256) for name in kernels}
    path = write(tmp_path / "model.gguf", stored,
                 original={name: tuple(values[name].shape) for name in kernels})
    lora = {f"{kohya(name.removesuffix('.weight'))}.{suffix}": tensor
            for seed, name in enumerate(kernels)
            for suffix, tensor in adapter(kind, values[name], seed).items()}
    ours, dense = load_diffusion_model(path), host_patcher(values, family)
    without = run_family(dense, family)
    assert len(kernels) > 3 and relative_error(run_family(ours, family), without) < 1e-5
    expected = run_family(patched(dense, (lora, 0.7)), family)
    actual = run_family(patched(ours, (lora, 0.7)), family)
    assert error_by_effect(actual, expected, without) < LIMIT
