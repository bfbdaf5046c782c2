"""What converters do to names, shapes and types, and what people pick by mistake."""
import os
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import gguf
import numpy as np
import pytest
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from families import (
    FAMILIES,
    comfyui_gguf_style,
    host_patcher,
    load_without_complaint,
    random_weights,
    relative_error,
    run,
    shrunken_detection,
    stable_diffusion_cpp_style,
)
from pack_api import WeightFileError, is_packed, load_diffusion_model, load_notes
from packed_files import PACKED_FILES
from patched_models import tiny_flux
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from devtools.files.gguf_files import random_rows, write_all, write_gguf
from featherweight.loaders.container import weight_file as container

PREFIX = "model.diffusion_model."


pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def family(request, monkeypatch):
    family = FAMILIES[request.param]
    shrunken_detection(family, monkeypatch)
    return family


def families(*names):
    return pytest.mark.parametrize("family", names, indirect=True)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.gguf")


def check_as_host(path, family, seen, caplog):
    """The file at `path` runs as the values in it do in the host."""
    patcher = load_without_complaint(path, caplog)
    assert relative_error(run(patcher, family), run(host_patcher(seen, family), family)) < 1e-5
    return patcher


def rearranged(weights):
    """Weights and metadata as ComfyUI-GGUF's converter stores those whose last dimension K-quants
    do not divide."""
    stored, shapes = {}, {}
    for name, values in weights.items():
        if (
            values.ndim > 1
            and values.numel() >= 512
            and values.numel() % 256 == 0
            and values.shape[-1] % 256
        ):
            stored[name] = values.reshape(-1, 256)
            shapes[f"comfy.gguf.orig_shape.{name}"] = list(values.shape)
        else:
            stored[name] = values
    return stored, shapes


@families("sd1.5", "sdxl", "wan2.1-t2v")
def test_weights_stored_in_rows_of_256_keep_their_shape(family, path, caplog):
    weights = random_weights(family)
    stored, shapes = rearranged(weights)
    seen = write_gguf(path, stored, **comfyui_gguf_style("Q4_K"), metadata=shapes,
                      pack=random_rows)
    patcher = load_without_complaint(path, caplog)
    layers = patcher.model.diffusion_model
    reshaped = [
        name for name in weights
        if weights[name].shape != stored[name].shape and name.endswith(".weight")
    ]
    assert {weights[name].ndim for name in reshaped} == (
        {5} if family is FAMILIES["wan2.1-t2v"] else {2, 4}
    )
    seen = {name: values.reshape(weights[name].shape) for name, values in seen.items()}
    assert relative_error(run(patcher, family), run(host_patcher(seen, family), family)) < 1e-5
    for name in reshaped:
        assert (
            is_packed(layers.get_parameter(name))
            and layers.get_parameter(name).shape == weights[name].shape
        )


@pytest.mark.parametrize(("family", "endings", "change", "prefix", "style"), [
    pytest.param("sdxl", ("proj_in.weight", "proj_out.weight"),
                 lambda values: values[:, :, None, None], PREFIX, stable_diffusion_cpp_style(),
                 id="linear projections of SDXL as convolutions"),
    pytest.param("sd1.5", "skip_connection.weight", lambda values: values[:, :, 0, 0], "", {
        "type_of": lambda name, values: "Q8_0" if name.endswith("skip_connection.weight") else "F32"
    }, id="1x1 convolutions as matrices"),
    *(pytest.param("z-image", "pad_token", lambda values: values[0], "", {
        "type_of": lambda name, values, kind=kind: kind
        if values.ndim == 2 or "pad_token" in name else "F32"
    }, id=f"pad tokens without their first dimension, {kind}") for kind in ("F32", "Q8_0"))
], indirect=["family"])
def test_a_weight_in_another_shape_keeps_its_own(family, endings, change, prefix, style, path,
                                                 caplog):
    weights = random_weights(family)
    stored = {name: change(values) if name.endswith(endings) else values
              for name, values in weights.items()}
    assert any(stored[name].shape != weights[name].shape for name in weights)
    seen = write_gguf(path, {prefix + name: values for name, values in stored.items()}, **style)
    seen = {name: seen[prefix + name].reshape(values.shape) for name, values in weights.items()}
    check_as_host(path, family, seen, caplog)


@families("wan2.1-t2v", "hunyuan-video")
def test_five_dimensions_as_comfyui_gguf_writes_them(family, path, caplog):
    """Its fix_5d_tensors.py adds the patch embedding with all of its dimensions, against ggml's
    limit of four."""
    weights = random_weights(family)
    writer = gguf.GGUFWriter(path, "wan")
    for name, values in weights.items():
        writer.add_tensor(name, values.numpy())
    write_all(writer)
    check_as_host(path, family, weights, caplog)


@families("qwen-image")
def test_empty_tensor_that_marks_a_variant(family, path, caplog):
    """Qwen-Image-Edit 2511 is told from its predecessors by the name of a tensor without values."""
    weights = random_weights(family) | {"__index_timestep_zero__": torch.empty(0)}
    write_gguf(path, weights, lambda name, values: "Q8_0" if values.ndim == 2 else "F32")
    patcher = load_diffusion_model(path)
    assert patcher.model.diffusion_model.default_ref_method == "index_timestep_zero"


@families("flux-schnell", "ltx-2")
def test_packed_vectors(family, path, caplog):
    style = stable_diffusion_cpp_style("Q8_0", vector_type="Q8_0")
    seen = write_gguf(path, random_weights(family), **style, metadata=family.metadata)
    check_as_host(path, family, seen, caplog)


@families("flux-schnell", "z-image", "kandinsky5")
def test_query_and_key_norms_named_scale(family, path, caplog):
    weights = random_weights(family)
    names = {
        name: name.removesuffix("weight") + "scale" for name in weights
        if name.endswith(("query_norm.weight", "key_norm.weight", "q_norm.weight", "k_norm.weight"))
    }
    assert names
    seen = write_gguf(path, {names.get(name, name): values for name, values in weights.items()},
                      **comfyui_gguf_style())
    seen = {name: seen[names.get(name, name)] for name in weights}
    check_as_host(path, family, seen, caplog)


@pytest.mark.parametrize(("family", "name"), [
    ("ltx-2", "video_embeddings_connector.learnable_registers"),
    ("hidream", "double_stream_blocks.0.block.ff_i.gate.weight"),
    ("sd3.5", "pos_embed"),
], indirect=["family"])
def test_parameters_outside_of_layers_are_dequantized_at_load(family, name, path, caplog):
    weights = random_weights(family)
    seen = write_gguf(path, weights, lambda key, values: "Q4_0"
                      if key == name else "F32", metadata=family.metadata)
    patcher = load_without_complaint(path, caplog)
    value = patcher.model.diffusion_model.state_dict()[name]
    assert not is_packed(value) and value.dtype == torch.float32
    assert torch.equal(value, torch.from_numpy(seen[name])) and not torch.equal(
        value, weights[name]
    )


def test_registers_of_ltx_2_reach_the_text_connector(path, monkeypatch, caplog):
    family = FAMILIES["ltx-2"]
    seen = write_gguf(path, random_weights(family), **comfyui_gguf_style(),
                      metadata=family.metadata)
    context = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        out, expected = (patcher.model.diffusion_model.preprocess_text_embeds(
            context, unprocessed=True) for patcher in (load_without_complaint(path, caplog),
                                                       host_patcher(seen, family)))
    assert relative_error(out, expected) < 1e-5


@families("sd1.5", "flux-dev")
def test_whole_checkpoint_gives_its_diffusion_model(family, path, caplog):
    weights = {PREFIX + name: values for name, values in random_weights(family).items()}
    others = {
        "first_stage_model.decoder.conv_in.weight": torch.ones(8, 4, 3, 3),
        "first_stage_model.decoder.mid.attn_1.q.weight": torch.ones(64, 64),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": torch.
        ones(64, 64),
        "cond_stage_model.1.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(
            64, 64), "alphas_cumprod": torch.ones(1000)
    }
    seen = write_gguf(path, others | weights, **stable_diffusion_cpp_style())
    seen = {
        name.removeprefix(PREFIX): values for name, values in seen.items()
        if name.startswith(PREFIX)
    }
    check_as_host(path, family, seen, caplog)


def as_in_diffusers(family):
    """The weights of a family as diffusers keeps them."""
    name = next(name for name, other in FAMILIES.items() if other is family)
    return in_diffusers_names(random_weights(family), DIFFUSERS[name](family.config)), DIFFUSERS[
        name
    ](family.config)


@pytest.mark.parametrize(
    ("family", "types"),
    [
        *((name, ["Q8_0"]) for name in DIFFUSERS),
        ("flux-dev", ["Q8_0", "Q4_0", "F16"]),
        ("flux-dev", ["Q6_K"]),
    ],
    indirect=["family"],
)
def test_names_of_diffusers(family, types, path, caplog):
    weights, (stored, table) = random_weights(family), as_in_diffusers(family)
    turn = iter(range(len(stored)))
    seen = write_gguf(
        path, stored, lambda key, values: types[next(turn) % len(types)]
        if values.ndim == 2 else "F16")
    patcher = load_without_complaint(path, caplog)
    packed = [module for module in patcher.model.diffusion_model.modules()
              if isinstance(module, torch.nn.Linear) and is_packed(module.weight)]
    assert len(packed) >= (
        len([values for values in weights.values() if values.ndim == 2]) - 4
        if len(types) == 1
        else 1
    )
    seen = {
        name: torch.from_numpy(values).reshape(stored[name].shape) for name, values in seen.items()
    }
    expected = host_patcher(in_the_hosts_names(seen, weights, table), family)
    assert relative_error(run(patcher, family), run(expected, family)) < 1e-5


@pytest.fixture
def filled_memory():
    """What torch leaves in new tensors is not zero, as it may be of itself."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("family", "part"), [
    ("flux-dev", "to_q"), ("flux2", "to_k"), ("sd3.5", "to_v")], indirect=["family"])
@pytest.mark.usefixtures("filled_memory")
def test_diffusers_file_without_a_part_of_a_weight_is_refused(family, part, path):
    stored, table = as_in_diffusers(family)
    target = table["transformer_blocks.0.attn.to_k.weight"][0]
    del stored[f"transformer_blocks.0.attn.{part}.weight"]
    write_gguf(path, stored, **comfyui_gguf_style())
    expected = f"model.gguf.*{target}.*Download (it|the file) again"
    with pytest.raises(WeightFileError, match=expected) as error:
        load_diffusion_model(path)
    assert "\n" not in str(error.value)


@families("flux-dev")
def test_diffusers_names_of_which_some_are_not_known_are_refused(family, path):
    stored, _ = as_in_diffusers(family)
    write_gguf(
        path,
        {name.replace("timestep_embedder", "clock"): values for name, values in stored.items()},
        **comfyui_gguf_style())
    with pytest.raises(
            WeightFileError,
            match="'time_in.*and the model has no"
                  " 'time_text_embed.clock.linear_1.bias'"):
        load_diffusion_model(path)


@families("flux-schnell", "sd3.5")
def test_a_weight_of_another_size_is_named(family, path):
    weights = dict(random_weights(family))
    name = next(name for name, values in weights.items()
                if name.endswith("mlp.2.weight") or name.endswith("mlp.fc2.weight"))
    weights[name] = weights[name][:128]
    write_gguf(path, weights, **comfyui_gguf_style())
    with pytest.raises(
            WeightFileError,
            match=f"model.gguf: the names of the weights .*, their sizes are not: {name}"):
        load_diffusion_model(path)


LORA_LAYER = "double_blocks.0.img_attn.qkv"
REFUSED = {  # shapes in a file -> words of the message
    "text encoder": ({"token_embd.weight": (64, 32), "blk.0.attn_q.weight": (32, 32)}, (
        "a text encoder", "token_embd.weight", "Load Text Encoder (GGUF, Featherweight)")),
    "T5": ({"enc.blk.0.attn_q.weight": (32, 32)}, ("a text encoder", "enc.blk.0.attn_q.weight")),
    "mmproj": ({"v.blk.0.attn_q.weight": (32, 32), "mm.0.weight": (32, 32)}, (
        "mmproj", "v.blk.0.attn_q.weight", "Load Text Encoder (GGUF, Featherweight)")),
    "LoRA": ({f"{LORA_LAYER}.lora_A.weight": (4, 32), f"{LORA_LAYER}.lora_B.weight": (96, 4)}, (
        "a LoRA", "lora_A", "LoRA loader")),
    "unknown": ({"layer.weight": (32, 32), "layer.scale": ()}, (
        "no diffusion model", "'layer.weight'", "Update ComfyUI")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_file_is_refused_and_loaded_models_are_left_alone(case, path):
    shapes, said = REFUSED[case]
    values = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    write_gguf(path, values, lambda name, values: "F16", architecture=None)
    family = FAMILIES["flux-schnell"]
    other = host_patcher(random_weights(family), family)
    comfy.model_management.load_models_gpu([other])
    before = list(comfy.model_management.current_loaded_models)
    with pytest.raises(WeightFileError) as error:
        load_diffusion_model(path)
    assert comfy.model_management.current_loaded_models == before and before
    for words in ("model.gguf", *said):
        assert words in str(error.value)


# --- what newer hosts look for in a file ---

CONFIG_NAME = "double_blocks.0.img_attn.config"
CONFIG = torch.tensor(list(b'{"backend": "sage"}'), dtype=torch.uint8)


def add_config(path: Path):
    """Puts the settings of an attention into a file: a tensor of JSON, as newer hosts read them.

    GGUF has no unsigned bytes, so it has them signed.
    """
    if path.suffix == ".gguf":
        reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(f"{path}.new", "flux")
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.add_tensor(CONFIG_NAME, CONFIG.view(torch.int8).numpy())
        write_all(writer)
        del reader, tensor, writer  # Windows replaces no file that is mapped
        Path(f"{path}.new").replace(path)
        return
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file) | {CONFIG_NAME: CONFIG}, f"{file}.new", metadata=metadata)
    os.replace(f"{file}.new", file)


@pytest.fixture
def given_to_the_host(monkeypatch):
    """The state dicts that the host gets of diffusion models."""
    given, load = [], comfy.sd.load_diffusion_model_state_dict

    def load_and_keep(state_dict, **options):
        given.append(dict(state_dict))
        return load(state_dict, **options)

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", load_and_keep)
    return given


@pytest.mark.parametrize("format_name", PACKED_FILES)
def test_settings_of_an_attention_in_a_file_reach_the_host(format_name, tmp_path,
                                                           given_to_the_host):
    writer, name = PACKED_FILES[format_name]
    writer(tmp_path / name, tiny_flux())
    add_config(tmp_path / name)
    load_diffusion_model(str(tmp_path / name))
    assert torch.equal(given_to_the_host[0][CONFIG_NAME].view(torch.uint8), CONFIG)


@pytest.mark.parametrize("format_name", PACKED_FILES)
def test_the_host_finds_the_file_that_a_weight_is_mapped_from(format_name, tmp_path,
                                                              given_to_the_host, monkeypatch):
    writer, name = PACKED_FILES[format_name]
    writer(tmp_path / name, tiny_flux())
    link = tmp_path / "links" / name
    link.parent.mkdir()
    link.symlink_to(tmp_path / name)
    patcher = load_diffusion_model(str(link))
    for tensors in (given_to_the_host[0], dict(patcher.model.diffusion_model.named_parameters())):
        packed = [tensor for tensor in tensors.values() if is_packed(tensor)]
        sources = {getattr(tensor.untyped_storage(), "_comfy_source_path", None)
                   for tensor in packed} - {None}
        assert packed and {Path(source).is_file() for source in sources} == {True}
        assert all(Path(source).is_relative_to(tmp_path / name) for source in sources)
    given_to_the_host.clear()
    monkeypatch.setattr(container, "should_read_into_memory", lambda path: True)
    load_diffusion_model(str(tmp_path / name))
    assert not [tensor for tensor in given_to_the_host[0].values()
                if hasattr(tensor.untyped_storage(), "_comfy_source_path")]


@families("flux2", "chroma")
def test_a_plain_file_in_names_that_comfyui_stumbles_over_loads(family, tmp_path):
    stored, _ = as_in_diffusers(family)
    save_file({name: value.contiguous() for name, value in stored.items()},
              tmp_path / "a.safetensors")
    patcher = load_diffusion_model(str(tmp_path / "a.safetensors"))
    assert load_notes(patcher) == ()
    assert relative_error(run(patcher, family),
                          run(host_patcher(random_weights(family), family), family)) < 1e-5


@pytest.mark.parametrize("architecture", ["krea2", None])
def test_a_gguf_loads_whatever_architecture_it_names(architecture, tmp_path):
    family, path = FAMILIES["minimax-h3"], tmp_path / "model.gguf"
    weights = random_weights(family)
    seen = write_gguf(path, weights, **comfyui_gguf_style() | {"architecture": architecture})
    seen = {name: torch.from_numpy(values).view(weights[name].shape)
            for name, values in seen.items()}
    ours = load_diffusion_model(str(path))
    assert relative_error(run(ours, family), run(host_patcher(seen, family), family)) < 1e-5
