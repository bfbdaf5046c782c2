"""LoRA files, safetensors, torch's and GGUF adapters: read, and held against a model."""
import io
import pickle
import random

import numpy as np

from ..gguf_fields import gguf_damaged
from ..mutations import bytes_damaged, safetensors_damaged
from . import Target

LAYERS = ("double_blocks.0.img_attn.proj", "single_blocks.0.linear1", "img_in")


class Program:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        import os
        return os.system, ("id",)


class LoraTarget(Target):
    ending: str

    def prepare(self):
        import torch

        from featherweight.loaders.files.container import WeightFileError
        from featherweight.loaders.lora.compatibility import check_lora
        from featherweight.loaders.lora.lora_file import load_lora_file
        from featherweight.loaders.lora.report import report_text

        self.load, self.check, self.report, self.own = (
            load_lora_file,
            check_lora,
            report_text,
            (WeightFileError,),
        )
        self.model = _small_flux(torch)
        return self.honest()

    def honest(self) -> list[bytes]:
        raise NotImplementedError

    def read(self, data):
        path = self.folder / f"lora{self.ending}"
        path.write_bytes(data)
        report = self.check(self.model, None, *self.load(str(path)), measure=True)
        self.report(report, path.name, {})


class SafetensorsLora(LoraTarget):
    name, reads, ending = (
        "lora",
        "LoRA files in safetensors, held against a small Flux",
        ".safetensors",
    )
    damaged = staticmethod(safetensors_damaged)

    def honest(self):
        from safetensors.torch import save
        return [
            save({key: value.clone()
                  for key, value in tensors.items()}, {"ss_base_model_version": "flux1"})
            for tensors in _loras()
        ]


class TorchLora(LoraTarget):
    name, reads, ending = (
        "lora_torch",
        "LoRA files of torch (pickles, only with weights_only)",
        ".pt",
    )

    def honest(self):
        import torch
        out = []
        for tensors in _loras()[:2]:
            for zipped in (True, False):
                file = io.BytesIO()
                torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
                out.append(file.getvalue())
        return [*out, pickle.dumps(Program(), protocol=2)]

    def damaged(self, data, chance: random.Random):
        return bytes_damaged(data, chance)


class AdapterGGUF(LoraTarget):
    name, reads, ending = "lora_gguf", "GGUF adapters", ".gguf"
    damaged = staticmethod(gguf_damaged)

    def honest(self):
        from devtools.files.gguf_files import write_gguf
        path, out = self.folder / "honest.gguf", []
        for names, kind, architecture, rank in (
            (LAYERS, "F16", "flux", 2),
            (("enc.blk.0.attn_q",), "Q8_0", "t5", 32),
        ):
            tensors = {
                f"{name}.weight.lora_{half}": np.full(shape, 0.1, np.float32) for name in names
                for half, shape in (("a", (rank, 128)), ("b", (128, rank)))
            }
            write_gguf(
                path,
                tensors,
                lambda name, values: kind,
                architecture,
                {
                    "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 2
                })
            out.append(path.read_bytes())
        path.unlink()
        return out


def _loras() -> list[dict]:
    """Small LoRAs of each kind; their values are not random, so that files stay small and alike."""
    import torch
    down, up = torch.full((2, 128), 0.01), torch.full((128, 2), 0.02)
    plain = {f"diffusion_model.{name}.lora_{half}.weight": value for name in LAYERS[:1] for half,
             value in (("A", down), ("B", up))}
    kohya = {
        f"lora_unet_{LAYERS[0].replace('.', '_')}.{part}": value
        for part, value in (("lora_down.weight", down), ("lora_up.weight", up),
                            ("alpha", torch.tensor(1.0)), ("dora_scale", torch.ones(128, 1)))
    }
    loha = {f"lora_unet_{LAYERS[0].replace('.', '_')}.hada_{part}": value for part, value in (
        ("w1_a", up), ("w1_b", down), ("w2_a", up), ("w2_b", down))}
    lokr = {
        f"lora_unet_{LAYERS[0].replace('.', '_')}.lokr_{part}": torch.full(shape, 0.1)
        for part, shape in (("w1", (2, 2)), ("w2_a", (64, 2)), ("w2_b", (2, 64)))
    }
    full = {f"diffusion_model.{LAYERS[0]}.diff_b": torch.zeros(128),
            f"diffusion_model.{LAYERS[0]}.set_weight": torch.zeros(4, 4),
            f"diffusion_model.{LAYERS[0]}.oft_blocks": torch.zeros(2, 4, 4),
            "diffusion_model.x.reshape_weight": torch.tensor([2, 2])}
    return [plain, kohya, loha, lokr, full]


def _small_flux(torch):
    """A Flux of the host's, 128 wide, without values but those that a measurement reads."""
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models
    config = comfy.supported_models.Flux({"image_model": "flux", "in_channels": 16,
                                         "out_channels": 16, "patch_size": 2, "context_in_dim": 64,
                                         "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1,
                                         "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56,
                                         56], "theta": 10000, "qkv_bias": True, "vec_in_dim": 32,
                                         "guidance_embed": False, "txt_ids_dims": []})
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model({}, "", device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
