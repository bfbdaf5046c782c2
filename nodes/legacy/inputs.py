"""The inputs of other packs' nodes as rows of data: kind, settings, and why one has no effect.

A key is the input's name, with a word after a colon where packs differ in what they offer.
"""
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ...loaders.devices import DEFAULT, gpus
from ...loaders.paths.folders import (
    DIFFUSION_MODEL,
    ENCODER,
    LORA_FOLDERS,
    list_files,
    list_model_folders,
)
from ..combo_options import combo_options, encoder_types, host_node
from ..file_inputs import (
    Options,
    file_options,
    is_name,
    list_options,
    nullable_options,
    open_options,
)
from ..load_diffusion_model import FOLDERS
from ..load_text_encoder import FOLDERS as CLIP_FOLDERS

CHECKPOINT_FOLDERS = ("checkpoints_gguf", "checkpoints")
VAE_FOLDERS = ("vae_gguf", "vae", "vae_approx")
NONE = "None"  # a slot without a LoRA
FLUX_SLOTS, SLOTS = 15, 10  # LoRAs of a stack
MAX_GPUS = 64
STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
MODEL_FILE = "A file in models/diffusion_models or models/unet."


@dataclass(frozen=True)
class LegacyInput:
    """An input of another pack's node.

    Attributes:
        kind: the host's class of inputs.
        tooltip: of the input; of an unused one, why it has no effect.
        settings: further arguments of the host's class.
        options: makes the options, of a combo.
        required: whether a workflow must have it.
        unused: whether it has no effect, and is there for old workflows.
        file: whether it is the file, or one of the files, that a loader reads.
    """

    kind: Any
    tooltip: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Callable[[], Sequence[str]] | None = None
    required: bool = False
    unused: bool = False
    file: bool = False

    def make(self, name: str):
        """Returns the host's input of that name."""
        settings = dict(self.settings)
        if self.options:
            options = self.options()
            settings["options"] = options if isinstance(options, list) else list(options)
            settings["extra_dict"] = dict(getattr(options, "settings", {}))
        if not self.required:
            settings["optional"] = True
        tooltip = f"Kept for old workflows. {self.tooltip}" if self.unused else self.tooltip
        return self.kind.Input(name, tooltip=tooltip, **settings)


def make_inputs(keys: str, further: Mapping[str, LegacyInput] | None = None) -> list:
    """Returns the host's inputs of these keys of `INPUTS`, which have spaces between them."""
    rows = {**INPUTS, **(further or {})}
    return [rows[key].make(key.partition(":")[0]) for key in keys.split()]


def _choice(tooltip: str, options: Callable[[], Sequence[str]], file: bool = False) -> LegacyInput:
    return LegacyInput(io.Combo, tooltip, options=options, required=True, file=file)


_file = functools.partial(_choice, file=True)


def _vaes() -> Options:
    gguf = [name for name in list_files("vae_gguf") if name.lower().endswith(".gguf")]
    return file_options([*gguf, *host_vae_names()], VAE_FOLDERS)


def host_vae_names() -> list[str]:
    """Returns what the host's own VAE loader offers."""
    return combo_options(host_node("VAELoader"), "vae_name")


def _unused(kind, why: str, default, options: Callable | Sequence[str] | None = None,
            **settings: Any) -> LegacyInput:
    make = options if options is None or callable(options) else lambda: options
    return LegacyInput(kind, why, {"default": default, **settings}, make, unused=True)


class DeviceInput(LegacyInput):
    """A choice of a device, where the first GPU, if there is one, is the default."""

    def make(self, name: str):
        made = super().make(name)
        made.default = made.default or made.options[min(1, len(gpus()))]
        return made


def _device(tooltip: str, default: str | None = None, required: bool = False) -> DeviceInput:
    return DeviceInput(io.Combo, tooltip, {"default": default},
                       lambda: open_options(["cpu", *map(str, gpus())]), required)


COMPUTES = (
    "The device that computes. If this machine does not have it, ComfyUI's default device is used."
)
ENCODER_FILE = (
    "A file in models/text_encoders or models/clip: GGUF, NF4 or any other, in any order."
)
FLUX_ENCODER_FILE = (
    "CLIP-L or T5, in any order: a file in models/text_encoders or models/clip, GGUF, NF4 or any"
    " other."
)
TEXT_TYPE = "The model the text is encoded for."
DTYPES = ("default", "target", "float32", "float16", "bfloat16")
SWITCH = ("enable", "disable")
OFFLOAD = "ComfyUI moves weights to main memory by itself."


def _virtual_vram(default: float = 4.0, maximum: float = 128.0, required=False) -> LegacyInput:
    return LegacyInput(
        io.Float,
        "This many GiB of the model's weights are kept on the donors and are copied in at each"
        " step.", {"default": default, "min": 0.0, "max": maximum, "step": 0.1},
        required=required)


def _donor(required: bool = False) -> LegacyInput:
    return _device("The device that keeps the weights of the virtual VRAM.", "cpu", required)


_EXPERT = LegacyInput(
    io.String,
    "How much stays on the device that computes, instead of virtual VRAM: bytes"
    " (cuda:0,2.5gb;cpu,*), percentages of the model (cuda:0,25%;cpu,75%) or a fraction of the"
    " device's memory (cuda:0,0.1). The rest is in main memory.",
    {"default": "", "multiline": False})
_HIDDEN: dict[str, Any] = {"advanced": True}

INPUTS: dict[str, LegacyInput] = {
    # files
    **dict.fromkeys(("unet_name", "gguf_name", "model_name"),
                    _file(MODEL_FILE, lambda: list_options(*FOLDERS))),
    **dict.fromkeys(
        ("unet_name:folders", "model_name:folders", "model_path"),
        _file(MODEL_FILE, lambda: list_options(*FOLDERS, model_class=DIFFUSION_MODEL))),
    "ckpt_name": _file("A file in models/checkpoints.", lambda: list_options(*CHECKPOINT_FOLDERS)),
    "vae_name": _file("A file in models/vae or models/vae_approx.", _vaes),
    **dict.fromkeys(("clip_name", "clip_name1", "clip_name2", "clip_name3", "clip_name4"),
                    _file(ENCODER_FILE, lambda: list_options(*CLIP_FOLDERS))),
    **dict.fromkeys(
        ("text_encoder1", "text_encoder2"),
        _file(FLUX_ENCODER_FILE, lambda: list_options(*CLIP_FOLDERS, model_class=ENCODER))),
    "lora_name": _file("A file in models/loras; GGUF adapters work too.",
                       lambda: list_options(*LORA_FOLDERS)),
    # how it is loaded
    "type": _choice(TEXT_TYPE, lambda: encoder_types("CLIPLoader")),
    "type:dual": _choice(TEXT_TYPE, lambda: encoder_types("DualCLIPLoader")),
    "model_type": _choice(f"{TEXT_TYPE[:-1]}: Flux.1.", lambda: ["flux.1"]),
    "model_type:old": _choice(f"{TEXT_TYPE[:-1]}: Flux.1.", lambda: ["flux"]),
    "t5_min_length": LegacyInput(
        io.Int, "The prompt is filled up to this number of tokens for the T5.",
        {"default": 512, "min": 256, "max": 1024, "step": 128}),
    "weight_dtype": LegacyInput(
        io.Combo, "As in ComfyUI's own loader, for files without packed weights.",
        {"default": "default"},
        lambda: combo_options(host_node("UNETLoader"), "weight_dtype") or ["default"]),
    # devices
    "device:encoder": LegacyInput(
        io.Combo, "cpu: encode on the CPU and leave the GPU's memory to the diffusion model.",
        {"default": DEFAULT, "advanced": True}, lambda: open_options([DEFAULT, "cpu"])),
    "device": _device(COMPUTES),
    "compute_device": _device(COMPUTES),
    **{f"{part}_device": _device(COMPUTES, required=True)
       for part in ("unet", "clip", "vae", "unet_compute")},
    "clip_compute_device": _device(COMPUTES, "cpu", required=True),
    "virtual_vram_gb": _virtual_vram(),
    "virtual_vram_gb:24": _virtual_vram(maximum=24.0),
    "unet_virtual_vram_gb": _virtual_vram(required=True),
    "clip_virtual_vram_gb": _virtual_vram(2.0, required=True),
    "donor_device": _donor(),
    "unet_donor_device": _donor(required=True),
    "clip_donor_device": _donor(required=True),
    "expert_mode_allocations": _EXPERT,
    "unet_expert_mode_allocations": _EXPERT,
    "clip_expert_mode_allocations": _EXPERT,
    "use_other_vram": LegacyInput(
        io.Boolean,
        "Keeps the weights of the virtual VRAM on the other GPUs first, then on the CPU.",
        {"default": False}),
    # LoRAs
    "model": LegacyInput(io.Model, "The diffusion model the LoRA is applied to.", required=True),
    "model:stack": LegacyInput(io.Model, "The diffusion model the LoRAs are applied to.",
                               required=True),
    "clip": LegacyInput(io.Clip, "A text encoder, which is not changed.", required=True),
    "lora_count": LegacyInput(io.Int, "How many slots are applied, from the first on.",
                              {"default": 3, "min": 1, "max": SLOTS}),
    "lora_strength": LegacyInput(
        io.Float, "How strongly the diffusion model is changed; may be negative.", STRENGTH),
    **{key: row for slot in range(1, FLUX_SLOTS + 1) for key, row in {
        f"enabled_{slot}": LegacyInput(io.Boolean, "Whether this LoRA is applied.",
                                       {"default": True}),
        f"lora_name_{slot}": LegacyInput(
            io.Combo, f"A file in models/loras. {NONE}: this slot is empty.", {"default": NONE},
            lambda: Options([NONE, *list_files(*LORA_FOLDERS)], is_name)),
        f"lora_strength_{slot}": LegacyInput(
            io.Float, "How strongly the diffusion model is changed; may be negative.", STRENGTH),
    }.items()},
    # what has no effect
    "dequant_dtype": _unused(
        io.Combo, "Weights are dequantized in float32 and rounded once, to the dtype that the model"
        " computes in.", "default", DTYPES),
    "patch_dtype": _unused(io.Combo, "Patches are added in float32 and rounded once.", "default",
                           DTYPES),
    "patch_on_device": _unused(io.Boolean, "ComfyUI places patches by itself.", False),
    "bnb_dtype": _unused(io.Combo, "The file defines the format of its weights.", "default",
                         ("default", "nf4", "fp4")),
    "load_dtype": _unused(io.Combo, "Weights are packed from the file's own values.",
                          "float8_e4m3fn", ("default", "float8_e4m3fn", "float8_e5m2")),
    "eject_models": _unused(io.Boolean, "It has no effect.", True),
    "eject_models:off": _unused(io.Boolean, "It has no effect.", False),
    "high_precision_loras": _unused(io.Boolean, "LoRAs keep their full precision.", True),
    "cache_threshold": _unused(io.Float, "No step is skipped; ComfyUI's EasyCache does that.", 0.0,
                               min=0.0, max=1.0, step=0.001, **_HIDDEN),
    "attention": _unused(io.Combo, "ComfyUI chooses how attention is computed.", "nunchaku-fp16",
                         ("nunchaku-fp16", "flash-attention2"), **_HIDDEN),
    "cpu_offload": _unused(io.Combo, OFFLOAD, "auto",
                           lambda: nullable_options(["auto", *SWITCH]), **_HIDDEN),
    "cpu_offload:off": _unused(io.Combo, OFFLOAD, "disable",
                               lambda: nullable_options(["auto", *SWITCH]), **_HIDDEN),
    "device_id": _unused(io.Int, "ComfyUI chooses the GPU.", 0, min=0, max=MAX_GPUS - 1, **_HIDDEN),
    "data_type": _unused(io.Combo, "ComfyUI chooses the dtype that the model computes in.",
                         "bfloat16", ("bfloat16", "float16"), **_HIDDEN),
    "i2f_mode": _unused(io.Combo, "It chooses a kernel of the original pack, which is not used.",
                        "enabled", ("enabled", "always"), **_HIDDEN),
    "num_blocks_on_gpu": _unused(
        io.Int, "ComfyUI decides how much of the model stays on the GPU; Place Model"
        " (Featherweight) can set it.", 1, min=1, max=60, **_HIDDEN),
    "use_pin_memory": _unused(io.Combo, "ComfyUI decides which memory it pins.", "disable", SWITCH,
                              **_HIDDEN),
    "use_4bit_t5": _unused(io.Combo, "The T5 is the file picked above.", "disable", SWITCH[::-1],
                           **_HIDDEN),
    "int4_model": _unused(  # it need not exist, because it is not read
        io.Combo, "Pick a 4-bit T5 as one of the two text encoders.", "none",
        lambda: Options(["none", *list_model_folders(*CLIP_FOLDERS, model_class=ENCODER)], is_name),
        **_HIDDEN),
    "toggle_all": _unused(io.Boolean, "The switch of each LoRA decides.", True),
}
