"""Each of the host's own nodes that takes a MODEL does to a packed model what it does to the host's
dense one."""
import asyncio
import functools
import re

import comfy.clip_vision
import comfy.ldm.lumina.controlnet
import comfy.ops
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_extras import nodes_model_patch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from comfy_extras.nodes_model_merging import ModelSubtract
from host_nodes import (
    Case,
    FrameVae,
    Setting,
    difference_controlnet,
    execute,
    image,
    lora,
    model_patch,
    observed,
    schema,
    seeded,
    vae,
)
from patched_models import relative
from safetensors.torch import save_file

import nodes
from devtools import ROOT

pytestmark = pytest.mark.usefixtures("small_models")

def subtracted(setting: Setting):
    return ModelSubtract().merge(setting.model, setting.other_model, 1.0)[0]


def every(names: str, *args, **options) -> dict[str, Case]:
    return {name: Case(*args, **options) for name in names.split()}


def sharpen():
    return nodes.NODE_CLASS_MAPPINGS["LatentOperationSharpen"].execute(
        sharpen_radius=3, sigma=1.0, alpha=0.5)[0]


with_ops = {"operations": comfy.ops.manual_cast}

CASES = {
    # Samplers, guiders and what is told to them.
    **every(
        "APG BasicGuider BasicScheduler BetaSamplingScheduler CFGGuider CFGNorm CFGOverride"
        " CFGZeroStar DualCFGGuider KSampler KSamplerAdvanced Mahiro PerpNeg PerpNegGuider"
        " RenormCFG RescaleCFG SDTurboScheduler SamplerCustom SamplerSASolver"
        " SamplingPercentToSigma TCFG TemporalScoreRescaling VideoLinearCFGGuidance"
        " VideoTriangleCFGGuidance NAGuidance"
    ),
    "DualModelGuider": Case(
        inputs={
            "model_negative": lambda setting: setting.other_model,
            "negative": lambda setting: setting.conditioning(3),
        }
    ),
    "AddNoise": Case(inputs={"noise": Noise_RandomNoise(1)}),
    "DifferentialDiffusion": Case(noise_mask=True),
    "EasyCache": Case(inputs={"reuse_threshold": 3.0, "start_percent": 0.0}, steps=6),
    "LazyCache": Case(inputs={"reuse_threshold": 3.0, "start_percent": 0.0}, steps=6),
    "Epsilon Scaling": Case(),
    "FreSca": Case(inputs={"freq_cutoff": 1}),
    "LatentApplyOperationCFG": Case(inputs={"operation": lambda _: sharpen()}),
    "ScaleROPE": Case(inputs={"scale_x": 2.0}),
    **every(
        "SkipLayerGuidanceDiT SkipLayerGuidanceDiTSimple SkipLayerGuidanceSD3",
        inputs={
            "double_layers": "0",
            "single_layers": "0",
            "layers": "0",
            "start_percent": 0.0,
            "end_percent": 1.0,
        },
    ),
    # Noise schedules.
    **every(
        "MiniMaxH3SigmaShift ModelSamplingAuraFlow ModelSamplingContinuousEDM"
        " ModelSamplingContinuousV ModelSamplingDiscrete ModelSamplingFlux ModelSamplingLTXV"
        " ModelSamplingSD3 ModelSamplingStableCascade"
    ),
    "ModelNoiseScale": Case(inputs={"noise_scale": 2.0}),
    "ModelComputeDtype": Case(inputs={"dtype": "bf16"}, limit=0.02),
    # Attention and blocks of UNets.
    **every(
        "FreeU FreeU_V2 PerturbedAttentionGuidance SelfAttentionGuidance TomePatchModel", "unet"
    ),
    **every("UNetCrossAttentionMultiply UNetSelfAttentionMultiply", "unet", floats=1.5),
    "UNetTemporalAttentionMultiply": Case("unet", effect=False),  # of Stable Video Diffusion
    "HyperTile": Case("unet", inputs={"tile_size": 1, "swap_size": 1}),
    "HypernetworkLoader": Case("unet", inputs={"hypernetwork_name": "hypernetwork.pt"}),
    "PatchModelAddDownscale": Case("unet", inputs={"block_number": 1, "end_percent": 1.0}),
    "DiffControlNetLoader": Case(
        "unet", inputs={"control_net_name": lambda _: difference_controlnet()}
    ),
    # LoRA and training.
    "LoraLoader": Case(inputs={"clip": None, "lora_name": "lora.safetensors"}),
    "LoraLoaderModelOnly": Case(inputs={"lora_name": "lora.safetensors"}),
    "LoraLoaderBypass": Case(inputs={"clip": None, "lora_name": "lora.safetensors"}),
    "LoraLoaderBypassModelOnly": Case(inputs={"lora_name": "lora.safetensors"}),
    "LoraModelLoader": Case(inputs={"lora": lora}),
    "LoraSave": Case(
        inputs={"model_diff": subtracted, "lora_type": "full_diff", "bias_diff": True}
    ),
    "GetICLoRAParameters": Case(),
    "TrainLoraNode": Case(inputs={"steps": 2, "training_dtype": "fp32", "lora_dtype": "fp32"}),
    # Merging and saving.
    "ModelMergeAdd": Case(),
    "ModelMergeSubtract": Case(),
    **every("ModelMergeSimple ModelMergeFlux1", floats=0.3),
    **every("ModelMergeBlocks ModelMergeSD1", "unet", floats=0.3),
    "ModelMergeSDXL": Case("sdxl", floats=0.3),
    **every("ModelMergeSD3_2B ModelMergeSD35_Large", "sd3.5", floats=0.3),
    "ModelMergeAuraflow": Case("aura-flow", floats=0.3),
    **every("ModelMergeCosmos7B ModelMergeCosmos14B", "cosmos", floats=0.3),
    **every(
        "ModelMergeCosmosPredict2_2B ModelMergeCosmosPredict2_14B", "cosmos-predict2", floats=0.3
    ),
    "ModelMergeKrea2": Case("krea2", floats=0.3),
    "ModelMergeLTXV": Case("ltxv", floats=0.3),
    "ModelMergeMochiPreview": Case("mochi", floats=0.3),
    "ModelMergeQwenImage": Case("qwen-image", floats=0.3),
    "ModelMergeWAN2_1": Case("wan2.1-t2v", floats=0.3),
    "ModelSave": Case(),
    "CheckpointSave": Case(inputs={"clip": None, "vae": None}),
    "ImageOnlyCheckpointSave": Case(inputs={"clip_vision": None, "vae": None}),
    # Of one family.
    # only memory differs
    "ChromaRadianceOptions": Case("chroma-radiance", inputs={"nerf_tile_size": 0}, effect=False),
    # smooths what lies 32 from the edges
    "HiDreamO1PatchSeamSmoothing": Case(inputs={"start_percent": 0.0}, effect=False),
    "ContextWindowsManual": Case(
        "wan2.1-t2v",
        inputs={"context_length": 2, "context_overlap": 1, "dim": 2},
        latent=(1, 16, 4, 4, 4),
    ),
    "WanContextWindowsManual": Case(
        "wan2.1-t2v", inputs={"context_length": 5, "context_overlap": 1}, latent=(1, 16, 4, 4, 4)
    ),
    "LTXVContextWindows": Case(
        "ltxv", inputs={"context_length": 9, "context_overlap": 1}, latent=(1, 128, 4, 4, 4)
    ),
    "ARVideoI2V": Case(
        "wan2.1-t2v",
        inputs={
            "vae": lambda _: vae(),
            "start_image": image(32, 32),
            "width": 32,
            "height": 32,
            # read by the sampler of causal models
            "length": 5,
        },
        effect=False,
    ),
    "wanBlockSwap": Case("wan2.1-t2v", effect=False),  # does nothing since the host manages memory
    "FluxKVCache": Case("flux2", effect=False),
    # Several devices, of which there is one here; tests/loaders/models/test_diffusion_patcher.py
    # clones models for another.
    "MultiGPU_WorkUnits": Case(effect=False),
    "SelectModelDevice": Case(inputs={"device": "cpu"}, effect=False),
    # Small modules that patch a model.
    "QwenImageDiffsynthControlnet": Case(
        "qwen-image",
        inputs={
            "model_patch": lambda _: model_patch(
                nodes_model_patch.QwenImageBlockWiseControlNet(1, dim=256, **with_ops)
            ),
            "vae": FrameVae(),
            "image": image(64, 64),
        },
    ),
    "ZImageFunControlnet": Case(
        "z-image",
        inputs={
            "model_patch": lambda _: model_patch(
                comfy.ldm.lumina.controlnet.ZImage_Control(
                    256, 2, 2, ffn_dim_multiplier=1.0, n_control_layers=2, **with_ops
                )
            ),
            "vae": lambda _: vae(),
            "image": image(64, 64),
        },
    ),
    "USOStyleReference": Case(
        cfg=1.0,
        inputs={
            "model_patch": lambda _: model_patch(
                nodes_model_patch.SigLIPMultiFeatProjModel(9, 2, 16, 256, **with_ops)
            ),
            "clip_vision_output": lambda _: clip_vision_output(),
        },
    ),
}

# Nodes that no model of a test's size can be given, and nodes that other tests run.
EXCEPTIONS = {
    "ModelMergeSD2": "another id of ModelMergeSD1's class",
    "RTDETR_detect": "RT-DETR finds things in pictures and is no diffusion model",
    "SAM3_Detect": "SAM 3 cuts out things in pictures and is no diffusion model",
    "SAM3_VideoTrack": "SAM 3 cuts out things in pictures and is no diffusion model",
    "SDPoseKeypointExtractor": "SDPose has one size, 0.9 billion weights, and a head beside its"
                               " UNet",
    "SeedVR2Conditioning": "reads two tensors of SeedVR2, which has 3 billion weights or more",
    "TripoSplatSamplingPreview": "asks the autoencoder of TripoSplat for its decoder; the model is"
                                 " only cloned",
    "SUPIRApply": "SUPIR's patch has one size, 1.3 billion weights",
    "WanInfiniteTalkToVideo": "its patch is for Wan 14B; it sets wrappers and patches of attention"
                              " as other nodes here do",
    "LTXVReferenceAudio": "asks the sound autoencoder of LTX-2; its guidance is that of"
                          " SkipLayerGuidanceDiT",
    "TorchCompileModel": "tests/ops/layers/test_compile.py has it",
    "AnimaLLLiteApply": "its patch is built from a file's names alone; the rest is"
                        " QwenImageDiffsynthControlnet's way",
    "WanUni3CControlnetApply": "encodes a video with the autoencoder of Wan, which has one size"
}


def clip_vision_output() -> comfy.clip_vision.Output:
    output = comfy.clip_vision.Output()
    output.all_hidden_states = seeded(1, 24, 9, 16)
    output.penultimate_hidden_states = seeded(1, 9, 16, seed=2)
    return output


@functools.cache
def host_nodes() -> dict[str, type]:
    """Id -> class of the host's own nodes that take a MODEL."""
    asyncio.run(nodes.init_builtin_extra_nodes())
    return {
        name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items()
        if node.__module__.split(".")[0] in ("nodes",
                                             "comfy_extras") or "comfy_extras" in node.__module__
        if any(kind == "MODEL" for kind, _ in schema(node).values())
    }


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Folders of the host: what nodes save lies below `tmp_path`, and they find small files
    there."""
    save_file(lora(None), tmp_path / "lora.safetensors")
    layers = {f"linear.{index}.{part}": seeded(*shape, seed=index) * 0.1 for index in (1, 2)
              for part, shape in (("weight", (768, 768)), ("bias", (768,)))}
    torch.save({768: [layers, layers]}, tmp_path / "hypernetwork.pt")
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise",
                        lambda folder, name: str(tmp_path / name))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def results(name: str, case: Case, packed: bool, folder) -> list[dict[str, torch.Tensor]]:
    """What a node gives, and what it saves."""
    setting = Setting(case, packed)
    before = set(folder.rglob("*.safetensors"))
    with torch.inference_mode():
        found = [
            observed(kind, value, setting) for kind, value in execute(host_nodes()[name], setting)
        ]
    saved = [
        comfy.utils.load_torch_file(str(path))
        for path in set(folder.rglob("*.safetensors")) - before
    ]
    return found + saved


@functools.cache
def picture_without_nodes(family: str, latent: tuple | None, steps: int, cfg: float,
                          noise_mask: bool) -> torch.Tensor:
    """What the dense model draws for the cases with these settings."""
    setting = Setting(Case(family, latent=latent, steps=steps, cfg=cfg, noise_mask=noise_mask),
                      packed=False)
    with torch.inference_mode():
        return setting.sample(setting.model)


@pytest.mark.parametrize("name", CASES)
def test_a_node_does_to_a_packed_model_what_it_does_to_a_dense_one(name, files):
    if name not in host_nodes():
        pytest.skip(f"this ComfyUI has no node {name}")
    case = CASES[name]
    packed, dense = (results(name, case, is_packed, files) for is_packed in (True, False))
    assert len(packed) == len(dense)
    for found, expected in zip(packed, dense):
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value.shape == expected[key].shape
            value, wanted = value.float(), expected[key].float()
            assert (value - wanted).norm() <= case.limit * wanted.norm(), key
    assert any(packed) or name == "GetICLoRAParameters"
    if "MODEL" in host_nodes()[name].RETURN_TYPES:
        without = picture_without_nodes(case.family, case.latent, case.steps, case.cfg,
                                        case.noise_mask)
        found = next(outputs["MODEL"] for outputs in dense if "MODEL" in outputs)
        assert (relative(found, without) > 1e-3) == case.effect, relative(found, without)


def test_every_node_of_the_host_that_takes_a_model_is_run_or_excused():
    assert set(host_nodes()) <= CASES.keys() | EXCEPTIONS.keys()
    assert host_nodes()["ModelMergeSD2"] is host_nodes()["ModelMergeSD1"]
    assert not CASES.keys() & EXCEPTIONS.keys()


def test_nodes_that_the_compatibility_page_names_are_run():
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    table = page.split("## ComfyUI's own nodes")[1].split("\n## ")[0]
    names = ", ".join(re.findall(r"^\| ([^|-][^|]*) \|", table, re.M)[1:]).split(", ")
    host_nodes()  # loads all
    ids = {display: node_id for node_id, display in nodes.NODE_DISPLAY_NAME_MAPPINGS.items()}
    # writes text, on the real server
    in_other_files = {"TextGenerate": ROOT / "tests/server/test_text_encoder.py"}
    assert len(names) > 3
    for name in names:
        node_id = ids[name]
        assert node_id in CASES or node_id in in_other_files[node_id].read_text(encoding="utf-8")
