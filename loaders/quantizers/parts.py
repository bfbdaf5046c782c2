"""Says what the parts of a weight must be, and checks those of a file by it."""
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...ops.stable_names import short_error_name
from ..container.weight_file import describe

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn,
          torch.float8_e5m2, *(
              [torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []))  # torch 2.7
WHOLE = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
         torch.uint64)
REAL = WHOLE + FLOATS
UNCOMPARED = (torch.uint16, torch.uint32, torch.uint64)  # that torch reads, but compares with none
TITLES = {FLOATS: "any float type", WHOLE: "any integer type", REAL: "any real type"}

# no damage of a download changes shapes and types, which stand in the header
GET_OTHER_CONVERSION = "Get another conversion."

Parts = dict[str, torch.Tensor]


@short_error_name
class PartError(ValueError):
    """The parts of a weight do not belong together; the message is part of a sentence.

    Args:
        problem: what is wrong with them.
        advice: what to do.
        writer: who packed the weight, where that is not the quantiser that found it.
    """

    def __init__(self, problem: str, advice: str = GET_OTHER_CONVERSION, writer: str = ""):
        super().__init__(problem)
        self.advice, self.writer = advice, writer


@dataclass(frozen=True)
class Part:
    """What a part of a weight must be.

    Attributes:
        shape: one of several, separated by " or "; "" allows any. "(N, K / 2)" is a matrix, "N" is
            N numbers in any shape. A size is a product and quotient of numbers and of names, which
            mean the same in all parts of a layer; the first part that has a name says how much it
            is. Names are capital letters; "K..." is the product of all further sizes.
        dtypes: those allowed; () allows any.
        optional: a word where a layer may be without the part; it has all or none of the parts
            with the same word.
        other_names: that some writers give the part.
        advice: what to do where the part is another.
    """
    shape: str
    dtypes: tuple[torch.dtype, ...] = ()
    optional: str = ""
    other_names: tuple[str, ...] = ()
    advice: str = GET_OTHER_CONVERSION

    def __str__(self) -> str:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in self.dtypes or ("",))
        dtypes = TITLES.get(self.dtypes, f"{', '.join(names)} or {last}" if names else last)
        shapes = [each.replace("...", ", ...") if each.startswith("(") else
                  "one number" if each == "1" else f"{each} numbers"
                  for each in self.shape.replace("(N, 1...)", "N").split(" or ") if each]
        return " of ".join(filter(None, [" or ".join(shapes), dtypes]))


def bind_sizes(parts: Mapping[str, torch.Tensor], expected: Mapping[str, Part],
               titles: Mapping[str, str] | None = None) -> dict[str, int]:
    """Checks the parts of a layer.

    Args:
        parts: name -> tensor.
        expected: name -> what it must be, those first from whose shapes the sizes are known.
        titles: names that a message has in place of others.

    Returns:
        Each name of a size in the shapes -> the size.

    Raises:
        PartError: a part is missing or is not what it must be.
    """
    present = {part.optional for name, part in expected.items() if name in parts}
    for name, part in expected.items():
        if name not in parts and (not part.optional or part.optional in present):
            raise PartError(f"it has no {name or 'codes'}, expected {part}")
    other = next((name for name in parts if name not in expected), None)
    if other is not None:
        raise PartError(f"it has {other}, expected only"
                        f" {', '.join(name or 'codes' for name in expected)}")
    sizes, titles = dict[str, int](), {"": "codes"} | dict(titles or {})
    for name, part in expected.items():
        if name not in parts:
            continue
        bound = (_bind(shape, parts[name].shape, sizes) for shape in part.shape.split(" or "))
        fitting = next((new for new in bound if new is not None), None)
        if fitting is None or (part.dtypes and parts[name].dtype not in part.dtypes):
            named = re.findall(r"[A-Z]", part.shape)
            known = ", ".join(f"{size} = {sizes[size]}" for size in sizes if size in named)
            raise PartError(f"it has {titles.get(name, name)} of {describe(parts[name])}, expected"
                            f" {part}{known and f' with {known}'}", part.advice)
        sizes = fitting
    return sizes


def as_comparable(parts: Parts, expected: Mapping[str, Part]) -> Parts:
    """Returns the parts of a layer, with numbers of any integer type in one that torch computes
    with.

    Args:
        parts: name -> tensor.
        expected: name -> what it must be.

    Raises:
        PartError: a number does not fit into int64.
    """
    return {name: _as_int64(name, tensor) if tensor.dtype in UNCOMPARED
            and expected[name].dtypes in (WHOLE, REAL) else tensor
            for name, tensor in parts.items()}


def _as_int64(name: str, tensor: torch.Tensor) -> torch.Tensor:
    numbers = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and bool((numbers < 0).any()):
        raise PartError(f"it has {name} of {describe(tensor)} with numbers above {2**63 - 1},"
                        " expected smaller ones")
    return numbers


def _bind(text: str, shape: torch.Size, sizes: dict[str, int]) -> dict[str, int] | None:
    """Returns `sizes` and those that a shape tells; None where it is another than the text says."""
    if not text:
        return sizes
    texts = [each for each in text.strip("()").split(",") if each.strip()]
    found = list(shape) if text.startswith("(") else [math.prod(shape)]
    if texts and texts[-1].endswith("..."):
        found[len(texts) - 1:] = [math.prod(found[len(texts) - 1:])]
    if len(found) != len(texts):
        return None
    for each, size in zip(texts, found):
        product, divisor, unknown = 1, size, []
        for sign, factor in re.findall(r"([*/]?) *(\w+)", each):
            value = int(factor) if factor.isdigit() else sizes.get(factor)
            if value is None:
                unknown.append((sign, factor))
            elif sign == "/":
                divisor *= value
            else:
                product *= value
        if unknown:
            (sign, name), = unknown  # what is first in a layout leaves one
            whole, by = (product, divisor) if sign == "/" else (divisor, product)
            if not whole or not by or whole % by:
                return None
            sizes = sizes | {name: whole // by}
        elif product != divisor:
            return None
    return sizes
