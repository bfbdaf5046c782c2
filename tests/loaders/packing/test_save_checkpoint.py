"""Whole checkpoints in ComfyUI's own types: it opens them by itself, its model, text encoders and
VAE are those that were saved, and text encoders are packed where it reads them packed."""
import contextlib
import dataclasses
import random
import re

import comfy.sd
import pytest
import torch
from checkpoint_parts import autoencoder, stable_diffusion
from comfy.quant_ops import QuantizedTensor
from comfy.sd1_clip import SDClipModel
from comfy.supported_models import AuraFlow
from encoders import ENCODERS
from encoders.encoder import TOKENS, small_towers
from encoders.encoder import random_weights as random_encoder
from families import FAMILIES, random_weights, relative_error, shrunken_detection
from families import run as run_family
from pack_api import HOST_TYPES, KEEP_TYPES, SaveError, load_checkpoint, plan_file
from safetensors.torch import load_file, save_file
from saving import save

from featherweight.loaders import packing_rules
from featherweight.loaders.packing.checkpoint_source import (
    source_of_checkpoint,
    source_of_checkpoint_file,
)
from featherweight.loaders.packing.planning.file_plan import MIXES, SaveOptions
from featherweight.loaders.packing.planning.plan import PlanError
from featherweight.loaders.quantizers.comfy_quant_marks import MARK

pytestmark = pytest.mark.usefixtures("small_models")
MODEL = "model.diffusion_model."


SMALL_CLIP_G = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 2,
                "intermediate_size": 128}


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a checkpoint of a family of models has: prefix in it -> key of ENCODERS.

    packed: prefixes of the text encoders that ComfyUI reads packed. vae: prefix of the VAE.
    """

    encoders: dict[str, str]
    packed: tuple[str, ...] = ()
    vae: str = "vae."

    def options(self) -> dict:
        """The host's options with which the text encoders are small."""
        options = {"dtype": torch.float32, "clip_g_model_config": SMALL_CLIP_G}
        for name in self.encoders.values():
            options |= {key: value for key, value in ENCODERS[name].model_options.items()
                        if key != "model_config"}
        if len(self.encoders) == 1:
            options["model_config"] = dict(ENCODERS[next(iter(self.encoders.values()))].config)
        return options


TEXT, OTHER_TEXT = "text_encoders.", "cond_stage_model."
CHECKPOINTS = {
    "flux-dev": Parts({f"{TEXT}clip_l.transformer.": "clip-l",
                       f"{TEXT}t5xxl.transformer.": "t5-xxl of transformers"},
                      (f"{TEXT}t5xxl.",)),
    "anima": Parts({f"{OTHER_TEXT}qwen3_06b.transformer.": "qwen3-0.6b"},
                   (f"{OTHER_TEXT}qwen3_06b.",), vae="first_stage_model."),
    "omnigen2": Parts({f"{TEXT}qwen25_3b.transformer.": "qwen2.5-3b"}, (f"{TEXT}qwen25_3b.",)),
    # ComfyUI reads no packed T5 from a checkpoint of it
    "pixart-sigma": Parts({f"{TEXT}t5xxl.transformer.": "t5-xxl of transformers"}),
    "aura-flow": Parts({f"{TEXT}pile_t5xl.transformer.": "t5-xl"}),
    "sd1.5": Parts({}), "sdxl": Parts({}),
}


def written(path, name: str):
    """Writes a whole checkpoint of a family."""
    parts, tensors = CHECKPOINTS[name], {}
    tensors |= {f"{MODEL}{key}": value for key, value in random_weights(FAMILIES[name]).items()}
    for prefix, key in parts.encoders.items():
        encoder = ENCODERS[key]
        weights = encoder.published(random_encoder(encoder))
        markers = {marker: torch.zeros(shape) for marker, shape in encoder.markers.items()
                   if marker not in weights}
        tensors |= {f"{prefix}{key}": value for key, value in (weights | markers).items()}
    tensors |= {f"{parts.vae}{key}": value for key, value in autoencoder().items()}
    if name in ("sd1.5", "sdxl"):
        tensors = stable_diffusion()
    if name == "sdxl":
        model = random_weights(FAMILIES[name])
        tensors = {key: value for key, value in tensors.items() if not key.startswith(MODEL)}
        tensors |= {f"{MODEL}{key}": value for key, value in model.items()}
        tensors = {key.replace("cond_stage_model.", "conditioner.embedders.0."): value
                   for key, value in tensors.items()} | open_clip()
    save_file({key: torch.as_tensor(value).half().contiguous() for key, value in tensors.items()},
              path, metadata=dict(FAMILIES[name].metadata))


def open_clip() -> dict[str, torch.Tensor]:
    """A small CLIP-G in the form of SDXL's checkpoints."""
    width, prefix = SMALL_CLIP_G["hidden_size"], "conditioner.embedders.1.model."
    shapes = {"positional_embedding": (77, width), "token_embedding.weight": (49408, width),
              "text_projection": (width, width), "ln_final.weight": (width,),
              "ln_final.bias": (width,)}
    for layer in (f"transformer.resblocks.{number}." for number in range(3)):
        for name, shape in (("ln_1.weight", (width,)), ("ln_1.bias", (width,)),
                            ("attn.in_proj_weight", (3 * width, width)),
                            ("attn.in_proj_bias", (3 * width,)),
                            ("attn.out_proj.weight", (width, width)),
                            ("attn.out_proj.bias", (width,)), ("ln_2.weight", (width,)),
                            ("ln_2.bias", (width,)), ("mlp.c_fc.weight", (2 * width, width)),
                            ("mlp.c_fc.bias", (2 * width,)),
                            ("mlp.c_proj.weight", (width, 2 * width)),
                            ("mlp.c_proj.bias", (width,))):
            shapes[layer + name] = shape
    return {prefix + name: torch.randn(shape) * 0.03 for name, shape in shapes.items()}


def opened(path, options) -> tuple:
    return comfy.sd.load_checkpoint_guess_config(str(path), te_model_options=options)[:3]


def encode(clip, tokens) -> torch.Tensor:
    """What the last layer of each text encoder gives for some tokens."""
    outputs = []
    for model in clip.cond_stage_model.modules():
        if isinstance(model, SDClipModel):
            model.layer, model.layer_idx = "last", None
            with torch.inference_mode():
                outputs.append(SDClipModel.forward(model, [tokens])[0].flatten())
    return torch.cat(outputs)


def decode(vae, channels: int) -> torch.Tensor:
    return vae.decode(torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("how", ["model", "file"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_host_opens_a_whole_checkpoint(tmp_path, monkeypatch, name, how):
    parts, family = CHECKPOINTS[name], FAMILIES[name]
    kind = HOST_TYPES[len(name) % len(HOST_TYPES)]
    with contextlib.ExitStack() as stack:
        for key in parts.encoders.values():
            stack.enter_context(small_towers(ENCODERS[key]))
        shrunken_detection(family, monkeypatch)
        written(tmp_path / "first.safetensors", name)
        model, clip, vae = opened(tmp_path / "first.safetensors", parts.options())
        if how == "file":
            source = source_of_checkpoint_file(tmp_path / "first.safetensors")
        else:
            source = source_of_checkpoint(model, clip, vae)
        saved = save(source, tmp_path / "a.safetensors", kind)
        again, clip_again, vae_again = opened(saved.path, parts.options())
        tensors = load_file(saved.path)
        marked = [key.removesuffix(MARK) for key in tensors if key.endswith(MARK)]
        # a small T5 lacks the tensor by which ComfyUI knows one that it reads packed
        packed = () if how == "model" and name == "flux-dev" else parts.packed
        assert any(layer.startswith(MODEL) for layer in marked)
        assert all(layer.startswith((MODEL, *packed)) for layer in marked)
        assert all(any(layer.startswith(start) for layer in marked) for start in packed)
        for module, starts in ((again.model.diffusion_model, MODEL),
                               (clip_again.cond_stage_model, (TEXT, OTHER_TEXT))):
            held = sum(isinstance(getattr(each, "weight", None), QuantizedTensor)
                       for each in module.modules())
            assert held == sum(layer.startswith(starts) and "block.23." not in layer
                               for layer in marked)
        assert relative_error(run_family(again, family), run_family(model, family)) < 0.3
        tokens = TOKENS if parts.encoders else (TOKENS * 10)[:77]
        error = relative_error(encode(clip_again, tokens), encode(clip, tokens))
        assert error < 0.5 if packed else error == 0
        channels = family.latent[1] if name in ("sd1.5", "sdxl") else 16
        assert torch.equal(decode(vae_again, channels), decode(vae, channels))
        host = tmp_path / "host.safetensors"
        comfy.sd.save_checkpoint(str(host), model, clip, vae)
        expected = load_file(host)
        parts_of_marked = tuple(f"{layer}." for layer in marked)
        for key, tensor in tensors.items() if how == "model" else ():
            if not key.startswith(parts_of_marked):
                assert tensor.shape == expected[key].shape, key
        assert how == "file" or expected.keys() <= tensors.keys()


@pytest.mark.parametrize("how", ["model", "file"])
def test_a_lora_and_a_size_work_as_for_a_model_alone(tmp_path, how):
    tensors = stable_diffusion()
    save_file(tensors, tmp_path / "first.safetensors")
    model = {key.removeprefix(MODEL): value for key, value in tensors.items()
             if key.startswith(MODEL)}
    block = next(key for key, value in model.items()
                 if "transformer_blocks" in key and value.ndim == 2 and value.shape[1] % 256 == 0)
    lora = {f"diffusion_model.{block.removesuffix('.weight')}.lora_{part}.weight": values * 0.05
            for part, values in (("up", torch.randn(len(model[block]), 4)),
                                 ("down", torch.randn(4, model[block].shape[1])))}
    save_file(lora, tmp_path / "lora.safetensors")
    if how == "file":
        source = source_of_checkpoint_file(
            tmp_path / "first.safetensors", [(str(tmp_path / "lora.safetensors"), 1.0)])
    else:
        first, clip, vae = load_checkpoint(str(tmp_path / "first.safetensors"))
        first, clip = comfy.sd.load_lora_for_models(first, clip, lora, 1.0, 1.0)
        source = source_of_checkpoint(first, clip, vae)
    mix = random.choice([mix for mix in MIXES if {*mix} <= {*HOST_TYPES}])
    coarse, fine = (plan_file(source, tmp_path / "a.safetensors", kind).nbytes
                    for kind in reversed(mix))
    size = (coarse + fine) // 2
    saved = save(source, tmp_path / "a.safetensors", size, row_types=mix)
    assert coarse <= saved.nbytes <= size and {*mix} <= {*saved.types.values()}
    assert re.search(r"LoRA 1 \(strength 1\): (9|10)\d\.\d%", saved.text)
    with pytest.raises(PlanError, match="is too small for this model: .* it takes"):
        plan_file(source, tmp_path / "b.safetensors", 100_000_000, SaveOptions(row_types=mix))
    again = load_file(save(source, tmp_path / "b.safetensors", KEEP_TYPES).path)
    for key, tensor in tensors.items():
        if key != f"{MODEL}{block}":
            assert torch.equal(again[key].float(), tensor.float()), key


def test_what_cannot_be_a_checkpoint_is_refused(tmp_path, monkeypatch):
    save_file(stable_diffusion(), tmp_path / "first.safetensors")
    source = source_of_checkpoint_file(tmp_path / "first.safetensors")
    for path, wanted, message in (
            ("a.safetensors", "NF4", "cannot have weights in GGUF types or NF4. Choose int8"),
            ("a.safetensors", "Q8_0", "cannot have weights in GGUF types or NF4"),
            ("a.safetensors", 10**9, "cannot have weights in GGUF types or NF4"),
            ("a.gguf", "nvfp4", "which must be a safetensors file")):
        with pytest.raises(PlanError, match=message):
            plan_file(source, tmp_path / path, wanted)
    written(tmp_path / "second.safetensors", "aura-flow")
    monkeypatch.setattr(AuraFlow, "clip_target", lambda self, state_dict={}: None)
    monkeypatch.setattr(packing_rules, "UNREAD_ENCODERS", re.compile("no encoder"))
    with pytest.raises(SaveError, match="^ComfyUI reads no text encoders from a checkpoint of"):
        source_of_checkpoint_file(tmp_path / "second.safetensors")
