"""Node ids of ComfyUI-MultiGPU that wrap no loader but are its own: checkpoints with a device for each part.

They are called as Python too, see `legacy_gguf`.
"""
from comfy_api.latest import io

from ..loaders.checkpoint import load_checkpoint
from ..loaders.devices import find_device
from ..loaders.folders import all_there, embedding_folders, find_file
from . import legacy_gguf, legacy_nf4, multigpu
from .multigpu import CATEGORY, device_input, donor_input, expert_input, virtual_vram_input
from .shown import loaded

HELP = multigpu.Loader.HELP_PAGE
PARTS = ("model", "clip", "vae")


def load_parts(ckpt_name: str, unet_device: str, clip_device: str, vae_device: str) -> tuple[dict, list]:
    """(the parts of a checkpoint, each for its device; sentences about devices that are not here)."""
    path = find_file(ckpt_name, *legacy_nf4.CHECKPOINT_FOLDERS)
    (unet, *notes), (clip, *more), (vae, *most) = map(find_device, (unet_device, clip_device, vae_device))
    parts = load_checkpoint(path, embedding_folders(), output_vae=False, device=unet, encoder_device=clip)[:2]
    parts += load_checkpoint(path, output_model=False, output_clip=False, device=vae)[2:]
    return dict(zip(PARTS, parts)), [*notes, *more, *most]


class CheckpointLoaderAdvancedMultiGPU(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CheckpointLoaderAdvancedMultiGPU",
            display_name="Checkpoint Loader Advanced (MultiGPU)",
            category=CATEGORY,
            description=multigpu.DESCRIPTION,
            inputs=[legacy_nf4.checkpoint_input(),
                    *(device_input(name, optional=False) for name in ("unet_device", "clip_device", "vae_device"))],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            is_deprecated=True,
        )

    @classmethod
    def validate_inputs(cls, ckpt_name=None, **devices):
        return all_there(ckpt_name, keys=legacy_nf4.CHECKPOINT_FOLDERS)

    @classmethod
    def load_checkpoint(cls, ckpt_name, unet_device, clip_device, vae_device) -> tuple:
        parts, notes = load_parts(ckpt_name, unet_device, clip_device, vae_device)
        return loaded(*notes, **parts)

    FUNCTION, execute = "load_checkpoint", load_checkpoint


class CheckpointLoaderAdvancedDisTorch2MultiGPU(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CheckpointLoaderAdvancedDisTorch2MultiGPU",
            display_name="Checkpoint Loader Advanced (DisTorch2)",
            category=CATEGORY,
            description=multigpu.DESCRIPTION,
            inputs=[
                legacy_nf4.checkpoint_input(),
                device_input("unet_compute_device", optional=False),
                virtual_vram_input("unet_virtual_vram_gb", optional=False), donor_input("unet_donor_device", optional=False),
                device_input("clip_compute_device", "cpu", optional=False),
                virtual_vram_input("clip_virtual_vram_gb", 2.0, optional=False),
                donor_input("clip_donor_device", optional=False),
                device_input("vae_device", optional=False),
                expert_input("unet_expert_mode_allocations"), expert_input("clip_expert_mode_allocations"),
                io.Boolean.Input("high_precision_loras", default=True, optional=True,
                                 tooltip="Kept for old workflows. LoRAs keep their full precision."),
                multigpu.eject_input(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            is_deprecated=True,
        )

    @classmethod
    def validate_inputs(cls, ckpt_name=None, **others):
        return all_there(ckpt_name, keys=legacy_nf4.CHECKPOINT_FOLDERS)

    @classmethod
    def load_checkpoint(cls, ckpt_name, unet_compute_device, unet_virtual_vram_gb, unet_donor_device, clip_compute_device,
                        clip_virtual_vram_gb, clip_donor_device, vae_device, unet_expert_mode_allocations="",
                        clip_expert_mode_allocations="", high_precision_loras=True, eject_models=True) -> tuple:
        parts, notes = load_parts(ckpt_name, unet_compute_device, clip_compute_device, vae_device)
        for name, prefix, gib, donor, expert in (
                ("model", "unet_", unet_virtual_vram_gb, unet_donor_device, unet_expert_mode_allocations),
                ("clip", "clip_", clip_virtual_vram_gb, clip_donor_device, clip_expert_mode_allocations)):
            parts[name] = multigpu.placed(parts[name], gib, [donor], expert, notes, prefix)
        return loaded(*notes, **parts)

    FUNCTION, execute = "load_checkpoint", load_checkpoint


class UNetLoaderLP(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UNetLoaderLP",
            display_name="UNet Loader (LP)",
            category=CATEGORY,
            description=multigpu.DESCRIPTION,
            inputs=[legacy_gguf.model_name_input()],
            outputs=[io.Model.Output()],
            is_deprecated=True,
        )

    @classmethod
    def validate_inputs(cls, unet_name=None):
        return all_there(unet_name, keys=legacy_gguf.FOLDERS)

    @classmethod
    def load_unet(cls, unet_name) -> tuple:
        return legacy_gguf.load(unet_name, None, None)

    FUNCTION, execute = "load_unet", load_unet
