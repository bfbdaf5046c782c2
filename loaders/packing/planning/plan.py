"""A plan: which type each tensor of a model takes, for one type or for a size, with the text that
people are shown."""
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ...files.container import nbytes_of
from ...sizes import size_text, type_lines, unit_of
from .knapsack import choose_types
from .packing_rules import PackingRules, Shapes, divides_rows, with_fallback

# What a plan for a size chooses among, and what it loses, in dB of the weights' power over the
# error's: means over the matrices of the demo's model, Q8_0 and the types in blocks of 32 over
# normally distributed weights.
LOSSES = {
    "Q2_K": 11.7, "Q3_K": 16.8, "IQ4_NL": 22.3, "IQ4_XS": 22.5, "Q4_K": 23.1, "Q5_0": 27.4,
    "Q5_1": 28.2, "Q5_K": 29.4, "Q6_K": 35.4, "Q8_0": 45.4, "F16": 75.0, "BF16": 75.0
}
TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
DIGITS = 2  # behind the point, of the sizes that plans are asked for and give
IN_BLOCKS_OF_32 = ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")  # for rows that 256 does not divide
# Matrices that see one vector an image, not one a token.
MODULATION = re.compile(
    r"(_mod|\.mod|modulation\w*)\.(lin|\d+|linear)\.|adaLN_modulation|adaln_modulation|\.modulation\."
)


class PlanError(ValueError):
    """What was asked for cannot be planned. The message says what the least or the choice is.

    short_by: bytes that a size lacks, 0 where it is something else. more: a sentence at its end, or
    "".
    """

    short_by: int = 0
    more: str = ""


def too_small(nbytes: int, short_by: int, more: str = "") -> PlanError:
    """The error for a size of `nbytes`, which names one that suffices."""
    least = nbytes + short_by
    # of the last digit shown, rounded up, so that it can be asked for
    unit = max(1, unit_of(least)[0] // 10 ** DIGITS)
    error = PlanError(
        f"A size of {size_text(nbytes, DIGITS)} is too small for this model: with the smallest"
        f" type wherever one may be packed it takes {size_text(-(-least // unit) * unit, DIGITS)}."
        f" Ask for that much or more.{more}")
    error.short_by, error.more = short_by, more
    return error


@dataclass(frozen=True)
class Plan:
    """types: name -> a key of `FORMATS` or "F32", for every tensor of the model, in the order of
    the model."""

    types: dict[str, str]

    def nbytes(self, shapes: Shapes) -> int:
        """Bytes of all tensors together, without header and padding."""
        return sum(nbytes_of(kind, shapes[name]) for name, kind in self.types.items())

    def text(self, shapes: Shapes) -> str:
        """For people, a line for each type: its tensors, their bytes and share, the type with the
        most bytes first."""
        counts, sizes = Counter(self.types.values()), Counter()
        for name, kind in self.types.items():
            sizes[kind] += nbytes_of(kind, shapes[name])
        return "\n".join(
            type_lines({kind: (count, sizes[kind]) for kind, count in counts.items()}, DIGITS))

    def json(self) -> str:
        """The plan for a file's metadata: {"types": {type: [names]}}."""
        names = {}
        for name, kind in self.types.items():
            names.setdefault(kind, []).append(name)
        return json.dumps({"types": names})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises PlanError for a text that is none."""
        try:
            return cls({
                str(name): str(kind) for kind, names in json.loads(text)["types"].items()
                for name in names
            })
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError("The text is no plan of types for a model's tensors.") from error


def candidates(shape: tuple[int, ...], half: str = "BF16") -> tuple[str, ...]:
    """The types a plan for a size chooses among for a matrix: those whose blocks divide its rows,
    smallest first."""
    packed = [kind for kind in TYPES if divides_rows(kind, shape)]
    if len(packed) < len(TYPES):
        packed = [kind for kind in IN_BLOCKS_OF_32 if divides_rows(kind, shape)]
    return (*packed, half)


def plan_for_type(shapes: Shapes, type_name: str, family: PackingRules,
                  halves: Mapping[str, str] | None = None) -> Plan:
    """Plan every matrix that may be packed in one type, or in what takes its place.

    NF4 and FP4 leave lookup tables exact, as Forge's files do.

    Args:
        shapes: name -> logical shape, in the host's names without prefix.
        halves: name -> the 16-bit type where it is not packed; "BF16" where that is not told.
    """
    halves, types = halves or {}, {}
    with_tables = type_name not in ("NF4", "FP4")
    for name, shape in shapes.items():
        half = halves.get(name, "BF16")
        if family.may_be_packed(name, shape, with_tables):
            types[name] = with_fallback(type_name, shape, half)
        else:
            types[name] = family.exact_type(name, shape, half)
    return Plan(types)


def plan_for_size(shapes: Shapes, nbytes: int, family: PackingRules,
                  costs: Mapping[str, Mapping[str, float]] | None = None,
                  halves: Mapping[str, str] | None = None) -> Plan:
    """Plan the best types of which all tensors together take at most `nbytes`.

    Args:
        shapes, halves: as for `plan_for_type`.
        costs: name -> type -> how much the tensor in that type moves the output, as power, from a
            measurement; types that were not measured follow from those that were. None: by rule
            (`expected_costs`).

    Raises:
        PlanError: where the smallest types take more.
    """
    halves = halves or {}
    exact, options = {}, {}
    for name, shape in shapes.items():
        half = halves.get(name, "BF16")
        if family.may_be_packed(name, shape):
            options[name] = candidates(shape, half)
        else:
            exact[name] = family.exact_type(name, shape, half)
    budget = nbytes - Plan(exact).nbytes(shapes)
    sizes = {
        name: {kind: nbytes_of(kind, shapes[name]) for kind in types}
        for name, types in options.items()
    }
    least = sum(min(of_types.values()) for of_types in sizes.values())
    if budget < least:
        raise too_small(nbytes, least - budget)
    expected = expected_costs({name: shapes[name] for name in options})
    if costs:
        costs = _measured_costs(options, costs, expected)
    else:
        costs = {
            name: {kind: expected[name] * relative_loss(kind) for kind in types}
            for name, types in options.items()
        }
    chosen = choose_types(costs, sizes, budget)
    return Plan({name: exact.get(name) or chosen[name] for name in shapes})


def relative_loss(type_name: str) -> float:
    """Power of a type's error over that of the weights."""
    return 10 ** (-LOSSES[type_name] / 10)


def expected_costs(shapes: Shapes) -> dict[str, float]:
    """What one unit of each matrix's relative error is expected to cost, where nothing was
    measured.

    A larger matrix is held to matter more, but by the root of its size: each layer's relative error
    goes on to the next, however large the layer is. First and last blocks matter up to half as much
    again as those in the middle, and matrices that see one vector an image half as much as others.
    """
    blocks = {name: re.match(r"(.*?)\.(\d+)\.", name) for name in shapes}
    last = {}
    for block in filter(None, blocks.values()):
        last[block[1]] = max(last.get(block[1], 0), int(block[2]))
    costs = {}
    for name, shape in shapes.items():
        block = blocks[name]
        depth = int(block[2]) / last[block[1]] if block and last[block[1]] else 0.5
        at_the_end = 1 + 0.5 * abs(2 * depth - 1) ** 2
        costs[name] = (
            math.sqrt(math.prod(shape)) * at_the_end * (0.5 if MODULATION.search(name) else 1)
        )
    return costs


def _measured_costs(options: Mapping[str, tuple[str, ...]], costs: Mapping[str, Mapping[str,
                                                                                        float]],
                    expected: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Costs of every type a tensor may take. A larger type is always a little cheaper, whatever the
    measurement's noise."""
    known = {
        name: {
            kind: cost for kind, cost in costs.get(name, {}).items()
            if kind in LOSSES and math.isfinite(cost)
        } for name in options
    }
    # How much a unit of relative error costs: of tensors without a measurement as much as the
    # median of the others says.
    ratios = sorted(cost / relative_loss(kind) / expected[name]
                    for name, measured in known.items() for kind, cost in measured.items())
    usual = ratios[len(ratios) // 2] if ratios else 1.0
    complete = {}
    for name, kinds in options.items():
        complete[name], before = {}, math.inf
        for kind in kinds:
            nearest = min(known[name], key=lambda other: abs(LOSSES[other] - LOSSES[kind]),
                          default=None)
            unit = (
                known[name][nearest] / relative_loss(nearest) if nearest else usual * expected[name]
            )
            before = min(max(0.0, unit) * relative_loss(kind), before * (1 - 1e-3))
            complete[name][kind] = before
    return complete
