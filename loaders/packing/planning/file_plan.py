"""A file before it is written: the types of its tensors, its size, and what is refused before any
work."""
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ....ops.format import FORMATS
from ...files import gguf_writer, safetensors_writer
from ...files.atomic_file import WriteError, check_writable
from ...files.container import PLAIN_DTYPES, nbytes_of
from ...sizes import size_text
from ..calibration.sensitivity import Sensitivity
from ..source import Source, Weight
from .packing_rules import (
    HALVES,
    PLAIN_BYTES,
    Shapes,
    bits_per_value,
    divides_rows,
    rules_for,
    with_fallback,
)
from .plan import DIGITS, Plan, PlanError, plan_for_size, plan_for_type, too_small

LORA_TYPE = "Q6_K"  # the least for weights with a LoRA that were rounded coarsely before
# what people are offered, the finest first
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K", "NF4")
KEEP_TYPES = "as it is"  # in place of a type: each weight in the type it is held in
# bits a weight up to which a type has lost so much that saving it again is worth a warning
COARSE_BITS = 3.0
# `.scale` in the files of the field
NORM_SCALE = ("norm.query_norm.weight", "norm.key_norm.weight")


@dataclass(frozen=True)
class SaveOptions:
    """How a model is saved.

    sensitivity: a measurement of this model. keep_loras: weights that were rounded coarsely before
    and have LoRAs take at least LORA_TYPE, in which these arrive whole. metadata: texts for the
    file.
    overwrite: whether the file may replace one of its name.
    """

    sensitivity: Sensitivity | None = None
    keep_loras: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(frozen=True)
class FilePlan:
    """A file that can be written.

    wanted: what was asked for, as `plan_file` takes it. types: name of each weight that is written
    as numbers -> its type. tensors: name in the file -> (shape, type), of all. metadata: all of the
    file's. nbytes: the size of the file, which it keeps within where `wanted` is one.
    """

    source: Source
    path: Path
    wanted: str | int
    options: SaveOptions
    types: dict[str, str]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    metadata: dict
    nbytes: int
    started: float = field(default_factory=time.monotonic)

    @property
    def is_safetensors(self) -> bool:
        return is_safetensors(self.path)

    @property
    def max_bytes(self) -> int | None:
        """The size that the file may have; None for any."""
        return self.wanted if isinstance(self.wanted, int) else None

    @property
    def notes(self) -> list[str]:
        """What people should know of what will not be in the file."""
        return [*self.source.notes, *_warnings(self.source)]

    @property
    def text(self) -> str:
        """The plan in short lines, as the node shows it."""
        size = f"{size_text(self.nbytes, DIGITS)}, not written yet"
        return "\n".join(
            [self.path.name, size,
             Plan(self.types).text(self.source.shapes), *self.notes])

    @property
    def must_survive(self) -> set[str]:
        """Names of weights with LoRAs that are to arrive whole and may be swallowed by the weight's
        type.

        The values of these lie on its steps, or nearly. In a type that is coarser than the one they
        are held in and than LORA_TYPE, they are rounded as those of a dense model are.
        """
        names = set()
        for name in self.source.touched if self.options.keep_loras else ():
            weight = self.source.weights[name]
            bits = bits_per_value(weight.held_as)
            is_packed = weight.held_as in FORMATS and bits < bits_per_value(HALVES[0])
            if (len(weight.shape) > 1 and is_packed
                    and bits_per_value(self.types[name]) >= min(bits, bits_per_value(LORA_TYPE))):
                names.add(name)
        return names


def plan_file(source: Source, path: str | os.PathLike, wanted: str | int,
              options: SaveOptions | None = None) -> FilePlan:
    """Plan a file of a source.

    Args:
        source: what is saved.
        path: of the file: GGUF, or safetensors where it ends in that; there 4-bit weights are as
            bitsandbytes keeps them.
        wanted: a type by name, KEEP_TYPES, or the bytes that the file may have.
        options: others.

    Raises:
        PlanError: where no types fit into the size.
        SensitivityError: where the measurement is of another model.
        WriteError: where the file cannot be written.
    """
    path, options = Path(path), options or SaveOptions()
    reject_own_files(path, source)
    if options.sensitivity is not None:
        options.sensitivity.check_is_for(source.shapes)
    plan = _plan_within(source, path, wanted, options) if isinstance(wanted, int) else _lay_out(
        source, path, wanted, options, make_plan(source, wanted, options, is_safetensors(path)))
    check_writable(path, plan.nbytes, options.overwrite)
    return plan


def reject_own_files(path: str | os.PathLike, *sources: Source):
    """Raise WriteError where a new file would replace one that these models were loaded of, under
    whatever name."""
    for own in {own for source in sources for own in source.paths}:
        if os.path.exists(path) and os.path.exists(own) and os.path.samefile(path, own):
            raise WriteError(
                f"{path} is a file of the model that is to be saved, or of a LoRA on it, and is"
                " not overwritten. Give the new file another name.")


def suffix_for(source: Source, wanted: str | int) -> str:
    """What the name of a file ends in that holds the types: .safetensors for NF4, and as it is for
    a model held so."""
    held = {weight.held_as for weight in source.weights.values()}
    in_safetensors = (
        wanted == "NF4" or (wanted == KEEP_TYPES and held & safetensors_writer.QUANT_NAMES.keys())
    )
    return ".safetensors" if in_safetensors else ".gguf"


def is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def written_name(name: str) -> str:
    """A weight's name in files: the host's, but for the norms that readers other than it know by an
    older name."""
    return f"{name.removesuffix('weight')}scale" if name.endswith(NORM_SCALE) else name


def plain_type(weight: Weight, safetensors: bool) -> str:
    """The type of a tensor that is written as it is."""
    if safetensors:
        return safetensors_writer.DTYPES[weight.tensor.dtype]
    return next((name for name, dtype in PLAIN_DTYPES.items() if dtype == weight.tensor.dtype),
                "I8")


def make_plan(source: Source, wanted: str | int, options: SaveOptions,
              safetensors: bool = False) -> Plan:
    """Choose the types of a source's weights.

    Args:
        source: of the weights.
        wanted: a type by name, KEEP_TYPES, or the bytes of all tensors.
        options: whose measurement and whose `keep_loras` count.
        safetensors: whether the file is one, which has only NF4 and plain types.

    Raises:
        PlanError: where no types fit into the size.
    """
    least = _least_types(source) if options.keep_loras and not safetensors else {}
    if isinstance(wanted, int):
        return _plan_for_size(source, wanted, least, options.sensitivity)
    shapes, types = source.shapes, {}
    planned = (
        None
        if wanted == KEEP_TYPES
        else plan_for_type(shapes, wanted, rules_for(shapes), source.halves).types
    )
    for name in shapes:
        weight = source.weights[name]
        if planned is None:
            types[name] = _own_type(weight, safetensors)
            continue
        types[name] = planned[name]
        is_exact = planned[name] in PLAIN_BYTES
        if (
            (is_exact or weight.held_as == wanted)
            and name not in least
            and not safetensors
            and _is_ggml(weight)
        ):
            types[name] = weight.held_as  # what stays exact is no more exact than it is held
    for name, type_name in least.items():
        if bits_per_value(types[name]) < bits_per_value(type_name):
            types[name] = type_name
    return Plan(types)


def _least_types(source: Source) -> dict[str, str]:
    """Name -> LORA_TYPE, of weights with LoRAs that are held in a coarser one."""
    types = {}
    for name in source.touched:
        weight = source.weights[name]
        if (weight.is_number and len(weight.shape) > 1
                and bits_per_value(weight.held_as) < bits_per_value(LORA_TYPE)):
            types[name] = with_fallback(LORA_TYPE, weight.shape, weight.half)
    return types


def _plan_for_size(source: Source, nbytes: int, least: Mapping[str, str],
                   sensitivity: Sensitivity | None) -> Plan:
    """The best types of at most `nbytes`. least: of weights whose LoRAs are to arrive whole, which
    take that."""
    shapes = source.shapes
    family = rules_for(shapes)
    fixed = {
        name: type_name for name, type_name in least.items()
        if family.may_be_packed(name, shapes[name])
    }
    free = {name: shape for name, shape in shapes.items() if name not in fixed}
    fixed_bytes = Plan(fixed).nbytes(shapes)
    costs = None if sensitivity is None else sensitivity.costs
    try:
        chosen = plan_for_size(free, nbytes - fixed_bytes, family, costs, source.halves).types
    except PlanError as error:
        if not fixed:
            raise
        more = (
            f" {len(fixed)} weights with a LoRA on them take {LORA_TYPE},"
            f" {size_text(fixed_bytes, DIGITS)}, so that the LoRA arrives whole; choose otherwise"
            " under 'LoRAs', or begin with a model that is not packed."
        )
        raise too_small(nbytes, error.short_by, more) from error
    return Plan({name: fixed.get(name) or chosen[name] for name in shapes})


def _plan_within(source: Source, path: Path, nbytes: int, options: SaveOptions) -> FilePlan:
    """A file of at most `nbytes`, header and padding included. Raises PlanError."""
    budget = nbytes  # of the tensors alone
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


def _lay_out(source: Source, path: Path, wanted: str | int, options: SaveOptions,
             plan: Plan) -> FilePlan:
    """The file of a plan."""
    safetensors = is_safetensors(path)
    tensors = {
        written_name(name): (weight.shape, plan.types.get(name) or plain_type(weight, safetensors))
        for name, weight in source.weights.items()
    }
    metadata = {**options.metadata, "featherweight.plan": plan.json()}
    if not safetensors:
        metadata = _gguf_metadata(source.shapes, path, plan) | metadata
    nbytes = (safetensors_writer if safetensors else gguf_writer).file_size(tensors, metadata)
    return FilePlan(source, path, wanted, options, plan.types, tensors, metadata, nbytes)


def _gguf_metadata(shapes: Shapes, path: Path, plan: Plan) -> dict:
    sizes = Counter()
    for name, type_name in plan.types.items():
        sizes[type_name] += nbytes_of(type_name, shapes[name])
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
        values[weight.held_as] += weight.values
    coarse = [
        type_name for type_name in values
        if bits_per_value(type_name) < COARSE_BITS and values[type_name] > 0.1 * values.total()
    ]
    if not coarse:
        return []
    return [
        f"Caution: the model's weights are {' and '.join(coarse)} already. What was lost of them"
        " comes back in no type: begin with the original model if you can."
    ]


def _is_ggml(weight: Weight) -> bool:
    """Whether a weight may be written in the type of GGUF that it is held in.

    In blocks that do not divide its rows, as files of ComfyUI-GGUF have them, only as it is.
    """
    held_as = weight.held_as
    if held_as not in FORMATS or FORMATS[held_as].ggml_type is None or held_as in HALVES:
        return False
    return divides_rows(held_as, weight.shape) or (weight.is_whole and not weight.patches)


def _own_type(weight: Weight, safetensors: bool) -> str:
    """The type a weight is held in, where a file may hold it; else the 16 bits of its values."""
    in_safetensors = weight.held_as in safetensors_writer.QUANT_NAMES
    is_written = in_safetensors if safetensors else _is_ggml(weight)
    return weight.held_as if is_written or weight.held_as in PLAIN_BYTES else weight.half
