"""Nodes of other packs on a packed model and on ComfyUI's dense one: `other_packs.py FOLDER`.

Runs in a process of its own, for packs replace parts of ComfyUI. FOLDER: of a pack. Prints a line
of JSON for each of its cases, {"case", "error", "effect", "has_effect"}: how far the results of the
two models are apart, how far that of the dense one is from what it gives without the node, and
whether it has to be; or {"log"} if ComfyUI cannot load the pack.
"""
import asyncio
import functools
import io
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HOST_ARGUMENTS", "--cpu --fp32-unet --fp32-vae")
import comfyui_and_pack  # noqa: F401  first: puts both where they can be imported

import folder_paths
import pytest
import torch
from comfy.controlnet import load_controlnet as load_dense_controlnet
from controlnets import KINDS, sample, shrunken_controlnet
from families import shrunken_detection
from host_nodes import MODELS, Case, Setting, execute, lora, models, observed, seeded
from pack_api import WeightFileError
from packed_files import write_q8_0
from patched_models import folder, relative
from safetensors.torch import save_file

import nodes
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.packing.source import check_saveable
from featherweight.nodes.apply_lora import ApplyLora

VIDEO, TILES = (1, 16, 4, 4, 4), (1, 4, 16, 16)


def latent(setting: Setting) -> dict[str, torch.Tensor]:
    return {"samples": setting.latent}


def long_video(_) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(1, 16, 40, 4, 4)}


def ip_adapter(_) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter of Stable Diffusion 1.5 for an image's embedding of 64 numbers; its 16 layers
    have the widths of the model "unet"."""
    layers = {f"{2 * index + 1}.to_{part}_ip.weight": seeded(640 if index == 15 else 320, 768,
                                                             seed=index) * 0.05
              for index in range(16) for part in "kv"}
    projection = {"proj.weight": seeded(4 * 768, 64) * 0.1, "proj.bias": seeded(4 * 768),
                  "norm.weight": seeded(768).abs(), "norm.bias": seeded(768)}
    return {"image_proj": projection, "ip_adapter": layers}


def inpainting(setting: Setting) -> dict[str, torch.Tensor]:
    return {"samples": setting.latent, "noise_mask": torch.ones(1, 1, 64, 64)}


def fooocus_patch(setting: Setting) -> tuple:
    """Fooocus' inpainting: a head, and changes of the weights, as codes with their range."""
    node = nodes.NODE_CLASS_MAPPINGS["INPAINT_ApplyFooocusInpaint"]
    head = sys.modules[node.__module__].InpaintHead()
    head.head.data = seeded(320, 5, 3, 3) * 0.05
    ends = torch.tensor(-0.02), torch.tensor(0.02)
    shapes = {name: values.shape for name, values in setting.model.model.state_dict().items()
              if name.startswith("diffusion_model.") and name.endswith("weight")}
    return head, {name: (seeded(*shape, seed=index).mul(99).abs().to(torch.uint8), *ends)
                  for index, (name, shape) in enumerate(shapes.items())}


def clownshark(family: str) -> tuple[str, Case]:
    return "ClownsharKSampler_Beta", Case(family, {
        "model": lambda setting: setting.model, "positive": lambda setting: setting.conditioning(2),
        "negative": lambda setting: setting.conditioning(3), "latent_image": latent, "steps": 2})


def contexts(_):
    node = nodes.NODE_CLASS_MAPPINGS["ADE_StandardStaticContextOptions"]
    return getattr(node(), node.FUNCTION)(context_length=2, context_overlap=1)[0]


def tiled(family: str, method: str, shape=TILES) -> tuple[str, Case]:
    sizes = {"tile_width": 64, "tile_height": 64, "tile_overlap": 32}
    return "TiledDiffusion", Case(family, {"method": method, **sizes}, latent=shape)


def wan(node: str, **options) -> tuple[str, Case]:
    return node, Case("wan2.1-t2v", **options)


# By the name of a pack's repository: nodes of it, and how they are called.
CASES: dict[str, list[tuple[str, Case]]] = {
    "ComfyUI-KJNodes": [
        ("DifferentialDiffusionAdvanced", Case(noise_mask=True, inputs={
            "samples": latent, "mask": torch.linspace(0, 1, 64).reshape(1, 8, 8)})),
        ("ScheduledCFGGuidance", Case(steps=4, inputs={"end_percent": 0.5})),
        ("CFGZeroStarAndInit", Case()),
        ("ModelPatchTorchSettings", Case(effect=False)),
        ("ModelMemoryUsageFactorOverride", Case(effect=False)),
        ("PatchModelPatcherOrder", Case(effect=False)),
        ("ApplyRifleXRoPE_HunuyanVideo", Case("hunyuan-video", {"latent": long_video})),
        ("NABLA_AttentionKJ", Case("kandinsky5", {"latent": latent, "torch_compile": False},
                                   effect=False)),  # of longer videos
        wan("ApplyRifleXRoPE_WanVideo", inputs={"latent": long_video}),
        wan("WanVideoEnhanceAVideoKJ", latent=VIDEO, inputs={"latent": latent}),
        wan("WanVideoNAG"),
        wan("WanChunkFeedForward", effect=False, inputs={"dim_threshold": 0}),
    ],
    "ComfyUI_IPAdapter_plus": [
        ("IPAdapterEmbeds", Case("unet", {
            "ipadapter": ip_adapter, "pos_embed": seeded(1, 64), "neg_embed": seeded(1, 64, seed=2),
            "weight_type": kind})) for kind in ("linear", "style transfer")
    ],
    "ComfyUI-TiledDiffusion": [
        tiled(*each) for each in (
            ("unet", "MultiDiffusion"), ("unet", "Mixture of Diffusers"),
            ("unet", "SpotDiffusion"), ("flux-schnell", "MultiDiffusion", (1, 16, 16, 16)))
    ],
    "ComfyUI-AnimateDiff-Evolved": [
        # frames that no motion model joins
        ("ADE_UseEvolvedSampling", Case("unet", {"context_options": contexts}, latent=(4, 4, 8, 8),
                                        effect=False))
    ],
    "Comfy-WaveSpeed": [
        ("ApplyFBCacheOnModel", Case(family, {"residual_diff_threshold": 1.0}, steps=6))
        for family in ("unet", "sdxl", "sd3.5", "hunyuan-video")
    ],
    "comfyui-inpaint-nodes": [
        ("INPAINT_ApplyFooocusInpaint", Case("unet", {"patch": fooocus_patch,
                                                      "latent": inpainting})),
    ],
    "LanPaint": [
        ("LanPaint_KSampler", Case("unet", {
            "steps": 2, "LanPaint_NumSteps": 2, "latent_image": inpainting})),
    ],
    "RES4LYF": [
        clownshark("flux-schnell"), clownshark("unet"),
        ("ReWanPatcher", Case("wan2.1-t2v", effect=False)),
    ],
    "sd-perturbed-attention": [
        (name, Case("unet", cfg=6.0)) for name in (
            "PerturbedAttention", "SmoothedEnergyGuidanceAdvanced", "TokenPerturbationGuidance",
            "NormalizedAttentionGuidance", "FrequencyDecoupledGuidance", "PLADIS")
    ],
    "Skimmed_CFG": [
        (name, Case(family, cfg=6.0)) for name in ("Skimmed CFG", "Skimmed CFG - replace")
        for family in ("unet", "flux-schnell")
    ],
    "ComfyUI-Advanced-ControlNet": [], "ComfyUI-GGUF": [],  # have what takes no Case
}


def compare(name: str, case: Case) -> dict:
    """Returns the line of a node."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    packed, dense = (
        [observed(kind, value, setting) for kind, value in execute(node, setting)]
        for setting in (Setting(case, True), Setting(case, False))
    )
    errors = [relative(found, outputs[kind]) for results, outputs in zip(packed, dense)
              for kind, found in results.items()]
    plain = Setting(case, False)
    drawn = next((outputs["MODEL"] for outputs in dense if "MODEL" in outputs), None)
    effect = None if drawn is None else relative(drawn, plain.sample(plain.model))
    return {"case": f"{name}, {case.family}", "error": max(errors), "effect": effect}


def compare_controlnets(name: str) -> dict:
    """Returns the line of *Apply Advanced ControlNet* with a mask. name: one of KINDS."""
    kind, path = KINDS[name], Path(folder().name)
    node = nodes.NODE_CLASS_MAPPINGS["ACN_AdvancedControlNetApply_v2"]

    def apply(positive, negative, control, hint, vae, mask=None) -> tuple:
        return node.execute(positive, negative, control, hint, 0.8, 0.0, 1.0, mask_optional=mask,
                            vae_optional=vae).args

    masked = functools.partial(apply, mask=torch.linspace(0, 1, 64).reshape(1, 8, 8))
    with pytest.MonkeyPatch.context() as patch:
        shrunken_controlnet(kind, patch)
        values = write_q8_0(path / "control.gguf", kind.weights())
        save_file(values, path / "control.safetensors")
        packed = load_controlnet(str(path / "control.gguf"))
        dense = load_dense_controlnet(str(path / "control.safetensors"))
    expected = sample(kind, dense, apply=masked)
    return {
        "case": f"a mask, {name}",
        "error": relative(sample(kind, packed, packed_base=True, apply=masked), expected),
        "effect": relative(expected, sample(kind, dense, apply=apply))
    }


def compare_gguf() -> dict:
    """Returns the line of *Apply LoRA* on a model of ComfyUI-GGUF's own loader, which computes in
    16 bits."""
    dense, path = Setting(Case(), False), Path(folder().name)
    models("flux-schnell")  # writes the files
    save_file(lora(dense), path / "lora.safetensors")
    for key in ("unet", "diffusion_models", "unet_gguf", "loras"):
        folder_paths.folder_names_and_paths[key] = [str(path)], {".gguf", ".safetensors"}
    with pytest.MonkeyPatch.context() as patch:
        shrunken_detection(MODELS["flux-schnell"], patch)
        model, = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet("flux-schnell-False.gguf")
    with pytest.raises(WeightFileError, match="another pack's loader"):
        check_saveable(model)
    changed = ApplyLora.execute(model, "lora.safetensors").args[0]
    expected, = nodes.LoraLoaderModelOnly().load_lora_model_only(dense.model, "lora.safetensors", 1)
    drawn = dense.sample(expected)
    return {"case": "Apply LoRA", "error": relative(dense.sample(changed), drawn), "limit": 1e-3,
            "effect": relative(drawn, dense.sample(dense.model)), "has_effect": True}


def load_pack(path: Path) -> str:
    """Has ComfyUI load a pack, as at its start. Returns what it logs if it cannot, else ""."""
    import server  # here, for tests have a folder of this name

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server.PromptServer(loop)
    log = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(log))
    loop.run_until_complete(nodes.init_builtin_extra_nodes())
    return "" if loop.run_until_complete(nodes.load_custom_node(str(path))) else log.getvalue()


def main(path: Path):
    if log := load_pack(path):
        print(json.dumps({"log": log}))
        return
    torch.set_num_threads(1)
    with torch.inference_mode():
        for name, case in CASES.get(path.name, []):
            effect = {"has_effect": case.effect}
            print(json.dumps(compare(name, case) | effect), flush=True)
        if path.name == "ComfyUI-Advanced-ControlNet":
            for name in ("sd1.5", "flux"):
                print(json.dumps(compare_controlnets(name) | {"has_effect": True}), flush=True)
        if path.name == "ComfyUI-GGUF":
            print(json.dumps(compare_gguf()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
