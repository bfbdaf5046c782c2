"""How long a kernel takes and how long torch takes, one after the other, at the shapes of a model.

Both run while ComfyUI uses the device, and the least of several times is the one least disturbed.
"""
import math
import time
from collections.abc import Callable

import torch

from .. import int8_codes
from ..format import Format
from .check import random_tensors
from .verdicts import Case

ROWS = (1, 16, 256, 4096)  # of the input, where a kernel takes so many, beside the least and the most it takes
MOST_ROWS = ROWS[-1]
TIMED = frozenset(("unpack", "linear", "int8_rows", "int8_tokens"))  # of what packs the reference is a search of minutes
SHAPES = ((3072, 3072),)  # (N, K), where a model has said nothing
MOST_SHAPES = 3  # of a format, those with the most values
MOST_VALUES = 1 << 26  # of a weight: larger ones are timed with fewer rows
TURNS = 5  # of both, at most
FEWEST_TURNS = 2
CLEAR = 1.5  # after the fewest turns no other is made where one takes so many times as long as the other
TURN_SECONDS = 0.01  # of one turn, at least
MOST_SECONDS = 3  # of a kernel with one number of rows; after that no other turn is made, and no other shape is timed


class Timing:
    """shapes: name of a format -> [[N, K], ...], those of the model's weights."""

    def __init__(self, device: torch.device, shapes: dict[str, list[list[int]]]):
        self.device, self._shapes = device, shapes
        self._unpackers = {}

    def add(self, kernel, packed_format: type[Format], case: Case):
        """A kernel that is right and faster than torch, so that torch's product is timed with what will unpack for it."""
        if kernel.op == "unpack":
            self._unpackers.setdefault(_of_values(case), set()).add(kernel.run)

    def times(self, kernel, packed_format: type[Format] | None, case: Case) -> dict[str, list[float]]:
        """Rows of the input, "" where there are none, to the seconds of the kernel and of torch, summed over the shapes.
        Nothing for what is not `TIMED`."""
        if kernel.op not in TIMED:
            return {}
        measure = {"unpack": self._unpack, "linear": self._linear, "int8_rows": self._int8_rows,
                   "int8_tokens": self._int8_tokens}[kernel.op]
        least, most = kernel.min_tokens, kernel.max_tokens or MOST_ROWS
        rows = sorted({least, most, *(rows for rows in ROWS if least <= rows <= most)})
        found = {}
        for number in rows if kernel.op in ("linear", "int8_tokens") else ("",):
            pairs, started = [], time.perf_counter()
            for shape in self._usable_shapes(packed_format):
                if not pairs or time.perf_counter() - started < MOST_SECONDS:
                    pairs.append(measure(kernel, packed_format, case, shape, number))
            found[str(number)] = [sum(times) for times in zip(*pairs)]
        return found

    def _usable_shapes(self, packed_format: type[Format] | None) -> list[tuple[int, int]]:
        """Whose rows are whole blocks and whole groups of codes, the largest first."""
        multiple = packed_format.block_length if packed_format else 1
        name = packed_format.__name__ if packed_format else None
        given = self._shapes.get(name, ()) if name else [shape for shapes in self._shapes.values() for shape in shapes]
        given = [(rows, columns) for rows, columns in given if rows and columns and columns % multiple == 0]
        given = sorted(set(given), key=lambda shape: -shape[0] * shape[1])[:MOST_SHAPES]
        return [(min(rows, max(1, MOST_VALUES // columns)), columns)
                for rows, columns in given or [(rows, -(-columns // multiple) * multiple) for rows, columns in SHAPES]]

    def _unpack(self, kernel, packed_format, case, shape, _) -> tuple[float, float]:
        tensors, value_dtype = self._weight(packed_format, shape), value_dtype_of(case)
        out = torch.empty(shape, dtype=case.dtype, device=self.device)
        return self._beside(lambda: kernel.run(packed_format, tensors, out, value_dtype, 0),
                            lambda: packed_format.unpack_into(tensors, out, value_dtype))

    def _linear(self, kernel, packed_format, case, shape, rows) -> tuple[float, float]:
        tensors, values = self._weight(packed_format, shape), torch.empty(shape, dtype=case.dtype, device=self.device)
        input = self._input((rows, shape[1]), case.dtype)
        out = input.new_empty((rows, shape[0]))
        value_dtype, found = value_dtype_of(case), []
        for unpack in self._unpackers.get(_of_values(case), {_unpack_by_torch}):
            found.append(self._beside(lambda: kernel.run(packed_format, tensors, input, None, out, case.value_dtype),
                                      lambda: (unpack(packed_format, tensors, values, value_dtype, 0),
                                               torch.nn.functional.linear(input, values))))
        return tuple(map(min, zip(*found)))

    def _int8_rows(self, kernel, packed_format, case, shape, _) -> tuple[float, float]:
        rows, columns = _with_whole_groups(shape, packed_format)
        tensors = self._weight(packed_format, (rows, columns))
        out = self._codes(rows, columns)
        return self._beside(lambda: kernel.run(packed_format, tensors, *out, case.value_dtype, 0),
                            lambda: int8_codes.encode_rows(packed_format, tensors, *out, case.value_dtype, 0))

    def _int8_tokens(self, kernel, packed_format, case, shape, rows) -> tuple[float, float]:
        columns = _with_whole_groups(shape, None)[1]
        input, out = self._input((rows, columns), case.dtype), self._codes(rows, columns)
        return self._beside(lambda: kernel.run(input, *out), lambda: int8_codes.encode_tokens(input, *out))

    def _weight(self, packed_format, shape) -> list[torch.Tensor]:
        return random_tensors(packed_format, shape[0] * shape[1] // packed_format.block_length, self.device, calm=True)

    def _input(self, shape, dtype) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(self.device, dtype)

    def _codes(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.empty((rows, columns), dtype=torch.int8, device=self.device),
                torch.empty(rows, dtype=torch.float32, device=self.device))

    def _beside(self, *operations: Callable[[], object]) -> tuple[float, ...]:
        """Seconds of one call of each."""
        counts, least = [], []
        for operation in operations:
            self._seconds(operation, 1)  # what is compiled or allocated at the first call
            once = self._seconds(operation, 1)
            counts.append(max(1, int(TURN_SECONDS / once)))
            least.append(once)
        started = time.perf_counter()
        for turn in range(1, TURNS + 1):
            for index, operation in enumerate(operations):
                least[index] = min(least[index], self._seconds(operation, counts[index]))
            is_clear = turn >= FEWEST_TURNS and max(least) > CLEAR * min(least)
            if is_clear or time.perf_counter() - started > MOST_SECONDS:
                break
        return tuple(least)

    def _seconds(self, operation, count: int) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(count):
            operation()
        self._wait()
        return max(1e-9, (time.perf_counter() - started) / count)

    def _wait(self):
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()


def _unpack_by_torch(packed_format, tensors, out, value_dtype, first):
    packed_format.unpack_into(tensors, out, value_dtype, first)


def value_dtype_of(case: Case) -> torch.dtype | None:
    """As `kernels.unpack_into` hands it on."""
    return None if case.value_dtype == case.dtype else case.value_dtype


def _of_values(case: Case) -> tuple:
    return case.format, case.dtype, value_dtype_of(case)


def _with_whole_groups(shape: tuple[int, int], packed_format: type[Format] | None) -> tuple[int, int]:
    multiple = math.lcm(int8_codes.GROUP, packed_format.block_length if packed_format else 1)
    return shape[0], -(-shape[1] // multiple) * multiple
