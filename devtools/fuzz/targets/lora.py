"""LoRA files: safetensors, torch's and GGUF adapters, read and compared with a model."""
import io
import os
import pickle
from pathlib import Path

import numpy as np

from . import Target, target

LAYERS = ("double_blocks.0.img_attn.proj", "single_blocks.0.linear1", "img_in")
CONFIG = {"context_in_dim": 64, "hidden_size": 128, "num_heads": 1, "depth": 1,
          "depth_single_blocks": 1, "vec_in_dim": 32, "guidance_embed": False}


class Program:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("id",)


def lora_target(folder: Path, samples: list[bytes], ending: str) -> Target:
    """Returns a target that reads a LoRA and compares it with a small Flux."""
    import torch
    from lora_models import empty_model

    from featherweight.loaders.container.weight_file import WeightFileError
    from featherweight.loaders.lora.compatibility import check_lora
    from featherweight.loaders.lora.lora_file import load_lora_file
    from featherweight.loaders.lora.report import report_text

    patcher = empty_model("Flux.1", **CONFIG)
    patcher.model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in patcher.model.parameters():
            parameter.fill_(0.01)

    def read(path: Path):
        report = check_lora(patcher, None, *load_lora_file(str(path)), measure=True)
        report_text(report, path.name, {})

    return Target(folder, samples, read, (WeightFileError,), f"lora{ending}")


def loras() -> list[dict]:
    """Returns small LoRAs of each adapter type."""
    import torch
    from patched_models import KINDS, lora_for

    weight = {f"{LAYERS[0]}.weight": torch.full((128, 128), 0.01)}
    weight[f"{LAYERS[0]}.weight"][0] = 0.02  # values that are all alike have no spread
    made = [lora_for(weight, kind, rank=2) for kind in KINDS]
    down, up = torch.full((2, 128), 0.01), torch.full((128, 2), 0.02)
    layer = f"diffusion_model.{LAYERS[0]}"
    plain = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    full = {f"{layer}.diff_b": torch.zeros(128), f"{layer}.set_weight": torch.zeros(4, 4),
            f"{layer}.oft_blocks": torch.zeros(2, 4, 4),
            "diffusion_model.x.reshape_weight": torch.tensor([2, 2])}
    small = [each for each in made if sum(tensor.nbytes for tensor in each.values()) < 1 << 14]
    return [plain, full, *small]


@target
def lora(folder: Path) -> Target:
    """LoRA files in safetensors, compared with a small Flux"""
    from safetensors.torch import save

    return lora_target(folder, [
        save({name: tensor.clone() for name, tensor in each.items()},
             {"ss_base_model_version": "flux1"}) for each in loras()], ".safetensors")


@target
def lora_torch(folder: Path) -> Target:
    """LoRA files of torch (pickles, only with weights_only)"""
    import torch

    samples = [pickle.dumps(Program(), protocol=2)]
    for tensors in loras()[:2]:
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
            samples.append(file.getvalue())
    return lora_target(folder, samples, ".pt")


@target
def lora_gguf(folder: Path) -> Target:
    """GGUF adapters"""
    from .models import written_gguf

    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 2}
    return lora_target(folder, [
        written_gguf({f"{name}.weight.lora_{half}": np.full(shape, 0.1) for name in names
                      for half, shape in (("a", (rank, 128)), ("b", (128, rank)))},
                     lambda name, values, kind=kind: kind, architecture, metadata)
        for names, kind, architecture, rank in (
            (LAYERS, "F16", "flux", 2), (("enc.blk.0.attn_q",), "Q8_0", "t5", 32))], ".gguf")
