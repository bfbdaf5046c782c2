"""Workflows with the node ids of other packs, in `server/legacy_workflows`, and the files that they
name."""
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from devtools import demo
from devtools.files import demo_files, tiny_models
from devtools.files.gguf_files import write_gguf

# a plain fp8 model with a LoRA, which ComfyUI loads itself on a GPU, and rounds to fp8 again
OTHER_ON_A_GPU = "api loaders given safetensors"
WORKFLOWS = sorted((Path(__file__).parents[1] / "server" / "legacy_workflows").glob("*.json"))


def write_files(models: Path):
    """The files that the workflows name, in folders of their own: the demo's, and Flux and CLIP-L
    as plain files."""
    folders = {
        key: models / key / "legacy"
        for key in ("diffusion_models", "text_encoders", "checkpoints", "vae")
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(models / "diffusion_models" / demo.MODEL_NAME,
                folders["diffusion_models"] / "flux-Q8_0.gguf")
    shutil.copy(models / "text_encoders" / demo_files.ENCODER_NAME,
                folders["text_encoders"] / "clip_l-Q8_0.gguf")
    vae = load_file(models / "vae" / demo_files.VAE_NAME)
    write_gguf(folders["vae"] / "vae-F16.gguf", vae, lambda name, values: "F16", architecture="pig")
    fp8 = {
        name: torch.from_numpy(value).to(torch.float8_e4m3fn if value.ndim == 2 else torch.float16)
        for name, value in tiny_models.flux(context=768).items()
    }
    save_file(fp8, folders["diffusion_models"] / "flux_fp8.safetensors")
    vae = {
        f"vae.{name}": torch.from_numpy(value) for name, value in tiny_models.autoencoder().items()
    }
    save_file({f"model.diffusion_model.{name}": value for name, value in fp8.items()} | vae,
              folders["checkpoints"] / "flux_fp8_checkpoint.safetensors")
    generator = torch.Generator().manual_seed(0)
    encoder = {
        name: torch.randn(shape, generator=generator) * 0.03 +
        ("norm" in name and name.endswith("weight"))
        for name, shape in tiny_models.clip_l_shapes().items()
    }
    save_file(encoder, folders["text_encoders"] / "clip_l.safetensors")
