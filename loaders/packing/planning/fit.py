"""Chooses the weights with which a model fits a device, by the device's whole memory.

What is free at the moment plays no part, so that the same device has the same weights every day.
Of its memory, in whole GiB, a GPU keeps for other things:

| for | bytes |
|---|---|
| CUDA itself and a desktop | `SYSTEM_BYTES` |
| what ComfyUI leaves to other programs | `HOST_RESERVE_BYTES`, or what `--reserve-vram` says |
| a step of a picture or video of the usual size | ComfyUI's formula, at least `MIN_STEP_BYTES` |
| a dequantised weight | the largest matrix in 16 bits, unless nothing is packed |
| LoRAs, and a ControlNet | `LORA_SHARE` of its memory |

Memory that a model shares with the system, on CPUs and Macs, also holds the text encoder, the VAE
and other programs: `MODEL_SHARE` of it is for the weights of a diffusion model, `ENCODER_SHARE` for
those of a text encoder.

Then a model stays as it is if it fits, else takes FAST_TYPE if that fits and the device multiplies
it, else the best mix of GGUF's types for the size. float8 and nvfp4 are not chosen: at their sizes
Q6_K and Q4_K are more exact.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from comfy.cli_args import args
from comfy.supported_models_base import BASE

from ...devices import total_memory
from ...families import rules_for
from .packing_rules import PLAIN_BYTES, Shapes
from .plan import least_bytes, plan_for_type

GIB = 2 ** 30
STEP = 10 ** 7  # bytes: sizes are multiples, so that the number shown is the number used
NEARLY = GIB // 4  # that a card may lack of a whole GiB: drivers keep some of it
SYSTEM_BYTES = 0.7 * GIB  # estimate
MIN_STEP_BYTES = 0.8 * GIB  # what the host keeps free for a step at least
HOST_RESERVE_BYTES = 0.4 * GIB
LORA_SHARE = 1 / 24
MODEL_SHARE, ENCODER_SHARE = 1 / 2, 1 / 4
UNKNOWN_STEP_SHARE = 1 / 4  # of a GPU, for models whose step is not known
FAST_TYPE = "int8_convrot"
FAST_FORMAT = "int8_tensorwise"  # ComfyUI's name of it
STREAMED_TYPE = "Q4_K"  # of a model that does not fit whole with any types
# Models of single images whose latents the host stores as video.
IMAGE_MODELS = {"QwenImage", "Anima", "CosmosT2IPredict2", "Krea2", "JoyImage"}


@dataclass(frozen=True)
class Memory:
    """The memory of a device.

    Attributes:
        gib: all of it, in GiB, which cards' names call GB.
        is_shared: whether the system and other programs use it too.
        reserve: bytes that ComfyUI leaves to other programs.
    """

    gib: int
    is_shared: bool = False
    reserve: float = HOST_RESERVE_BYTES

    @classmethod
    def of(cls, device: torch.device) -> "Memory":
        """Returns that of a device of this machine."""
        total = total_memory(device)
        reserve = HOST_RESERVE_BYTES if args.reserve_vram is None else args.reserve_vram * GIB
        return cls(int(total + NEARLY) // GIB, device.type in ("cpu", "mps"), reserve)

    @property
    def text(self) -> str:
        """It in words: "a GPU of 12 GB", "16 GB of main memory"."""
        return f"{self.gib} GB of main memory" if self.is_shared else f"a GPU of {self.gib} GB"

    def for_model(self, step_bytes: float | None, workspace: int = 0) -> int:
        """Returns the bytes for the weights of a diffusion model.

        Args:
            step_bytes: of `step_memory`, None if not known.
            workspace: of `workspace_bytes`, 0 where nothing is packed.
        """
        total = self.gib * GIB
        if self.is_shared:
            return int(total * MODEL_SHARE)
        if step_bytes is None:
            step_bytes = total * UNKNOWN_STEP_SHARE
        used = SYSTEM_BYTES + self.reserve + max(MIN_STEP_BYTES, step_bytes) + workspace
        return max(0, int(total * (1 - LORA_SHARE) - used))

    def for_encoder(self, workspace: int = 0) -> int:
        """Returns the bytes for the weights of a text encoder, which runs before the model."""
        if self.is_shared:
            return int(self.gib * GIB * ENCODER_SHARE)
        used = SYSTEM_BYTES + self.reserve + MIN_STEP_BYTES + workspace
        return max(0, int(self.gib * GIB - used))


@dataclass(frozen=True)
class Weights:
    """The weights of one file of a model.

    Attributes:
        shapes: as for `rules_for`.
        nbytes: in memory, as they are in the file.
        packed: of those that are packed in the file, as for `plan_for_size`.
    """

    shapes: Shapes
    nbytes: int
    packed: Mapping[str, int]


@dataclass(frozen=True)
class Choice:
    """The weights with which a model fits.

    Attributes:
        target: "" for the files as they are, a type, or bytes of the best mix.
        room: bytes that the device has for the weights.
        missing: bytes that the smallest weights are too large by, 0 if the chosen ones fit.
    """

    target: str | int
    room: int
    missing: int = 0


def choose(files: Sequence[Weights], room: int, room_unpacked: int,
           multiplies_int8: bool = False) -> Choice:
    """Chooses the weights of a model for a device.

    Args:
        files: of the model.
        room: bytes for the weights.
        room_unpacked: the same where nothing is packed.
        multiplies_int8: whether the device multiplies FAST_TYPE.
    """
    is_packed = any(file.packed for file in files)
    as_it_is = room if is_packed else room_unpacked
    if sum(file.nbytes for file in files) <= as_it_is:
        return Choice("", as_it_is)
    if multiplies_int8 and not is_packed and room >= sum(
            plan_for_type(file.shapes, FAST_TYPE, rules_for(file.shapes)).nbytes(file.shapes)
            for file in files):
        return Choice(FAST_TYPE, room)
    size = room // STEP * STEP
    missing = sum(
        max(0, least_bytes(file.shapes, rules_for(file.shapes), file.packed) - nbytes)
        for file, nbytes in zip(files, shares(size, files)))
    return Choice(STREAMED_TYPE, room, missing) if missing else Choice(size, room)


def shares(size: int, files: Sequence[Weights]) -> list[int]:
    """Returns the bytes for each file of a model that is to have a size: in proportion."""
    total = sum(file.nbytes for file in files) or 1
    return [size * file.nbytes // total for file in files]


def workspace_bytes(shapes: Shapes) -> int:
    """Returns the bytes of the largest matrix dequantised to 16 bits."""
    return PLAIN_BYTES["BF16"] * max(
        (math.prod(shape) for shape in shapes.values() if len(shape) == 2), default=0)


def step_memory(config: BASE, images: int = 0) -> tuple[float, str] | None:
    """Estimates the bytes that the host keeps free for a step, in addition to the weights.

    Uses the host's formula with flash attention in 16 bits (`comfy/model_base.py`,
    BaseModel.memory_required).

    Args:
        config: the host's configuration of a diffusion model.
        images: of the same size, that a model which edits gets too.

    Returns:
        The bytes and the resolution they are for, or None if the latents are not known.
    """
    latents, names = config.latent_format, {cls.__name__ for cls in type(config).__mro__}
    dimensions, ratio = latents.latent_dimensions, latents.spacial_downscale_ratio
    latents_name = latents_name_of(config)
    if "AV" in latents_name or "Audio" in latents_name or dimensions == 1:
        return None
    if dimensions == 2 or names & IMAGE_MODELS:
        area, resolution = (1024 // ratio) ** 2, "1024 × 1024"
    else:
        width, height, frames = (832, 480, 81) if ratio == 8 else (1280, 704, 121)
        latent_frames = (frames - 1) // latents.temporal_downscale_ratio + 1
        area = latent_frames * (width // ratio) * (height // ratio)
        resolution = f"{width} × {height}, {frames} frames"
    step_bytes = area * (1 + images) * 2 * 0.01 * config.memory_usage_factor * 2 ** 20
    return max(MIN_STEP_BYTES, step_bytes), resolution


def latents_name_of(config: BASE) -> str:
    """Returns the class name of a model's latents."""
    latents = config.latent_format
    return (latents if isinstance(latents, type) else type(latents)).__name__
