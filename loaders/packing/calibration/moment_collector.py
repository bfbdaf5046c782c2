"""Second moments of the inputs of a model's layers, collected while it runs."""
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch

from ....ops.packed_layout import QuantizedTensor, is_packed
from ....ops.product import dequantize
from ....ops.quantize.second_moments import HELD_OUT, SKETCH_ROWS, STEP, SecondMoments
from ..planning.packing_rules import rules_for
from .sampling import free_memory

# Bytes that all moments of a model together take where the model runs, at most: up to there their
# blocks are wider than they must be, and what is beyond lies in main memory.
MEMORY = 2_000_000_000
# columns of a block, the first that fits; None: whole matrices
BLOCKS = (None, 2048, 1024, 512, 256)
SMALL = 1 << 18  # values of an input that is worth keeping to find those that are given it again


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    """Name -> logical shape of the parameters of the host's BaseModel, in its names without
    prefix."""
    return {name: tuple(value.shape) for name, value in model.diffusion_model.named_parameters()}


def linear_layers(model) -> dict[str, torch.nn.Module]:
    """Name of its weight -> each linear layer that may be packed, in the order of the model."""
    shapes = shapes_of(model)
    family = rules_for(shapes)
    layers = {f"{name}.weight": layer for name, layer in model.diffusion_model.named_modules()
              if isinstance(layer, torch.nn.Linear)}
    return {
        name: layer for name, layer in layers.items()
        if name in shapes and family.may_be_packed(name, shapes[name])
    }


def dense_weight(layer: torch.nn.Module, device: torch.device | None = None) -> torch.Tensor:
    """The weight of a layer as it lies there, float32 (N, K), packed or not; LoRAs that run beside
    it are not in it."""
    weight = layer.weight.detach() if device is None else layer.weight.detach().to(device)
    if is_packed(weight):
        return dequantize(weight, torch.float32)
    return (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).float()


def block_for(columns: Iterable[int], memory: int = MEMORY) -> int | None:
    """The columns of a block with which the moments of inputs of so many columns take at most
    `memory` bytes, or the fewest there are; None where whole matrices do."""
    columns = list(columns)
    return next((block for block in BLOCKS if nbytes_of(columns, block) <= memory), BLOCKS[-1])


def nbytes_of(columns: Iterable[int], block: int | None) -> int:
    """Bytes of the moments of inputs of so many columns: float32, in blocks, and the sketches of
    held-out tokens."""
    sizes = [(width, min(width, block or width)) for width in columns]
    return sum(4 * (-(-width // size) * size * size + SKETCH_ROWS * width) for width, size in sizes)


class Collector:
    """Collects while it is entered, and leaves the layers as they were.

    layers: name -> layer. Layers that are given the same tensor share their moments, as queries,
    keys and values do and what sees one vector an image. memory: bytes of the moments that may lie
    where the model runs, less where it has no room for twice as much; the others lie on the CPU,
    and get each call's moments from there.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module], memory: int = MEMORY):
        self.layers = layers
        columns = [layer.in_features for layer in layers.values()]
        self.block = block_for(columns, memory)
        self.memory = memory
        self._left: float | None = None  # of it; None before the first inputs
        self.moments: dict[str, SecondMoments] = {}
        self.same_as: dict[str, str] = {}
        self.hold_out = False
        # shape -> the input of that shape, and whose it was
        self._latest: dict[torch.Size, tuple[Callable, str]] = {}
        self._handles = []

    def __enter__(self):
        self._handles = [
            layer.register_forward_pre_hook(
                lambda layer, inputs, name=name: self._see(name, inputs[0]))
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self._latest.clear()

    def of(self, name: str) -> SecondMoments | None:
        """The moments of a layer's inputs, or None for one that never ran."""
        return self.moments.get(self.same_as.get(name, name))

    def next_step(self, number: int):
        """Another step of a picture begins. About every fourth step's tokens are held out, never
        the first's."""
        self.hold_out = (0.5 + number * STEP) % 1 < HELD_OUT
        self._latest.clear()

    @torch.no_grad()
    def _see(self, name: str, inputs: torch.Tensor):
        if name not in self.moments:
            latest, owner = self._latest.get(inputs.shape, (None, None))
            if latest is not None and _same(latest(), inputs):
                self.same_as[name] = owner
                return
            self.same_as.pop(name, None)
            self.moments[name] = SecondMoments.zeros(inputs.shape[-1], self.block,
                                                  self._home_for(inputs))
        self._latest[inputs.shape] = (
            (lambda: inputs) if inputs.numel() <= SMALL else weakref.ref(inputs),
            name,
        )
        moments = self.moments[name]
        if moments.blocks.device == inputs.device:
            moments.add(inputs, hold_out=self.hold_out)
        else:
            on_device = SecondMoments.zeros(moments.columns, self.block, inputs.device)
            on_device.add(inputs, hold_out=self.hold_out)
            moments.merge(on_device)

    def _home_for(self, inputs: torch.Tensor) -> torch.device:
        """Where the moments of a layer with these inputs are to lie, which counts as taken from
        then on."""
        if self._left is None:
            self._left = min(self.memory, free_memory(inputs.device) / 2)
        nbytes = nbytes_of([inputs.shape[-1]], self.block)
        if nbytes > self._left:
            return torch.device("cpu")
        self._left -= nbytes
        return inputs.device


def _same(seen: torch.Tensor | None, inputs: torch.Tensor) -> bool:
    return seen is inputs or (
        seen is not None and inputs.numel() <= SMALL and torch.equal(seen, inputs)
    )
