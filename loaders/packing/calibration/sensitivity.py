"""What was measured of a model: second moments of its layers' inputs, and what each layer's error
costs. One file.

Anyone who has a model of the same layers can use it. A column of a layer's inputs takes 156 bytes,
in blocks of 256 columns: the 1.52 million of Flux.1-dev, shared ones counted once, 0.24 GB
(computed, not measured). The costs take 60 KB of that.
"""
import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from ....ops.quantize.second_moments import SecondMoments
from ...files.atomic_file import atomic_writer
from ...files.container import FileState, first_line

KEY = "featherweight_sensitivity"
FORMAT = 2
# types that reports name, smallest first
SHOWN = ("Q3_K", "IQ4_NL", "Q4_K", "Q5_1", "Q6_K", "Q8_0")


class SensitivityError(ValueError):
    """A sensitivity file that cannot be used. The message names the file, what is wrong and what to
    do."""


@dataclass
class Sensitivity:
    """costs: name of a matrix -> packed type -> power of the change of the model's output over that
    of the output.

    shapes: name -> shape (N, K) of the matrices measured, in the host's names without prefix.
    about: what was run, in words and numbers. file: name of the file it came from, for messages.
    """

    costs: dict[str, dict[str, float]]
    shapes: dict[str, tuple[int, ...]]
    about: dict = field(default_factory=dict)
    file: str = "The measurement"
    _moments: Callable[[str], SecondMoments | None] = lambda name: None

    def moments(self, name: str) -> SecondMoments | None:
        """The moments of a matrix's inputs, on the CPU; None where there are none. Read from the
        file each time."""
        return self._moments(name)

    @property
    def digest(self) -> str:
        """A short name of the model's layers, the same for every model that has them."""
        listed = sorted((name, *shape) for name, shape in self.shapes.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]

    def check_is_for(self, shapes: Mapping[str, tuple[int, ...]]):
        """Raises SensitivityError where a model of these parameters is not the one that was
        measured.

        shapes: name -> logical shape, in the host's names without prefix.
        """
        missing = [name for name in self.shapes if name not in shapes]
        others = [
            name for name, shape in self.shapes.items()
            if name in shapes and tuple(shapes[name]) != tuple(shape)
        ]
        if not missing and not others:
            return
        name = (others or missing)[0]
        difference = f"is {tuple(shapes[name])} there" if others else "is not there"
        raise SensitivityError(
            f"{self.file} was measured on another model: its {name} of {tuple(self.shapes[name])}"
            f" {difference}, and {len(missing) + len(others)} of {len(self.shapes)} layers do not"
            " fit. Measure this model, or pick its file."
        )

    def save(self, path: str | os.PathLike):
        """Write the file: whole under its name or not at all. Raises WriteError, as
        `atomic_writer`."""
        tensors, same_as, seen = {}, {}, {}
        for name in self.shapes:
            moments = self.moments(name)
            if moments is None:
                continue
            # layers that share their inputs share the moments
            owner = seen.setdefault(id(moments), name)
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
        with contextlib.suppress(OSError):  # `atomic_writer` says what is in the way
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, len(data), overwrite=True) as file:
            file.write(data)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Sensitivity":
        """Raises SensitivityError for a file that is none, is not whole, or of another format."""
        file, state = os.path.basename(path), FileState.of(path)
        with _opened(path) as opened:
            about, names = json.loads((opened.metadata() or {})[KEY]), set(opened.keys())
            if about["format"] != FORMAT:
                raise SensitivityError(
                    f"{file} is of format {about['format']}, this version reads {FORMAT}. Update"
                    " this pack, or measure again.")
            same_as, shapes = (
                about["same_as"],
                {name: tuple(shape) for name, shape in about["shapes"].items()},
            )
            result = cls(about["costs"], shapes, about["about"], file)

        def moments(name: str) -> SecondMoments | None:
            owner = same_as.get(name, name)
            parts = {
                key.removeprefix(f"{owner}/"): key for key in names
                if key.rpartition("/")[0] == owner
            }
            if not parts:
                return None
            with _opened(path) as opened:
                read = SecondMoments.from_tensors(
                    {part: opened.get_tensor(key) for part, key in parts.items()})
            if FileState.of(path) != state:
                raise SensitivityError(
                    f"{file} was written to or replaced while it was in use. Run this again, which"
                    " reads it as it is now.")
            return read

        result._moments = moments
        return result


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[safe_open]:
    """The file, open. What goes wrong with it inside this block is a SensitivityError."""
    file = os.path.basename(path)
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SensitivityError:
        raise
    except (
        OSError,
        RuntimeError,
    ) as error:  # the second is torch's word for a file that it cannot open or map
        raise _unreadable(file, error) from error
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        try:
            is_sensitivity = _begins_as_sensitivity(path)
        except OSError as reason:
            raise _unreadable(file, reason) from reason
        if is_sensitivity:
            raise SensitivityError(
                f"{file} is damaged or was not copied whole. Copy it again, or measure again."
            ) from error
        raise SensitivityError(
            f"{file} is not a sensitivity file. Measure Sensitivity (Featherweight) writes one."
        ) from error


def _unreadable(file: str, error: Exception) -> SensitivityError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return SensitivityError(
        f"{file} cannot be read: {reason}. Pick another file, or measure again.")


def _begins_as_sensitivity(path: str | os.PathLike) -> bool:
    with open(path, "rb") as file:
        return KEY.encode() in file.read(1 << 10)


def report(sensitivity: Sensitivity, count: int = 12) -> str:
    """What packing one layer costs the output, in each type that was measured, for the `count`
    layers that matter most."""
    lines = [
        f"{len(sensitivity.costs)} layers; signal to error of the output in dB with one layer"
        " packed, the worst first:"
    ]
    for name, costs in _ranked(sensitivity)[:count]:
        values = ", ".join(f"{kind} {_decibels(costs[kind])}" for kind in SHOWN if kind in costs)
        lines.append(f"{name.removesuffix('.weight')}: {values}")
    return "\n".join(lines)


def summary(sensitivity: Sensitivity, count: int = 7) -> str:
    """The same in lines short enough for a node: one type, the smallest that was measured."""
    kind = next(
        (kind for kind in SHOWN if any(kind in costs for costs in sensitivity.costs.values())),
        None)
    lines = (
        [f"With one layer in {kind}, the worst first:", "signal to error of the output in dB"]
        if kind
        else []
    )
    lines += [f"{name.removesuffix('.weight')}: {_decibels(costs[kind])}"
              for name, costs in _ranked(sensitivity)[:count] if kind in costs]
    return "\n".join([f"{len(sensitivity.costs)} layers measured", *lines])


def _ranked(sensitivity: Sensitivity) -> list[tuple[str, dict[str, float]]]:
    return sorted(sensitivity.costs.items(), key=lambda entry: -max(entry[1].values(), default=0.0))


def _decibels(cost: float) -> str:
    return f"{-10 * math.log10(max(cost, 1e-12)):.1f}"
