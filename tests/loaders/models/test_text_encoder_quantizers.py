"""Text encoders that quantisers packed, in the folders and files that each saves, beside the host's
dense ones of the same values."""
import functools
import json
import re
from pathlib import Path

import nunchaku_writer
import pytest
import torch
from conformance.mlx import affine_parts
from encoder_tester import EncoderTester
from encoders import ENCODERS
from encoders.encoder import (
    hidden_states,
    host_clip,
    load_encoder,
    random_weights,
)
from families import relative_error
from host_formats import in_host_format
from mflux_models import LEVEL, VERSION
from pack_api import compute
from quantizer_writers import awq, gptq, pack_quantized, quantized_state_dict, save_config
from safetensors.torch import save_file
from sdnq_writer import write_folder

pytestmark = pytest.mark.usefixtures("small_models")

PATCHES = "visual.patch_embed.proj.weight"
LINEAR = re.compile(r"(SelfAttention|DenseReluDense|self_attn|mlp)\.")
OTHER = re.compile(r"relative_attention|visual\.|vision_model\.")
TABLE = re.compile(r"embed_tokens|shared\.")
# what is in place of parts of names
OF_MLX_VLM = ((r"^model\.", "language_model.model."), (r"^visual\.", "vision_tower."))
OF_MFLUX = (
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"t5_blocks.\1.attention.layer_norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.", r"t5_blocks.\1.attention."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.", r"t5_blocks.\1.ff."),
    (r"^encoder\.final_layer_norm\.", "final_layer_norm."),
    (r"^model\.", ""))


def keeps(name: str) -> bool:
    return not LINEAR.search(name) or OTHER.search(name) is not None


def keeps_no_tables(name: str) -> bool:
    """MLX quantises tables of tokens too, but no vision parts."""
    return keeps(name) and not TABLE.search(name)


def renamed(tensors, names):
    for pattern, replacement in names:
        tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
    return tensors


def of_hugging_face(quant_method, quantize, folder: Path, weights, beside):
    stored, values = quantized_state_dict(weights, quantize, keeps)
    save_file(beside | stored, folder / "model.safetensors")
    save_config(folder, quant_method=quant_method)
    return values


def of_sdnq(folder: Path, weights, beside):
    return write_folder(
        folder, beside | weights, "uint4", group=64, rank=8, settings={"sdnq_version": "0.1.0"},
        is_chosen=lambda name, value: value.ndim == 2 and name in weights and not keeps(name))


def of_nunchaku(folder: Path, weights, beside):
    halves = {name: tensor.bfloat16().float() if keeps(name) else tensor
              for name, tensor in weights.items()}
    stored, values = quantized_state_dict(halves, lambda value: nunchaku_writer.awq(
        value, None, 128, is_t5=True)[:2], keeps)
    save_file({name: tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
               for name, tensor in (beside | stored).items()}, folder / "awq-int4.safetensors")
    return values


def of_mlx_lm(folder: Path, weights, beside, bits, group, names=()):
    stored, values = quantized_state_dict(
        weights, lambda value: affine_parts(value, bits, group), keeps_no_tables)
    stored = beside | stored
    if PATCHES in stored:
        stored[PATCHES] = stored[PATCHES].permute(0, 2, 3, 4, 1).contiguous()
    save_file(renamed(stored, names), folder / "model.safetensors", {"format": "mlx"})
    settings = {"group_size": group, "bits": bits, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(
        {"quantization": settings, "quantization_config": settings}))
    return values


def of_mflux(folder: Path, weights, beside, bits):
    stored, values = quantized_state_dict(
        weights, lambda value: affine_parts(value, bits, 64), keeps_no_tables)
    stored, metadata = renamed(beside | stored, OF_MFLUX), {LEVEL: str(bits), VERSION: "0.24.0"}
    save_file(stored, folder / "0.safetensors", metadata)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": metadata, "weight_map": dict.fromkeys(stored, "0.safetensors")}))
    return values


OF_FOUR, OF_EIGHT = {"bits": 4, "group": 64}, {"bits": 8, "group": 32}
# who saves -> (function that writes weights, and others beside them, into a folder and
# returns the values; encoders)
SAVED = {
    **{name: (functools.partial(of_hugging_face, name, quantize),
              ("t5-xxl", "qwen2.5-vl-7b", "gemma-3-12b", "llama-3-8b"))
       for name, quantize in {
           "gptq": gptq, "awq": functools.partial(awq, symmetric=True),
           "compressed-tensors": functools.partial(pack_quantized, symmetric=False)}.items()},
    "SDNQ": (of_sdnq, ("qwen3-0.6b", "t5-xxl")),
    "Nunchaku": (of_nunchaku, ("t5-xxl",)),
    **{f"mlx-lm {sizes['bits']} bits": (functools.partial(of_mlx_lm, **sizes), ("qwen3-4b",))
       for sizes in (OF_FOUR, OF_EIGHT)},
    **{f"mlx-vlm {sizes['bits']} bits": (
        functools.partial(of_mlx_lm, names=OF_MLX_VLM, **sizes),
        ("gemma-3-12b", "qwen2.5-vl-7b", "qwen3-vl-4b")) for sizes in (OF_FOUR, OF_EIGHT)},
    **{f"mflux {bits} bits": (functools.partial(of_mflux, bits=bits),
                              ("t5-xxl", "qwen3-4b", "qwen3-8b")) for bits in (4, 8)},
}


class TestSavedEncoders(EncoderTester):
    formats = SAVED
    some_formats = ("gptq", "SDNQ", "Nunchaku", "mlx-lm 4 bits", "mflux 4 bits")

    def cases(self, with_loras):
        return [(name, who) for who, (_, names) in SAVED.items() for name in names]

    def kind_of(self, format_name):
        return SAVED[format_name][1][0]

    def write(self, kind, format_name, folder):
        weights = random_weights(kind)
        markers = {key: torch.zeros(shape) for key, shape in kind.markers.items()}
        values = SAVED[format_name][0](folder, weights, markers | dict(kind.extra))
        dense = host_clip(kind, {key: values[key] for key in weights})
        return str(next(folder.iterdir()) if format_name == "Nunchaku" else folder), dense

    def packs(self, format_name, name, matrix):
        return matrix.ndim == 2 and not keeps(f"{name}.weight")


def of_comfyui(folder: Path, weights, beside, format_name):
    """With ComfyUI's marks, in a file."""
    stored, values = {}, dict(weights)
    for name, value in weights.items():
        if not keeps(name) and value.ndim == 2:
            parts, values[name] = in_host_format(name, value, format_name)
            stored |= parts
        else:
            stored[name] = value
    save_file(beside | stored, folder / "encoder.safetensors")
    return values


@pytest.mark.more_with_heavy
@pytest.mark.parametrize("format_name", ["float8_e4m3fn", "int8_tensorwise"])
@pytest.mark.parametrize("name", [
    name for name in ENCODERS  # of others llama.cpp and transformers save other values
    if not name.startswith(("gpt-oss", "qwen3.5")) or name.endswith("of transformers")])
def test_a_gpu_gives_what_a_cpu_does_of_an_encoder_in_comfyuis_formats(
        name, format_name, tmp_path, monkeypatch):
    """ComfyUI has layers for its formats in some encoders only."""
    kind = ENCODERS[name]
    for config, changes in kind.towers:
        for key, value in changes.items():
            monkeypatch.setitem(config, key, value)
    weights = random_weights(kind)
    markers = {key: torch.zeros(shape) for key, shape in kind.markers.items()}
    values = of_comfyui(tmp_path, weights, markers | dict(kind.extra), format_name)
    monkeypatch.setattr(compute, "host_multiplies", lambda name, device: True)
    loaded = load_encoder(tmp_path / "encoder.safetensors", kind)
    expected = hidden_states(host_clip(kind, {key: values[key] for key in weights}))
    assert relative_error(hidden_states(loaded), expected) < 1e-4
