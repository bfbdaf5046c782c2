"""The files of a soak: the demo's model in many types, with its LoRAs, text encoder and VAE, one
with many layers, and bad ones."""
import shutil
from pathlib import Path

from devtools.files import demo_files, gguf_files, tiny_models

OURS = "FeatherweightLoadDiffusionModel"
REPLACED = "replaced {}.gguf"  # for each client one, of which the contents change
LONG = "many layers.gguf"  # whose load can be cancelled
TYPES = ("Q8_0", "Q4_K", "Q2_K", "IQ4_XS", "NF4", "FP4", "int8")
DENSE = demo_files.MODELS["F16"]
NOT_THERE = "not there.gguf"
Loader = tuple[str, dict]  # class of a node and its inputs


def file_name(kind: str) -> str:
    return f"soak {kind}.{'safetensors' if kind in ('NF4', 'FP4', 'int8') else 'gguf'}"


def loaders() -> list[Loader]:
    """Every way to load the model."""
    return [
        ("UNETLoader", {"unet_name": DENSE, "weight_dtype": "default"}),
        ("UnetLoaderGGUF", {"unet_name": file_name("Q8_0")}),
        ("UNETLoaderNF4", {"unet_name": file_name("NF4")}),
        *((OURS, {"model_name": DENSE, "pack_to": kind}) for kind in ("Q8_0", "NF4")),
        *((OURS, {"model_name": file_name(kind), "compute": compute})
          for kind in TYPES for compute in ("exact", "int8"))]


def write(base: Path):
    """Write all of it below `base`/models."""
    demo_files.make_models(base, ("F16",))
    folder = base / "models" / "diffusion_models"
    for kind in TYPES:
        demo_files.write_model(folder / file_name(kind), kind)
    gguf_files.write_random_gguf(folder / LONG, tiny_models.flux_shapes(128, 40, 80, 768), "Q8_0")
    good, packed = ((folder / file_name(kind)).read_bytes() for kind in ("Q8_0", "NF4"))
    for name, data in {
            "page.gguf": b"<!DOCTYPE html><html>Sign in</html>", "cut.gguf": good[:-1000],
            "count.gguf": good[:8] + (1 << 62).to_bytes(8, "little") + good[16:],
            "cut.safetensors": packed[:-1000]}.items():
        (folder / f"bad {name}").write_bytes(data)


def bad_names(base: Path) -> list[str]:
    """The bad files, and one that is not there."""
    found = (base / "models" / "diffusion_models").glob("bad *")
    return [*sorted(path.name for path in found), NOT_THERE]


def replace(base: Path, name: str, kind: str):
    """Put the file of a type under another name, as a download does: at once."""
    folder = base / "models" / "diffusion_models"
    part = folder / f"{name}.new"
    shutil.copyfile(folder / file_name(kind), part)
    part.replace(folder / name)
