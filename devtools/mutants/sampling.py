"""A fixed sample of mutants, in an order that stays when lines move.

A place is known by its file, definition, kind of mutation and the text of its line, never by the
number of the line. A hash of these and a seed orders all places of a room, so a sample is the first
hundred, and the next of the sample is the next by hash.
"""
import ast
import functools
import hashlib
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOMS = {
    "ops": ("ops",), "loaders": ("loaders",), "nodes and machines": ("nodes", "machines", "cluster")
}
LOGGERS = {"log", "logging"}

# Each says the same of strings, small numbers and classes.
EQUIVALENT = ("Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq")

# The nodes that a family of operators looks at; the others look at all.
NODE_TYPES = {"ReplaceBinaryOperator": {"operator"}, "ReplaceComparisonOperator": {"comparison"},
              "ReplaceUnaryOperator": {"factor", "not_test"}}

# What cosmic-ray takes for a binary operator may also be the star of `{**options}`.
BINARY_PARENTS = {"arith_expr", "term", "power", "shift_expr", "expr", "xor_expr", "and_expr"}


@dataclass(frozen=True)
class Place:
    """Where a family of mutations can be applied.

    Attributes:
        file: From the repository's root, with slashes.
        definition: Function or class around it, with those around that; "" for the module.
        family: Of cosmic-ray's operators, such as `ReplaceBinaryOperator`.
        text: The line, without the spaces around it.
        occurrence: Among the places that have all of these in common.
    """

    file: str
    definition: str
    family: str
    text: str
    occurrence: int

    def hash(self, seed: int, *more) -> str:
        parts = [seed, self.file, self.definition, self.family, self.text, self.occurrence, *more]
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


@dataclass(frozen=True)
class Mutant:
    """One mutation of a place.

    Attributes:
        operator: cosmic-ray's, such as `ReplaceBinaryOperator_Add_Sub`.
        variant: Which of the mutations that this operator has for one place.
    """

    place: Place
    operator: str
    variant: int

    def to_json(self) -> dict:
        return {**vars(self.place), "operator": self.operator, "variant": self.variant}

    @classmethod
    def from_json(cls, entry: dict) -> "Mutant":
        place = Place(*(entry[name] for name in Place.__dataclass_fields__))
        return cls(place, entry["operator"], entry["variant"])


@dataclass(frozen=True)
class Spot:
    """A place in one version of its file.

    Attributes:
        line: Its number.
        occurrences: Of each (operator, variant), what cosmic-ray counts in the file.
    """

    place: Place
    line: int
    occurrences: dict[tuple[str, int], int]


@functools.cache
def _load_operators() -> dict:
    """cosmic-ray's operators that need no arguments, by name."""
    try:
        import cosmic_ray.mutating  # noqa: F401  it imports more than the plugins do
        from cosmic_ray.plugins import get_operator, operator_names
    except ImportError as error:
        raise SystemExit(
            f"Failed: mutants need cosmic-ray ({error}). "
            "Run `.dev/venv/bin/python -m pip install cosmic-ray`, then this again."
        ) from None
    operators = {name.removeprefix("core/"): get_operator(name) for name in operator_names()}
    return {name: operator() for name, operator in operators.items()
            if not operator.arguments() and not name.endswith(EQUIVALENT)}


def find_spots(file: str, source: str) -> list[Spot]:
    """List the places of a file that can be mutated, but for annotations and calls of a log."""
    operators = _load_operators()
    from cosmic_ray.ast import ast_nodes, get_ast

    lines, silent = source.splitlines(), _silent_spans(source)
    counts, positions = Counter(), defaultdict(dict)
    for node in ast_nodes(get_ast(source)):
        for name, operator in operators.items():
            family = name.partition("_")[0]
            if node.type not in NODE_TYPES.get(family, {node.type}):
                continue
            for start, _ in operator.mutation_positions(node):
                occurrence = counts[name]
                counts[name] += 1
                if family == "ReplaceBinaryOperator" and node.parent.type not in BINARY_PARENTS:
                    continue
                if not any(first <= start < last for first, last in silent):
                    at = (start, family, _definition(node))
                    variant = sum(other == name for other, _ in positions[at])
                    positions[at][name, variant] = occurrence
    same, spots = Counter(), []
    for (start, family, definition), occurrences in sorted(
        positions.items(), key=lambda item: item[0]
    ):
        key = (file, definition, family, lines[start[0] - 1].strip())
        spots.append(Spot(Place(*key, same[key]), start[0], occurrences))
        same[key] += 1
    return spots


def _definition(node) -> str:
    names = []
    while node := node.parent:
        if node.type in ("funcdef", "classdef"):
            names.append(node.name.value)
    return ".".join(reversed(names))


def _silent_spans(source: str) -> list[tuple]:
    """Where a mutation changes nothing that a test should look at, as (start, end) of line and
    column."""
    silent = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            silent.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            silent.append(node.annotation)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            silent += [node] if isinstance(owner, ast.Name) and owner.id in LOGGERS else []
    return [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
            for node in silent if node]


def mutate(source: str, operator: str, occurrence: int) -> str | None:
    """Plants a fault; returns None if the result is not valid Python, or the same."""
    from cosmic_ray.mutating import mutate_code

    try:
        mutated = mutate_code(source, _load_operators()[operator], occurrence)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)  # such as `is 1`
            compile(mutated, "mutant", "exec", dont_inherit=True)
        same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
    except (SyntaxError, ValueError):
        return None
    return None if same else mutated


class Room:
    """The mutants of some folders of a tree."""

    def __init__(self, tree: Path, folders: tuple[str, ...]):
        _load_operators()
        paths = [path for folder in folders for path in sorted((tree / folder).rglob("*.py"))]
        self.sources = {
            path.relative_to(tree).as_posix(): path.read_text(encoding="utf-8") for path in paths
        }
        spots = [spot for file, source in self.sources.items() for spot in find_spots(file, source)]
        self.spots = {spot.place: spot for spot in spots}
        self._places = defaultdict(list)  # that are alike but for their file
        for place in self.spots:
            self._places[replace(place, file="")].append(place)

    def ordered(self, seed: int, after: str = "") -> Iterator[Mutant]:
        """Every place in the order of its hash, with one mutation each; `after`: those beyond
        it."""
        places = sorted((place.hash(seed), place) for place in self.spots)
        for place in (place for order, place in places if order > after):
            variants = sorted(self.spots[place].occurrences,
                              key=lambda each: place.hash(seed, *each))
            usable = (Mutant(place, *each) for each in variants if self.plant(Mutant(place, *each)))
            if mutant := next(usable, None):
                yield mutant

    def plant(self, mutant: Mutant) -> str | None:
        """Return the source of the mutant's file with the fault in it; None where there is none
        such."""
        spot = self.spots[mutant.place]
        occurrence = spot.occurrences.get((mutant.operator, mutant.variant))
        return (
            None
            if occurrence is None
            else mutate(self.sources[mutant.place.file], mutant.operator, occurrence)
        )

    def locate(self, mutant: Mutant) -> Mutant | None:
        """Find a mutant of another version of the tree, whose file may have another name here."""
        places = self._places[replace(mutant.place, file="")]
        places = [mutant.place] if mutant.place in places else places
        located = Mutant(places[0], mutant.operator, mutant.variant) if len(places) == 1 else None
        return located if located and self.plant(located) else None


def draw_sample(tree: Path, seed: int, commit: str, size: int, rooms: dict = ROOMS) -> dict:
    """Draw the first `size` mutants of each room."""
    drawn = {}
    for name, folders in rooms.items():
        mutants = Room(tree, folders).ordered(seed)
        drawn[name] = [mutant.to_json() for mutant, _ in zip(mutants, range(size))]
    return {"seed": seed, "commit": commit, "rooms": drawn}


def fit_sample(sample: dict, name: str, room: Room) -> list[tuple[Mutant, Mutant | None]]:
    """List (the sample's mutant, the same in this tree or the one that takes its place).

    What a tree no longer has is replaced by the next of the sample: the next by hash that it has.
    The second is None where a tree has too few.
    """
    seed, wanted = sample["seed"], [Mutant.from_json(entry) for entry in sample["rooms"][name]]
    located = {mutant: room.locate(mutant) for mutant in wanted}
    last = max((mutant.place.hash(seed) for mutant in wanted), default="")
    taken = set(located.values())
    others = (mutant for mutant in room.ordered(seed, after=last) if mutant not in taken)
    return [(mutant, located[mutant] or next(others, None)) for mutant in wanted]


def write_sample(path: Path, sample: dict):
    """Write a sample as JSON with a line for each mutant."""
    rooms = [
        f'  {json.dumps(name)}: [\n' + ",\n".join(f"    {json.dumps(entry)}"
                                                  for entry in entries) + "\n  ]"
        for name, entries in sample["rooms"].items()
    ]
    head = f' "seed": {sample["seed"]},\n "commit": {json.dumps(sample["commit"])},\n "rooms": {{\n'
    path.write_text("{\n" + head + ",\n".join(rooms) + "\n }\n}\n", encoding="utf-8")
