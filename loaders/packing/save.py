"""A model to a file of packed weights: the plan, what is refused before any work, the writing, and what people are told.

Each weight is read, patched in float32, packed once and written before the next. In memory are at most two dense slices of one
weight and what the packing of a slice needs, unless a patch can only be applied to a whole weight; and, where layers are packed
in their order, all of them packed.
"""
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...ops.format import FORMATS
from ..files import gguf_writer, safetensors_writer
from ..files.container import PLAIN_DTYPES, nbytes_of
from ..files.writing import WriteError, check_writable
from .block_by_block import InTurn
from .maker import Maker, bits, plain_type
from ..sizes import size_text
from .plan import DIGITS, Plan, PlanError, plan_for_size, plan_for_type, too_small
from .rules import HALVES, PLAIN_BYTES, family_of, fits, fitting, half_type
from .source import Source, Weight

FINE = "Q6_K"  # the least for weights with a change that were rounded coarsely before
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K", "NF4")  # what people are offered, the finest first
ALIKE = "as it is"  # in place of a type: each weight in the type it is held in
COARSE_BITS = 3.0  # bits a weight up to which a type has lost so much that saving it anew is worth a warning
NORM_SCALE = ("norm.query_norm.weight", "norm.key_norm.weight")  # `.scale` in the files of the field


@dataclass(frozen=True)
class Saved:
    """A file that was written.

    types: name -> type, as it came out. table: of these. told: what of the LoRAs has arrived and what people should know.
    """

    path: Path
    nbytes: int
    seconds: float
    types: dict[str, str]
    table: str
    told: list[str]

    def __str__(self) -> str:
        return f"{self.path}: {size_text(self.nbytes, DIGITS)} in {self.seconds:.0f} s"

    @property
    def text(self) -> str:
        """All of it in short lines, as the node shows them."""
        size = f"{size_text(self.nbytes, DIGITS)}, written in {self.seconds:.0f} s"
        return "\n".join([self.path.name, size, self.table, *self.told])


def plan_of(source: Source, wanted: str | int, costs: Mapping[str, Mapping[str, float]] | None = None, keep: bool = True,
            safetensors: bool = False) -> Plan:
    """The types for a type by name, ALIKE or a size in bytes of all tensors. costs: of a measurement (`plan_for_size`).

    keep: weights that were rounded coarsely before and have patches take at least FINE, in which patches arrive whole.
    Raises PlanError.
    """
    shapes = source.shapes
    family = family_of(shapes)
    halves = {name: half_type(_dtype(source.weights[name])) for name in shapes}
    floors = {name: fitting(FINE, shapes[name], halves[name]) for name in _rounded_before(source)} if keep else {}
    if safetensors:
        floors = {}  # it has no such types
    if isinstance(wanted, int):
        floors = {name: kind for name, kind in floors.items() if family.may_be_packed(name, shapes[name])}
        free = {name: shape for name, shape in shapes.items() if name not in floors}
        budget = wanted - Plan(floors).nbytes(shapes)
        try:
            types = floors | plan_for_size(free, budget, family, costs, halves).types
        except PlanError as error:
            if not floors:
                raise
            more = (f" {len(floors)} weights with a LoRA on them take {FINE}, {size_text(wanted - budget, DIGITS)}, so that"
                    " the LoRA arrives whole; choose otherwise under 'LoRAs', or begin with a model that is not packed.")
            raise too_small(wanted, error.short_by, more) from error
        return Plan({name: types[name] for name in shapes})
    if wanted == ALIKE:
        types = {name: _writable(source.weights[name], halves[name], safetensors) for name in shapes}
    else:
        types = plan_for_type(shapes, wanted, family, halves).types
        if not safetensors:  # what stays exact is no more exact than it is held
            types |= {name: source.weights[name].held_as for name, kind in types.items() if name not in floors
                      and (kind in PLAIN_BYTES or source.weights[name].held_as == wanted) and _is_ggml(source.weights[name])}
    return Plan(types | {name: kind for name, kind in floors.items()
                         if bits(types[name]) < bits(kind) and not source.weights[name].held_as == kind})


def save(source: Source, path: str | os.PathLike, wanted: str | int, sensitivity=None, keep: bool = True,
         metadata: Mapping[str, str] | None = None, overwrite: bool = False,
         track: Callable[[list, list[int]], Iterable] = lambda names, sizes: names,
         planned: Callable[[str], None] = lambda text: None, turn: Callable[[], InTurn] | None = None) -> Saved:
    """Write a source as GGUF, or as safetensors where `path` ends in that: there 4-bit weights are as bitsandbytes keeps them.

    wanted, keep: see `plan_of`. sensitivity: a measurement of this model. metadata: texts for the file. track: goes over the
    names, with the values of each, in place of a plain loop; what it raises ends the work. planned: is shown the plan before
    anything is written. turn: makes, after that, what the linear layers of the source's model are packed by in their order, so
    that each makes up for the errors before it; `track` then goes over them first, and they are in memory at once, packed.
    Raises SaveError, PlanError, WriteError, and WeightFileError where a file that weights are read from is written to
    meanwhile; then nothing has come to be.
    """
    path, started = Path(path), time.monotonic()
    check_target(path, source)
    safetensors = path.suffix.lower() == ".safetensors"
    container = safetensors_writer if safetensors else gguf_writer
    if sensitivity is not None:
        sensitivity.check_is_for(source.shapes)
    plan, tensors, texts = _within(source, path, wanted, sensitivity, keep, metadata or {}, safetensors)
    check_writable(path, container.file_size(tensors, texts), overwrite)
    notes = [*source.notes, *_warnings(source)]
    size = size_text(container.file_size(tensors, texts), DIGITS)
    planned("\n".join([path.name, f"{size}, not written yet", plan.text(source.shapes), *notes]))
    whole = _whole(source, plan.types) if keep else set()
    making = Maker(source, plan.types, sensitivity, whole, not isinstance(wanted, int) and not safetensors, safetensors,
                   None if turn is None else turn(), wanted if isinstance(wanted, int) else None,
                   container.file_size(tensors, texts))
    made = {}
    if turn is not None:
        names = [name for name in making.turn.order if plan.types[name] in FORMATS]
        for name in track(names, [source.weights[name].values for name in names]):
            source.guard()
            made[name] = making.in_turn(name)
            source.let_go()
    open_writer = safetensors_writer.safetensors_writer if safetensors else gguf_writer.gguf_writer
    with open_writer(path, tensors, texts, overwrite) as writer:
        for name in track(list(source.weights), [max(1, weight.values) for weight in source.weights.values()]):
            source.guard()
            kind, pieces = made.pop(name, None) or making.of(source.weights[name])
            writer.write(written_name(name), kind, pieces)
            source.let_go()
        source.guard()
    return Saved(path, path.stat().st_size, time.monotonic() - started, making.types,
                 Plan(making.types).text(source.shapes), [*making.told(), *notes])


def check_target(path: str | os.PathLike, *sources: Source):
    """Raise WriteError where a new file would replace one that these models were loaded of, under whatever name."""
    for own in {own for source in sources for own in source.paths}:
        if os.path.exists(path) and os.path.exists(own) and os.path.samefile(path, own):
            raise WriteError(f"{path} is a file of the model that is to be saved, or of a LoRA on it, and is not overwritten."
                             " Give the new file another name.")


def suffix_for(source: Source, wanted: str | int) -> str:
    """What the name of a file ends in that holds the types: .safetensors for NF4, and as it is for a model held so."""
    held = {weight.held_as for weight in source.weights.values()}
    return ".safetensors" if wanted == "NF4" or wanted == ALIKE and held & safetensors_writer.NAMES.keys() else ".gguf"


def written_name(name: str) -> str:
    """A weight's name in files: the host's, but for the norms that readers other than it know by an older name."""
    return f"{name.removesuffix('weight')}scale" if name.endswith(NORM_SCALE) else name


def _within(source: Source, path: Path, wanted: str | int, sensitivity, keep: bool, metadata: Mapping[str, str],
            safetensors: bool) -> tuple[Plan, dict, dict]:
    """(plan, what the file will hold, its metadata), a size being that of the file with its header."""
    container = safetensors_writer if safetensors else gguf_writer
    costs = None if sensitivity is None else sensitivity.costs
    budget = wanted
    while True:
        too_little = None
        try:
            plan = plan_of(source, budget, costs, keep, safetensors)
        except PlanError as error:
            too_little = error
            plan = plan_of(source, budget + error.short_by, costs, keep, safetensors)  # the smallest there is
        tensors = {written_name(name): (weight.shape, plan.types.get(name) or plain_type(weight, safetensors))
                   for name, weight in source.weights.items()}
        texts = metadata | {"featherweight.plan": plan.json()}
        if not safetensors:
            texts = _gguf_metadata(source, path, plan) | texts
        size = container.file_size(tensors, texts)
        if not isinstance(wanted, int) or size <= wanted:
            return plan, tensors, texts
        if too_little is not None:
            raise too_small(wanted, size - wanted, too_little.more) from too_little
        budget -= size - wanted


def _gguf_metadata(source: Source, path: Path, plan: Plan) -> dict:
    shapes = source.shapes
    sizes = Counter()
    for name, kind in plan.types.items():
        sizes[kind] += nbytes_of(kind, shapes[name])
    most = sizes.most_common(1)[0][0] if sizes else ""
    architecture = family_of(shapes).architecture
    return ({"general.architecture": architecture} if architecture else {}) | {
        "general.name": path.stem, "general.quantization_version": gguf_writer.QUANTIZATION_VERSION} | (
        {"general.file_type": gguf_writer.FILE_TYPES[most]} if most in gguf_writer.FILE_TYPES else {})


def _warnings(source: Source) -> list[str]:
    sizes = Counter()
    for weight in source.weights.values():
        sizes[weight.held_as] += weight.values
    coarse = [kind for kind in sizes if bits(kind) < COARSE_BITS and sizes[kind] > 0.1 * sizes.total()]
    if not coarse:
        return []
    return [f"Caution: the model's weights are {' and '.join(coarse)} already. What was lost of them comes back in no type:"
            " begin with the original model if you can."]


def _rounded_before(source: Source) -> list[str]:
    """Names of weights with patches that are held in a packed type coarser than FINE."""
    return [name for name in source.touched if source.weights[name].is_number and len(source.weights[name].shape) > 1
            and bits(source.weights[name].held_as) < bits(FINE)]


def _whole(source: Source, types: Mapping[str, str]) -> set[str]:
    """Names of weights with patches whose planned type may swallow a part of these: their values lie on its steps, or nearly.

    In a type that is coarser than the one they are held in and than FINE, they are rounded as those of a dense model are.
    """
    held = {name: source.weights[name].held_as for name in source.touched if len(source.weights[name].shape) > 1}
    return {name for name, kind in held.items()
            if kind in FORMATS and bits(kind) < bits(HALVES[0]) and bits(types[name]) >= min(bits(kind), bits(FINE))}


def _dtype(weight: Weight) -> torch.dtype:
    return PLAIN_DTYPES["F16"] if weight.held_as == "F16" else torch.bfloat16


def _is_ggml(weight: Weight) -> bool:
    """Whether a weight may be written in the type of GGUF that it is held in: in blocks that do not divide its rows, as files
    of ComfyUI-GGUF have them, only as it is."""
    kind = weight.held_as
    return (kind in FORMATS and FORMATS[kind].ggml_type is not None and kind not in HALVES
            and (fits(kind, weight.shape) or weight.is_whole and not weight.patches))


def _writable(weight: Weight, half: str, safetensors: bool) -> str:
    """The type a weight is held in, where a file may hold it; else the 16 bits of its values."""
    kind = weight.held_as
    held = kind in safetensors_writer.NAMES if safetensors else _is_ggml(weight)
    return kind if held or kind in PLAIN_BYTES else half
