"""Collects second moments of the inputs of a model's layers while it runs."""
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch

from ....ops.layers.product import dequantize
from ....ops.quantize.second_moments import HELD_OUT, SKETCH_ROWS, STEP, SecondMoments
from ....ops.tensor.packed_layout import QuantizedTensor, is_packed
from ...families import rules_for
from .sampling import free_memory

# Bytes that all moments of a model may take on its device. Blocks are as wide as this allows; what
# does not fit with the narrowest goes to main memory.
MEMORY = 2_000_000_000
# Columns of a block, the first that fits; None for whole matrices.
BLOCKS = (None, 2048, 1024, 512, 256)
SMALL = 1 << 18  # values of an input that is kept to recognise layers that get an equal one


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    """Returns name, without prefix -> logical shape of the parameters of the host's BaseModel."""
    return {name: tuple(value.shape) for name, value in model.diffusion_model.named_parameters()}


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """Returns name of the weight -> linear layer that may be packed, in the order of the model."""
    shapes = shapes_of(model)
    family = rules_for(shapes)
    layers = {f"{name}.weight": layer for name, layer in model.diffusion_model.named_modules()
              if isinstance(layer, torch.nn.Linear)}
    return {
        name: layer for name, layer in layers.items()
        if name in shapes and family.may_be_packed(name, shapes[name])
    }


def dense_weight(layer: torch.nn.Linear, device: torch.device) -> torch.Tensor:
    """Returns the weight of a layer, packed or not, as float32 (N, K), without LoRA branches."""
    weight = layer.weight.detach().to(device)
    if is_packed(weight):
        return dequantize(weight, torch.float32)
    return (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).float()


def block_for(columns: Iterable[int], memory: int = MEMORY) -> int | None:
    """Chooses the widest blocks with which moments fit into memory, else the narrowest.

    Args:
        columns: of the inputs of each layer.
        memory: bytes for the moments of all of them.

    Returns:
        Columns of a block, None for whole matrices.
    """
    columns = list(columns)
    return next((block for block in BLOCKS if moment_bytes(columns, block) <= memory), BLOCKS[-1])


def moment_bytes(columns: Iterable[int], block: int | None) -> int:
    """Returns the bytes of the moments and sketches of layers' inputs, float32.

    Args:
        columns: of the inputs of each layer.
        block: columns of a block, None for whole matrices.
    """
    total = 0
    for width in columns:
        size = min(width, block or width)
        total += 4 * (-(-width // size) * size * size + SKETCH_ROWS * width)
    return total


class Collector:
    """Collects moments while entered, by forward hooks that it removes at the end.

    Layers that get the same input share their moments: queries, keys and values, and all that see
    one vector an image. Moments that do not fit on the device lie on the CPU; those of each call
    are computed on the device and added there.

    layers: name -> layer. memory: bytes of moments on the model's device, at most half of what is
    free on it. most_tokens: of one input, evenly spaced; None: all. on_device: False keeps all
    moments on the CPU. on_error: is called with what goes wrong, after which nothing is collected
    and the model runs on; None: it is raised. is_paused: nothing is collected.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Linear], memory: int = MEMORY,
                 most_tokens: int | None = None, on_device: bool = True,
                 on_error: Callable[[Exception], None] | None = None):
        self.layers = layers
        self.on_error = on_error
        self.most_tokens = most_tokens
        self.is_paused = False
        self.block = block_for([layer.in_features for layer in layers.values()], memory)
        self.memory = memory
        # of the memory; None before the first inputs
        self._remaining: float | None = None if on_device else 0.0
        self.moments: dict[str, SecondMoments] = {}
        self.same_as: dict[str, str] = {}
        self.hold_out = False
        # shape -> the latest input of that shape, and the name of its layer
        self._latest: dict[torch.Size, tuple[Callable[[], torch.Tensor | None], str]] = {}
        self._handles = []

    def __enter__(self):
        for name, layer in self.layers.items():
            self._handles.append(
                layer.register_forward_pre_hook(functools.partial(self._on_inputs, name)))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._latest.clear()

    def moments_of(self, name: str) -> SecondMoments | None:
        """Returns the moments of a layer's inputs, None for a layer that never ran."""
        return self.moments.get(self.same_as.get(name, name))

    def next_step(self, number: int):
        """Starts a step of a picture. The tokens of about every fourth are held out, never step 0.
        """
        self.next_call((0.5 + number * STEP) % 1 < HELD_OUT)

    def next_call(self, hold_out: bool):
        """Starts a call of the model, whose tokens are held out or not."""
        self.hold_out = hold_out
        self._latest.clear()

    @torch.no_grad()
    def _on_inputs(self, name: str, layer: torch.nn.Module, args: tuple):
        if self.is_paused:
            return
        try:
            self._collect(name, args[0])
        except Exception as error:
            if self.on_error is None:
                raise
            self.is_paused = True
            self.on_error(error)

    def _collect(self, name: str, inputs: torch.Tensor):
        if name not in self.moments:
            if inputs.shape in self._latest:
                latest, owner = self._latest[inputs.shape]
                if is_same(latest(), inputs):
                    self.same_as[name] = owner
                    return
            self.same_as.pop(name, None)
            self.moments[name] = SecondMoments.zeros(inputs.shape[-1], self.block,
                                                  self._reserve(inputs))
        self._latest[inputs.shape] = (
            (lambda: inputs) if inputs.numel() <= SMALL else weakref.ref(inputs),
            name,
        )
        moments = self.moments[name]
        if self.most_tokens is not None:
            inputs = inputs.reshape(-1, moments.columns)
            inputs = inputs[::-(-len(inputs) // self.most_tokens)]
        if moments.blocks.device == inputs.device:
            moments.add(inputs, hold_out=self.hold_out)
        else:
            on_device = SecondMoments.zeros(moments.columns, self.block, inputs.device)
            on_device.add(inputs, hold_out=self.hold_out)
            moments.merge(on_device)

    def _reserve(self, inputs: torch.Tensor) -> torch.device:
        """Reserves memory for the moments of these inputs and returns their device."""
        if self._remaining is None:
            self._remaining = min(self.memory, free_memory(inputs.device) / 2)
        nbytes = moment_bytes([inputs.shape[-1]], self.block)
        if nbytes > self._remaining:
            return torch.device("cpu")
        self._remaining -= nbytes
        return inputs.device


def is_same(latest: torch.Tensor | None, inputs: torch.Tensor) -> bool:
    """Returns whether an input is the latest one, or one of a few values that equals it."""
    return latest is inputs or (
        latest is not None and inputs.numel() <= SMALL and torch.equal(latest, inputs)
    )
