"""The sensitivity file: second moments of layers' inputs, and what each layer's error costs.

It is valid for every model with the same layers. A column of a layer's inputs takes 156 bytes, in
blocks of 256 columns: 0.24 GB for the 1.52 million of Flux.1-dev, shared ones counted once
(computed, not measured). The costs take 0.14 MB of that.
"""
import contextlib
import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from ....ops.bounded_json import read_json
from ....ops.quantize.second_moments import SecondMoments
from ....ops.stable_names import short_error_name
from ...container.weight_file import FileState, first_line
from ...files.atomic_file import atomic_writer
from ..layer_losses import LAYERS, RESULT, WEIGHTS, percent

KEY = "featherweight_sensitivity"
FORMAT = 2
FAST = "fast"  # the effort without runs of the model, whose costs are those of a layer's output
UNUSED = "unused"  # key of `about`: whether packing by the measurement was no better than without
NOT_BETTER = ("On calls that it was not fitted to, it packs no better than no measurement does."
              " Measure with more images.")
# Types that reports show, smallest first.
SHOWN = ("Q3_K", "IQ4_NL", "Q4_K", "Q5_1", "Q6_K", "Q8_0")


@short_error_name
class SensitivityError(ValueError):
    """Raised for a sensitivity file that cannot be used; the message says what to do."""


@dataclass
class Sensitivity:
    """A measurement of a model.

    Attributes:
        costs: name of a matrix -> packed type -> power of the output's error over the output's.
        shapes: name -> shape (N, K) of the matrices measured, in the host's names without prefix.
        about: what was run, in words and numbers.
        file: name of the file it was read from, for messages.
    """

    costs: dict[str, dict[str, float]]
    shapes: dict[str, tuple[int, ...]]
    about: dict = field(default_factory=dict)
    file: str = "The measurement"
    _moments: Callable[[str], SecondMoments | None] = lambda name: None

    @property
    def loss_kind(self) -> str:
        """What its losses are a share of, as in `layer_losses`."""
        if self.is_unused:
            return WEIGHTS
        # "no runs" is what earlier versions called FAST
        is_fast = self.about.get("thoroughness") in (FAST, "no runs")
        return RESULT if self.costs and not is_fast else LAYERS

    @property
    def is_unused(self) -> bool:
        """Whether nothing is packed by it; then a file is read without its costs and moments."""
        return bool(self.about.get(UNUSED))

    def moments(self, name: str) -> SecondMoments | None:
        """Reads the moments of a matrix's inputs, on the CPU; None where none were collected."""
        return self._moments(name)

    @property
    def digest(self) -> str:
        """A hash of the names and shapes of the model's layers."""
        layers = sorted((name, *shape) for name, shape in self.shapes.items())
        return hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:16]

    def match(self, shapes: Mapping[str, tuple[int, ...]]) -> "Sensitivity":
        """Returns the measurement for a model.

        Args:
            shapes: name -> logical shape of this model, in the host's names without prefix.

        Raises:
            SensitivityError: where another model was measured.
        """
        missing = [name for name in self.shapes if name not in shapes]
        reshaped = [
            name for name, shape in self.shapes.items()
            if name in shapes and tuple(shapes[name]) != tuple(shape)
        ]
        if not missing and not reshaped:
            return self
        name = (reshaped or missing)[0]
        difference = f"is {tuple(shapes[name])} here" if reshaped else "is missing here"
        raise SensitivityError(
            f"{self.file} was measured on another model: its {name} of {tuple(self.shapes[name])}"
            f" {difference}, and {len(missing) + len(reshaped)} of {len(self.shapes)} layers do not"
            " fit. Measure this model, or pick its file."
        )

    def notes(self, packed: list[str], is_for_size: bool) -> list[str]:
        """Returns a sentence where it is not used.

        Args:
            packed: names of the matrices that are packed.
            is_for_size: whether types are chosen for a size.
        """
        return [f"{self.file} is not used. {NOT_BETTER}"] if self.is_unused else []

    def save(self, path: str | os.PathLike, overwrite: bool = True):
        """Writes the file, whole under its name or not at all.

        Args:
            path: of the file.
            overwrite: whether it replaces one of that name.

        Raises:
            WriteError: where it cannot be written.
        """
        tensors, same_as = {}, {}
        owners: dict[int, tuple[str, SecondMoments]] = {}  # which live, so that no id is used again
        for name in self.shapes:
            moments = self.moments(name)
            if moments is None:
                continue
            # Layers with the same inputs share their moments.
            owner, _ = owners.setdefault(id(moments), (name, moments))
            if owner != name:
                same_as[name] = owner
                continue
            tensors |= {
                f"{name}/{part}": value.contiguous() for part, value in moments.to_tensors().items()
            }
        about = {
            "format": FORMAT, "costs": self.costs, "shapes": self.shapes, "same_as": same_as,
            "about": self.about, "digest": self.digest
        }
        data, path = safetensors.torch.save(tensors, {KEY: json.dumps(about)}), Path(path)
        with contextlib.suppress(OSError):  # `atomic_writer` says what is wrong
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, len(data), overwrite) as file:
            file.write(data)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Sensitivity":
        """Reads a file.

        Raises:
            SensitivityError: for another file, a damaged one, or another version of the format.
        """
        file, state = os.path.basename(path), FileState.of(path)
        with _open_tensors(path) as tensors:
            about, names = read_json((tensors.metadata() or {})[KEY]), set(tensors.keys())
            if about["format"] != FORMAT:
                raise SensitivityError(
                    f"{file} is of format {about['format']}, this version reads {FORMAT}. Update"
                    " this pack, or measure again.")
            same_as = dict(about["same_as"])
            shapes = {name: tuple(map(operator.index, shape))
                      for name, shape in about["shapes"].items()}
            costs = {name: {type_name: float(cost) for type_name, cost in of_types.items()}
                     for name, of_types in about["costs"].items()}
            result = cls(costs, shapes, dict(about["about"]), file)
        if result.is_unused:
            result.costs = {}
            return result

        def moments(name: str) -> SecondMoments | None:
            owner = same_as.get(name, name)
            parts = {
                key.removeprefix(f"{owner}/"): key for key in names
                if key.rpartition("/")[0] == owner
            }
            if not parts:
                return None
            with _open_tensors(path) as tensors:
                result = SecondMoments.from_tensors(
                    {part: tensors.get_tensor(key) for part, key in parts.items()})
            if FileState.of(path) != state:
                raise SensitivityError(
                    f"{file} was written to or replaced while it was in use. Run this again, which"
                    " reads it as it is now.")
            return result

        result._moments = moments
        return result


@contextlib.contextmanager
def _open_tensors(path: str | os.PathLike) -> Iterator[safe_open]:
    """Opens the file. Errors inside this block become SensitivityError."""
    file = os.path.basename(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SensitivityError:
        raise
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where it cannot map a file
        raise _unreadable(file, error) from error
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError,
            OverflowError) as error:
        try:
            with open(path, "rb") as start:
                is_sensitivity = KEY.encode() in start.read(1 << 10)
        except OSError as reason:
            raise _unreadable(file, reason) from reason
        if is_sensitivity:
            raise SensitivityError(
                f"{file} is damaged or was not copied completely. Copy it again, or measure again."
            ) from error
        raise SensitivityError(
            f"{file} is not a measurement. Measure Sensitivity (Featherweight) makes one."
        ) from error


def _unreadable(file: str, error: Exception) -> SensitivityError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return SensitivityError(
        f"{file} cannot be read: {reason}. Pick another file, or measure again.")


def report(sensitivity: Sensitivity) -> str:
    """Returns what packing one layer costs, by type, for the 12 layers that matter most."""
    lines = [
        *_unused_lines(sensitivity),
        f"{len(sensitivity.costs)} layers; error of the output in % with one layer packed, the"
        " worst first:"
    ]
    for name, costs in _ranked(sensitivity)[:12]:
        values = ", ".join(
            f"{type_name} {_percent(costs[type_name])}" for type_name in SHOWN
            if type_name in costs)
        lines.append(f"{name.removesuffix('.weight')}: {values}")
    return "\n".join(lines)


def summary(sensitivity: Sensitivity) -> str:
    """Returns the report in lines short enough for a node: for the smallest type measured."""
    lines = [f"{len(sensitivity.costs)} layers measured", *_unused_lines(sensitivity)]
    measured = {type_name for costs in sensitivity.costs.values() for type_name in costs}
    smallest = next((type_name for type_name in SHOWN if type_name in measured), None)
    if smallest is not None:
        lines.append(f"With one layer in {smallest}, the worst first:")
        lines.append("error of the output in %")
        lines += [
            f"{name.removesuffix('.weight')}: {_percent(costs[smallest])}"
            for name, costs in _ranked(sensitivity)[:7] if smallest in costs
        ]
    return "\n".join(lines)


def _unused_lines(sensitivity: Sensitivity) -> list[str]:
    return [f"It is saved and will not be used. {NOT_BETTER}"] if sensitivity.is_unused else []


def _ranked(sensitivity: Sensitivity) -> list[tuple[str, dict[str, float]]]:
    """Returns the layers by their error in the smallest type of all, or in their own smallest."""
    def error(entry: tuple[str, dict[str, float]]) -> float:
        costs = entry[1]
        return next((costs[name] for name in SHOWN if name in costs), 0.0)

    return sorted(sensitivity.costs.items(), key=error, reverse=True)


def _percent(cost: float) -> str:
    return percent(max(0.0, cost)).removesuffix(" %")
