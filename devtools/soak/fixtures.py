"""The files of a soak: small models of several families in many formats, LoRAs, encoders, a
checkpoint, and bad ones."""
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import families
import numpy as np
import torch
from safetensors.torch import save_file

from devtools.files import bnb_files, demo_files, gguf_files, tiny_models

OURS, STOCK = "FeatherweightLoadDiffusionModel", "UNETLoader"
FLUX = {"hidden": 256, "double_blocks": 1, "single_blocks": 1, "context": 256}
REPLACED = "replaced {}.gguf"  # for each client one, of which the contents change
CONTENTS = "contents {}.gguf"
ENCODERS = (demo_files.ENCODER_NAME, "soak clip_l NF4.safetensors")
LORAS = ("soak blocks.safetensors", "soak attention.safetensors")
LONG = "many layers.gguf"  # whose load can be cancelled


@dataclass(frozen=True)
class Model:
    """A way to load a model of a family. loader, inputs: the node."""

    family: str
    loader: str
    inputs: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.loader, *map(str, self.inputs.values())])


SIZE = {"width": 64, "height": 64, "batch_size": 1}
# the tests' small models of the host's own classes
FAMILIES = {"flux": families.FAMILIES["flux-schnell"], "sd3": families.FAMILIES["sd3.5"],
            "sd1.5": families.FAMILIES["sd1.5"], "wan": families.FAMILIES["wan2.1-t2v"]}
# the host's node that makes an empty latent, and its inputs
LATENTS = {"flux": ("EmptySD3LatentImage", SIZE), "sd3": ("EmptySD3LatentImage", SIZE),
           "sd1.5": ("EmptyLatentImage", SIZE),
           "wan": ("EmptyHunyuanLatentVideo", SIZE | {"length": 5})}
TYPES = {
    "flux": ("Q8_0", "Q4_K", "Q2_K", "IQ4_XS", "NF4", "FP4", "int8"), "sd3": ("Q5_0", "NF4"),
    "sd1.5": ("Q4_0", "NF4"), "wan": ("Q6_K", "int8")
}


def file_name(family: str, kind: str) -> str:
    return f"{family} {kind}.{'safetensors' if kind in ('dense', 'NF4', 'FP4', 'int8') else 'gguf'}"


def models() -> list[Model]:
    """Every way to load one of `write`'s models, the host's own for the dense ones first."""
    found = [
        Model(family, STOCK, {"unet_name": file_name(family, "dense"), "weight_dtype": "default"})
        for family in FAMILIES
    ]
    found += [
        Model("flux", STOCK,
              {"unet_name": file_name("flux", "dense"), "weight_dtype": "fp8_e4m3fn"})
    ]
    found += [Model(family, OURS, {"model_name": file_name(family, kind), "compute": compute})
              for family, kinds in TYPES.items() for kind in kinds for compute in ("exact", "int8")
              if compute == "exact" or kind in ("Q8_0", "Q4_K", "NF4")]
    found += [Model(family, OURS, {"model_name": file_name(family, "dense"), "pack_to": kind})
              for family in FAMILIES for kind in ("Q8_0", "NF4")]
    found += [Model("flux", "UnetLoaderGGUF", {"unet_name": file_name("flux", "Q8_0")}),
              Model("flux", "UNETLoaderNF4", {"unet_name": file_name("flux", "NF4")})]
    return found


def write(base: Path):
    """Write all of it below `base`/models, 500 MB."""
    models, bad = base / "models", base / "models" / "diffusion_models"
    demo_files.make_models(base, ("Q8_0", "NF4"))
    demo_files.make_checkpoint(base)
    shapes = tiny_models.clip_l_shapes()
    bnb_files.write_random_bnb(models / "text_encoders" / ENCODERS[1], shapes)
    for family, kinds in TYPES.items():
        weights = families.random_weights(FAMILIES[family])
        save_file({name: value.bfloat16().contiguous() for name, value in weights.items()},
                  bad / file_name(family, "dense"))
        for kind in kinds:
            write_packed(bad / file_name(family, kind), weights, kind, family)
    for seed in (1, 2):
        weights = {name: torch.from_numpy(value)
                   for name, value in tiny_models.flux(seed, **FLUX).items()}
        write_packed(bad / CONTENTS.format(seed), weights, "Q4_K", "flux")
    gguf_files.write_random_gguf(bad / LONG, tiny_models.flux_shapes(128, 40, 80, 256), "Q8_0")
    for part, name in zip(("blocks", "attn"), LORAS):
        tensors = tiny_models.flux_lora(5, part, "lora_unet_{flat}", ".lora_down.weight",
                                        ".lora_up.weight", strength=0.3, **FLUX)
        save_file({key: torch.from_numpy(value) for key, value in tensors.items()},
                  models / "loras" / name)
    write_bad(bad)


def write_packed(path: Path, weights: dict[str, torch.Tensor], kind: str, family: str):
    if kind in ("NF4", "FP4"):
        bnb_files.write_bnb(path, weights, kind.lower(), keep=_small)
    elif kind == "int8":
        bnb_files.write_bnb_int8(path, weights, keep=_small)
    else:
        gguf_files.write_gguf(
            path, weights, lambda name, values: "F32"
            if values.ndim < 2 or values.size < 1 << 14 else kind,
            architecture=family.partition(".")[0])


def _small(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim != 2 or not name.endswith(".weight") or tensor.numel() < 1 << 14


def write_bad(folder: Path):
    """Files that cannot be loaded, each of another kind."""
    good = (folder / file_name("flux", "Q8_0")).read_bytes()
    packed = (folder / file_name("flux", "NF4")).read_bytes()
    files = {
        "bad empty.gguf": b"", "bad page.gguf": b"<!DOCTYPE html><html>Sign in</html>",
        "bad cut.gguf": good[:-1000], "bad header.gguf": good[:200],
        "bad count.gguf": good[:8] + (1 << 62).to_bytes(8, "little") + good[16:],
        "bad cut.safetensors": packed[:-1000], "bad header.safetensors": packed[:50],
        "bad json.safetensors": (64).to_bytes(8, "little") + b"{" * 64
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for kind, name in (("lora", "double_blocks.0.img_attn.proj.weight.lora_a"),
                       ("unknown", "something.weight")):
        gguf_files.write_gguf(folder / f"bad {kind}.gguf", {name: np.ones((4, 32), np.float32)},
                              lambda name, values: "Q8_0")


def bad_names(base: Path) -> list[str]:
    """The bad files, and one that is not there."""
    return [
        *sorted(path.name for path in (base / "models" / "diffusion_models").glob("bad *")),
        "not there.gguf"
    ]


def replace(base: Path, client: int, content: int):
    """Put one of two contents under the name of a client's replaced file, as a download does: at
    once."""
    folder = base / "models" / "diffusion_models"
    part = folder / f"{REPLACED.format(client)}.new"
    shutil.copyfile(folder / CONTENTS.format(content), part)
    part.replace(folder / REPLACED.format(client))


def stamp(base: Path) -> str:
    """What says that the files in `base` are whole and of this version; none where they are not."""
    path = base / "written.json"
    wanted = json.dumps([model.name for model in models()])
    return "" if path.is_file() and path.read_text() == wanted else wanted
