"""GPUs and models of real proportions, so much smaller that a test can afford them.

A narrow model has the layers of a real one, with fewer columns. Its bytes are a fraction of the
real one's, and so are those of the fake GPU, of the step, and of all that ComfyUI and *fit this
GPU* keep free. So the same types are chosen as for the real model on the real card, but for the
parts of a model that do not shrink alike.
"""
import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from devtools.measure import model_sizes

import comfy.controlnet
import comfy.memory_management
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models
import pytest
import torch
from families import FAMILIES, Family, host_model, shrunken_detection
from pack_api import Format, pack_tensor, pack_types, packed_tensor
from safetensors.torch import save_file

from featherweight.loaders.packing.planning import for_device
from featherweight.ops.layers import workspace

HALF_BYTES = 2
MAIN_GIB = 1 << 10  # main memory is no limit here
PERIOD = 64  # rows of a weight after which its rows repeat, so that only these are packed
SDXL_WIDTHS = {"model_channels": 64, "context_dim": 512}


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledModel:
    """A narrow model and the real one.

    Attributes:
        real: its name in `model_sizes.MODELS`.
        family: the narrow one.
        cond: what its conditioning has in addition to the text; a tuple is a shape.
    """

    real: str
    family: Family
    cond: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def scale(self) -> float:
        """Bytes of the real model divided by those of the narrow one."""
        return self._real_values / sum(map(math.prod, self.shapes.values()))

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        with pytest.MonkeyPatch.context() as patch:
            self._accept_narrow(patch)
            model = host_model(self.family, self.family.config, "meta")
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    @property
    def _real_values(self) -> int:
        return sum(map(math.prod, self.real_shapes.values()))

    @functools.cached_property
    def real_shapes(self) -> dict[str, tuple[int, ...]]:
        with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
            return self._published.shapes()

    def real_choice(self, gib: int) -> for_device.Choice:
        """Returns what is chosen for the real model, in bfloat16, on a GPU of so many GiB."""
        shapes, memory = self.real_shapes, for_device.Memory(gib, main_gib=MAIN_GIB)
        room_for = functools.partial(memory.for_model, self.step_bytes)
        sizes = for_device.Sizes([for_device.Weights(shapes, HALF_BYTES * self._real_values, {})])
        return for_device.choose(sizes, room_for, True, memory.for_copying(None))

    @property
    def _published(self) -> model_sizes.Model:
        return next(model for model in model_sizes.MODELS if model.name == self.real)

    @functools.cached_property
    def step_bytes(self) -> float:
        """Bytes of a step of the real model by the host's formula, without its minimum."""
        with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
            config = self._published.config()
        with mock.patch.object(for_device, "MIN_STEP_BYTES", 0):
            return for_device.step_memory(config)[0]

    @functools.cached_property
    def usage_factor(self) -> float:
        with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
            return self._published.config().memory_usage_factor

    def write(self, path: Path) -> str:
        """Writes the narrow model in bfloat16, with random rows that repeat every PERIOD rows."""
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, shape in self.shapes.items():
            rows = torch.randn(min(shape[0], PERIOD), *shape[1:], generator=generator)
            if len(shape) > 1:
                rows *= min(0.05, math.prod(shape[1:]) ** -0.5)
            else:
                rows = rows * 0.05 + ("norm" in name and not name.endswith("bias"))
            repeats = -(-shape[0] // PERIOD), *(1 for _ in shape[1:])
            weights[name] = rows.repeat(repeats)[:shape[0]].to(torch.bfloat16).contiguous()
        save_file(weights, path)
        return str(path)

    def conditioning(self, seed: int) -> list:
        """Returns random conditioning for the host's samplers."""
        generator = torch.Generator().manual_seed(seed)
        cond = {name: torch.randn(value, generator=generator) if isinstance(value, tuple) else value
                for name, value in self.cond.items()}
        return [[torch.randn(self.family.context, generator=generator), cond]]

    def _accept_narrow(self, monkeypatch: pytest.MonkeyPatch):
        """Lets the host know the narrow model by what its detection says of the file."""
        shrunken_detection(self.family, monkeypatch)
        if self.family.supported == "SDXL":
            known = comfy.supported_models.SDXL
            monkeypatch.setattr(known, "unet_config", {**known.unet_config, **SDXL_WIDTHS})

    def scale_host(self, monkeypatch: pytest.MonkeyPatch):
        """Divides what the host and *fit this GPU* keep free by `scale`, and has the host compute
        in 16 bits.

        A weight is dequantised in slices, since torch's reference takes four times as much memory
        for it as the kernels of a GPU.
        """
        scale = self.scale
        self._accept_narrow(monkeypatch)
        monkeypatch.setattr(comfy.model_management.args, "fp32_unet", False)
        monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args: None)
        for name in ("GIB", "NEARLY", "STEP", "SYSTEM_BYTES", "MIN_STEP_BYTES",
                     "HOST_RESERVE_BYTES", "DEVICE_WORKSPACE_BYTES"):
            monkeypatch.setattr(for_device, name, round(getattr(for_device, name) / scale))
        monkeypatch.setattr(workspace, "DEVICE_WORKSPACE_BYTES",
                            for_device.workspace_bytes(self.shapes) // 4)
        reserved = comfy.model_management.extra_reserved_memory() / scale
        inference = comfy.model_management.minimum_inference_memory() / scale
        monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: reserved)
        monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: inference)
        supported = getattr(comfy.supported_models, self.family.supported)
        build, factor = supported.__init__, self.usage_factor / scale

        def scaled_init(config, *args, **options):
            build(config, *args, **options)
            config.memory_usage_factor = factor

        monkeypatch.setattr(supported, "__init__", scaled_init)
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required",
                            lambda model, shape, cond_shapes=None: shape[0] * self.step_bytes
                            / scale)


def _deeper(name: str, supported: str | None = None, **config) -> Family:
    family = FAMILIES[name]
    return dataclasses.replace(family, supported=supported or family.supported,
                               config={**family.config, **config})


def flux(hidden: int = 256, depth: int = 19, single: int = 38) -> ScaledModel:
    """Returns Flux; real: 19 double and 38 single blocks."""
    family = _deeper("flux-dev", hidden_size=hidden, num_heads=hidden // 128, depth=depth,
                     depth_single_blocks=single)
    return ScaledModel("Flux.1 dev, schnell, Kontext", family,
                       {"pooled_output": (1, 768), "guidance": 3.5})


def qwen_image(heads: int = 2, layers: int = 60) -> ScaledModel:
    """Returns Qwen-Image, of 128 columns a head; real: 60 layers."""
    return ScaledModel("Qwen-Image, Qwen-Image-Edit", _deeper(
        "qwen-image", num_attention_heads=heads, num_layers=layers))


def wan(dim: int = 256, layers: int = 40) -> ScaledModel:
    """Returns Wan 2.1 14B; real: 40 layers."""
    return ScaledModel("Wan 2.1 14B T2V, Wan 2.2 14B (each of its two)", _deeper(
        "wan2.1-t2v", dim=dim, ffn_dim=3 * dim, num_heads=dim // 128, num_layers=layers))


def sdxl() -> ScaledModel:
    """Returns SDXL, a fifth as wide, with all its transformers."""
    family = _deeper(
        "sdxl", supported="SDXL", **SDXL_WIDTHS, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4],
        transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], num_head_channels=64)
    family = dataclasses.replace(family, context=(1, 7, SDXL_WIDTHS["context_dim"]))
    return ScaledModel("SDXL", family, {"pooled_output": (1, 1280)})


@contextmanager
def packing_of_repeated_rows() -> Iterator[None]:
    """Inside this block PERIOD rows of a weight are packed and repeated, as `write` repeats them.

    The blocks of GGUF's types do not depend on one another, so that the result is the same.
    """
    def pack(values: torch.Tensor, packed_format: Format, *_) -> torch.Tensor:
        if len(values) <= PERIOD or values.shape[1] % packed_format.block_length:
            return pack_tensor(values, packed_format)
        assert torch.equal(values[PERIOD:2 * PERIOD], values[:PERIOD][:len(values) - PERIOD])
        packed = pack_tensor(values[:PERIOD], packed_format)
        data = packed._qdata.reshape(PERIOD, -1)
        data = data.repeat(-(-len(values) // PERIOD), 1)[:len(values)].contiguous()
        return packed_tensor(packed_format, data, values.shape)

    with mock.patch.object(pack_types, "pack_tensor", pack):
        yield
