"""Small model patches of the host's classes under the names of their files, in the hands of the
host's nodes."""
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import comfy.clip_vision
import comfy.ldm.anima.lllite
import comfy.ldm.lumina.controlnet
import comfy.ldm.supir.supir_modules
import comfy.ldm.wan.uni3c
import folder_paths
import torch
from comfy_extras import nodes_model_patch, nodes_wan
from controlnets import FrameLatents, Latents, build_weights
from families import FAMILIES
from host_nodes import MODELS, conditioning, models, seeded, two_steps

WAN = dataclasses.replace(  # whose width 40 heads divide
    FAMILIES["wan2.1-t2v"],
    config={**FAMILIES["wan2.1-t2v"].config, "dim": 640, "num_heads": 5})
MODELS["wan of 640"] = WAN


class ZImageControl(comfy.ldm.lumina.controlnet.ZImage_Control):
    def __init__(self, **options):
        super().__init__(256, 2, 2, ffn_dim_multiplier=1.0, **options)


class QwenControl(nodes_model_patch.QwenImageBlockWiseControlNet):
    def __init__(self, **options):
        super().__init__(1, dim=256, **options)


class StyleProjector(nodes_model_patch.SigLIPMultiFeatProjModel):
    def __init__(self, **options):
        super().__init__(64, 32, 64, 256, **options)


class MultiTalk(nodes_model_patch.MultiTalkModelPatch):
    def __init__(self, **options):
        super().__init__(num_layers=1, **options)


class Supir(torch.nn.Module):
    """SUPIR's control model and two kinds of its adapters, with a fifth of the channels."""

    def __init__(self, device=None, dtype=None, operations=None):
        super().__init__()
        options = {"device": device, "dtype": dtype, "operations": operations}
        supir = comfy.ldm.supir.supir_modules
        self.control_model = supir.GLVControl(
            model_channels=64, num_res_blocks=1, transformer_depth=(0, 1, 1), context_dim=128,
            adm_in_channels=64, channel_mult=(1, 2, 2), **options)
        self.project_modules = torch.nn.ModuleList(
            [supir.ZeroSFT(64, 64, 64, **options), supir.ZeroCrossAttn(64, 64, **options)])


# The host's classes with their fixed sizes, and those of this file that take their place.
SMALL = (
    (comfy.ldm.lumina.controlnet, "ZImage_Control", ZImageControl),
    (nodes_model_patch, "QwenImageBlockWiseControlNet", QwenControl),
    (nodes_model_patch, "SigLIPMultiFeatProjModel", StyleProjector),
    (nodes_model_patch, "MultiTalkModelPatch", MultiTalk),
    (comfy.ldm.supir.supir_modules, "SUPIR", Supir),
)


def shrink(monkeypatch):
    """Has the host build model patches of the sizes of this file."""
    for module, name, small in SMALL:
        monkeypatch.setattr(module, name, small)


def renamed(weights: Mapping[str, torch.Tensor], *names: tuple[str, str]):
    for old, new in names:
        weights = {name.replace(old, new): value for name, value in weights.items()}
    return dict(weights)


def z_image(**options) -> dict[str, torch.Tensor]:
    """As VideoX-Fun writes them: query, key and value apart."""
    weights = {}
    for name, value in build_weights(ZImageControl, **options).items():
        if name.endswith(".attention.qkv.weight"):
            for part, rows in zip("qkv", value.chunk(3)):
                weights[name.replace(".qkv.", f".to_{part}.")] = rows.contiguous()
        else:
            weights[name] = value
    return renamed(weights, (".attention.out.", ".attention.to_out.0."),
                   (".k_norm.", ".norm_k."), (".q_norm.", ".norm_q."))


@functools.cache
def z_image_fun() -> dict[str, torch.Tensor]:
    return z_image()


@functools.cache
def z_image_fun_3() -> dict[str, torch.Tensor]:
    return z_image(n_control_layers=3, additional_in_dim=17, refiner_control=True)


@functools.cache
def z_image_fun_15(broken: bool = False) -> dict[str, torch.Tensor]:
    weights = z_image(n_control_layers=15, additional_in_dim=17, refiner_control=True)
    if broken:  # as the first files of that version are
        name = "control_noise_refiner.0.after_proj.weight"
        weights[name] = torch.zeros_like(weights[name])
    return weights


@functools.cache
def qwen(additional_in_dim: int = 0) -> dict[str, torch.Tensor]:
    return build_weights(QwenControl, additional_in_dim=additional_in_dim)


@functools.cache
def uso() -> dict[str, torch.Tensor]:
    return {f"feature_embedder.{name}": value
            for name, value in build_weights(StyleProjector).items()}


@functools.cache
def uni3c() -> dict[str, torch.Tensor]:
    weights = build_weights(
        comfy.ldm.wan.uni3c.WanUni3CControlnet, in_channels=36, conv_out_dim=128, dim=256,
        ffn_dim=512, num_layers=1, time_embed_dim=256, out_proj_dim=256, add_channels=7,
        mid_channels=8)
    names = ((f".self_attn.{short}.", f".self_attn.{long}.") for short, long in (
        ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")))
    return renamed(weights, *names)


@functools.cache
def multitalk() -> dict[str, torch.Tensor]:
    return build_weights(MultiTalk, in_dim=640, intermediate_dim=32, out_dim=64)


@functools.cache
def supir() -> dict[str, torch.Tensor]:
    weights = {f"model.{name}" if name.startswith("control_model.") else
               f"model.diffusion_model.{name}": value
               for name, value in build_weights(Supir).items()}
    return weights | {"first_stage_model.denoise_encoder.mid.attn_1.q.weight": seeded(64, 64)}


@functools.cache
def lllite() -> dict[str, torch.Tensor]:
    options = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    lllite = comfy.ldm.anima.lllite
    module = torch.nn.Module()
    module.lllite_conditioning1 = lllite.AnimaLLLiteConditioning(3, 64, 64, 1, (1, 2, 4, 8),
                                                                 **options)
    for name in ("self_attn_q_proj", "cross_attn_q_proj", "mlp_layer1"):
        module.add_module(f"lllite_dit_blocks_0_{name}",
                          lllite.AnimaLLLiteModule(256, 64, 64, **options))
    return build_weights(lambda **_: module)


class VideoLatents(Latents):
    """A VAE without weights for frames: 16 channels, a latent of the first and of every 4 more."""

    def encode(self, pictures):
        return super().encode(pictures)[::4].movedim(0, 1).unsqueeze(0)

    def temporal_compression_decode(self):
        return 4


def pictures(count: int, size: int) -> torch.Tensor:
    return seeded(count, size, size, 3, seed=9).abs() % 1


def style() -> comfy.clip_vision.Output:
    output = comfy.clip_vision.Output()
    output.all_hidden_states = seeded(1, 24, 64, 64)
    output.penultimate_hidden_states = seeded(1, 64, 64, seed=2)
    return output


def apply_z_image(model, patch):
    return nodes_model_patch.ZImageFunControlnet().diffsynth_controlnet(
        model, patch, Latents(), pictures(1, 64), 0.8)[0]


def apply_qwen(model, patch):
    return nodes_model_patch.QwenImageDiffsynthControlnet().diffsynth_controlnet(
        model, patch, FrameLatents(), pictures(1, 64), 0.8)[0]


def apply_uso(model, patch):
    return nodes_model_patch.USOStyleReference().apply_patch(model, patch, style())[0]


def apply_uni3c(model, patch):
    return nodes_model_patch.WanUni3CControlnetApply().apply_patch(
        model, patch, VideoLatents(), pictures(5, 32), 0.8, 0.0, 1.0)[0]


def apply_multitalk(model, patch):
    audio = {"encoded_audio_all_layers": [seeded(1, 30, 768, seed=layer) for layer in range(13)]}
    return nodes_wan.WanInfiniteTalkToVideo.execute(
        {"mode": "single_speaker"}, model, patch, [], [], VideoLatents(), 32, 32, 5, audio, 9,
        start_image=pictures(1, 32), audio_scale=1.0).result[0]


def apply_lllite(model, patch):
    return nodes_model_patch.AnimaLLLiteApply().apply_patch(
        model, patch, pictures(1, 64), 0.8, 0.0, 1.0)[0]


@dataclasses.dataclass(frozen=True)
class Kind:
    """weights: of the file. base: the model it patches, one of `host_nodes.MODELS`; None: it is run
    alone. apply: (model, patch) -> the model that a node of the host returns. cfg: 1.0 where that
    patches no batch."""

    weights: Callable[[], Mapping[str, torch.Tensor]]
    base: str | None
    apply: Callable[[Any, Any], Any] | None = None
    cfg: float = 3.0


KINDS = {
    "Z-Image Fun": Kind(z_image_fun, "z-image", apply_z_image),
    "Z-Image Fun 2.0 lite": Kind(z_image_fun_3, "z-image", apply_z_image),
    "Z-Image Fun 2.0": Kind(functools.partial(z_image_fun_15, True), "z-image", apply_z_image),
    "Z-Image Fun 2.1": Kind(z_image_fun_15, "z-image", apply_z_image),
    "Qwen DiffSynth": Kind(qwen, "qwen-image", apply_qwen),
    "Qwen DiffSynth inpaint": Kind(functools.partial(qwen, 4), "qwen-image", apply_qwen),
    "USO": Kind(uso, "flux-dev", apply_uso, cfg=1.0),
    "Uni3C": Kind(uni3c, "wan2.1-t2v", apply_uni3c),
    "InfiniteTalk": Kind(multitalk, "wan of 640", apply_multitalk, cfg=1.0),
    "LLLite": Kind(lllite, "anima", apply_lllite),
    "SUPIR": Kind(supir, None),
}


def load_dense(path: str, monkeypatch):
    """Loads a file in a folder by the host's own node."""
    folder, name = os.path.split(path)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "model_patches",
                        ([folder], {".safetensors"}))
    return nodes_model_patch.ModelPatchLoader().load_model_patch(name)[0]


def sample(kind: Kind, patch=None) -> torch.Tensor:
    """Two steps of the host's sampler on its own dense model with a model patch; where no model of
    a small size takes it, what the patch's layers give."""
    if kind.base is None:
        return run_supir(patch)
    family, model = MODELS[kind.base], models(kind.base)[1]
    if patch is not None:
        model = kind.apply(model, patch)
    noise, latent = (seeded(*family.latent, seed=seed) for seed in (1, 4))
    return two_steps(model, kind.cfg, noise, latent / 2,
                     *(conditioning(kind.base, seed) for seed in (2, 3)))


@torch.inference_mode()
def run_supir(patch) -> torch.Tensor:
    if patch is None:
        return torch.zeros(1, dtype=torch.float32)
    comfy.model_management.load_models_gpu([patch])
    model, x = patch.model, seeded(1, 4, 16, 16)
    features = model.control_model(x, torch.tensor([3.0]), x + 1, seeded(1, 7, 128),
                                   seeded(1, 64))
    fused = model.project_modules[0](features[0], features[1], features[0])
    mixed = model.project_modules[1](features[0], features[0])
    return torch.cat([value.flatten() for value in (*features, fused, mixed)])
