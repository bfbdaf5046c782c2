"""Node ids of ComfyUI-MultiGPU: loaders with a device, or with virtual VRAM (DisTorch, DisTorch2).

An id joins a loader and a family, as in `UnetLoaderGGUF` + `DisTorch2MultiGPU`, and its class is
made from both. Three loaders are the pack's own. Its loaders for ControlNets, CLIP vision and other
packs' models are not provided here.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.model_management
import torch
from comfy_api.latest import io

import nodes as host_nodes

from ...loaders.byte_sizes import size_text
from ...loaders.devices import CPU, device_options, find_device, gpus
from ...loaders.models.placement import place, place_clip
from ...loaders.paths.folders import validate_files
from ..combo_options import combo_options
from ..file_inputs import Options, nullable_options, open_options, validate_main
from ..node_text import loader_output
from ..number_checks import reject_nan
from . import FURTHER_CLIPS, LegacyNode, make_node, vae_files
from .distorch import UnreadableError, allocate_virtual_vram, parse_allocation_string
from .gguf import (
    CLIP_FOLDERS,
    FOLDERS,
    clip_inputs,
    dtype_inputs,
    load_clip,
    load_model,
    model_input,
)
from .nf4 import CHECKPOINT_FOLDERS, CheckpointLoader, checkpoint_input, load_parts

# UNETLoader's weight_dtype: the host's model options
WEIGHT_DTYPES = {
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
}


# --- the loaders ---

@dataclass(frozen=True)
class WrappedLoader:
    """A loader that the pack wraps.

    Attributes:
        title: of its node; {} stands for the family.
        inputs: as in `LegacyNode`.
        load: takes a device or None, and the inputs by name; returns the loaded parts by the keys
            of `node_text.TITLES`.
        validate: takes the name of the main file; returns True, or a sentence about missing ones.
        outputs: as in `LegacyNode`.
        device: DisTorch2's name of its device input.
    """

    title: str
    inputs: Callable[[], list]
    load: Callable[..., dict]
    validate: Callable[..., bool | str]
    outputs: tuple = (io.Model.Output,)
    device: str = "compute_device"


def _load_gguf(
    device, unet_name, dequant_dtype="default", patch_dtype="default", patch_on_device=False
) -> dict:
    return {"model": load_model(unet_name, model_options=device_options(device))}


def _load_unet(device, unet_name, weight_dtype="default") -> dict:
    return {
        "model": load_model(
            unet_name, model_options=device_options(device) | WEIGHT_DTYPES.get(weight_dtype, {})
        )
    }


def _load_clip(device, type="stable_diffusion", **names) -> dict:
    clip_type = {3: "sd3", 4: "hidream"}.get(len(names), type or "stable_diffusion")
    return {"clip": load_clip(clip_type, *(names[name] for name in sorted(names)), device=device)}


def _weight_dtype_input():
    options = combo_options(host_nodes.NODE_CLASS_MAPPINGS["UNETLoader"], "weight_dtype")
    return io.Combo.Input(
        "weight_dtype",
        options=options or ["default", *WEIGHT_DTYPES],
        default="default",
        optional=True,
        tooltip="As in ComfyUI's own loader, for files without packed weights.",
    )


def _clip_loader(title: str, count: int, host_node: str | None = None) -> WrappedLoader:
    return WrappedLoader(
        title,
        functools.partial(clip_inputs, count, host_node),
        _load_clip,
        functools.partial(validate_main, others=FURTHER_CLIPS, keys=CLIP_FOLDERS),
        (io.Clip.Output,),
        device="device",
    )


_validate_models = functools.partial(validate_files, keys=FOLDERS)
UNET_GGUF = WrappedLoader(
    "Unet Loader (GGUF, {})", lambda: [model_input()], _load_gguf, _validate_models
)
UNET_GGUF_ADVANCED = WrappedLoader(
    "Unet Loader (GGUF/Advanced, {})",
    lambda: [model_input(), *dtype_inputs()],
    _load_gguf,
    _validate_models,
)
UNET_LP = replace(UNET_GGUF, title="UNet Loader ({})")
UNET = WrappedLoader(
    "Load Diffusion Model ({})",
    lambda: [model_input(), _weight_dtype_input()],
    _load_unet,
    _validate_models,
)
CLIP = _clip_loader("Load CLIP ({})", 1, "CLIPLoader")
DUAL_CLIP = _clip_loader("DualCLIPLoader ({})", 2, "DualCLIPLoader")
TRIPLE_CLIP = _clip_loader("TripleCLIPLoader ({})", 3)
QUADRUPLE_CLIP = _clip_loader("QuadrupleCLIPLoader ({})", 4)
CLIP_GGUF = replace(CLIP, title="CLIPLoader (GGUF, {})")
DUAL_CLIP_GGUF = replace(DUAL_CLIP, title="DualCLIPLoader (GGUF, {})")
TRIPLE_CLIP_GGUF = replace(TRIPLE_CLIP, title="TripleCLIPLoader (GGUF, {})")
QUADRUPLE_CLIP_GGUF = replace(QUADRUPLE_CLIP, title="QuadrupleCLIPLoader (GGUF, {})")
VAE = WrappedLoader(
    "Load VAE ({})",
    lambda: [vae_files.vae_name_input()],
    lambda device, vae_name: {"vae": vae_files.load(vae_name, device)},
    vae_files.validate,
    (io.Vae.Output,),
)
CHECKPOINT = WrappedLoader(
    "Load Checkpoint ({})",
    lambda: [checkpoint_input()],
    lambda device, ckpt_name: load_parts(ckpt_name, device=device),
    functools.partial(validate_files, keys=CHECKPOINT_FOLDERS),
    CheckpointLoader.outputs,
)
CHECKPOINT_NF4 = replace(CHECKPOINT, title="Load NF4 Checkpoint ({})")
CHECKPOINT_ADVANCED = replace(CHECKPOINT, title="Checkpoint Loader Advanced ({})")


# --- the inputs of the families ---

def device_input(name: str, default: str | None = None, optional: bool = True):
    """Returns the input for the device that computes. default: None for the first GPU, if any."""
    names = ["cpu", *map(str, gpus())]
    return io.Combo.Input(
        name,
        options=open_options(names),
        default=default or names[min(1, len(gpus()))],
        optional=optional,
        tooltip="The device that computes. If this machine does not have it, ComfyUI's default"
        " device is used.",
    )


def virtual_vram_input(
    name: str = "virtual_vram_gb",
    default: float = 4.0,
    maximum: float = 128.0,
    optional: bool = True,
):
    """Returns the input for virtual VRAM, in GiB."""
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=maximum,
        step=0.1,
        optional=optional,
        tooltip="This many GiB of the model's weights are kept on the donors and are copied in at"
        " each step.",
    )


def donor_input(name: str = "donor_device", optional: bool = True):
    """Returns the input for the device that keeps the weights of the virtual VRAM."""
    return io.Combo.Input(
        name,
        options=open_options(["cpu", *map(str, gpus())]),
        default="cpu",
        optional=optional,
        tooltip="The device that keeps the weights of the virtual VRAM.",
    )


def expert_input(name: str = "expert_mode_allocations"):
    """Returns the input for an expert-mode string."""
    return io.String.Input(
        name,
        default="",
        multiline=False,
        optional=True,
        tooltip="Devices and amounts, instead of virtual VRAM: bytes (cuda:0,2.5gb;cpu,*),"
        " percentages of the model (cuda:0,25%;cpu,75%) or fractions of each device's memory.",
    )


def eject_input(default: bool = True):
    """Returns an input that old workflows have and that has no effect."""
    return io.Boolean.Input(
        "eject_models",
        default=default,
        optional=True,
        tooltip="Kept for old workflows. It has no effect.",
    )


# --- the families ---

class MultiGPULoader(LegacyNode):
    """Base of the pack's loaders.

    wrapped: the loader that a class wraps. family: the word for it in titles.
    """

    HELP_PAGE = "LegacyMultiGPU"
    category = "Featherweight/legacy/MultiGPU"
    description = (
        "A loader of workflows made with ComfyUI-MultiGPU, which is archived. In new workflows use"
        " the loaders and Place Model (Featherweight)."
    )
    wrapped: WrappedLoader
    family = "MultiGPU"

    @classmethod
    def inputs(cls) -> list:
        own = cls.wrapped.inputs()
        for choice in own:
            if isinstance(choice, io.Combo.Input) and not isinstance(choice.options, Options):
                choice.options = nullable_options(choice.options)
        return [*own, *cls.further_inputs()]

    @classmethod
    def further_inputs(cls) -> list:
        """Returns the inputs after those of the wrapped loader."""
        return []

    @classmethod
    def validate_inputs(
        cls, unet_name=None, ckpt_name=None, vae_name=None, clip_name=None, clip_name1=None
    ):
        names = (unet_name, ckpt_name, vae_name, clip_name, clip_name1)
        return cls.wrapped.validate(next((name for name in names if name is not None), None))


class DeviceLoader(MultiGPULoader):
    """A loader with a device.

    virtual_vram_gb: GiB for API files without that input; None: the loader has no virtual VRAM.
    """

    FUNCTION = "override"
    virtual_vram_gb: float | None = None

    @classmethod
    def further_inputs(cls) -> list:
        return [device_input("device")]

    @classmethod
    def override(
        cls,
        *,
        device=None,
        compute_device=None,
        virtual_vram_gb=None,
        use_other_vram=False,
        donor_device="cpu",
        expert_mode_allocations="",
        eject_models=True,
        **inputs,
    ) -> tuple:
        device, note = find_device(device if device is not None else compute_device)
        notes = [note]
        parts = cls.wrapped.load(device, **inputs)
        if cls.virtual_vram_gb is not None:
            gib = cls.virtual_vram_gb if virtual_vram_gb is None else virtual_vram_gb
            donors = None if use_other_vram else [donor_device]
            first = next(iter(parts))
            parts[first] = place_part(parts[first], gib, donors, expert_mode_allocations, notes)
        return loader_output(*notes, **parts)


class DisTorchLoader(DeviceLoader):
    """A loader with virtual VRAM in its first form."""

    family = "DisTorch"
    virtual_vram_gb = 0.0

    @classmethod
    def further_inputs(cls) -> list:
        return [
            *super().further_inputs(),
            virtual_vram_input(maximum=24.0),
            io.Boolean.Input(
                "use_other_vram",
                default=False,
                optional=True,
                tooltip="Keeps the weights of the virtual VRAM on the other GPUs first, then on the"
                " CPU.",
            ),
            expert_input(),
        ]


class DisTorch2Loader(DeviceLoader):
    """A loader with virtual VRAM in its second form."""

    family = "DisTorch2"
    virtual_vram_gb = 4.0

    @classmethod
    def further_inputs(cls) -> list:
        return [
            device_input(cls.wrapped.device),
            virtual_vram_input(),
            donor_input(),
            expert_input(),
            eject_input(default=cls.wrapped.device != "device"),
        ]


def place_part(
    part,
    virtual_vram_gb: float,
    donors: list[str] | None,
    expert_string: str,
    notes: list,
    prefix: str = "",
):
    """Places the weights of a loaded part as the pack's inputs say, and returns the part.

    A part that computes on the CPU stays there completely.

    Args:
        part: a MODEL, CLIP or VAE.
        virtual_vram_gb: GiB that go to the donors.
        donors: names of devices; None: all other GPUs, then the CPU.
        expert_string: an allocation, used instead of virtual_vram_gb if it is not empty.
        notes: sentences about what cannot be done are appended.
        prefix: of the names of the inputs, for these sentences.
    """
    vram_name = f"{prefix}virtual_vram_gb"
    reject_nan(**{vram_name: virtual_vram_gb})
    patcher = getattr(part, "patcher", part)
    expert_string = expert_string.strip()
    if expert_string == "None":  # the host's text for a null
        expert_string = ""
    if patcher is None or patcher.load_device == CPU or not (expert_string or virtual_vram_gb):
        return part
    compute = patcher.load_device
    size = patcher.model_size()
    allocation = None
    if expert_string:
        input_name = f"{prefix}expert_mode_allocations"
        try:
            allocation, missing = parse_allocation_string(expert_string, size, compute)
            notes += missing
        except UnreadableError as error:
            notes.append(
                f"{prefix}expert_mode_allocations cannot be read at {error}. {vram_name} is used."
            )
    if allocation is None:
        input_name = vram_name
        if donors:
            matches = [find_device(name, "the cpu") for name in donors]
            notes += [note for _, note in matches]
            donor_devices = [device or CPU for device, _ in matches]
        else:
            donor_devices = [*(gpu for gpu in gpus() if gpu != compute), CPU]
        if virtual_vram_gb < 0:
            notes.append(
                f"{vram_name} is {virtual_vram_gb:g}, which is below 0; it is treated as 0, so"
                f" everything stays on {compute}."
            )
        allocation = allocate_virtual_vram(size, virtual_vram_gb, compute, donor_devices)
        if compute in donor_devices and allocation[compute] == size:
            notes.append(
                f"The donor {compute} is the device that computes, so everything stays there."
            )
    kept = allocation.pop(compute)
    stores = [(device, amount) for device, amount in allocation.items()
              if device != CPU and amount > 0]
    total = comfy.model_management.get_total_memory(compute)
    if kept > total:
        notes.append(
            f"{input_name} leaves {size_text(kept)} on the device that computes, but {compute} has"
            f" {size_text(total)} in total; ComfyUI keeps as much there as fits."
        )
    placement = kept, stores, notes.append
    if part is patcher:
        return place(patcher, *placement)
    if hasattr(part, "cond_stage_model"):
        return place_clip(part, *placement)
    part.patcher = place(patcher, *placement)
    part.first_stage_model = part.patcher.model  # a new one, if it was loaded again
    return part


# --- the pack's own loaders ---

def _load_parts_on(
    ckpt_name: str, unet_device: str, clip_device: str, vae_device: str
) -> tuple[dict, list]:
    """Loads the parts of a checkpoint, each for its device.

    Returns (the parts by the keys of `node_text.TITLES`, sentences about missing devices or None).
    """
    unet, unet_note = find_device(unet_device)
    clip, clip_note = find_device(clip_device)
    vae, vae_note = find_device(vae_device)
    parts = load_parts(ckpt_name, output_vae=False, device=unet, encoder_device=clip)
    parts["vae"] = load_parts(ckpt_name, output_model=False, output_clip=False, device=vae)["vae"]
    return parts, [unet_note, clip_note, vae_note]


class CheckpointLoaderAdvanced(MultiGPULoader):
    """Loads a checkpoint, with a device for each part."""

    FUNCTION = "load_checkpoint"

    @classmethod
    def further_inputs(cls) -> list:
        return [
            device_input(name, optional=False)
            for name in ("unet_device", "clip_device", "vae_device")
        ]

    @classmethod
    def load_checkpoint(cls, ckpt_name, unet_device, clip_device, vae_device) -> tuple:
        parts, notes = _load_parts_on(ckpt_name, unet_device, clip_device, vae_device)
        return loader_output(*notes, **parts)


class CheckpointLoaderAdvancedDisTorch2(MultiGPULoader):
    """Loads a checkpoint, with a device for each part and virtual VRAM for two of them."""

    FUNCTION = "load_checkpoint"
    family = "DisTorch2"

    @classmethod
    def further_inputs(cls) -> list:
        return [
            device_input("unet_compute_device", optional=False),
            virtual_vram_input("unet_virtual_vram_gb", optional=False),
            donor_input("unet_donor_device", optional=False),
            device_input("clip_compute_device", "cpu", optional=False),
            virtual_vram_input("clip_virtual_vram_gb", 2.0, optional=False),
            donor_input("clip_donor_device", optional=False),
            device_input("vae_device", optional=False),
            expert_input("unet_expert_mode_allocations"),
            expert_input("clip_expert_mode_allocations"),
            io.Boolean.Input(
                "high_precision_loras",
                default=True,
                optional=True,
                tooltip="Kept for old workflows. LoRAs keep their full precision.",
            ),
            eject_input(),
        ]

    @classmethod
    def load_checkpoint(
        cls,
        ckpt_name,
        unet_compute_device,
        unet_virtual_vram_gb,
        unet_donor_device,
        clip_compute_device,
        clip_virtual_vram_gb,
        clip_donor_device,
        vae_device,
        unet_expert_mode_allocations="",
        clip_expert_mode_allocations="",
        high_precision_loras=True,
        eject_models=True,
    ) -> tuple:
        parts, notes = _load_parts_on(
            ckpt_name, unet_compute_device, clip_compute_device, vae_device
        )
        unet = unet_virtual_vram_gb, [unet_donor_device], unet_expert_mode_allocations
        clip = clip_virtual_vram_gb, [clip_donor_device], clip_expert_mode_allocations
        parts["model"] = place_part(parts["model"], *unet, notes, "unet_")
        parts["clip"] = place_part(parts["clip"], *clip, notes, "clip_")
        return loader_output(*notes, **parts)


class UnetLoaderLP(MultiGPULoader):
    """Loads a diffusion model, without further inputs."""

    FUNCTION = "load_unet"
    family = "LP"

    @classmethod
    def load_unet(cls, unet_name) -> tuple:
        return loader_output(model=load_model(unet_name))


# id: (base class, the loader that is wrapped)
NODE_CONFIG = {
    "UnetLoaderGGUFMultiGPU": (DeviceLoader, UNET_GGUF),
    "UnetLoaderGGUFAdvancedMultiGPU": (DeviceLoader, UNET_GGUF_ADVANCED),
    "CLIPLoaderGGUFMultiGPU": (DeviceLoader, CLIP_GGUF),
    "DualCLIPLoaderGGUFMultiGPU": (DeviceLoader, DUAL_CLIP_GGUF),
    "TripleCLIPLoaderGGUFMultiGPU": (DeviceLoader, TRIPLE_CLIP_GGUF),
    "QuadrupleCLIPLoaderGGUFMultiGPU": (DeviceLoader, QUADRUPLE_CLIP_GGUF),
    "UNETLoaderMultiGPU": (DeviceLoader, UNET),
    "CLIPLoaderMultiGPU": (DeviceLoader, CLIP),
    "DualCLIPLoaderMultiGPU": (DeviceLoader, DUAL_CLIP),
    "TripleCLIPLoaderMultiGPU": (DeviceLoader, TRIPLE_CLIP),
    "QuadrupleCLIPLoaderMultiGPU": (DeviceLoader, QUADRUPLE_CLIP),
    "VAELoaderMultiGPU": (DeviceLoader, VAE),
    "CheckpointLoaderSimpleMultiGPU": (DeviceLoader, CHECKPOINT),
    "CheckpointLoaderNF4MultiGPU": (DeviceLoader, CHECKPOINT_NF4),
    "CheckpointLoaderAdvancedMultiGPU": (CheckpointLoaderAdvanced, CHECKPOINT_ADVANCED),
    "CheckpointLoaderAdvancedDisTorch2MultiGPU": (
        CheckpointLoaderAdvancedDisTorch2,
        CHECKPOINT_ADVANCED,
    ),
    "UNetLoaderLP": (UnetLoaderLP, UNET_LP),
    "UnetLoaderGGUFDisTorchMultiGPU": (DisTorchLoader, UNET_GGUF),
    "UnetLoaderGGUFAdvancedDisTorchMultiGPU": (DisTorchLoader, UNET_GGUF_ADVANCED),
    "CLIPLoaderGGUFDisTorchMultiGPU": (DisTorchLoader, CLIP_GGUF),
    "DualCLIPLoaderGGUFDisTorchMultiGPU": (DisTorchLoader, DUAL_CLIP_GGUF),
    "TripleCLIPLoaderGGUFDisTorchMultiGPU": (DisTorchLoader, TRIPLE_CLIP_GGUF),
    "QuadrupleCLIPLoaderGGUFDisTorchMultiGPU": (DisTorchLoader, QUADRUPLE_CLIP_GGUF),
    "UnetLoaderGGUFDisTorch2MultiGPU": (DisTorch2Loader, UNET_GGUF),
    "UnetLoaderGGUFAdvancedDisTorch2MultiGPU": (DisTorch2Loader, UNET_GGUF_ADVANCED),
    "CLIPLoaderGGUFDisTorch2MultiGPU": (DisTorch2Loader, CLIP_GGUF),
    "DualCLIPLoaderGGUFDisTorch2MultiGPU": (DisTorch2Loader, DUAL_CLIP_GGUF),
    "TripleCLIPLoaderGGUFDisTorch2MultiGPU": (DisTorch2Loader, TRIPLE_CLIP_GGUF),
    "QuadrupleCLIPLoaderGGUFDisTorch2MultiGPU": (DisTorch2Loader, QUADRUPLE_CLIP_GGUF),
    "UNETLoaderDisTorch2MultiGPU": (DisTorch2Loader, UNET),
    "CLIPLoaderDisTorch2MultiGPU": (DisTorch2Loader, CLIP),
    "DualCLIPLoaderDisTorch2MultiGPU": (DisTorch2Loader, DUAL_CLIP),
    "TripleCLIPLoaderDisTorch2MultiGPU": (DisTorch2Loader, TRIPLE_CLIP),
    "QuadrupleCLIPLoaderDisTorch2MultiGPU": (DisTorch2Loader, QUADRUPLE_CLIP),
    "VAELoaderDisTorch2MultiGPU": (DisTorch2Loader, VAE),
    "CheckpointLoaderSimpleDisTorch2MultiGPU": (DisTorch2Loader, CHECKPOINT),
}
NODE_CLASS_MAPPINGS = {
    node_id: make_node(__name__, node_id, base, wrapped.title.format(base.family), wrapped=wrapped,
                       outputs=wrapped.outputs)
    for node_id, (base, wrapped) in NODE_CONFIG.items()
}
