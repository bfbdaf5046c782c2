"""Model files that people download, a row for each kind that a publisher has, written small.

Names are those of autumn 2026, as pages, templates and lists have them; extensions are left out and
`{a,b}` stands for one name each. `NOT_MADE` says which files cannot be made, and why.
"""
import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import nunchaku_writer
import pytest
import torch
from diffusers_names import (
    DIFFUSERS,
    in_diffusers_names,
    in_the_hosts_names,
    wan_names,
    wan_shapes,
)
from encoders import ENCODERS
from encoders.clip import of_open_clip
from encoders.encoder import TOWERS, in_gguf_names
from encoders.encoder import random_weights as encoder_weights
from encoders.qwen_vl import LAST_LAYER
from families import random_weights
from mflux_models import write_folder as write_mflux
from nunchaku_models import quantized as nunchaku_model
from nunchaku_models import table_of
from published_forms import (
    FP8,
    Encode,
    Encoded,
    Weights,
    fp8_mixed,
    int8_convrot,
    int8_kernels,
    joined,
    marked,
    of_black_forest_labs,
    plain,
    plain_fp8,
    scaled_fp8,
    type_in,
    w4a8,
    write_by_c,
    write_converted,
)
from published_models import (
    CLIP_G_OF_FEW_TOKENS,
    OF_LTX,
    PREFIX,
    WIDE_CLIP_L,
    Published,
    checkpoint,
    diffusion_model,
    family_of,
    family_weights,
    published_name,
    text_encoder,
    vae,
    vae_weights,
)
from safetensors.torch import save_file
from sdnq_writer import H4
from sdnq_writer import write_folder as write_sdnq

from devtools.files.gguf_files import pack, random_rows, write_gguf

# Writes weights below a folder; returns the path, and the values that a reader must get by the
# published names, as far as they are known.
Write = Callable[[Path, Weights, random.Random], tuple[Path, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Row:
    """Files of one kind.

    Attributes:
        repository: of the publisher, or several.
        files: names in it.
        models: names that `model_of` takes.
        forms: how it is written, by name.
        notes: patterns of what a loader or an inspection rightly says of it.
        inspected: what an inspection finds where it is not the model's role.
    """

    repository: str
    files: str
    models: tuple[str, ...]
    forms: Mapping[str, Write]
    notes: tuple[str, ...] = ()
    inspected: str = ""

    @property
    def title(self) -> str:
        return f"{self.repository}: {self.files}"


# --- forms of files
# ------------------------------------------------------------------------------------------------

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def save(path: Path, encoded: Encoded, metadata: Mapping[str, str] | None = None) -> Path:
    metadata = {**encoded.metadata, **(metadata or {})}
    tensors = {name: tensor.contiguous().clone() for name, tensor in encoded.tensors.items()}
    save_file(tensors, path, metadata or None)
    return path


def one_file(encode: Encode, prefix: str = "", metadata: Mapping[str, str] | None = None,
             beside: Mapping[str, torch.Tensor] | None = None) -> Write:
    """A safetensors file. prefix: of the names; beside: tensors that are no weights."""
    def write(folder, weights, chance):
        encoded = encode(weights, chance)
        values = encoded.values
        encoded = joined(encoded.under(prefix) if prefix else encoded,
                         Encoded(dict(beside or {}), {}))
        usual = chance.choice(({}, {"format": "pt"}))
        return save(folder / "model.safetensors", encoded, {**usual, **(metadata or {})}), values
    return write


def files(metadata: Mapping[str, str] | None = None, prefix: str = "",
          beside: Mapping[str, torch.Tensor] | None = None, **forms: Encode) -> dict[str, Write]:
    """Safetensors files of several forms, by their names."""
    return {name: one_file(encode, prefix, metadata, beside) for name, encode in forms.items()}


def ggufs(architecture: str | None, *mixes: str, metadata: Mapping[str, Any] | None = None,
          drops: Callable[[str], bool] = lambda name: False) -> dict[str, Write]:
    """GGUF files by ComfyUI-GGUF's converter or a fork of it. drops: leaves weights out."""
    def writer(mix: str) -> Write:
        def write(folder, weights, chance):
            kept = {name: value for name, value in weights.items() if not drops(name)}
            path = folder / "model.gguf"
            return path, write_converted(path, kept, chance, mix, architecture, metadata)
        return write
    return {mix: writer(mix) for mix in mixes}


def ggufs_by_c(*mixes: str, metadata: Mapping[str, Any] | None = None) -> dict[str, Write]:
    """GGUF files by stable-diffusion.cpp."""
    def writer(mix: str) -> Write:
        def write(folder, weights, chance):
            path = folder / "model.gguf"
            return path, write_by_c(path, weights, chance, mix, metadata)
        return write
    return {mix: writer(mix) for mix in mixes}


# what stands in the name of an mmproj file -> its type, and the dtype of its values
OF_TOWERS = {"BF16": ("BF16", BF16), "F16": ("F16", F16), "Q8_0": ("Q8_0", F32)}


def ggufs_of_encoder(name: str, *mixes: str, mmproj: str | None = None,
                     architecture: str = "",
                     mark: str | None = None) -> dict[str, Write]:
    """GGUF files by llama.cpp. mmproj: name of the file of the vision part that lies next to it;
    mark: name of a weight by which the loaders know it, and which the small model lacks."""
    encoder = ENCODERS[name]

    def writer(mix: str) -> Write:
        def write(folder, weights, chance):
            def type_of(key, values):
                if values.ndim < 2 or not key.endswith(".weight"):
                    return "F32"
                return type_in(mix, chance, values.shape[-1])

            weights = encoder_weights(encoder)
            tower = {key: value for key, value in weights.items() if key.startswith(TOWERS)}
            weights = {key: value for key, value in weights.items() if key not in tower}
            values = {}
            if mmproj:
                assert encoder.mmproj
                dtype, rounded = next(each for name, each in OF_TOWERS.items() if name in mmproj)
                write_gguf(folder / f"{mmproj}.gguf", encoder.mmproj(tower),
                           lambda key, values: dtype if values.ndim > 1 else "F32", "clip",
                           pack=random_rows if dtype == "Q8_0" else pack)
                values = {key: value.to(rounded).float() if value.ndim > 1 else value
                          for key, value in encoder.published(tower).items()
                          if value.ndim == 1 or dtype != "Q8_0"}
            marks = {mark: torch.ones(encoder.markers[mark])} if mark else {}
            stored = in_gguf_names(encoder.changed(encoder.published(weights) | marks),
                                   encoder.architecture)
            if chance.choice((True, False)):  # of models whose head is not their table
                stored.setdefault("output.weight", torch.ones(32, 256))
            path = folder / f"{'Qwen-VL-' if mmproj else ''}encoder-{mix}.gguf"
            said = gguf.MODEL_ARCH_NAMES[encoder.architecture]
            write_gguf(path, stored, type_of, architecture or said, dict(encoder.metadata),
                       pack=random_rows)
            return path, values
        return write
    return {mix: writer(mix) for mix in mixes}


def sdnq(family: str, name: str = "uint4", rank: int = 32, **options) -> dict[str, Write]:
    """A folder of SDNQ, in diffusers' names where the host's are others."""
    def write(folder, weights, chance):
        weights = random_weights(family_of(family))
        table = DIFFUSERS.get(family, DIFFUSERS.get(family.partition("-")[0]))
        table = table and table(family_of(family).config)
        names = wan_names(wan_shapes(16)) if family.startswith("wan") else None
        stored = in_diffusers_names(weights, table) if table else weights
        if names:
            stored = {names[key]: value for key, value in weights.items()}
        values = write_sdnq(
            folder / "transformer", stored, name,
            is_chosen=lambda key, value: value.ndim == 2 and not value.shape[1] % 64,
            group=64, rank=rank, **options)
        if table:
            values = in_the_hosts_names(values, weights, table)
        if names:
            values = {key: values[names[key]] for key in weights}
        return folder / "transformer", {published_name(family, key): value
                                        for key, value in values.items()}
    return {"folder": write}


def nunchaku(family: str, precision: str, *ranks: int) -> dict[str, Write]:
    def writer(rank: int) -> Write:
        def write(folder, weights, chance):
            model = nunchaku_model(family, precision, rank=rank)
            metadata = {**nunchaku_writer.METADATA, "quantization_config": json.dumps({
                "method": "svdquant", "rank": rank, "weight": {
                    "dtype": "int4" if precision == "int4" else "fp4_e2m1_all",
                    "group_size": 64 if precision == "int4" else 16}})}
            values = nunchaku_writer.write(folder / "model.safetensors", model, metadata)
            values = in_the_hosts_names(values, random_weights(family_of(family)),
                                        table_of(family))
            return folder / "model.safetensors", {
                published_name(family, key): value for key, value in values.items()}
        return write
    return {f"{precision}_r{rank}": writer(rank) for rank in ranks}


def mflux(family: str, *bits: int) -> dict[str, Write]:
    """A folder as mflux saves it."""
    def writer(count: int) -> Write:
        def write(folder, weights, chance):
            values = write_mflux(family, folder / "transformer", count)
            return folder / "transformer", {published_name(family, key): value
                                            for key, value in values.items()}
        return write
    return {f"{count} bits": writer(count) for count in bits}


def bnb_files():
    return pytest.importorskip("devtools.files.bnb_files", reason="bitsandbytes writes them")


def nf4_folder(family: str) -> dict[str, Write]:
    """The folder of a transformer as diffusers saves it with bitsandbytes."""
    def write(folder, weights, chance):
        weights, config = random_weights(family_of(family)), family_of(family).config
        table = DIFFUSERS[family](config) if family in DIFFUSERS else None
        path = folder / "transformer"
        path.mkdir()
        stored = in_diffusers_names(weights, table) if table else weights
        values = bnb_files().write_bnb(
            path / "diffusion_pytorch_model.safetensors",
            {key: value.contiguous() for key, value in stored.items()}, nested=True)
        (path / "config.json").write_text(json.dumps({"quantization_config": {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}))
        if table:
            values = in_the_hosts_names(values, weights, table)
        return path, {published_name(family, key): value for key, value in values.items()}
    return {"folder": write}


def nf4(weights: Weights, chance: random.Random) -> Encoded:
    """Every matrix by bitsandbytes."""
    tensors, values = {}, {}
    for name, value in weights.items():
        tensors[name] = values[name] = value
        if value.ndim == 2 and name.endswith(".weight"):
            parts, values[name] = bnb_files().quantised(value, "nf4")
            del tensors[name]
            tensors |= {f"{name}{part}": tensor for part, tensor in parts.items()}
    return Encoded(tensors, values)


IN_BF16 = plain(BF16)


def checkpoint_of(family: str, encode: Encode, vae_name: str, of_vae: Encode = IN_BF16,
                  vae_prefix: str = "vae.", encoders: Callable[..., Encoded] | None = None,
                  metadata: Mapping[str, str] | None = None,
                  beside: Mapping[str, torch.Tensor] | None = None) -> Write:
    """A whole checkpoint. encoders: what it holds of text encoders."""
    def write(folder, weights, chance):
        parts = [encode(family_weights(family), chance).under(PREFIX)]
        if vae_name:
            parts.append(of_vae(vae_weights(vae_name), chance).under(vae_prefix))
        if encoders:
            parts.append(encoders(chance))
        parts.append(Encoded(dict(beside or {}), {}))
        return save(folder / "model.safetensors", joined(*parts), metadata), parts[0].values
    return write


def encoders_of(of_t5: Encode, with_clip_g: bool = False) -> Callable[..., Encoded]:
    """T5 and CLIPs of a checkpoint as ComfyUI saves them."""
    def encoded(chance):
        parts = [of_t5(encoder_weights(ENCODERS["t5-xxl"]), chance).under(
            "text_encoders.t5xxl.transformer.")]
        for name, encoder in (("clip_l", WIDE_CLIP_L), ("clip_g", CLIP_G_OF_FEW_TOKENS)):
            if name != "clip_l" and not with_clip_g:
                continue
            weights = encoder_weights(encoder)
            parts.append(plain(F16)(weights, chance).under(f"text_encoders.{name}.transformer."))
            parts.append(Encoded({f"text_encoders.{name}.logit_scale": torch.tensor(4.6055)}, {}))
        return joined(*parts)
    return encoded


def sdxl_encoders(chance: random.Random) -> Encoded:
    """CLIP-L of transformers and CLIP-G of open_clip, as Stability's checkpoint has them."""
    clip_l = plain(F16)({name: value for name, value in encoder_weights(WIDE_CLIP_L).items()
                         if not name.startswith("text_projection")}, chance)
    clip_g = plain(F16)(of_open_clip(encoder_weights(CLIP_G_OF_FEW_TOKENS)), chance)
    start = "conditioner.embedders."
    return joined(clip_l.under(f"{start}0.transformer."), clip_g.under(f"{start}1.model."),
                  Encoded({f"{start}0.transformer.text_model.embeddings.position_ids":
                           torch.arange(8)[None],
                           f"{start}1.model.logit_scale": torch.tensor(4.6)}, {}))


# --- models
# ------------------------------------------------------------------------------------------------

OF_VAES = {f"VAE {name}": name for name in (
    "flux", "flux2", "flux2 with a small decoder", "wan2.1", "wan2.2", "hunyuan-video-1.5",
    "ace-1.5", "minimax-h3", "minimax-h3 audio")}
CHECKPOINTS = {
    "checkpoint flux-dev": ("flux-dev", "flux"),
    "checkpoint flux-schnell": ("flux-schnell", "flux"),
    "checkpoint sdxl": ("sdxl", "sdxl"), "checkpoint sd3.5": ("sd3.5", "flux"),
    "checkpoint hidream-o1": ("hidream-o1", ""), "checkpoint ltx-2": ("ltx-2", "ltx-2"),
    "checkpoint ltx-2-19b": ("ltx-2-19b", "ltx-2"),
}


@functools.cache
def model_of(name: str) -> Published:
    """Returns the model of a name in a row's `models`."""
    if name in OF_VAES:
        return vae(OF_VAES[name])
    if name in CHECKPOINTS:
        return checkpoint(*CHECKPOINTS[name])
    if name in ENCODERS:
        return text_encoder(name)
    return diffusion_model(name)


# --- the files
# ------------------------------------------------------------------------------------------------

K_S_TO_8 = ("Q3_K_S", "Q4_K_S", "Q5_K_S", "Q8_0")
K_M_TO_8 = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q8_0")
EDIT_2511 = {"__index_timestep_zero__": torch.tensor([])}
LTX_CONFIG = {name: {"config": json.dumps({
    **json.loads(family_of(name).metadata["config"]), "vae": OF_LTX})}
    for name in ("ltx-2", "ltx-2-19b")}
LTX_PARTS = {
    "audio_vae.decoder.conv_in.conv.weight": torch.ones(8, 8, 3, 3),
    "vocoder.conv_pre.weight": torch.ones(8, 8, 3),
    "text_embedding_projection.aggregate_embed.weight": torch.ones(64, 64),
}


def is_connector(name: str) -> bool:
    return "_embeddings_connector." in name


FLUX_1 = (
    Row("Comfy-Org/flux1-dev; Comfy-Org/flux1-schnell", "flux1-dev; flux1-schnell",
        ("flux-dev", "flux-schnell"), files(bf16=plain(BF16))),
    Row("Comfy-Org/flux1-dev", "flux1-dev-fp8", ("checkpoint flux-dev",), {
        "fp8": checkpoint_of("flux-dev", plain_fp8, "flux", plain(F32),
                             encoders=encoders_of(plain(FP8)))}),
    Row("Comfy-Org/flux1-schnell", "flux1-schnell-fp8", ("checkpoint flux-schnell",), {
        "fp8": checkpoint_of("flux-schnell", plain_fp8, "flux", plain(F32),
                             encoders=encoders_of(plain(FP8)))}),
    Row("Comfy-Org/flux1-dev", "flux1-fill-dev", ("flux-fill",), files(bf16=plain(BF16))),
    Row("Comfy-Org/flux1-kontext-dev_ComfyUI", "flux1-dev-kontext_fp8_scaled", ("flux-dev",),
        files(fp8_scaled=scaled_fp8)),
    Row("Kijai/flux-fp8", "flux1-dev-fp8", ("flux-dev",), files(fp8=plain_fp8)),
    Row("city96/FLUX.1-dev-gguf", "flux1-dev-{Q3_K_S,Q4_K_S,Q5_K_S,Q8_0}", ("flux-dev",),
        ggufs("flux", *K_S_TO_8)),
    Row("city96/FLUX.1-schnell-gguf", "flux1-schnell-{Q3_K_S,Q4_K_S,Q5_K_S,Q8_0}",
        ("flux-schnell",), ggufs("flux", *K_S_TO_8)),
    Row("leejet/FLUX.1-dev-gguf", "flux1-dev-{q3_k,q4_k,q8_0}", ("flux-dev",),
        ggufs_by_c("q3_k", "q4_k", "q8_0")),
    Row("unsloth/FLUX.1-dev-GGUF", "flux1-dev-Q4_K_M", ("flux-dev",), ggufs("flux", "Q4_K_M")),
    Row("QuantStack, unsloth: FLUX.1-Kontext-dev-GGUF", "flux1-kontext-dev-Q4_K_M", ("flux-dev",),
        ggufs("flux", "Q4_K_M")),
    Row("YarvixPA/FLUX.1-Fill-dev-GGUF", "flux1-fill-dev-{Q3_K_S,Q4_K_S,Q5_K_S,Q8_0}",
        ("flux-fill",), ggufs("flux", *K_S_TO_8)),
)
FLUX_2 = (
    Row("Comfy-Org/flux2-dev", "flux2_dev_fp8mixed", ("flux2",), files(fp8mixed=fp8_mixed)),
    Row("city96/FLUX.2-dev-gguf", "flux2-dev-{Q4_K_S,Q4_K_M,Q6_K}", ("flux2",),
        ggufs("flux", "Q4_K_S", "Q4_K_M", "Q6_K")),
    Row("unsloth/FLUX.2-dev-GGUF", "flux2-dev-Q4_K_M", ("flux2",), ggufs("flux", "Q4_K_M")),
    Row("orabazes/FLUX.2-dev-GGUF", "flux2_dev_{Q3_K_M,Q4_K_M,Q5_K_M,Q8_0}", ("flux2",),
        ggufs("flux2", *K_M_TO_8)),
    Row("gguf-org/flux2-dev-gguf", "flux2-dev-{q3_k_m,q4_k_m,q8_0}", ("flux2",),
        ggufs("pig", "q3_k_m", "q4_k_m", "q8_0")),
    Row("Comfy-Org/flux2-klein", "flux-2-klein{,-base}-4b", ("flux2-klein",),
        files(bf16=plain(BF16))),
    Row("black-forest-labs/FLUX.2-klein{,-base}-4b-fp8", "flux-2-klein{,-base}-4b-fp8",
        ("flux2-klein",), files(marked=marked("float8_e4m3fn"),
                                unmarked=of_black_forest_labs("fp8"))),
    Row("black-forest-labs/FLUX.2-klein{,-base}-9b-fp8, -9b-kv-fp8",
        "flux-2-klein-9b-fp8, -base-9b-fp8, -9b-kv-fp8", ("flux2-klein",),
        files(marked=marked("float8_e4m3fn"), unmarked=of_black_forest_labs("fp8"))),
    Row("black-forest-labs/FLUX.2-klein-9b-nvfp4", "flux-2-klein-9b-nvfp4", ("flux2-klein",),
        files(marked=marked("nvfp4"), unmarked=of_black_forest_labs("nvfp4"))),
    Row("unsloth/FLUX.2-klein-4B-GGUF", "flux-2-klein-4b-{Q4_K_M,Q8_0}", ("flux2-klein",),
        ggufs("flux", "Q4_K_M", "Q8_0")),
    Row("leejet/FLUX.2-klein-4B-GGUF", "flux-2-klein-4b-Q4_0", ("flux2-klein",),
        ggufs_by_c("Q4_0")),
    Row("unsloth/FLUX.2-klein-9B-GGUF", "flux-2-klein-9b-{Q3_K_M,Q4_K_M,Q5_K_M,Q8_0}",
        ("flux2-klein",), ggufs("flux", *K_M_TO_8)),
    Row("unsloth/FLUX.2-klein-base-9B-GGUF", "flux-2-klein-base-9b-Q4_K_M", ("flux2-klein",),
        ggufs("flux", "Q4_K_M")),
    Row("leejet/FLUX.2-klein-base-{4B,9B}-GGUF", "flux-2-klein-base-9b-Q4_0", ("flux2-klein",),
        ggufs_by_c("Q4_0", "Q8_0")),
)
QWEN = (
    Row("Comfy-Org/Qwen-Image_ComfyUI",
        "qwen_image{,_2512}_{bf16,fp8_e4m3fn}; qwen_image_nvfp4", ("qwen-image",),
        files(bf16=plain(BF16), fp8_e4m3fn=plain_fp8, nvfp4=marked("nvfp4"))),
    Row("Comfy-Org/Qwen-Image-Edit_ComfyUI", "qwen_image_edit_2509_fp8_e4m3fn", ("qwen-image",),
        files(fp8_e4m3fn=plain_fp8)),
    Row("Comfy-Org/Qwen-Image-Edit_ComfyUI",
        "qwen_image_edit_2511_{bf16,int8_convrot,fp8mixed}", ("qwen-image",),
        files(beside=EDIT_2511, bf16=plain(BF16), int8_convrot=int8_convrot, fp8mixed=fp8_mixed)),
    Row("Comfy-Org/marigold-v2-0", "qwen_image_edit_2509_int8_convrot", ("qwen-image",),
        files(int8_convrot=int8_convrot)),
    Row("city96/Qwen-Image-gguf", "qwen-image-{Q3_K_S,Q3_K_M,Q4_K_S,Q6_K}", ("qwen-image",),
        ggufs("qwen_image", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q6_K")),
    Row("unsloth/Qwen-Image-2512-GGUF", "qwen-image-2512-{Q2_K,Q4_K_M,Q6_K,Q8_0}",
        ("qwen-image",), ggufs("qwen_image", "Q2_K", "Q4_K_M", "Q6_K", "Q8_0")),
    Row("unsloth/Qwen-Image-Edit-2511-GGUF", "qwen-image-edit-2511-{Q3_K_M,Q4_K_M,Q6_K,Q8_0}",
        ("qwen-image",), ggufs("qwen_image", "Q3_K_M", "Q4_K_M", "Q6_K", "Q8_0")),
    Row("QuantStack/Qwen-Image-Edit-2509-GGUF", "Qwen-Image-Edit-2509-{Q4_K_M,Q5_K_M,Q8_0}",
        ("qwen-image",), ggufs("qwen_image", "Q4_K_M", "Q5_K_M", "Q8_0")),
)
Z_IMAGE = (
    Row("Comfy-Org/z_image; Comfy-Org/z_image_turbo",
        "z_image{,_turbo}_{bf16,int8_convrot}; z_image_turbo_nvfp4", ("z-image",),
        files(bf16=plain(BF16), int8_convrot=int8_convrot, nvfp4=marked("nvfp4"))),
    Row("jayn7/Z-Image-Turbo-GGUF", "z_image_turbo-{Q3_K_S,Q3_K_M,Q4_K_M,Q8_0}", ("z-image",),
        ggufs("lumina2", "Q3_K_S", "Q3_K_M", "Q4_K_M", "Q8_0")),
    Row("unsloth/Z-Image-Turbo-GGUF; unsloth/Z-Image-GGUF",
        "z-image-turbo-{Q4_K_M,Q8_0}; z-image-Q4_K_M", ("z-image",),
        ggufs("lumina2", "Q4_K_M", "Q8_0")),
    Row("leejet/Z-Image-Turbo-GGUF", "z_image_turbo-{Q3_K,Q4_0,Q4_K,Q8_0}", ("z-image",),
        ggufs_by_c("Q3_K", "Q4_0", "Q4_K", "Q8_0")),
)
OLDER = (
    Row("Comfy-Org/stable-diffusion-3.5-fp8", "sd3.5_large_fp8_scaled", ("checkpoint sd3.5",), {
        "fp8_scaled": checkpoint_of("sd3.5", scaled_fp8, "flux",
                                    encoders=encoders_of(scaled_fp8, with_clip_g=True))}),
    Row("city96/stable-diffusion-3.5-{large,large-turbo,medium}-gguf",
        "sd3.5_large-{Q4_0,Q8_0}; sd3.5_large_turbo-Q4_0; sd3.5_medium-{Q3_K_M,Q4_K_M,Q8_0}",
        ("sd3.5",), ggufs("sd3", "Q4_0", "Q8_0", "Q3_K_M", "Q4_K_M")),
    Row("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0", ("checkpoint sdxl",), {
        "fp16": checkpoint_of("sdxl", plain(F16), "sdxl", plain(F16), "first_stage_model.",
                              sdxl_encoders, {"modelspec.architecture": "stable-diffusion-xl"})}),
    Row("HyperX-Sentience/SDXL-GGUF; mzwing/SDXL-Lightning-GGUF", "(names not seen)", ("sdxl",),
        {"by the converter": ggufs("sdxl", "Q4_K_M")["Q4_K_M"],
         "by stable-diffusion.cpp": ggufs_by_c("Q4_0")["Q4_0"]}),
    Row("lodestones/Chroma1-HD; Comfy-Org/Chroma1-HD_repackaged",
        "Chroma1-HD; Chroma1-HD-fp8mixed", ("chroma",),
        files(bf16=plain(BF16), fp8mixed=fp8_mixed)),
    Row("silveroxides/Chroma1-HD-GGUF", "Chroma1-HD-{Q4_K_M,Q5_K_M,Q8_0}", ("chroma",),
        ggufs("flux", "Q4_K_M", "Q5_K_M", "Q8_0")),
    Row("Comfy-Org/HiDream-I1_ComfyUI", "hidream_i1_{full,dev,fast}_fp8", ("hidream",),
        files(fp8=plain_fp8)),
    Row("city96/HiDream-I1-{Full,Dev,Fast}-gguf", "hidream-i1-full-{Q3_K_M,Q4_K_M,Q8_0}",
        ("hidream",), ggufs("hidream", "Q3_K_M", "Q4_K_M", "Q8_0")),
    Row("Comfy-Org/HiDream-O1-Image", "hidream_o1_image_{bf16,fp8_scaled,mxfp8}",
        ("checkpoint hidream-o1",), {
            name: checkpoint_of("hidream-o1", encode, "") for name, encode in (
                ("bf16", plain(BF16)), ("fp8_scaled", marked("float8_e4m3fn")),
                ("mxfp8", marked("mxfp8")))}, inspected="diffusion model"),
)
KREA = (
    Row("Comfy-Org/Krea-2",
        "krea2_{raw,turbo}_{bf16,fp8_scaled,int8_convrot}; krea2_turbo_{mxfp8,nvfp4}", ("krea2",),
        files(bf16=plain(BF16), fp8_scaled=marked("float8_e4m3fn"), int8_convrot=int8_convrot,
              mxfp8=marked("mxfp8"), nvfp4=marked("nvfp4"))),
    Row("Abiray/Krea-2-Turbo-GGUF", "Krea-2-Turbo-{Q3_K_M,Q4_K_M,Q5_K_M,Q8_0}", ("krea2",),
        ggufs("krea2", *K_M_TO_8)),
    Row("realrebelai/KREA-2_GGUFs; vantagewithai/Krea-2-Turbo-GGUF",
        "TURBO/Krea-2-Turbo-Q6_K; krea2_turbo-{Q4_K_M,Q8_0}", ("krea2",),
        ggufs("krea2", "Q6_K", "Q4_K_M", "Q8_0")),
    Row("Comfy-Org/Ideogram-4",
        "ideogram4{,_unconditional}_{fp8_scaled,int8_convrot,nvfp4_mixed}", ("ideogram4",),
        files(fp8_scaled=marked("float8_e4m3fn"), int8_convrot=int8_convrot,
              nvfp4_mixed=marked("nvfp4", "float8_e4m3fn", mixed=True))),
    Row("molbal/ideogram-4-gguf",
        "ideogram4-{transformer,unconditional_transformer}-{q4_0,q5_0,q8_0}", ("ideogram4",),
        ggufs_by_c("q4_0", "q5_0", "q8_0")),
    Row("Abiray/ideogram-4-GGUF", "ideogram4-{Q4_K,Q6_K,Q8_0}", ("ideogram4",),
        ggufs("ideogram4", "Q4_K", "Q6_K", "Q8_0")),
    Row("circlestone-labs/Anima", "anima-base-v1.0", ("anima",), {
        "bf16": one_file(plain(BF16)), "bf16 with a prefix": one_file(plain(BF16), "net.")}),
    Row("Abiray/Anima-base-v1.0-GGUF", "anima-base-v1.0-{Q3_K_M,Q4_K_M,Q5_K_M,Q8_0}", ("anima",),
        ggufs("cosmos", *K_M_TO_8)),
)
MINIMAX = (
    Row("Comfy-Org/MiniMax-H3", "minimax_h3_{fl2va,ref2va}_{bf16,int8_convrot}", ("minimax-h3",),
        files(bf16=plain(BF16), int8_convrot=int8_convrot)),
    Row("Comfy-Org/MiniMax-H3",
        "minimax_h3_{fl2va,ref2va}_pruned_{bf16,fp8_scaled,int8_convrot}", ("minimax-h3-pruned",),
        files(bf16=plain(BF16), fp8_scaled=marked("float8_e4m3fn"), int8_convrot=int8_convrot)),
    Row("Comfy-Org/MiniMax-H3", "minimax_h3_video_vae_{fp16,int8_convrot}", ("VAE minimax-h3",),
        files(fp16=plain(F16), int8_convrot=int8_kernels)),
    Row("Comfy-Org/MiniMax-H3", "minimax_h3_audio_vae_fp32", ("VAE minimax-h3 audio",),
        files(fp32=plain(F32))),
    Row("unsloth/MiniMax-H3-GGUF", "minimax_h3_fl2va_pruned-{UD-Q2_K_XL,Q3_K,Q4_K,Q8_0}",
        ("minimax-h3-pruned",), ggufs("minimax_h3", "UD-Q2_K_XL", "Q3_K", "Q4_K", "Q8_0")),
    Row("leejet/MiniMax-H3-GGUF", "minimax_h3_fl2va{,_pruned}-Q4_K_M",
        ("minimax-h3", "minimax-h3-pruned"), ggufs_by_c("Q4_K_M")),
    Row("Abiray/MiniMax-H3-GGUF; realrebelai/MiniMax-H3_GGUFs",
        "MiniMax-H3-FL2VA-{Q3_K_M,Q4_K_M,Q5_K_M,Q8_0}", ("minimax-h3",),
        ggufs("minimax_h3", *K_M_TO_8)),
    Row("Lightricks/LTX-2", "ltx-2-19b-{dev,distilled}{,-fp8}", ("checkpoint ltx-2-19b",), {
        name: checkpoint_of("ltx-2-19b", encode, "ltx-2", metadata=LTX_CONFIG["ltx-2-19b"],
                            beside=LTX_PARTS)
        for name, encode in (("bf16", plain(BF16)), ("fp8", fp8_mixed))}),
    Row("Lightricks/LTX-2.3-fp8", "ltx-2.3-22b-{dev,distilled}-fp8", ("checkpoint ltx-2",), {
        "fp8": checkpoint_of("ltx-2", fp8_mixed, "ltx-2", metadata=LTX_CONFIG["ltx-2"],
                             beside=LTX_PARTS)}),
    Row("QuantStack/LTX-2.3-GGUF", "LTX-2.3-{dev,distilled}-{Q3_K_M,Q4_K_M,Q5_K_M,Q8_0}",
        ("ltx-2",), ggufs("ltxv", *K_M_TO_8, metadata=LTX_CONFIG["ltx-2"])),
    Row("unsloth/LTX-2.3-GGUF", "ltx-2.3-22b-{dev,distilled}-{Q3_K_M,Q4_K_M}", ("ltx-2",),
        ggufs("ltxv", "Q3_K_M", "Q4_K_M", metadata=LTX_CONFIG["ltx-2"], drops=is_connector),
        notes=("connector",)),
)
WAN = (
    Row("Comfy-Org/Wan_2.1_ComfyUI_repackaged", "wan2.1_t2v_14B_{bf16,fp8_scaled}",
        ("wan2.1-t2v",), files(bf16=plain(BF16), fp8_scaled=scaled_fp8)),
    Row("Comfy-Org/Wan_2.1_ComfyUI_repackaged", "wan2.1_i2v_480p_14B_fp16", ("wan2.1-i2v",),
        files(fp16=plain(F16))),
    Row("Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
        "wan2.2_{t2v,i2v}_{high,low}_noise_14B_{fp16,fp8_scaled}", ("wan2.1-t2v", "wan2.2-i2v"),
        files(fp16=plain(F16), fp8_scaled=scaled_fp8)),
    Row("Comfy-Org/Wan_2.2_ComfyUI_Repackaged", "wan2.2_ti2v_5B_fp16", ("wan2.2-ti2v",),
        files(fp16=plain(F16))),
    Row("Comfy-Org/Wan_2.1_ComfyUI_repackaged", "wan_2.1_vae", ("VAE wan2.1",),
        files(bf16=plain(BF16, F32))),
    Row("Comfy-Org/Wan_2.2_ComfyUI_Repackaged", "wan2.2_vae", ("VAE wan2.2",),
        files(fp16=plain(F16))),
    Row("city96/Wan2.1-T2V-14B-gguf, -I2V-14B-{480P,720P}-gguf",
        "wan2.1-t2v-14b-{Q3_K_S,Q4_K_M,Q5_K_M,Q8_0}", ("wan2.1-t2v", "wan2.1-i2v"),
        ggufs("wan", "Q3_K_S", "Q4_K_M", "Q5_K_M", "Q8_0")),
    Row("QuantStack/Wan2.2-{T2V,I2V}-A14B-GGUF",
        "{HighNoise,LowNoise}/Wan2.2-T2V-A14B-HighNoise-{Q3_K_S,Q4_K_M,Q8_0}",
        ("wan2.1-t2v", "wan2.2-i2v"), ggufs("wan", "Q3_K_S", "Q4_K_M", "Q8_0")),
    Row("QuantStack/Wan2.2-TI2V-5B-GGUF", "Wan2.2-TI2V-5B-{Q4_K_M,Q8_0}", ("wan2.2-ti2v",),
        ggufs("wan", "Q4_K_M", "Q8_0")),
    Row("Comfy-Org/HunyuanVideo_1.5_repackaged", "hunyuanvideo1.5_720p_{t2v,i2v}_fp16",
        ("hunyuan-video-1.5",), files(fp16=plain(F16))),
    Row("Comfy-Org/HunyuanVideo_1.5_repackaged", "hunyuanvideo15_vae_fp16",
        ("VAE hunyuan-video-1.5",), files(fp16=plain(F16))),
    Row("jayn7/HunyuanVideo-1.5_{T2V,I2V}_720p-GGUF", "720p/hunyuanvideo1.5_720p_t2v-{Q4_K_M,Q6_K}",
        ("hunyuan-video-1.5",), ggufs("hyvid", "Q4_K_M", "Q6_K")),
    Row("Comfy-Org/ace_step_1.5_ComfyUI_files",
        "acestep_v1.5_turbo; acestep_v1.5_xl_turbo_bf16", ("ace-step-1.5",),
        files(bf16=plain(BF16))),
    Row("Comfy-Org/ace_step_1.5_ComfyUI_files", "ace_1.5_vae", ("VAE ace-1.5",),
        files(bf16=plain(BF16, F32))),
    Row("Serveurperso/ACE-Step-1.5-GGUF",
        "acestep-v15-sft-Q8_0; acestep-v15-xl-turbo-{Q4_K_M,Q8_0}", ("ace-step-1.5",),
        ggufs("acestep-dit", "Q8_0", "Q4_K_M")),
)
OTHER_KINDS = (
    Row("nunchaku-ai/nunchaku-flux.1-{dev,schnell,kontext-dev,fill-dev,krea-dev}",
        "svdq-{int4,fp4}_r32-flux.1-dev", ("flux-dev",),
        nunchaku("flux-dev", "int4", 32) | nunchaku("flux-dev", "nvfp4", 32)),
    Row("nunchaku-ai/nunchaku-qwen-image, -qwen-image-edit-2509",
        "svdq-{int4,fp4}_{r32,r128}-qwen-image-edit-2509{,-lightningv2.0-4steps}",
        ("qwen-image",),
        nunchaku("qwen-image", "int4", 32, 128) | nunchaku("qwen-image", "nvfp4", 32, 128)),
    Row("nunchaku-ai/nunchaku-z-image-turbo",
        "svdq-int4_{r32,r128,r256}-z-image-turbo, svdq-fp4_{r32,r128}-z-image-turbo",
        ("z-image",),
        nunchaku("z-image", "int4", 32, 128, 256) | nunchaku("z-image", "nvfp4", 32, 128)),
    *(Row(f"Disty0/{name}-SDNQ-uint4-svd-r32", "(folder)", (family,), sdnq(family))
      for name, family in (
          ("FLUX.1-{dev,Kontext-dev}", "flux-dev"), ("FLUX.2-dev", "flux2"),
          ("Qwen-Image{,-2512,-Edit-2509,-Edit-2511}", "qwen-image"),
          ("Z-Image-Turbo", "z-image"), ("Chroma1-HD", "chroma"),
          ("Wan2.2-{T2V,I2V}-A14B", "wan2.1-t2v"))),
    Row("Disty0/FLUX.2-klein-4B-SDNQ-4bit-dynamic, -9B-4bit-dynamic-svd-r32", "(folder)",
        ("flux2-klein",), sdnq("flux2-klein", "int4", 0)),
    *(Row(f"{name}", "(folder)", (family,),
          sdnq(family, rank=0, rotated=(64, H4), settings={
              "use_hadamard": True, "hadamard_group_size": 64}))
      for name, family in (("Disty0/Ideogram-4-SDNQ-4bit-dynamic-hadamard", "ideogram4"),
                           ("vladmandic/Krea-2-Turbo-sdnq-hadamard-uint4", "krea2"))),
    Row("lllyasviel/flux1-dev-bnb-nf4", "flux1-dev-bnb-nf4-v2", ("checkpoint flux-dev",), {
        "NF4": checkpoint_of("flux-dev", nf4, "flux", encoders=encoders_of(plain(FP8)))}),
    Row("sayakpaul/flux.1-dev-nf4", "(folder)", ("flux-dev",), nf4_folder("flux-dev")),
    Row("diffusers/FLUX.2-dev-bnb-4bit", "(folder)", ("flux2",), nf4_folder("flux2")),
    Row("ideogram-ai/ideogram-4-nf4", "(folder)", ("ideogram4",), nf4_folder("ideogram4")),
    Row("filipstrand/{Z-Image-Turbo,FLUX.1-Krea-dev}-mflux-4bit", "(folder)",
        ("z-image",), mflux("z-image", 4)),
    Row("filipstrand/FLUX.1-Krea-dev-mflux-4bit", "(folder)", ("flux-dev",), mflux("flux-dev", 4)),
    Row("mlx-community/FLUX.2-Klein-4B-4bit", "(folder)", ("flux2-klein",),
        mflux("flux2-klein", 4)),
    Row("mlx-community/Qwen-Image-2512-{4bit,8bit}", "(folder)", ("qwen-image",),
        mflux("qwen-image", 4, 8)),
)


def encoder_files(name: str, **forms: Encode) -> dict[str, Write]:
    """Safetensors files of a text encoder, with the tokenizer that the host reads from it."""
    return files(beside=dict(ENCODERS[name].extra), **forms)


CLIP_BESIDE = {"text_model.embeddings.position_ids": torch.arange(8)[None]}
HEAD = {"lm_head.weight": torch.ones(8, 8, dtype=BF16)}  # this encoder does not use it
T5_NAMES = {"encoder.embed_tokens.weight": torch.ones(256, 256, dtype=F16)}
TEXT_ENCODERS = (
    Row("comfyanonymous/flux_text_encoders", "clip_l", ("clip-l",),
        files(beside=CLIP_BESIDE, fp16=plain(F16))),
    Row("comfyanonymous/flux_text_encoders",
        "t5xxl_fp16; t5xxl_fp8_e4m3fn; t5xxl_fp8_e4m3fn_scaled", ("t5-xxl of transformers",), {
            "fp16": one_file(plain(F16)), "fp16, the table twice": one_file(
                plain(F16), beside=T5_NAMES),
            "fp8_e4m3fn": one_file(plain_fp8), "fp8_e4m3fn_scaled": one_file(scaled_fp8)}),
    Row("Comfy-Org/stable-diffusion-3.5-fp8", "text_encoders/{clip_l,clip_g,t5xxl_fp16}",
        ("clip-l", "clip-g"), files(fp16=plain(F16))),
    Row("Comfy-Org/HiDream-I1_ComfyUI", "{clip_l,clip_g}_hidream", ("clip-l", "clip-g"),
        files(fp16=plain(F16))),
    Row("Comfy-Org/HiDream-I1_ComfyUI", "llama_3.1_8b_instruct_fp8_scaled", ("llama-3-8b",),
        files(fp8_scaled=scaled_fp8)),
    Row("Comfy-Org/flux2-dev", "mistral_3_small_flux2_{bf16,fp8,fp4_mixed}",
        ("mistral-3-24b-flux2",), encoder_files(
            "mistral-3-24b-flux2", bf16=plain(BF16), fp8=marked("float8_e4m3fn"),
            fp4_mixed=marked("nvfp4", "float8_e4m3fn", mixed=True))),
    Row("Comfy-Org/flux2-klein; Comfy-Org/flux2-klein-9B", "qwen_3_4b; qwen_3_8b",
        ("qwen3-4b", "qwen3-8b"), files(bf16=plain(BF16))),
    Row("Comfy-Org/flux2-klein-9B", "qwen_3_8b_fp8mixed", ("qwen3-8b",),
        files(fp8mixed=fp8_mixed)),
    Row("Comfy-Org/Qwen-Image_ComfyUI", "qwen_2.5_vl_7b{,_fp8_scaled,_nvfp4}", ("qwen2.5-vl-7b",),
        files(beside=HEAD, bf16=plain(BF16), fp8_scaled=scaled_fp8, nvfp4=marked("nvfp4"))),
    Row("Comfy-Org/Qwen-Image-2.1", "qwen3vl_8b_{bf16,int8_convrot}", ("qwen3-vl-8b",),
        files(bf16=plain(BF16), int8_convrot=int8_convrot)),
    Row("Comfy-Org/z_image_turbo", "qwen_3_4b{,_fp8_mixed,_fp4_mixed}", ("qwen3-4b",),
        files(bf16=plain(BF16), fp8_mixed=fp8_mixed,
              fp4_mixed=marked("nvfp4", "float8_e4m3fn", mixed=True))),
    Row("Comfy-Org/Krea-2", "qwen3vl_4b_{bf16,fp8_scaled}", ("qwen3-vl-4b",),
        files(bf16=plain(BF16), fp8_scaled=marked("float8_e4m3fn"))),
    Row("black-forest-labs/flux-3-image-klein-comfy", "qwen3vl_4b_int8_convrot", ("qwen3-vl-4b",),
        files(int8_convrot=int8_convrot)),
    Row("Comfy-Org/Qwen3-VL", "qwen3vl_8b_fp8_scaled", ("qwen3-vl-8b",),
        files(fp8_scaled=marked("float8_e4m3fn"))),
    Row("circlestone-labs/Anima", "qwen_3_06b_base", ("qwen3-0.6b",), files(bf16=plain(BF16))),
    Row("Comfy-Org/MiniMax-H3", "qwen3vl_32b_minimax_h3_{bf16,int8_convrot,nvfp4_awq}",
        ("qwen3-vl-32b",), files(bf16=plain(BF16), int8_convrot=int8_convrot,
                                 nvfp4_awq=marked("nvfp4", smoothed=True), w4a8=w4a8)),
    Row("Comfy-Org/ltx-2", "gemma_3_12B_it{,_fp8_scaled,_fp4_mixed}", ("gemma-3-12b",),
        encoder_files("gemma-3-12b", bf16=plain(BF16), fp8_scaled=scaled_fp8,
                      fp4_mixed=marked("nvfp4", "float8_e4m3fn", mixed=True))),
    Row("Comfy-Org/Wan_2.1_ComfyUI_repackaged; Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
        "umt5_xxl_{fp16,fp8_e4m3fn_scaled}", ("umt5-xxl of transformers",),
        encoder_files("umt5-xxl of transformers", fp16=plain(F16), fp8_e4m3fn_scaled=scaled_fp8)),
    Row("gguf-org/flux2-dev-gguf", "cow-mistral3-small-{q4_0,q8_0}", ("mistral-3-24b-flux2",),
        ggufs_of_encoder("mistral-3-24b-flux2", "q4_0", "q8_0", architecture="cow")),
    Row("leejet/MiniMax-H3-GGUF", "qwen3vl_32b_minimax_h3-{Q2_K_M,Q4_K_M}", ("qwen3-vl-32b",),
        ggufs_of_encoder("qwen3-vl-32b", "Q2_K_M", "Q4_K_M", mark=LAST_LAYER),
        notes=(f"does not use '{LAST_LAYER}' of",)),
    Row("city96/t5-v1_1-xxl-encoder-gguf", "t5-v1_1-xxl-encoder-{Q3_K_S,Q4_K_M,Q5_K_M,Q8_0}",
        ("t5-xxl",), ggufs_of_encoder("t5-xxl", "Q3_K_S", "Q4_K_M", "Q5_K_M", "Q8_0")),
    Row("city96/umt5-xxl-encoder-gguf", "umt5-xxl-encoder-{Q3_K_S,Q4_K_M,Q5_K_M,Q8_0}",
        ("umt5-xxl",), ggufs_of_encoder("umt5-xxl", "Q3_K_S", "Q4_K_M", "Q5_K_M", "Q8_0")),
    Row("unsloth/Qwen2.5-VL-7B-Instruct-GGUF",
        "Qwen2.5-VL-7B-Instruct-Q4_K_M, mmproj-BF16", ("qwen2.5-vl-7b",),
        {"mmproj as it comes": ggufs_of_encoder("qwen2.5-vl-7b", "Q4_K_M",
                                                mmproj="mmproj-BF16")["Q4_K_M"],
         "mmproj renamed": ggufs_of_encoder("qwen2.5-vl-7b", "Q4_K_M",
                                            mmproj="Qwen2.5-VL-7B-mmproj-BF16")["Q4_K_M"],
         "no mmproj": ggufs_of_encoder("qwen2.5-vl-7b", "Q4_K_M")["Q4_K_M"]}),
    Row("mradermacher/Qwen2.5-VL-7B-Instruct-GGUF",
        "Qwen2.5-VL-7B-Instruct.Q4_K_M, Qwen2.5-VL-7B-Instruct.mmproj-Q8_0", ("qwen2.5-vl-7b",),
        ggufs_of_encoder("qwen2.5-vl-7b", "Q4_K_M", mmproj="Qwen2.5-VL-7B-Instruct.mmproj-Q8_0")),
    Row("QuantStack/Qwen-Image-Edit-GGUF", "mmproj/Qwen2.5-VL-7B-Instruct-mmproj-BF16",
        ("qwen2.5-vl-7b",), ggufs_of_encoder(
            "qwen2.5-vl-7b", "Q4_K_M", mmproj="Qwen2.5-VL-7B-Instruct-mmproj-BF16")),
    Row("Qwen/Qwen3-VL-{8B,4B}-Instruct-GGUF",
        "Qwen3VL-8B-Instruct-Q4_K_M, mmproj-Qwen3VL-8B-Instruct-F16", ("qwen3-vl-8b",),
        ggufs_of_encoder("qwen3-vl-8b", "Q4_K_M", mmproj="mmproj-Qwen3VL-8B-Instruct-F16")),
    Row("Qwen/Qwen3-VL-{8B,4B}-Instruct-GGUF", "Qwen3VL-4B-Instruct-Q4_K_M", ("qwen3-vl-4b",),
        ggufs_of_encoder("qwen3-vl-4b", "Q4_K_M", mmproj="mmproj-Qwen3VL-4B-Instruct-F16")),
    Row("unsloth/Qwen3-{4B,8B}-GGUF", "Qwen3-4B-Q4_K_M", ("qwen3-4b",),
        ggufs_of_encoder("qwen3-4b", "Q4_K_M")),
    Row("unsloth/Qwen3-{4B,8B}-GGUF", "Qwen3-8B-Q6_K", ("qwen3-8b",),
        ggufs_of_encoder("qwen3-8b", "Q6_K")),
    Row("unsloth/gemma-3-12b-it-qat-GGUF", "gemma-3-12b-it-qat-UD-Q4_K_XL", ("gemma-3-12b",),
        ggufs_of_encoder("gemma-3-12b", "UD-Q4_K_XL")),
    Row("unsloth/Mistral-Small-3.2-24B-Instruct-2506-GGUF",
        "Mistral-Small-3.2-24B-Instruct-2506-Q4_K_M", ("mistral-3-24b",),
        ggufs_of_encoder("mistral-3-24b", "Q4_K_M")),
)
OTHER_VAES = (
    Row("Comfy-Org/Lumina_Image_2.0_Repackaged", "ae", ("VAE flux",), files(fp32=plain(F32))),
    Row("Comfy-Org/flux2-dev", "flux2-vae", ("VAE flux2",), files(fp32=plain(F32))),
    Row("black-forest-labs/FLUX.2-small-decoder", "full_encoder_small_decoder",
        ("VAE flux2 with a small decoder",), files(bf16=plain(BF16))),
    Row("Comfy-Org/Qwen-Image_ComfyUI", "qwen_image_vae", ("VAE wan2.1",),
        files(bf16=plain(BF16))),
)
ROWS = (*FLUX_1, *FLUX_2, *QWEN, *Z_IMAGE, *OLDER, *KREA, *MINIMAX, *WAN, *OTHER_KINDS,
        *TEXT_ENCODERS, *OTHER_VAES)

NEWER = "the ComfyUI of these tests does not know the model"
# files -> why they are not among ROWS
NOT_MADE = {
    "black-forest-labs/flux-3-image-klein-comfy: flux3-image-klein{,-base}-{bf16,int8-convrot}":
        NEWER,
    "AtomicChat/FLUX-3-Image-Klein-GGUF: AD-Q4_K, AD-Q5_K": NEWER,
    "Comfy-Org/Qwen-Image-2.1: qwen_image_2.1{,_turbo}_{bf16,int8_convrot}": NEWER,
    "Comfy-Org/Qwen-Image-2.1: qwen_image_2.1_vae_bf16": NEWER,
    "leejet/Qwen-Image-2.1-GGUF: qwen_image_2.1-{Q4_0,Q5_0,Q8_0}": NEWER,
    "abenzerps, unsloth: Qwen-Image-2.1-GGUF: qwen-image-2.1-{Q4_K_M,Q5_K_M,Q8_0}": NEWER,
    "Lightricks/LTX-2.5: ltx-2.5-22b-distilled-transformer-comfy-int8-convrot": NEWER,
    "Lightricks/LTX-2.5: gemma4-12b-with-proj-ltx-2.5-comfy-int8-convrot": NEWER,
    "unsloth/LTX-2.5-GGUF: distilled/ltx-2.5-22b-distilled-UD-Q4_K_XL": NEWER,
    "Abiray/LTX-2.5-Distilled-GGUF: LTX-2.5-Distilled-{Q3_K_M,Q4_K_M,Q5_K_M,Q8_0}": NEWER,
    "elix3r/gemma4-12b-with-proj-ltx-2.5-GGUF: gemma4-12b-with-proj-ltx-2.5-Q5_K_M": NEWER,
    "Comfy-Org/MiniMax-H3-Image: minimax_h3_image_pruned_{bf16,int8_convrot}, w4a8": NEWER,
    "LSDJesus, AtomicChat, Abiray: MiniMax-H3-Image-GGUF; unsloth/MiniMax-H3-Image-FP8": NEWER,
    "PrunaAI/P-H3-Image-Comfy; AtomicChat, vantagewithai: P-H3-Image-GGUF": NEWER,
    "UltraFast: Qwen-Image-2.1 Q4_K": NEWER,
    "realrebelai: MOSS-Image GGUFs": NEWER,
    "RelayVSR, PAN 2, Fibo-2.0, Kandinsky 6": NEWER,
    "MOSS-Image, Ming-Image, Fibo-2.0, Boogu, Mage-Flow, JoyAI, MiniMax-Music-3, YuE2":
        "only their templates were seen; Boogu, Mage-Flow and JoyAI are in test_model_table.py",
    "molbal/krea2-gguf: Q8_CR": "tests/loaders/files/test_gguf_marks.py has its writer",
    "Comfy-Org/HunyuanVideo_1.5_repackaged: byt5_small_glyphxl_fp16":
        "it loads beside another encoder only: tests/loaders/encoders/test_t5.py",
    "Comfy-Org/ace_step_1.5_ComfyUI_files: qwen_{0.6b,1.7b,4b}_ace15":
        "they load as a pair only, of two sizes",
}
