"""Plans the type of each tensor of a model, for one type or for a size."""
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ....ops.bounded_json import read_json
from ....ops.packing.pack_types import GGUF_TYPES, ROW_TYPES, TYPES, pack_type
from ....ops.stable_names import short_error_name
from ...byte_sizes import size_text, type_lines, type_shares, unit_of
from ...packing_rules import PackingRules, Shapes, with_fallback
from .choose_types import bytes_for_costs, choose_types

# Power of int8_convrot's error with the inputs rounded too over that with exact ones, of the demo.
ROUNDED_INPUTS = 10 ** 0.22
STAYS = "as stored"  # in place of the type of a weight that is packed already, and stays
DIGITS = 2  # decimal places of sizes in messages
SMALLEST_FIRST = sorted((name for name, each in TYPES.items() if each.is_gguf),
                        key=lambda name: TYPES[name].bits_per_value())


@short_error_name
class PlanError(ValueError):
    """Raised where a plan cannot be made. The message names the least size, or the choices.

    short_by: bytes that a size lacks, 0 for another reason. more: the message's last sentence.
    """

    short_by: int = 0
    more: str = ""


def too_small(nbytes: int, short_by: int, more: str = "") -> PlanError:
    """Returns the error for a size of `nbytes`, whose message names one that is enough."""
    least = nbytes + short_by
    # Rounded up to the last digit shown, so that the size in the message is enough.
    unit = max(1, unit_of(least)[0] // 10 ** DIGITS)
    least = -(-least // unit) * unit
    error = PlanError(
        f"A size of {size_text(nbytes, DIGITS)} is too small for this model: with the smallest"
        f" types it takes {size_text(least, DIGITS)}."
        f" Ask for that much or more.{more}")
    error.short_by = short_by
    error.more = more
    return error


@dataclass(frozen=True)
class Plan:
    """The types of a model's tensors.

    types: name -> a key of FORMATS or "F32", of every tensor, in the order of the model.
    """

    types: dict[str, str]

    def nbytes(self, shapes: Shapes) -> int:
        """Returns the bytes of all tensors together, without header and padding."""
        return sum(pack_type(type_name).nbytes(shapes[name])
                   for name, type_name in self.types.items())

    def text(self, shapes: Shapes) -> str:
        """Returns a line for each type, the one with the most bytes first: tensors, bytes, share.
        """
        return "\n".join(type_lines(self._totals(shapes), DIGITS))

    def shares(self, shapes: Shapes) -> str:
        """Returns the types with their shares of the bytes in one line."""
        return type_shares(self._totals(shapes))

    def _totals(self, shapes: Shapes) -> dict[str, tuple[int, int]]:
        counts, sizes = Counter(self.types.values()), Counter()
        for name, type_name in self.types.items():
            sizes[type_name] += pack_type(type_name).nbytes(shapes[name])
        return {type_name: (count, sizes[type_name]) for type_name, count in counts.items()}

    def json(self) -> str:
        """Returns the plan for a file's metadata: {"types": {type: [names]}}."""
        names: dict[str, list[str]] = {}
        for name, type_name in self.types.items():
            names.setdefault(type_name, []).append(name)
        return json.dumps({"types": names})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `json` returns. Raises PlanError for any other text."""
        try:
            return cls({
                str(name): str(type_name) for type_name, names in read_json(text)["types"].items()
                for name in names
            })
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                'The text is not a plan of types, expected {"types": {type: [names]}}.') from error


def types_for(shape: tuple[int, ...]) -> list[str]:
    """Returns the GGUF types among which a plan for a size chooses, smallest first: those that are
    offered, or where blocks of some do not divide the rows, all whose blocks do."""
    names = [name for name in SMALLEST_FIRST if TYPES[name].takes(shape)]
    offered = [name for name in names if name in GGUF_TYPES]
    return offered if len(offered) == len(GGUF_TYPES) else names


def plan_for_type(shapes: Shapes, type_name: str, family: PackingRules,
                  halves: Mapping[str, str] | None = None) -> Plan:
    """Plans one type for every matrix that may be packed, or the type that replaces it.

    Beside a row type, what stays exact has its 16-bit type, as in ComfyUI's own files.

    Args:
        shapes: name -> logical shape, in the host's names without prefix.
        type_name: a key of TYPES.
        family: the rules of the model.
        halves: name -> the 16-bit type where it is not packed; "BF16" for names without one.
    """
    halves, types = halves or {}, {}
    if type_name in ROW_TYPES:
        types = {name: halves.get(name, "BF16") for name in shapes}
        return Plan(types | {name: with_fallback(type_name, shapes[name], types[name])
                             for name in family.row_names(shapes, type_name)})
    for name, shape in shapes.items():
        half = halves.get(name, "BF16")
        if family.may_be_packed(name, shape, pack_type(type_name).packs_tables):
            types[name] = with_fallback(type_name, shape, half)
        else:
            types[name] = family.exact_type(name, shape, half)
    return Plan(types)


def plan_for_size(shapes: Shapes, nbytes: int, family: PackingRules,
                  costs: Mapping[str, Mapping[str, float]] | None = None,
                  halves: Mapping[str, str] | None = None, row_types: Collection[str] = (),
                  packed: Mapping[str, int] | None = None) -> Plan:
    """Plans the best types with which all tensors together take at most `nbytes`.

    Args:
        shapes, family, halves: as for `plan_for_type`.
        nbytes: of all tensors, without header and padding.
        costs: name -> type -> relative power of the output's error, from a measurement; types that
            were not measured follow from those that were. None: the largest type that fits
            everywhere, and what is left of the bytes goes to the next larger one, in the last
            blocks first.
        row_types: names of ROW_TYPES to choose among, beside 16 bits; none: the GGUF types.
        packed: name -> bytes of weights that are packed already: they stay STAYS, or take a
            smaller type.

    Raises:
        PlanError: where the smallest types take more.
    """
    exact, exact_bytes, sizes = _options(shapes, family, halves or {}, row_types, packed or {})
    budget = nbytes - exact_bytes
    least = _least_sum(sizes)
    if budget < least:
        raise too_small(nbytes, least - budget)
    chosen = choose_types(_costs(shapes, sizes, costs), sizes, budget)
    return Plan({name: exact.get(name) or chosen[name] for name in shapes})


def least_bytes(shapes: Shapes, family: PackingRules,
                packed: Mapping[str, int] | None = None) -> int:
    """Returns the least size for which `plan_for_size` plans GGUF types; args as there."""
    _, exact_bytes, sizes = _options(shapes, family, {}, (), packed or {})
    return exact_bytes + _least_sum(sizes)


def bytes_as_good_as(type_name: str, shapes: Shapes, family: PackingRules,
                     costs: Mapping[str, Mapping[str, float]] | None = None,
                     packed: Mapping[str, int] | None = None) -> int:
    """Returns nearly the least size for which GGUF types are expected to be as good as one type.

    Args:
        type_name: a GGUF type or one of ROW_TYPES, whose inputs are rounded too.
        shapes, family, costs, packed: as for `plan_for_size`.
    """
    _, exact_bytes, sizes = _options(shapes, family, {}, (), packed or {})
    costs = _costs(shapes, sizes, costs)
    types = plan_for_type(shapes, type_name, family).types
    rows = {name: type_costs.get("Q8_0", 0.0) * relative_error(types[name]) * ROUNDED_INPUTS
            / relative_error("Q8_0")
            for name, type_costs in costs.items() if types[name] in ROW_TYPES}
    limit = sum(rows.get(name, type_costs.get(types[name], type_costs.get(STAYS, 0.0)))
                for name, type_costs in costs.items())
    return exact_bytes + bytes_for_costs(costs, sizes, limit)


def _costs(shapes: Shapes, sizes: Mapping[str, Mapping[str, int]],
           measured: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[str, float]]:
    """Returns name -> type -> cost for the tensors and types of `sizes`.

    measured: `costs` of `plan_for_size`.
    """
    values = {name: math.prod(shapes[name]) for name in sizes}
    if measured:
        return _complete_costs(sizes, measured, values)
    return {name: {type_name: values[name] * relative_error(type_name) for type_name in types
                   if not pack_type(type_name).needs_measurement}
            for name, types in sorted(sizes.items(), key=lambda item: _place(item[0]), reverse=True)
            }


def _place(name: str) -> list[tuple[int, str]]:
    """Returns the place of a name among others, by the numbers in it."""
    return [(len(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _least_sum(sizes: Mapping[str, Mapping[str, int]]) -> int:
    """Returns the bytes of the smallest type of each tensor together."""
    return sum(min(type_sizes.values()) for type_sizes in sizes.values())


def _options(shapes: Shapes, family: PackingRules, halves: Mapping[str, str],
             row_types: Collection[str], packed: Mapping[str, int]
             ) -> tuple[dict[str, str], int, dict[str, dict[str, int]]]:
    """Returns the types among which a plan for a size chooses; args as for `plan_for_size`.

    Returns:
        Name -> type of the tensors without a choice, their bytes together, and name -> type ->
        bytes of the others, the 16-bit type or STAYS last.
    """
    exact, options = {}, {}
    rows = {type_name: set(family.row_names(shapes, type_name)) for type_name in row_types}
    for name, shape in shapes.items():
        half = halves.get(name, "BF16")
        if row_types:
            types = [each for each in row_types
                     if name in rows[each] and ROW_TYPES[each].takes(shape)]
        else:
            types = types_for(shape) if family.may_be_packed(name, shape) else []
        if name in packed:
            types = [each for each in types if TYPES[each].nbytes(shape) < packed[name]]
        if types:
            options[name] = (*sorted(types, key=lambda each: TYPES[each].nbytes(shape)),
                             STAYS if name in packed else half)
        elif name in packed:
            exact[name] = STAYS
        else:
            exact[name] = half if row_types else family.exact_type(name, shape, half)

    def size_of(name: str, type_name: str) -> int:
        return (packed[name] if type_name == STAYS
                else TYPES[type_name].nbytes(shapes[name]))

    return exact, sum(size_of(name, type_name) for name, type_name in exact.items()), {
        name: {type_name: size_of(name, type_name) for type_name in types}
        for name, types in options.items()
    }


def relative_error(type_name: str) -> float:
    """Returns the power of a type's error over that of the weights, 0 for what stays as it is."""
    return pack_type(type_name).relative_error


def expected_errors(types: Mapping[str, str], shapes: Shapes,
                    costs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns name -> power of the output's error that packing matrices to types causes, over the
    output's; costs: of a measurement, as for `plan_for_size`."""
    complete = _complete_costs({name: (type_name,) for name, type_name in types.items()}, costs,
                               {name: math.prod(shapes[name]) for name in types})
    return {name: complete[name][type_name] for name, type_name in types.items()}


def _complete_costs(options: Mapping[str, Iterable[str]],
                    costs: Mapping[str, Mapping[str, float]],
                    values: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Returns the cost of every type a tensor may take, from those that were measured.

    A type that was not measured costs what the nearest measured one of the tensor says. A larger
    type is always a little cheaper, whatever the noise of the measurement.

    Args:
        options: name -> types, smallest first.
        costs: name -> type -> measured cost.
        values: name -> number of values, with which costs are expected to grow.
    """
    measured = {
        name: {
            type_name: cost for type_name, cost in costs.get(name, {}).items()
            if relative_error(type_name) and math.isfinite(cost)
        } for name in options
    }
    # For tensors without a measurement: the median cost of a value's relative error.
    ratios = sorted(
        cost / relative_error(type_name) / values[name]
        for name, type_costs in measured.items() for type_name, cost in type_costs.items())
    median = ratios[len(ratios) // 2] if ratios else 1.0
    complete: dict[str, dict[str, float]] = {}
    for name, types in options.items():
        complete[name] = {}
        cost = math.inf
        for type_name in types:
            if type_name == STAYS:
                complete[name][type_name] = 0.0
                continue
            nearest = min(
                measured[name],
                key=lambda other: abs(
                    TYPES[other].signal_to_error - TYPES[type_name].signal_to_error),
                default=None)
            unit = median * values[name]
            if nearest:
                unit = measured[name][nearest] / relative_error(nearest)
            cost = min(max(0.0, unit) * relative_error(type_name), cost * (1 - 1e-3))
            complete[name][type_name] = cost
    return complete
