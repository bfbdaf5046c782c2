"""Text encoders that bitsandbytes packed, as files and as folders of transformers, beside every
other kind of file."""
import json

import pytest
import torch
from comfy.sd import CLIPType, load_text_encoder_state_dicts
from comfy.sd1_clip import SDClipModel
from encoders import ENCODERS
from encoders.clip import CLIP_SMALL
from encoders.encoder import TOKENS, in_gguf_names, seeded
from families import relative_error
from pack_api import COMFYUI, is_packed, load_text_encoder
from safetensors.torch import load_file, save_file

from devtools.files.gguf_files import write_gguf

pytest.importorskip("bitsandbytes", reason="it writes the files")
from devtools.files.bnb_files import write_bnb, write_bnb_int8

pytestmark = pytest.mark.usefixtures("small_models")

T5, CLIP_L = ENCODERS["t5-xxl"], ENCODERS["clip-l"]
OPTIONS = {
    "t5xxl_model_config": {
        "num_layers": 2, "vocab_size": 256, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4
    }, "clip_l_model_config": CLIP_SMALL, "dtype": torch.float32
}


def options():
    return {**OPTIONS, "model_config": dict(CLIP_SMALL)}  # the host writes into the last


def encoders(clip):
    return [module for module in clip.cond_stage_model.modules() if isinstance(module, SDClipModel)]


def dense(weights):
    return load_text_encoder_state_dicts([dict(part) for part in weights], clip_type=CLIPType.FLUX,
                                         model_options=options())


@pytest.fixture(scope="module")
def values():
    """Seeded weights of a small CLIP-L and a small T5-XXL, with the tensors by which the host knows
    them."""
    markers = [{name: torch.zeros(shape) for name, shape in encoder.markers.items()}
               for encoder in (CLIP_L, T5)]
    markers[0]["text_model.encoder.layers.1.mlp.fc1.weight"] = torch.zeros(128, 64)
    models = [model.transformer for model in encoders(dense(markers))]
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
    return [marked | seeded(found) for marked, found in zip(markers, shapes)]


# --- files: each writer gives the values a reader should see
# ---------------------------------------------------------------

def keeps(name, tensor):
    """What transformers does not give to bitsandbytes: all but the weights of linear layers."""
    return tensor.ndim != 2 or "embedding" in name or "shared" in name or "attention_bias" in name


def bnb(**kind):
    def write(path, weights):
        return path.with_suffix(".safetensors"), write_bnb(
            path.with_suffix(".safetensors"), weights, keep=keeps, **kind
        )

    return write


def int8(path, weights):
    return path.with_suffix(".safetensors"), write_bnb_int8(
        path.with_suffix(".safetensors"), weights, keep=keeps
    )


def folder(shards, **kind):
    def write(path, weights):
        path.mkdir()
        seen = write_bnb(path / "model.safetensors", weights, keep=keeps, **kind)
        (path / "config.json").write_text(
            json.dumps({
                "quantization_config": {
                    "quant_method": "bitsandbytes", "load_in_4bit": True,
                    "bnb_4bit_quant_type": kind.get("quant_type", "nf4")
                }
            }))
        if shards == 1:
            return path, seen
        stored, index = load_file(path / "model.safetensors"), {}
        (path / "model.safetensors").unlink()
        for shard in range(shards):
            name, keys = (
                f"model-{shard + 1:05d}-of-{shards:05d}.safetensors",
                list(stored)[shard::shards],
            )
            save_file({key: stored[key] for key in keys}, path / name)
            index |= dict.fromkeys(keys, name)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return path, seen
    return write


def gguf_file(packed_type):
    def write(path, weights):
        stored = in_gguf_names(weights, T5.architecture) if "shared.weight" in weights else weights
        seen = write_gguf(path.with_suffix(".gguf"), stored, lambda name, values: packed_type
                          if values.ndim == 2 else "F32")
        return path.with_suffix(".gguf"), dict(zip(weights, map(torch.from_numpy, seen.values())))
    return write


def fp16(path, weights):
    stored = {name: value.half() for name, value in weights.items()}
    save_file(stored, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors"), {name: value.float() for name, value in stored.items()}


def of_the_host(dtype, old=False, keep=keeps):
    """The host's own fp8 and int8 with a scale for each weight, in its form of today, and in the
    one before."""
    def write(path, weights):
        largest = 127 if dtype == torch.int8 else 448
        kind = {"format": "int8_tensorwise" if dtype == torch.int8 else "float8_e4m3fn"}
        text = torch.tensor(list(json.dumps(kind).encode()), dtype=torch.uint8)
        stored, seen = {"scaled_fp8": torch.zeros(2, dtype=dtype)} if old else {}, {}
        for name, value in weights.items():
            stored[name] = seen[name] = value
            if not keep(name, value):
                scale = value.abs().amax().clamp(1e-6) / largest
                stored[name] = (value / scale).to(dtype)
                seen[name] = stored[name].float() * scale
                layer = name.removesuffix(".weight")
                stored |= {f"{layer}.scale_weight": scale} if old else {
                    f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": text.clone()}
        save_file(stored, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors"), seen
    return write


PACKED = {
    "NF4": bnb(), "NF4 double-quantised": bnb(nested=True),
    "NF4 stored as bf16": bnb(storage=torch.bfloat16), "int8": int8,
    "NF4 in a larger file": bnb(prefix="text_encoders.any.transformer."),
    "FP4": bnb(quant_type="fp4"), "NF4 folder": folder(1),
    "NF4 folder of three files": folder(3, nested=True), "FP4 folder": folder(2, quant_type="fp4")
}
OTHERS = {
    "fp16": fp16, "GGUF": gguf_file("Q8_0"), "fp8 scaled": of_the_host(torch.float8_e4m3fn),
    "fp8 scaled, old": of_the_host(torch.float8_e4m3fn,
                                   old=True), "ComfyUI's int8": of_the_host(torch.int8),
    "fp8 scaled with its tokens": of_the_host(torch.float8_e4m3fn,
                                              keep=lambda name, tensor: "shared" not in name),
    "ComfyUI's int8 with its tokens": of_the_host(torch.int8,
                                                  keep=lambda name, tensor: "shared" not in name)
}
SETS = [
    *(("fp16", t5) for t5 in PACKED), *(("NF4", t5) for t5 in OTHERS), ("GGUF", "NF4"),
    ("int8", "NF4 folder of three files"), ("FP4 folder", "NF4 folder of three files"),
    ("GGUF", "fp8 scaled, old"), ("fp8 scaled", "NF4")
]


@pytest.mark.parametrize(("clip_kind", "t5_kind"), SETS)
def test_any_two_kinds_of_files_together_give_what_the_dense_model_gives(
        clip_kind, t5_kind, values, tmp_path):
    kinds = PACKED | OTHERS
    paths, seen = zip(*(kinds[kind](tmp_path / name, part) for kind, name, part in zip(
        (clip_kind, t5_kind), ("text_encoder", "text_encoder_2"), values)))
    clip = load_text_encoder([str(path) for path in paths], "flux", model_options=options())
    expected = dense(seen)
    for kind, found, reference in zip((clip_kind, t5_kind), encoders(clip), encoders(expected)):
        with torch.inference_mode():
            states, wanted = found([TOKENS]), reference([TOKENS])
        assert all(
            relative_error(state, want) < 1e-5 for state, want in zip(states, wanted)
            if want is not None)
        weights = {
            name: value for name, value in found.transformer.named_parameters()
            if not keeps(name, value)
        }
        # 16-bit numbers too, under the label float32
        held = not kind.endswith("with its tokens")
        assert all(is_packed(value.data) for value in weights.values()) == held


def test_a_table_of_tokens_in_a_format_of_the_host_is_saved_as_it_was(values, tmp_path):
    path, _ = OTHERS["fp8 scaled with its tokens"](tmp_path / "t5", values[1])
    clip = load_text_encoder([str(PACKED["NF4"](tmp_path / "clip", values[0])[0]),
                              str(path)], "flux", model_options=options(),
                             host_formats=COMFYUI)
    saved, stored = clip.patcher.model_state_dict_for_saving(), load_file(path)
    for part in ("weight", "weight_scale", "comfy_quant"):
        found, expected = saved[f"t5xxl.transformer.shared.{part}"], stored[f"shared.{part}"]
        assert found.dtype == expected.dtype and torch.equal(found.float(), expected.float())
