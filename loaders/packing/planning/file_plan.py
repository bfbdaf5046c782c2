"""Plans a file before it is written: the types of its tensors, its size, and whether it can be."""
import contextlib
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from comfy.quant_ops import QUANT_ALGOS

from ....ops.packing.pack_types import ROW_TYPES, SAVE, TYPES, pack_type
from ...byte_sizes import size_text
from ...comfyui.model_summary import title_of
from ...container.weight_file import PLAIN_DTYPES
from ...families import rules_for
from ...files import gguf_writer, safetensors_writer
from ...files.atomic_file import WriteError, check_writable
from ...name_lists import join_some
from ...packing_rules import HALVES, Shapes, with_fallback
from ..calibration.sensitivity import Sensitivity
from ..layer_losses import LOSS_IN_LAYERS, LOSS_KEY, RESULT, loss_text, total
from ..source import Source, Weight
from .plan import (
    DIGITS,
    STAYS,
    Plan,
    PlanError,
    expected_errors,
    plan_for_size,
    plan_for_type,
    too_small,
)

LORA_TYPE = "Q6_K"  # the least type for coarsely quantized weights with a LoRA
LORA_BITS, HALF_BITS = (TYPES[name].bits_per_value() for name in (LORA_TYPE, HALVES[0]))
# GGUF types and NF4, the finest first
SAVE_TYPES = tuple(name for name, each in TYPES.items()
                   if SAVE in each.menus and name not in ROW_TYPES)
# ComfyUI's own types that this ComfyUI reads; int8_convrot is called int8_tensorwise in files.
HOST_TYPES = tuple(
    name for name in ROW_TYPES if name == "int8_convrot" or name in QUANT_ALGOS)
KEEP_TYPES = "keep types"  # in place of a type: each weight keeps the type it is stored in
RENAMED_TYPES = {"as it is": KEEP_TYPES}  # words of earlier versions
# Sets of ComfyUI's own types that a size may be met with, the finest first: those that the same
# devices multiply.
MIXES = (("int8_convrot", "asym_w4a8_int8"), ("int8_convrot", "convrot_w4a4"),
         ("int8_convrot", "nvfp4"), ("float8_e4m3fn", "nvfp4"), ("mxfp8", "nvfp4"))
COARSE_BITS = 3.0  # bits of a value below which saving a model again is worth a warning
PACKED_SHARE = 0.1  # of a model's values, from which on what was lost before is told
# Norms that are called `.scale` in the field's files.
NORM_SCALE = ("norm.query_norm.weight", "norm.key_norm.weight")


@dataclass(frozen=True)
class SaveOptions:
    """How a model is saved.

    Attributes:
        sensitivity: a measurement of this model.
        keep_loras: whether coarsely quantized weights with a LoRA take at least LORA_TYPE, in which
            the LoRA arrives whole.
        metadata: texts for the file.
        overwrite: whether the file may replace one of the same name.
        mode: permissions of the file, as for `atomic_writer`.
        row_types: names of ROW_TYPES with which a size is met; none: it is met with GGUF types.
        is_int4_product: whether ComfyUI is to round the inputs of convrot_w4a4's layers to 4 bits
            too, which fewer GPUs multiply and which loses more than 8 bits.
    """

    sensitivity: Sensitivity | None = None
    keep_loras: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False
    row_types: tuple[str, ...] = ()
    mode: int = 0o666
    is_int4_product: bool = False


@dataclass(frozen=True)
class FilePlan:
    """A file that can be written.

    Attributes:
        source: what is saved.
        path: of the file.
        target: a type, KEEP_TYPES or a size, as for `plan_file`.
        options: how it is saved.
        types: name -> type of each weight of numbers.
        names: name -> name in the file of every tensor.
        tensors: name in the file -> (shape, type) of every tensor.
        metadata: of the file.
        nbytes: the size of the file, at most the target's.
        started: time.monotonic() at the start of the plan.
    """

    source: Source
    path: Path
    target: str | int
    options: SaveOptions
    types: dict[str, str]
    names: dict[str, str]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    metadata: dict
    nbytes: int
    started: float = field(default_factory=time.monotonic)

    @property
    def is_safetensors(self) -> bool:
        return is_safetensors(self.path)

    @property
    def max_bytes(self) -> int | None:
        """The size that the file may have, None for any."""
        return self.target if isinstance(self.target, int) else None

    @property
    def notes(self) -> list[str]:
        """Notes for people on what the file will lack, and on its measurement."""
        notes = [*self.source.notes, *(_warnings(self.source) or self._notes_on_second_losses()),
                 *self._notes_on_widths()]
        if self.options.sensitivity is not None:
            shapes = self.source.model.shapes
            rules = rules_for(shapes)
            packed = [
                name for name, shape in shapes.items() if not pack_type(self.types[name]).is_plain
                and rules.may_be_packed(name, shape)
            ]
            notes += self.options.sensitivity.notes(packed, self.max_bytes is not None)
        return notes

    def _notes_on_second_losses(self) -> list[str]:
        """Returns a note where much of the model is packed already and gets another packed type."""
        values: Counter[tuple[str, str]] = Counter()
        for name, type_name in self.types.items():
            weight = self.source.weights[name]
            values[weight.stored_type, type_name] += weight.values
        lossy = [(before, after) for (before, after), count in values.most_common()
                 if before != after and count > PACKED_SHARE * values.total()
                 and not (pack_type(before).is_plain or pack_type(after).is_plain)]
        if not lossy:
            return []
        befores, afters = (dict.fromkeys(names) for names in zip(*lossy))
        return [f"{' and '.join(map(title_of, befores))} becomes {' and '.join(afters)}: the"
                " weights lose a second time, and no type restores what they have lost before."
                " Start from the original model if you can."]

    def _notes_on_widths(self) -> list[str]:
        """Returns a note on weights whose shapes the row type asked for does not hold."""
        if self.target not in ROW_TYPES:
            return []
        shapes = self.source.model.shapes
        others = [name for name in rules_for(shapes).row_names(shapes, self.target)
                  if self.types[name] != self.target]
        if self.target not in self.types.values():
            return [f"Nothing is in {self.target}: ComfyUI reads no packed weights of this model."]
        if not others:
            return []
        return [f"{len(others)} weights stay in 16 bits, since their shapes do not fit"
                f" {self.target}: {join_some(others)}."]

    @property
    def text(self) -> str:
        """The plan in short lines."""
        return self._text(Plan(self.types).text(self.source.shapes))

    @property
    def short_text(self) -> str:
        """What the node shows: the types in one line."""
        return self._text(Plan(self.types).shares(self.source.shapes))

    def _text(self, types: str) -> str:
        size = f"{size_text(self.nbytes, DIGITS)}, not written yet"
        return "\n".join([self.path.name, size, types, *self.notes])

    @property
    def must_survive(self) -> set[str]:
        """Names of weights whose LoRAs are to arrive whole and could be lost by rounding.

        Those are quantized weights that take a type at least as fine as their own or as LORA_TYPE:
        their values lie on its steps, or nearly, and a small change rounds back to them. In a
        coarser type, or in a row type that is not their own, they are rounded like the values of a
        dense model.
        """
        names = set()
        for name in self.source.patched_names if self.options.keep_loras else ():
            weight, planned = self.source.weights[name], pack_type(self.types[name])
            bits = pack_type(weight.stored_type).bits_per_value()
            is_packed = (planned.name == weight.stored_type if planned.is_host_type
                         else bits < HALF_BITS)
            if (len(weight.shape) > 1 and is_packed
                    and planned.bits_per_value() >= min(bits, LORA_BITS)):
                names.add(name)
        return names


def plan_file(source: Source, path: str | os.PathLike, target: str | int,
              options: SaveOptions | None = None) -> FilePlan:
    """Plans a file of a source.

    Args:
        source: what is saved.
        path: of the file: safetensors where it ends in that, with 4-bit weights as bitsandbytes
            stores them; else GGUF.
        target: a type by name, KEEP_TYPES, or the bytes that the file may have.
        options: further ones, None for the defaults.

    Raises:
        PlanError: where no types fit into the size.
        SensitivityError: where the measurement is of another model.
        WriteError: where the file cannot be written.
    """
    path, options = Path(path), options or SaveOptions()
    if source.parts and not is_safetensors(path):
        raise PlanError(f"{path} is for a checkpoint, which must be a safetensors file. Give it a"
                        " name that ends in .safetensors.")
    reject_own_files(path, source)
    if options.sensitivity is not None:
        sensitivity = options.sensitivity.match(source.model.shapes)
        options = replace(options, sensitivity=sensitivity)
    if isinstance(target, int):
        plan = _plan_within(source, path, target, options)
    else:
        types = make_plan(source, target, options, is_safetensors(path))
        plan = _lay_out(source, path, target, options, types)
    check_writable(path, plan.nbytes, options.overwrite)
    return plan


def reject_own_files(path: str | os.PathLike, *sources: Source):
    """Raises WriteError where a file would replace one that these models were loaded from."""
    for source_path in {source_path for source in sources for source_path in source.paths}:
        if (os.path.exists(path) and os.path.exists(source_path)
                and os.path.samefile(path, source_path)):
            raise WriteError(
                f"{path} is a file of the model that is to be saved, or of a LoRA on it, and is"
                " not overwritten. Give the new file another name.")


def suffix_for(source: Source, target: str | int, row_types: Collection[str] = ()) -> str:
    """Returns ".safetensors" for a whole checkpoint, NF4 and ComfyUI's own types, and for a model
    that keeps them, else ".gguf". target: as for `plan_file`; row_types: of the options."""
    stored = {weight.stored_type for weight in source.weights.values()}
    keeps_safetensors = target == KEEP_TYPES and stored & safetensors_writer.PACKED_TYPES
    is_one = source.parts or row_types or target in safetensors_writer.PACKED_TYPES
    return ".safetensors" if is_one or keeps_safetensors else ".gguf"


def is_safetensors(path: Path) -> bool:
    """Returns whether a file is safetensors, by its suffix."""
    return path.suffix.lower() == ".safetensors"


def written_name(name: str, types: Mapping[str, str] | None = None) -> str:
    """Returns a weight's name in files: the host's, except for NORM_SCALE.

    With row types among the types of the file, it is the host's, which reads other names of norms
    in some families only.
    """
    if types and not ROW_TYPES.keys().isdisjoint(types.values()):
        return name
    return f"{name.removesuffix('weight')}scale" if name.endswith(NORM_SCALE) else name


def plain_type(weight: Weight, safetensors: bool) -> str:
    """Returns the type of a tensor that is written as it is."""
    if safetensors:
        return safetensors_writer.DTYPES[weight.tensor.dtype]
    return next((name for name, dtype in PLAIN_DTYPES.items() if dtype == weight.tensor.dtype),
                "I8")


def errors_of_result(source: Source, types: Mapping[str, str],
                     options: SaveOptions) -> dict[str, float]:
    """Returns the errors that packing to types causes in the model's output, for `layer_losses`;
    nothing without a measurement, or its costs, in the options."""
    if options.sensitivity is None or options.sensitivity.loss_kind != RESULT:
        return {}
    shapes = source.model.shapes
    packed = {name: types[name] for name in shapes if not pack_type(types[name]).is_plain
              and not source.weights[name].is_copied(types[name])}
    return expected_errors(packed, shapes, options.sensitivity.costs)


def make_plan(source: Source, target: str | int, options: SaveOptions,
              safetensors: bool = False) -> Plan:
    """Chooses the types of a source's weights.

    Args:
        source: of the weights.
        target: a type by name, KEEP_TYPES, or the bytes of all tensors.
        options: for their measurement and `keep_loras`.
        safetensors: whether the file is safetensors, which holds only NF4, ComfyUI's own types and
            plain ones.

    Raises:
        PlanError: where no types fit into the size, or this ComfyUI does not read the type.
    """
    if source.parts:
        return _plan_of_parts(source, target, options)
    row_types = options.row_types if isinstance(target, int) else [target]
    row_types = [type_name for type_name in row_types if type_name in ROW_TYPES]
    _reject_unread_types(source, row_types)
    least = _least_types(source) if options.keep_loras and not safetensors else {}
    if isinstance(target, int):
        return _plan_for_size(source, target, least, options)
    shapes, weights = source.shapes, source.weights
    if target == KEEP_TYPES:
        types = {name: keep_type(weights[name], safetensors) for name in shapes}
    elif row_types:
        types = plan_for_type(shapes, target, rules_for(shapes), _halves_beside_rows(source)).types
    else:
        types = plan_for_type(shapes, target, rules_for(shapes), source.halves).types
        for name, type_name in types.items():
            # A quantized weight that is to stay exact is copied: no type makes it more exact.
            is_copied = pack_type(type_name).is_plain or weights[name].stored_type == target
            if is_copied and name not in least and not safetensors and _is_ggml(weights[name]):
                types[name] = weights[name].stored_type
    for name, type_name in least.items():
        if pack_type(types[name]).bits_per_value() < pack_type(type_name).bits_per_value():
            types[name] = type_name
    return Plan(types)


def best_mix(source: Source, nbytes: int, options: SaveOptions) -> tuple[str, ...]:
    """Returns the one of `MIXES` that loses the least at a size, among those that this ComfyUI
    reads: of those that fit the one with the most `signal_to_error`, the coarser type first; where
    none fits, the smallest.

    Args:
        source: of the weights.
        nbytes: of all tensors.
        options: as for `plan_file`; their row types do not count.
    """
    mixes = sorted((mix for mix in MIXES if {*mix} <= {*HOST_TYPES}),
                   key=lambda mix: [-TYPES[name].signal_to_error for name in reversed(mix)])
    for mix in mixes:
        with contextlib.suppress(PlanError):
            make_plan(source, nbytes, replace(options, row_types=mix), safetensors=True)
            return mix
    return min(mixes, key=lambda mix: TYPES[mix[-1]].bits_per_value())


def _plan_of_parts(source: Source, target: str | int, options: SaveOptions) -> Plan:
    """Chooses the types of a whole checkpoint, whose text encoders are packed as they are alone.

    For a size they have the finest of its types, and the diffusion model takes what they leave.
    """
    if isinstance(target, int) != bool(options.row_types) or (
            isinstance(target, str) and target not in (KEEP_TYPES, *ROW_TYPES)):
        raise PlanError("A checkpoint cannot have weights in GGUF types or NF4. Choose"
                        f" {', '.join(HOST_TYPES)}, or save the model alone.")
    of_encoders = options.row_types[0] if isinstance(target, int) else target
    others, types = replace(options, sensitivity=None), {}
    for part in source.parts:
        part_target = of_encoders if part.may_be_packed else KEEP_TYPES
        plan = make_plan(part.source, part_target, others, safetensors=True)
        types |= {part.names[name]: type_name for name, type_name in plan.types.items()}
    nbytes = Plan(types).nbytes(source.shapes)
    try:
        of_model = make_plan(
            source.model, target - nbytes if isinstance(target, int) else target, options,
            safetensors=True).types
    except PlanError as error:
        if isinstance(target, int) and error.short_by:
            raise too_small(target, error.short_by, error.more) from error
        raise
    return Plan({name: of_model.get(name) or types[name] for name in source.shapes})


def _reject_unread_types(source: Source, row_types: Collection[str]):
    """Raises PlanError for types of ComfyUI's own that it does not read in a model."""
    for type_name in row_types:
        if type_name not in HOST_TYPES:
            raise PlanError(f"This ComfyUI does not read {type_name}. Update it, or choose one of"
                            f" {', '.join(HOST_TYPES)}.")
        if source.is_side_model:
            raise PlanError(f"ComfyUI reads {type_name} in diffusion models and text encoders, not"
                            " in this model. Choose a type of GGUF.")


def _halves_beside_rows(source: Source) -> dict[str, str]:
    """Returns name -> type of each weight where it is not packed, in a file with row types.

    That is its 16-bit type, or F32 for small tensors that have it already, but not in a text
    encoder, which ComfyUI computes in the dtype of its norms.
    """
    shapes, types = source.shapes, dict(source.halves)
    family = rules_for(shapes)
    for name, half in types.items():
        if (source.weights[name].stored_type == "F32" and not family.embedding
                and family.exact_type(name, shapes[name], half) == "F32"):
            types[name] = "F32"
    return types


def _least_types(source: Source) -> dict[str, str]:
    """Returns name -> LORA_TYPE, or its fallback, for weights with LoRAs in a coarser type."""
    types = {}
    for name in source.patched_names:
        weight = source.weights[name]
        if (weight.is_number and len(weight.shape) > 1
                and pack_type(weight.stored_type).bits_per_value() < LORA_BITS):
            types[name] = with_fallback(LORA_TYPE, weight.shape, weight.half)
    return types


def _plan_for_size(source: Source, nbytes: int, least: Mapping[str, str],
                   options: SaveOptions) -> Plan:
    """Chooses the best types of at most `nbytes` for all tensors.

    least: name -> type of weights whose LoRAs are to arrive whole, which take that type.
    """
    shapes = source.shapes
    family = rules_for(shapes)
    fixed = {
        name: type_name for name, type_name in least.items()
        if family.may_be_packed(name, shapes[name])
    }
    free = {name: shape for name, shape in shapes.items() if name not in fixed}
    fixed_bytes = Plan(fixed).nbytes(shapes)
    costs = None if options.sensitivity is None else options.sensitivity.costs
    halves = _halves_beside_rows(source) if options.row_types else source.halves
    stored = {name: pack_type(source.weights[name].stored_type) for name in shapes}
    packed = {} if options.row_types else {
        name: stored[name].nbytes(shapes[name]) for name in free
        if source.weights[name].is_copied(stored[name].name)
        and _is_ggml(source.weights[name]) and not stored[name].is_plain}
    try:
        chosen = plan_for_size(free, nbytes - fixed_bytes, family, costs, halves,
                               options.row_types, packed).types
    except PlanError as error:
        if not fixed:
            raise
        more = (
            f" {len(fixed)} weights with a LoRA on them take {LORA_TYPE},"
            f" {size_text(fixed_bytes, DIGITS)}, so that the LoRA keeps its full effect; choose"
            " keep the size at 'LoRAs on packed weights', or start from a model that is not packed."
        )
        raise too_small(nbytes, error.short_by, more) from error
    chosen = {name: stored[name].name if type_name == STAYS else type_name
              for name, type_name in chosen.items()}
    return Plan({name: fixed.get(name) or chosen[name] for name in shapes})


def _plan_within(source: Source, path: Path, nbytes: int, options: SaveOptions) -> FilePlan:
    """Plans a file of at most `nbytes`, header and padding included. Raises PlanError."""
    budget = nbytes  # for the tensors alone
    while True:
        try:
            plan = make_plan(source, budget, options, is_safetensors(path))
        except PlanError as error:
            smallest = make_plan(source, budget + error.short_by, options, is_safetensors(path))
            file = _lay_out(source, path, nbytes, options, smallest)
            if file.nbytes > nbytes:
                raise too_small(nbytes, file.nbytes - nbytes, error.more) from error
            return file
        file = _lay_out(source, path, nbytes, options, plan)
        if file.nbytes <= nbytes:
            return file
        budget -= file.nbytes - nbytes


def _lay_out(source: Source, path: Path, target: str | int, options: SaveOptions,
             plan: Plan) -> FilePlan:
    """Returns the file of a plan, with its tensors, metadata and size."""
    safetensors = is_safetensors(path)
    names = {name: written_name(source.file_names.get(name, name), plan.types)
             for name in source.weights}
    renamed = {"convrot_w4a4": safetensors_writer.INT4_PRODUCT} if options.is_int4_product else {}
    types = {name: renamed.get(type_name, type_name) for name, type_name in plan.types.items()}
    tensors = {
        names[name]: (weight.shape, types.get(name) or plain_type(weight, safetensors))
        for name, weight in source.weights.items()
    }
    metadata = {**source.metadata, **options.metadata, "featherweight.plan": plan.json()}
    if options.sensitivity is not None and not options.sensitivity.is_unused:
        errors = errors_of_result(source, plan.types, options)
        metadata[LOSS_KEY] = (loss_text(total(errors, RESULT), RESULT) if errors
                              else LOSS_IN_LAYERS)
    if not safetensors:
        metadata = _gguf_metadata(source.shapes, path, plan) | metadata
    nbytes = (safetensors_writer if safetensors else gguf_writer).file_size(tensors, metadata)
    return FilePlan(source, path, target, options, plan.types, names, tensors, metadata, nbytes)


def _gguf_metadata(shapes: Shapes, path: Path, plan: Plan) -> dict:
    sizes = Counter()
    for name, type_name in plan.types.items():
        sizes[type_name] += pack_type(type_name).nbytes(shapes[name])
    main_type = sizes.most_common(1)[0][0] if sizes else ""
    metadata = {"general.architecture": rules_for(shapes).architecture, "general.name": path.stem,
                "general.quantization_version": gguf_writer.QUANTIZATION_VERSION}
    if not metadata["general.architecture"]:
        del metadata["general.architecture"]
    if main_type in gguf_writer.FILE_TYPES:
        metadata["general.file_type"] = gguf_writer.FILE_TYPES[main_type]
    return metadata


def _warnings(source: Source) -> list[str]:
    values = Counter()
    for weight in source.weights.values():
        values[weight.stored_type] += weight.values
    coarse = [name for name in values if pack_type(name).bits_per_value() < COARSE_BITS
              and values[name] > PACKED_SHARE * values.total()]
    if not coarse:
        return []
    return [
        f"Caution: the model's weights are {' and '.join(coarse)} already. No type restores what"
        " they have lost: start from the original model if you can."
    ]


def _is_ggml(weight: Weight) -> bool:
    """Returns whether a weight may be written in its own type of GGUF. One whose blocks do not
    divide the rows, as in files of ComfyUI-GGUF, can only be copied."""
    stored = pack_type(weight.stored_type)
    return stored.is_gguf and (stored.takes(weight.shape)
                               or (weight.is_whole and not weight.patches))


def keep_type(weight: Weight, safetensors: bool) -> str:
    """Returns the type a weight is stored in where a file can hold it, else its 16-bit type."""
    stored = pack_type(weight.stored_type)
    is_writable = _is_ggml(weight)
    if safetensors:
        is_writable = stored.name in safetensors_writer.PACKED_TYPES and (
            not weight.patches or stored.takes(weight.shape))
    return stored.name if is_writable or stored.is_plain else weight.half
