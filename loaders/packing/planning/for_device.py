"""Chooses the weights with which a model fits a device, by the device's whole memory.

What is free at the moment plays no part, so that the same device has the same weights every day.
Of its memory, in whole GiB, a GPU keeps for other things:

| for | bytes |
|---|---|
| CUDA itself and a desktop | `SYSTEM_BYTES` |
| what ComfyUI leaves to other programs | `HOST_RESERVE_BYTES`, or what `--reserve-vram` says |
| a step of a picture or video of the usual size | ComfyUI's formula, at least `MIN_STEP_BYTES` |
| a dequantised weight | `workspace_bytes`, unless nothing is packed |
| LoRAs, a copy of an input for them, and a ControlNet | `LORA_SHARE` of its memory |

Memory that a model shares with the system, on CPUs and Macs, also holds the text encoder, the VAE
and other programs: `MODEL_SHARE` of it is for the weights of a diffusion model, `ENCODER_SHARE` for
those of a text encoder.

Then a model stays as it is if it fits; else takes FAST_TYPE if that fits and the device multiplies
it; else the best mix of GGUF's types for the size, if that is as good as FLOOR. If not, it takes
FLOOR's size, and what does not fit is copied in each step: copying costs time, a type below FLOOR
costs quality. All files of the model, packed, and its text encoder may then take MAIN_SHARE of the
main memory; what takes more comes down to LAST_FLOOR, and to what fits. So more memory of either
kind never makes the weights worse. LoRAs and ControlNets change how much is copied, never the
weights. float8 and nvfp4 are not chosen: at their sizes Q6_K and Q4_K are more exact.
"""
import functools
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.cli_args import args
from comfy.supported_models_base import BASE

from ....ops.layers.workspace import DEVICE_WORKSPACE_BYTES
from ....ops.packing.pack_types import GGUF_TYPES, TYPES
from ....ops.tensor.packed_layout import is_packed
from ...devices import CPU, total_memory
from ...families import model_of, rules_for
from ...packing_rules import PackingRules, Shapes
from ..layer_losses import WEIGHTS, loss_text
from .plan import bytes_as_good_as, least_bytes, plan_for_type, relative_error

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
FLOOR, LAST_FLOOR = "Q4_K", "Q3_K"  # types below which weights go only where memory ends
GRADES = [name for name in GGUF_TYPES if not TYPES[name].needs_measurement]
MAIN_SHARE = 0.6  # of the main memory, for all files of a model and its text encoder
ENCODER_BYTES = 0.6  # of a value of a text encoder in FLOOR
HALF_BYTES = 2  # of a value that ComfyUI computes in 16 bits
# Compute capability from which on -> bytes a second over the usual link, and operations a second
# of each multiprocessor. Estimates.
GENERATIONS = (((10, 0), 45e9, 1.2e12), ((8, 9), 22e9, 1.2e12), ((8, 0), 22e9, 0.8e12),
               ((7, 0), 11e9, 0.7e12), ((0, 0), 11e9, 0.4e12))
AMD = (8, 0)  # row of its GPUs, whose numbers mean something else
HALF_LINKS = re.compile(r"\b(3050|4050|4060|5050|5060)\b")  # cards with half as many lanes
EFFICIENCY = 0.6  # of operations in a step
SMALLER_MODELS = (("Flux.2 Klein 9B", 9.1e9), ("Flux.2 Klein 4B", 3.9e9),
                  ("SDXL", 2.6e9), ("SD 1.5", 0.9e9))
SMALLER_VIDEO_MODELS = (("Wan 2.2 5B", 5.0e9), ("Wan 2.1 1.3B", 1.4e9))
# Models of single images whose latents the host stores as video.
IMAGE_MODELS = {"QwenImage", "Anima", "CosmosT2IPredict2", "Krea2", "JoyImage"}


@dataclass(frozen=True)
class Memory:
    """The memory of a device.

    Attributes:
        gib: all of it, in GiB, which cards' names call GB.
        is_shared: whether the system and other programs use it too.
        reserve: bytes that ComfyUI leaves to other programs.
        main_gib: the main memory, in GiB.
    """

    gib: int
    is_shared: bool = False
    reserve: float = HOST_RESERVE_BYTES
    main_gib: int = 0

    @classmethod
    def of(cls, device: torch.device) -> "Memory":
        """Returns that of a device of this machine."""
        reserve = HOST_RESERVE_BYTES if args.reserve_vram is None else args.reserve_vram * GIB
        gib, main_gib = (int(total_memory(each) + NEARLY) // GIB for each in (device, CPU))
        return cls(gib, device.type in ("cpu", "mps"), reserve, main_gib)

    @property
    def text(self) -> str:
        """It in words: "a GPU of 12 GB", "16 GB of main memory"."""
        return f"{self.gib} GB of main memory" if self.is_shared else f"a GPU of {self.gib} GB"

    def for_model(self, step_bytes: float | None, workspace: int = 0, experts: int = 1) -> int:
        """Returns the bytes for the weights of a diffusion model.

        Args:
            step_bytes: of `step_memory`, None if not known.
            workspace: of `workspace_bytes`, 0 where nothing is packed.
            experts: of `experts_of`: memory that is shared holds them all.
        """
        total = self.gib * GIB
        if self.is_shared:
            return int(total * MODEL_SHARE / experts)
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

    def for_copying(self, config: BASE | None) -> int:
        """Returns the bytes that weights may have of which a part is copied in each step.

        config: the host's configuration of a diffusion model, None of a text encoder, which has as
            much as its model.
        """
        if self.is_shared:
            return 0
        nbytes = MAIN_SHARE * self.main_gib * GIB
        if config is None:
            return int(nbytes / 2)
        model = model_of(config)
        if model is None:
            return int(nbytes * 2 / 3)
        encoders = sum(min(map(_values_of_encoder, group)) for group in model.encoder_groups)
        return max(0, int(nbytes - ENCODER_BYTES * encoders)) // experts_of(config)


@dataclass(frozen=True)
class Weights:
    """The weights of one file of a model.

    Attributes:
        shapes: as for `rules_for`.
        nbytes: in memory, as they are in the file.
        packed: of those that are packed in the file, as for `plan_for_size`.
        costs: of the measurement of the model, as for `plan_for_size`.
        fixed: in memory, of those that stay as they are whatever the others are packed to.
    """

    shapes: Shapes
    nbytes: int
    packed: Mapping[str, int]
    costs: Mapping[str, Mapping[str, float]] | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)

    @functools.cached_property
    def least(self) -> int:
        """Bytes in the smallest types."""
        return min(self.nbytes, self._with_fixed(least_bytes(*self._free, self.packed)))

    @property
    def fast(self) -> int:
        """Bytes with FAST_TYPE."""
        shapes, rules = self._free
        return self._with_fixed(plan_for_type(shapes, FAST_TYPE, rules).nbytes(shapes))

    def as_good_as(self, type_name: str) -> int:
        """Returns the bytes of a mix that is expected to be as good as a type."""
        return self._with_fixed(bytes_as_good_as(type_name, *self._free, self.costs, self.packed))

    @functools.cached_property
    def _free(self) -> tuple[Shapes, PackingRules]:
        """The shapes of those that can be packed, and the rules of the model."""
        return {name: shape for name, shape in self.shapes.items()
                if name not in self.fixed}, rules_for(self.shapes)

    def _with_fixed(self, nbytes: int) -> int:
        return nbytes + sum(self.fixed.values())

    @classmethod
    def of(cls, shapes: Shapes, stored: Mapping[str, torch.Tensor],
           costs: Mapping[str, Mapping[str, float]] | None = None,
           fixed: Container[str] = ()) -> "Weights":
        """Returns those of stored tensors, in the host's names; of float32 it keeps 16 bits.

        fixed: names of those that stay as they are.
        """
        halved = {name: min(tensor.nbytes, HALF_BYTES * tensor.numel())
                  for name, tensor in stored.items()}
        stays = {name: tensor.nbytes for name, tensor in stored.items() if name in fixed}
        packed = {name: tensor.nbytes for name, tensor in stored.items()
                  if name not in fixed and is_packed(tensor)}
        return cls(shapes, sum((halved | stays | packed).values()), packed, costs, stays)


class Sizes:
    """How large the weights of a model are in its files and in types.

    Attributes:
        files: of the model.
        nbytes: of the weights as they are in the files.
    """

    def __init__(self, files: Sequence[Weights]):
        self.files = files
        self.nbytes = sum(file.nbytes for file in files)

    @functools.cached_property
    def as_good_as(self) -> dict[str, int]:
        """Type of GRADES, or FAST_TYPE -> size of a mix that is expected to be as good."""
        return {type_name: self._size([file.as_good_as(type_name) for file in self.files])
                for type_name in (*GRADES, FAST_TYPE)}

    @functools.cached_property
    def least(self) -> int:
        """Size of the smallest mix."""
        return self._size([file.least for file in self.files])

    @functools.cached_property
    def fast(self) -> int:
        """Bytes with FAST_TYPE."""
        return sum(file.fast for file in self.files)

    @functools.cached_property
    def workspace(self) -> int:
        """Bytes that dequantised weights take: of the file that takes the most."""
        return max(workspace_bytes(file.shapes) for file in self.files)

    @property
    def is_packed(self) -> bool:
        """Whether weights are packed in the files."""
        return any(file.packed for file in self.files)

    @property
    def matrices(self) -> list[tuple[int, ...]]:
        """Shapes of all matrices, with each of which a token is multiplied once."""
        return [shape for file in self.files for shape in file.shapes.values() if len(shape) > 1]

    @property
    def values(self) -> int:
        """The values of all matrices."""
        return sum(map(math.prod, self.matrices))

    @property
    def is_measured(self) -> bool:
        """Whether a measurement says what each type costs."""
        return any(file.costs for file in self.files)

    def grade(self, size: int) -> str:
        """Returns the largest type of GRADES that a mix of a size is as good as."""
        return next((type_name for type_name in GRADES if self.as_good_as[type_name] <= size),
                    GRADES[-1])

    def _size(self, needs: Sequence[int]) -> int:
        """Returns the least multiple of STEP that all files have room in."""
        return -(-sum(needs) // STEP) * STEP


@dataclass(frozen=True)
class Choice:
    """The weights with which a model runs on a device.

    Attributes:
        target: "" for the files as they are, a type, or bytes of the best mix.
        room: bytes that the device has for the weights.
        copied: bytes of the weights that it has no room for, which are copied in each step.
        grade: of a mix, the type of GRADES that it is as good as.
        lack: bytes by which FLOOR is too large for main memory; 0 where it is reached.
    """

    target: str | int
    room: int
    copied: int = 0
    grade: str = ""
    lack: int = 0

    @property
    def grade_text(self) -> str:
        """The grade in words: "as good as Q4_K, loss: small (7 % of the weights)"."""
        loss = loss_text(relative_error(self.grade), WEIGHTS)
        return f"as good as {self.grade}, loss: {loss}"


def choose(sizes: Sizes, room_for: Callable[[int], int], multiplies_int8: bool = False,
           main: int = 0) -> Choice:
    """Chooses the weights of a model for a device.

    Args:
        sizes: of the model.
        room_for: bytes that dequantised weights take -> bytes that the device has for the weights.
        multiplies_int8: whether the device multiplies FAST_TYPE.
        main: bytes of `Memory.for_copying`.
    """
    room = room_for(sizes.workspace)
    as_it_is = room if sizes.is_packed else room_for(0)
    if sizes.nbytes <= as_it_is:
        return Choice("", as_it_is)
    size = room
    if multiplies_int8 and not sizes.is_packed:
        if sizes.fast <= room:
            return Choice(FAST_TYPE, room)
        size = min(room, sizes.as_good_as[FAST_TYPE])  # a card that it fits has no worse weights
    floors = [sizes.as_good_as[type_name] for type_name in (FLOOR, LAST_FLOOR)]
    size = max(size // STEP * STEP,
               next((floor for floor in floors if floor <= max(size, main)),
                    max(sizes.least, main // STEP * STEP)))
    lack = floors[0] - max(main, room) if size < floors[0] else 0
    if size >= sizes.nbytes:
        return Choice("", room, sizes.nbytes - room, lack=lack)
    return Choice(size, room, max(0, size - room), sizes.grade(size), lack)


def experts_of(config: BASE | None) -> int:
    """Returns how many models like this one draw an image in turn, as Wan 2.2's two do."""
    model = None if config is None else model_of(config)
    if config is None or model is None:
        return 1
    is_it = (type(config).__name__, config.unet_config.get("dim")) == (model.host, model.width)
    return model.experts if is_it else 1


def is_video(config: BASE) -> bool:
    """Returns whether the usual size of a model is one of videos."""
    usual = _usual_latents(config)
    return usual is not None and "frames" in usual[1]


def smaller_model(values: int, is_video: bool) -> str:
    """Returns the name of a model with at most two thirds as many values, "" for none."""
    return next((name for name, least in (SMALLER_VIDEO_MODELS if is_video else SMALLER_MODELS)
                 if least <= values * 2 / 3), "")


def longer_step(copied: int, values: int, tokens: int, device: torch.device) -> float | None:
    """Estimates by which share a step takes longer where it copies weights first.

    By the generation of the card and its usual link, never by the link's present state, so that it
    is the same every day. None for a device that torch does not describe.

    Args:
        copied: bytes.
        values: of the matrices.
        tokens: of a step.
        device: that computes.
    """
    seconds = step_seconds(values, tokens, device)
    if seconds is None:
        return None
    card, link, _ = _usual_card(device)
    if HALF_LINKS.search(card.name):
        link /= 2
    if args.disable_pinned_memory:
        link /= 2
    return copied / link / seconds


def step_seconds(values: int, tokens: int, device: torch.device) -> float | None:
    """Estimates the seconds of a step that copies nothing; args and None as for `longer_step`."""
    if device.type != "cuda" or not tokens:
        return None
    card, _, operations = _usual_card(device)
    return 2 * values * tokens / (card.multi_processor_count * operations * EFFICIENCY)


def _usual_card(device: torch.device) -> tuple[Any, float, float]:
    """Returns what torch says of a GPU, and of GENERATIONS the bytes a second over its link and the
    operations a second of a multiprocessor."""
    card = torch.cuda.get_device_properties(device)
    capability = AMD if torch.version.hip else (card.major, card.minor)
    return card, *next(row for row in GENERATIONS if row[0] <= capability)[1:]


def shares(size: int, files: Sequence[Weights]) -> tuple[int, ...]:
    """Returns the bytes for each file of a model that is to have a size: its least, and of the rest
    in proportion to what packing can save, so that a file that is packed already keeps its size."""
    least = sum(file.least for file in files)
    spare = sum(file.nbytes - file.least for file in files) or 1
    if size < least:  # which no plan has; see `plan_for_size`
        wanted = [size * file.least // least for file in files]
    else:
        wanted = [min(file.nbytes,
                      file.least + (size - least) * (file.nbytes - file.least) // spare)
                  for file in files]
    return tuple(max(1, nbytes) for nbytes in wanted)  # 0 would not be taken for a size


def workspace_bytes(shapes: Shapes) -> int:
    """Returns the bytes of the workspace on a GPU: of the largest matrix in 16 bits, at most what
    a layer dequantises at a time."""
    return min(DEVICE_WORKSPACE_BYTES, HALF_BYTES * max(
        (math.prod(shape) for shape in shapes.values() if len(shape) == 2), default=0))


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
    if (usual := _usual_latents(config)) is None:
        return None
    area, resolution = usual
    step_bytes = area * (1 + images) * 2 * 0.01 * config.memory_usage_factor * 2 ** 20
    return max(MIN_STEP_BYTES, step_bytes), resolution


def step_tokens(config: BASE) -> int:
    """Returns about how many tokens a step of the usual size has, 0 if not known."""
    usual, patch = _usual_latents(config), config.unet_config.get("patch_size", 2)
    width = patch[-1] if isinstance(patch, Sequence) else patch
    return usual[0] // width ** 2 if usual and isinstance(width, int) else 0


def _usual_latents(config: BASE) -> tuple[int, str] | None:
    """Returns the positions in latents of the usual size, and the resolution; None if not known."""
    latents, names = config.latent_format, {cls.__name__ for cls in type(config).__mro__}
    dimensions, ratio = latents.latent_dimensions, latents.spacial_downscale_ratio
    latents_name = latents_name_of(config)
    if "AV" in latents_name or "Audio" in latents_name or dimensions == 1:
        return None
    if dimensions == 2 or names & IMAGE_MODELS:
        return (1024 // ratio) ** 2, "1024 × 1024"
    width, height, frames = (832, 480, 81) if ratio == 8 else (1280, 704, 121)
    latent_frames = (frames - 1) // latents.temporal_downscale_ratio + 1
    return (latent_frames * (width // ratio) * (height // ratio),
            f"{width} × {height}, {frames} frames")


def latents_name_of(config: BASE) -> str:
    """Returns the class name of a model's latents."""
    latents = config.latent_format
    return (latents if isinstance(latents, type) else type(latents)).__name__


def _values_of_encoder(name: str) -> float:
    """Returns about how many values a text encoder has, by its key of `encoder_sets.TITLES`."""
    sizes = re.findall(r"_E?(\d+)B?(?![A-Z\d])", name)
    if sizes:
        return int(sizes[-1]) * (1e8 if sizes[-1].startswith("0") else 1e9)
    return 5e9 if "XXL" in name else 1e9
