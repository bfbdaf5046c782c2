"""What the nodes of ComfyUI-MultiGPU are made of: the loaders it wraps, and the inputs it puts behind theirs.

Its ids are those of a loader and of a family: `UnetLoaderGGUF` + `DisTorch2MultiGPU`. A class in `legacy_multigpu` names both.
"""
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import nodes as host_nodes
import torch
from comfy_api.latest import io

from ..loaders.checkpoint import load_checkpoint
from ..loaders.devices import CPU, device_options, find_device, gpus
from ..loaders.diffusion import load_diffusion_model
from ..loaders.files.container import shown
from ..loaders.folders import all_there, embedding_folders, find_file
from ..loaders.placing import place, place_clip
from ..loaders.sizes import size_text
from ..loaders.text_encoder import load_text_encoder
from . import legacy_gguf, legacy_gguf_clip, legacy_nf4, vae_files
from .choices import choices_of
from .distorch import UnreadableError, by_expert_string, by_virtual_vram
from .numbers import refuse_nan
from .shown import loaded

CATEGORY = "Featherweight/legacy/MultiGPU"
DESCRIPTION = ("A loader of workflows made with ComfyUI-MultiGPU, which is archived. In new workflows: the loaders and Place"
               " Model (Featherweight).")

# What UNETLoader's weight_dtype means to the host.
WEIGHT_DTYPES = {
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn}, "fp8_e5m2": {"dtype": torch.float8_e5m2},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
}


# --- the loaders: inputs, and what they load for a device, by the keys of `shown.TITLES` ---

@dataclass(frozen=True)
class Kind:
    """A loader that is wrapped.

    inputs: makes its inputs. outputs: what makes its outputs. load: of a device or None and the inputs by name -> its parts.
    is_there: of the inputs by name -> True, or a sentence about a file that is not there. device: what the family's first input
    is called where the family leaves it open.
    """

    inputs: Callable[[], list]
    outputs: tuple
    load: Callable[..., dict]
    is_there: Callable[..., bool | str]
    device: str = "compute_device"


def _load_gguf(device, unet_name, dequant_dtype="default", patch_dtype="default", patch_on_device=False) -> dict:
    dtypes = (legacy_gguf.DTYPES[name or "default"] for name in (dequant_dtype, patch_dtype))
    return {"model": load_diffusion_model(find_file(unet_name, *legacy_gguf.FOLDERS), *dtypes,
                                          model_options=device_options(device))}


def _load_unet(device, unet_name, weight_dtype="default") -> dict:
    options = {**device_options(device), **WEIGHT_DTYPES.get(weight_dtype, {})}
    return {"model": load_diffusion_model(find_file(unet_name, *legacy_gguf.FOLDERS), model_options=options)}


def _load_clip(device, type="stable_diffusion", **names) -> dict:
    paths = [find_file(names[name], *legacy_gguf_clip.FOLDERS) for name in sorted(names)]
    kind = {3: "sd3", 4: "hidream"}.get(len(paths), type or "stable_diffusion")
    return {"clip": load_text_encoder(paths, kind, embedding_folders(), model_options=device_options(device))}


def _load_vae(device, vae_name) -> dict:
    return {"vae": vae_files.load(vae_name, device)}


def _load_checkpoint(device, ckpt_name) -> dict:
    path = find_file(ckpt_name, *legacy_nf4.CHECKPOINT_FOLDERS)
    return dict(zip(("model", "clip", "vae"), load_checkpoint(path, embedding_folders(), device=device)))


def _model_there(unet_name=None, **others) -> bool | str:
    return all_there(unet_name, keys=legacy_gguf.FOLDERS)


def _clips_there(**inputs) -> bool | str:
    return all_there(*(inputs[name] for name in inputs if name.startswith("clip_name")), keys=legacy_gguf_clip.FOLDERS)


def _vae_there(vae_name=None, **others) -> bool | str:
    return vae_files.is_there(vae_name)


def _checkpoint_there(ckpt_name=None, **others) -> bool | str:
    return all_there(ckpt_name, keys=legacy_nf4.CHECKPOINT_FOLDERS)


def _weight_dtype_input():
    offered = choices_of(host_nodes.NODE_CLASS_MAPPINGS["UNETLoader"], "weight_dtype") or ["default", *WEIGHT_DTYPES]
    return io.Combo.Input("weight_dtype", options=offered, default="default", optional=True,
                          tooltip="As in ComfyUI's own loader, for files without packed weights.")


def _clips(count: int, host_node: str | None) -> Kind:
    names = ["clip_name"] if count == 1 else [f"clip_name{number}" for number in range(1, count + 1)]

    def inputs():
        types = [legacy_gguf_clip.type_input(host_node)] if host_node else []
        return [*map(legacy_gguf_clip.name_input, names), *types]
    return Kind(inputs, (io.Clip.Output,), _load_clip, _clips_there, device="device")


ALL_THREE = (io.Model.Output, io.Clip.Output, io.Vae.Output)
UNET_GGUF = Kind(lambda: [legacy_gguf.model_name_input()], (io.Model.Output,), _load_gguf, _model_there)
UNET_GGUF_ADVANCED = Kind(lambda: [legacy_gguf.model_name_input(), *legacy_gguf.dtype_inputs()], (io.Model.Output,), _load_gguf,
                          _model_there)
UNET = Kind(lambda: [legacy_gguf.model_name_input(), _weight_dtype_input()], (io.Model.Output,), _load_unet, _model_there)
CLIP, DUAL_CLIP = _clips(1, "CLIPLoader"), _clips(2, "DualCLIPLoader")
TRIPLE_CLIP, QUADRUPLE_CLIP = _clips(3, None), _clips(4, None)
VAE = Kind(lambda: [vae_files.vae_name_input()], (io.Vae.Output,), _load_vae, _vae_there)
CHECKPOINT = Kind(lambda: [legacy_nf4.checkpoint_input()], ALL_THREE, _load_checkpoint, _checkpoint_there)


# --- the inputs of the families ---

def device_input(name: str, default: str | None = None, optional: bool = True):
    """default: None: the first GPU, where there is one."""
    names = ["cpu", *map(str, gpus())]
    return io.Combo.Input(name, options=names, default=default or names[min(1, len(gpus()))], optional=optional,
                          tooltip="The device that computes. One that this machine has not is ComfyUI's default one.")


def virtual_vram_input(name: str = "virtual_vram_gb", default: float = 4.0, most: float = 128.0, optional: bool = True):
    return io.Float.Input(name, default=default, min=0.0, max=most, step=0.1, optional=optional,
                          tooltip="This many GiB of the model's weights lie elsewhere and are copied in at each step.")


def donor_input(name: str = "donor_device", optional: bool = True):
    return io.Combo.Input(name, options=["cpu", *map(str, gpus())], default="cpu", optional=optional,
                          tooltip="Where the weights of the virtual VRAM lie.")


def expert_input(name: str = "expert_mode_allocations"):
    return io.String.Input(name, default="", multiline=False, optional=True,
                           tooltip="Devices and amounts, instead of virtual VRAM: bytes (cuda:0,2.5gb;cpu,*), shares of the"
                                   " model (cuda:0,25%;cpu,75%) or fractions of each device's memory.")


def eject_input(default: bool = True):
    return io.Boolean.Input("eject_models", default=default, optional=True, tooltip="Kept for old workflows. It has no effect.")


def _device(kind: Kind) -> list:
    return [device_input("device")]


def _distorch(kind: Kind) -> list:
    return [device_input("device"), virtual_vram_input(most=24.0),
            io.Boolean.Input("use_other_vram", default=False, optional=True,
                             tooltip="The other GPUs take the weights of the virtual VRAM first, then the CPU."),
            expert_input()]


def _distorch2(kind: Kind) -> list:
    return [device_input(kind.device), virtual_vram_input(), donor_input(), expert_input(),
            eject_input(default=kind.device != "device")]


DEVICE, DISTORCH, DISTORCH2 = _device, _distorch, _distorch2


# --- the nodes ---

def _unknown_choice(kind: Kind, inputs: dict) -> str | None:
    """A sentence about an input of the loader itself, not a file, with a value that it does not offer."""
    for one in kind.inputs():
        value, offered = inputs.get(one.id), getattr(one, "options", None)
        if offered and "_name" not in one.id and value not in (None, *offered):
            return f"{one.id} is {shown(value)}; it can be {', '.join(offered)}."
    return None


class Loader:
    """What the classes of the nodes share. They are called as Python under the name `override`."""

    HELP_PAGE = "LegacyMultiGPU"
    kind: Kind
    family: Callable[[Kind], list]

    @classmethod
    def schema(cls) -> dict:
        """All but the names of the node's schema."""
        return {
            "category": CATEGORY, "is_deprecated": True,  # not offered for new workflows
            "description": DESCRIPTION,
            "inputs": [*cls.kind.inputs(), *cls.family(cls.kind)],
            "outputs": [output() for output in cls.kind.outputs],
        }

    @classmethod
    def validate_inputs(cls, **inputs):
        """The host looks at no input itself then: devices of other machines are resolved when the node runs."""
        return _unknown_choice(cls.kind, inputs) or cls.kind.is_there(**inputs)

    @classmethod
    def override(cls, *, device=None, compute_device=None, virtual_vram_gb=None, use_other_vram=False, donor_device="cpu",
                 expert_mode_allocations="", eject_models=True, **inputs) -> tuple:
        device, note = find_device(device if device is not None else compute_device)
        parts = cls.kind.load(device, **inputs)
        notes = [note]
        if cls.family is not DEVICE:
            if virtual_vram_gb is None:
                virtual_vram_gb = 4.0 if cls.family is DISTORCH2 else 0.0  # what the pack took where an API file says nothing
            first = next(iter(parts))
            donors = None if use_other_vram else [donor_device]
            parts[first] = placed(parts[first], virtual_vram_gb, donors, expert_mode_allocations, notes)
        return loaded(*notes, **parts)

    FUNCTION, execute = "override", override


def placed(part, virtual_vram_gb: float, donors: list[str] | None, expert: str, notes: list, prefix: str = ""):
    """A MODEL, CLIP or VAE whose weights lie as the pack's inputs say. donors: names, None for all other GPUs and then the CPU.

    Appends to notes what cannot be so; prefix: that of the names of the inputs. Where the model computes on the CPU, all of it
    is there.
    """
    refuse_nan(**{f"{prefix}virtual_vram_gb": virtual_vram_gb})
    patcher, expert = getattr(part, "patcher", part), expert.strip()
    if expert == "None":  # the host's text for a null
        expert = ""
    if patcher is None or patcher.load_device == CPU or not (expert or virtual_vram_gb):
        return part
    compute, size, plan, asked = patcher.load_device, patcher.model_size(), None, f"{prefix}expert_mode_allocations"
    if expert:
        try:
            plan, missing = by_expert_string(expert, size, compute)
            notes += missing
        except UnreadableError as error:
            notes.append(f"{prefix}expert_mode_allocations cannot be read at {error}. {prefix}virtual_vram_gb is used.")
    if plan is None:
        asked = f"{prefix}virtual_vram_gb"
        found = [find_device(name, "the cpu") for name in donors or []]
        notes += [note for _, note in found]
        others = [device or CPU for device, _ in found] if donors else [*(gpu for gpu in gpus() if gpu != compute), CPU]
        if virtual_vram_gb < 0:
            notes.append(f"{asked} is {virtual_vram_gb:g}, below 0: everything stays on {compute}, as with 0.")
        plan = by_virtual_vram(size, virtual_vram_gb, compute, others)
        if compute in others and plan[compute] == size:
            notes.append(f"The donor {compute} is the device that computes, so everything stays there.")
    kept = plan.pop(compute)
    stores = [(device, amount) for device, amount in plan.items() if device != CPU and amount > 0]
    total = comfy.model_management.get_total_memory(compute)
    if kept > total:
        notes.append(f"{asked} leaves {size_text(kept)} on the device that computes, and {compute} has {size_text(total)} in"
                     " all; as much stays as ComfyUI finds room for.")
    where = kept, stores, notes.append
    if part is patcher:
        return place(patcher, *where)
    if hasattr(part, "cond_stage_model"):
        return place_clip(part, *where)
    part.patcher = place(patcher, *where)
    part.first_stage_model = part.patcher.model  # another one, where it was loaded again
    return part
