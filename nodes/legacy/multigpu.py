"""Node ids of ComfyUI-MultiGPU: loaders with a device, or with virtual VRAM (DisTorch, DisTorch2).

An id joins a loader and a family, as in `UnetLoaderGGUF` + `DisTorch2MultiGPU`, and its class is
made from both. Three loaders are the pack's own. Its loaders for ControlNets, CLIP vision and other
packs' models are not provided here.
"""
from dataclasses import dataclass, replace

from comfy_api.latest import io

from ...loaders.byte_sizes import size_text
from ...loaders.devices import CPU, find_device, gpus, total_memory
from ...loaders.models.placement import place, place_clip
from ..file_inputs import Options, nullable_options
from ..node_text import loader_output
from ..number_checks import reject_nan
from . import make_node
from .distorch import UnreadableError, allocate_virtual_vram, read_expert_string
from .loaders import Loader, ModelLoader, TextEncoderLoader
from .nf4 import CheckpointLoader, load_parts
from .vae_files import VaeLoader


@dataclass(frozen=True)
class WrappedLoader:
    """A loader that the pack wraps.

    Attributes:
        title: of its node; {} stands for the family.
        base: what it does.
        keys: as in `LegacyNode`.
        device, eject: DisTorch2's keys of the inputs for its device and of `eject_models`.
    """

    title: str
    base: type[Loader]
    keys: str
    device: str = "compute_device"
    eject: str = "eject_models"


def _clip_loader(title: str, keys: str) -> WrappedLoader:
    return WrappedLoader(title, TextEncoderLoader, keys, "device", "eject_models:off")


UNET_GGUF = WrappedLoader("Unet Loader (GGUF, {})", ModelLoader, "unet_name")
UNET_GGUF_ADVANCED = WrappedLoader("Unet Loader (GGUF/Advanced, {})", ModelLoader,
                                   "unet_name dequant_dtype patch_dtype patch_on_device")
UNET_LP = replace(UNET_GGUF, title="UNet Loader ({})")
UNET = WrappedLoader("Load Diffusion Model ({})", ModelLoader, "unet_name weight_dtype")
CLIP = _clip_loader("Load CLIP ({})", "clip_name type")
DUAL_CLIP = _clip_loader("DualCLIPLoader ({})", "clip_name1 clip_name2 type:dual")
TRIPLE_CLIP = _clip_loader("TripleCLIPLoader ({})", "clip_name1 clip_name2 clip_name3")
QUADRUPLE_CLIP = _clip_loader("QuadrupleCLIPLoader ({})",
                              "clip_name1 clip_name2 clip_name3 clip_name4")
CLIP_GGUF = replace(CLIP, title="CLIPLoader (GGUF, {})")
DUAL_CLIP_GGUF = replace(DUAL_CLIP, title="DualCLIPLoader (GGUF, {})")
TRIPLE_CLIP_GGUF = replace(TRIPLE_CLIP, title="TripleCLIPLoader (GGUF, {})")
QUADRUPLE_CLIP_GGUF = replace(QUADRUPLE_CLIP, title="QuadrupleCLIPLoader (GGUF, {})")
VAE = WrappedLoader("Load VAE ({})", VaeLoader, "vae_name")
CHECKPOINT = WrappedLoader("Load Checkpoint ({})", CheckpointLoader, "ckpt_name")
CHECKPOINT_NF4 = replace(CHECKPOINT, title="Load NF4 Checkpoint ({})")
CHECKPOINT_ADVANCED = replace(CHECKPOINT, title="Checkpoint Loader Advanced ({})")


# --- the families ---

class MultiGPULoader(Loader):
    """Base of the pack's loaders, next to that of the loader that is wrapped.

    Attributes:
        family: the word for it in titles.
        further: keys of the inputs after those of the wrapped loader; {device} and {eject} stand
            for its own.
        function: name of the method that scripts call.
    """

    HELP_PAGE = "LegacyMultiGPU"
    category = "Featherweight/legacy/MultiGPU"
    description = (
        "A loader of workflows made with ComfyUI-MultiGPU, which is archived. In new workflows use"
        " the loaders and Place Model (Featherweight)."
    )
    family = "MultiGPU"
    further = ""
    function = "override"

    @classmethod
    def inputs(cls) -> list:
        inputs = super().inputs()
        wrapped = len(inputs) - len(cls.further.split())
        for choice in inputs[:wrapped]:
            if isinstance(choice, io.Combo.Input) and not isinstance(choice.options, Options):
                choice.options = nullable_options(map(str, choice.options))
        return inputs


class DeviceLoader(MultiGPULoader):
    """A loader with a device.

    virtual_vram_gb: GiB for API files without that input; None: the loader has no virtual VRAM.
    """

    further = "device"
    virtual_vram_gb: float | None = None

    @classmethod
    def run(
        cls,
        *names,
        device=None,
        compute_device=None,
        virtual_vram_gb=None,
        use_other_vram=False,
        donor_device="cpu",
        expert_mode_allocations="",
        **inputs,
    ) -> tuple:
        found, note = find_device(device if device is not None else compute_device)
        notes = [note]
        parts = cls.load(*names, device=found, **inputs)
        if cls.virtual_vram_gb is not None:
            gib = cls.virtual_vram_gb if virtual_vram_gb is None else virtual_vram_gb
            donors = None if use_other_vram else [donor_device]
            first = next(iter(parts))
            parts[first] = place_part(parts[first], gib, donors, expert_mode_allocations, notes)
        return loader_output(*notes, **parts)


class DisTorchLoader(DeviceLoader):
    """A loader with virtual VRAM in its first form."""

    family = "DisTorch"
    further = "device virtual_vram_gb:24 use_other_vram expert_mode_allocations"
    virtual_vram_gb = 0.0


class DisTorch2Loader(DeviceLoader):
    """A loader with virtual VRAM in its second form."""

    family = "DisTorch2"
    further = "{device} virtual_vram_gb donor_device expert_mode_allocations {eject}"
    virtual_vram_gb = 4.0


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
        expert_string: what stays on the device that computes, used instead of virtual_vram_gb if
            it is not empty.
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
    input_name, kept, stores = vram_name, None, []
    if expert_string:
        input_name = f"{prefix}expert_mode_allocations"
        try:
            kept, has_others = read_expert_string(expert_string, size, compute)
            if has_others:
                notes.append(
                    f"{input_name} is used only for what stays on {compute}: what it gives to other"
                    " GPUs is kept in main memory; to keep weights on another GPU, clear it and use"
                    f" {vram_name} with a donor."
                )
        except UnreadableError as error:
            notes.append(f"{input_name} cannot be read at {error}. {vram_name} is used.")
            input_name = vram_name
    if kept is None:
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
    total = total_memory(compute)
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

    further = "unet_device clip_device vae_device"
    function = "load_checkpoint"

    @classmethod
    def run(cls, ckpt_name, *, unet_device, clip_device, vae_device) -> tuple:
        parts, notes = _load_parts_on(ckpt_name, unet_device, clip_device, vae_device)
        return loader_output(*notes, **parts)


class CheckpointLoaderAdvancedDisTorch2(MultiGPULoader):
    """Loads a checkpoint, with a device for each part and virtual VRAM for two of them."""

    family = "DisTorch2"
    further = (
        "unet_compute_device unet_virtual_vram_gb unet_donor_device clip_compute_device"
        " clip_virtual_vram_gb clip_donor_device vae_device unet_expert_mode_allocations"
        " clip_expert_mode_allocations high_precision_loras eject_models"
    )
    function = "load_checkpoint"

    @classmethod
    def run(
        cls,
        ckpt_name,
        *,
        unet_compute_device,
        unet_virtual_vram_gb,
        unet_donor_device,
        clip_compute_device,
        clip_virtual_vram_gb,
        clip_donor_device,
        vae_device,
        unet_expert_mode_allocations="",
        clip_expert_mode_allocations="",
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

    family = "LP"
    function = "load_unet"


# id: (family, the loader that is wrapped)
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
        CheckpointLoaderAdvancedDisTorch2, CHECKPOINT_ADVANCED
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

def _make(node_id: str, family: type[MultiGPULoader], wrapped: WrappedLoader) -> type[io.ComfyNode]:
    further = family.further.format(device=wrapped.device, eject=wrapped.eject)
    base = type(node_id, (family, wrapped.base), {"also": "", "further": further})
    return make_node(__name__, node_id, base, family.function, wrapped.title.format(family.family),
                     f"{wrapped.keys} {further}")


NODE_CLASS_MAPPINGS = {node_id: _make(node_id, *row) for node_id, row in NODE_CONFIG.items()}
