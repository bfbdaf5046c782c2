"""Tables that ComfyUI reads past their layer have their patches in what it reads."""
import collections
import dataclasses
import inspect
import linecache
import random
import re
import sys
from pathlib import Path

import comfy.model_management
import comfy.sd
import gguf
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from comfy_extras.nodes_model_merging import CLIPAdd, CLIPMergeSimple, CLIPSave, CLIPSubtract
from encoders import ENCODERS
from encoders.clip import CLIP_SMALL
from encoders.encoder import TOKENS as IDS
from encoders.encoder import (
    hidden_states,
    host_clip,
    load_encoder,
    small_towers,
    text_model,
    write_encoder,
)
from encoders.encoder import random_weights as encoder_weights
from families import FAMILIES, host_patcher, random_weights, run, shrunken_detection
from model_table import MODELS, NEWEST
from pack_api import (
    FORMATS,
    GGML_FORMATS,
    PackedLayer,
    QuantizedTensor,
    is_packed,
    load_diffusion_model,
    load_text_encoder,
    packed_layers,
    packed_operations,
    packed_tensor,
    random_tensors,
)
from packed_files import write_ggml
from patched_models import LIMIT, error_by_effect, relative
from safetensors.torch import load_file, save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.models.pack_on_load import LOAD_TYPES

pytestmark = pytest.mark.usefixtures("small_models")

HOST = Path(inspect.getfile(comfy.sd)).parent
# the host's own readers of weights, which call the layers' functions or apply patches
BY_LAYERS = {HOST / name for name in ("ops.py", "model_patcher.py", "lora.py", "utils.py")}
NO_VALUES = re.compile(r"\.weight\.(dtype|device|shape)\b")
QUICK = {"clip-l", "clip-g", "qwen3.5-0.8b", "gemma-2-2b", "t5-base"}
POSITIONS = "text_model.embeddings.position_embedding.weight"
MASK = "trainable_cond_mask.weight"


@pytest.fixture
def real_limit(monkeypatch):
    monkeypatch.setattr(packed_layers, "PLAIN_TABLE_BYTES", 32 << 20)


@pytest.fixture
def packed_reads(monkeypatch):
    """Lines of the host that read the values of a packed weight past its layer."""
    lines, getattr_of_modules = set(), torch.nn.Module.__getattr__

    def read(module, name):
        value = getattr_of_modules(module, name)
        if name == "weight" and isinstance(module, PackedLayer):
            caller = sys._getframe(1)
            path, line = Path(caller.f_code.co_filename), caller.f_lineno
            text = linecache.getline(str(path), line).strip()
            if (isinstance(value, QuantizedTensor) and HOST in path.parents
                    and path not in BY_LAYERS and not NO_VALUES.search(text)):
                lines.add(f"{path.name}:{line}: {text}")
        return value

    monkeypatch.setattr(torch.nn.Module, "__getattr__", read)
    return lines


@pytest.mark.usefixtures("real_limit")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.heavy) for name in ENCODERS])
def test_of_no_encoder_comfyui_reads_a_packed_weight_past_its_layer(name, packed_reads, tmp_path):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        write_encoder(tmp_path / "encoder.gguf", encoder, encoder_weights(encoder), "F16")
        clip = load_encoder(tmp_path / "encoder.gguf", encoder)
        hidden_states(clip)
        if "qwen3.5" in name:  # reads more where it writes text
            clip.generate({encoder.config_of: [[(token, 1.0) for token in IDS]]}, do_sample=False,
                          max_length=3)
    assert not packed_reads


@pytest.mark.usefixtures("real_limit")
@pytest.mark.parametrize("title", [
    pytest.param(title, marks=() if title in NEWEST[:4] else pytest.mark.heavy)
    for title in MODELS])
def test_of_no_diffusion_model_comfyui_reads_a_packed_weight_past_its_layer(
        title, packed_reads, tmp_path, monkeypatch):
    family = FAMILIES[MODELS[title]]
    shrunken_detection(family, monkeypatch)
    write_ggml("Q8_0", tmp_path / "model.gguf", random_weights(family), metadata=family.metadata)
    run(load_diffusion_model(str(tmp_path / "model.gguf")), family)
    assert not packed_reads


# --- every format ---


def quantized_by_gguf() -> list[str]:
    traits = gguf.quants._type_traits
    return [packed_format.name for number, packed_format in GGML_FORMATS.items()
            if gguf.GGMLQuantizationType(number) in traits]


ENCODER = dataclasses.replace(ENCODERS["clip-l"], config={
    **CLIP_SMALL, "hidden_size": 256, "num_attention_heads": 2},
    markers={})


def clip_file(folder, name: str, format_name: str, seed: int) -> tuple[list[str], dict]:
    """Paths of a CLIP-L whose table of positions is in a format of GGUF, and its values."""
    generator = torch.Generator().manual_seed(seed)
    values = {key: value if "token_embedding" in key else
              value + 0.5 * value.std() * torch.randn(value.shape, generator=generator)
              for key, value in encoder_weights(ENCODER).items()}
    path = folder / f"{name}.gguf"
    seen = write_gguf(path, values, lambda key, _: format_name if key == POSITIONS else "F32")
    return [str(path)], {key: torch.tensor(value).view(values[key].shape)
                         for key, value in seen.items()}


def encode(clip) -> torch.Tensor:
    cond, pooled = clip.encode_from_tokens({"l": [[(token, 1.0) for token in IDS]]},
                                           return_pooled=True)
    return torch.cat([cond.flatten(), pooled.flatten()])


MERGES = {"simple": lambda one, other: CLIPMergeSimple().merge(one, other, 0.5)[0],
          "subtract": lambda one, other: CLIPSubtract().merge(one, other, 1.0)[0],
          "add": lambda one, other: CLIPAdd().merge(one, other)[0]}
PACKINGS = [*(("GGUF", name) for name in quantized_by_gguf()),
            *(("pack to", name) for name in LOAD_TYPES)]
SOME = {"Q8_0", "Q4_0", "F16", "BF16", "nvfp4", "Q4_K", "int8_convrot"}


def two_clips(tmp_path, way: str, format_name: str):
    """Two packed CLIPs, and the host's dense ones of the same values."""
    packed, dense = [], []
    for seed, name in enumerate(("one", "other")):
        if way == "GGUF":
            paths, values = clip_file(tmp_path, name, format_name, seed)
            options = {}
        else:
            _, values = clip_file(tmp_path, name, "F32", seed)
            paths, options = [str(tmp_path / f"{name}.safetensors")], {"pack_to": format_name}
            save_file({key: value.contiguous() for key, value in values.items()}, paths[0])
        clip = load_text_encoder(paths, ENCODER.clip_type, model_options=ENCODER.model_options,
                                 **options)
        if way == "pack to":
            prefix = "clip_l.transformer."
            values = {key.removeprefix(prefix): value for key, value in dict(
                clip.patcher.model_state_dict(prefix).items()).items() if key.startswith(prefix)}
        packed.append(clip)
        dense.append(host_clip(ENCODER, values))
    return packed, dense


@pytest.mark.parametrize(("way", "format_name"), [
    pytest.param(way, name, marks=() if name in SOME else pytest.mark.heavy)
    for way, name in PACKINGS])
def test_merges_of_text_encoders_equal_those_of_dense_ones_and_are_saved(
        way, format_name, tmp_path):
    packed, dense = two_clips(tmp_path, way, format_name)
    without = encode(dense[0])
    assert relative(encode(packed[0]), without) < LIMIT
    for merge in MERGES.values():
        assert error_by_effect(encode(merge(*packed)), encode(merge(*dense)), without) < LIMIT
    assert relative(encode(packed[0]), without) < LIMIT  # nothing of them stays
    merged = random.Random(format_name).choice([*MERGES.values()])(*packed)
    node = CLIPSave()
    node.output_dir = str(tmp_path / "saved")
    image = encode(merged)
    node.save(merged, "clip")
    (path,) = (tmp_path / "saved").glob("*.safetensors")
    saved = host_clip(ENCODER, {key.removeprefix("transformer."): value
                                for key, value in load_file(path).items()})
    assert relative(encode(saved), image) < LIMIT


@pytest.mark.parametrize(("way", "format_name"), [
    ("GGUF", "Q8_0"), ("GGUF", "F16"), ("GGUF", "BF16"), ("GGUF", "Q4_K"), ("pack to", "Q8_0"),
    ("pack to", "int8_convrot")])
def test_a_diff_on_the_mask_of_wan_s2v_is_that_of_the_dense_model(way, format_name, tmp_path,
                                                                  monkeypatch):
    family = FAMILIES["wan2.2-s2v"]
    family = dataclasses.replace(
        family, config={**family.config, "num_layers": 2}, latent=(1, 16, 2, 4, 4),
        context=(1, 7, 4096), parts={"comfy.ldm.wan.model.WanModel_S2V": {
            "audio_inject_layers": [0]}}, extra={"reference_latent": (1, 16, 1, 4, 4)})
    shrunken_detection(family, monkeypatch)
    values = random_weights(family)
    if way == "GGUF":
        path = tmp_path / "s2v.gguf"
        values = write_ggml(format_name, path, values)
        ours = load_diffusion_model(str(path))
    else:
        path = tmp_path / "s2v.safetensors"
        save_file({name: value.bfloat16() for name, value in values.items()}, path)
        ours = load_diffusion_model(str(path), pack_to=format_name)
        values = {name.removeprefix("diffusion_model."): value for name, value in dict(
            ours.model_state_dict().items()).items() if name.startswith("diffusion_model.")}
    dense = host_patcher(values, family)
    lora = {f"diffusion_model.{MASK.removesuffix('weight')}diff": torch.randn(3, 256)}
    outputs = []
    for patcher in (ours, dense):
        outputs.append(run(patcher, family))
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0)
        assert patched.patches
        outputs.append(run(patched, family))
    assert relative(outputs[0], outputs[2]) < LIMIT
    assert error_by_effect(outputs[1], outputs[3], outputs[2]) < LIMIT


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_a_small_table_in_any_format_is_plain_and_a_large_one_stays_packed(format_name,
                                                                           monkeypatch):
    packed_format = FORMATS[format_name]
    blocks = 4
    shape = (blocks, packed_format.block_length)
    tensors = random_tensors(packed_format, blocks, torch.device("cpu"), bounded=True)
    weight = packed_tensor(packed_format, tensors[0], shape, torch.float32, *tensors[1:])
    nbytes = weight.numel() * 4
    for limit in (nbytes, nbytes - 1):
        monkeypatch.setattr(packed_layers, "PLAIN_TABLE_BYTES", limit)
        layer = packed_operations().Embedding(*shape, dtype=torch.float32)
        layer.load_state_dict({"weight": weight})
        assert is_packed(layer.weight) == (limit < nbytes)
        assert torch.equal(layer(torch.arange(blocks)), weight.dequantize())


@pytest.mark.parametrize("kind", ["diff", "lora"])
@pytest.mark.parametrize("name", ["gemma-3-4b", "qwen3-4b"])
def test_a_patch_on_a_large_table_is_in_what_comfyui_multiplies_with_it(kind, name, tmp_path):
    encoder = ENCODERS[name]
    key = "model.embed_tokens.weight"  # tied: the host multiplies with it to write text
    with small_towers(encoder):
        weights = encoder_weights(encoder)
        write_encoder(tmp_path / "encoder.gguf", encoder, weights)
        clips = [load_encoder(tmp_path / "encoder.gguf", encoder),
                 host_clip(encoder, weights)]
    rows, columns = weights[key].shape
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
    layer = next(name for name in clips[1].patcher.model.state_dict() if name.endswith(key))
    if kind == "diff":
        patch = {layer: ("diff", (change[0] @ change[1] / columns**0.5,))}
    else:
        patch = {layer: LoRAAdapter(set(), (change[0], change[1] / columns**0.5, None, None, None,
                                            None))}
    input = torch.randn(1, 3, columns, generator=generator)
    outputs = collections.defaultdict(list)
    for clip in clips:
        for strength in (0.0, 0.7):
            patched = clip.clone()
            assert not strength or patched.add_patches(patch, strength)
            comfy.model_management.load_models_gpu([patched.patcher])
            model = text_model(patched).transformer
            with torch.inference_mode():
                outputs["product"].append(model.logits(input))
                outputs["rows"].append(model.model.embed_tokens(torch.tensor(IDS)))
        assert is_packed(model.model.embed_tokens.weight) == (clip is clips[0])
    for own, ours, without, theirs in outputs.values():
        assert relative(own, without) < LIMIT
        assert error_by_effect(ours, theirs, without) < LIMIT
