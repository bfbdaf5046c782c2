"""Second moments of a layer's inputs, which tell how errors of its weight change its output."""
import math

import torch

# Blocks of some of the columns have a multiple of this many, which every block length divides.
BLOCK = 256
# Values of the tokens in one product, so that their copy in float32 stays small.
SLICE_VALUES = 1 << 23
# Rows of the sketch of held-out tokens, in memory and in a file. An error estimated by a sketch is
# off by at most sqrt(2 / rows): 18 % and 35 %. A file's sketch only decides which of two packings
# is better, and mostly one has half the error of the other.
SKETCH_ROWS, FILE_ROWS = 64, 16
# Fraction of calls whose tokens are held out, and the step of the sequence that selects them. The
# golden ratio is in phase with no number of steps, so no sampler step is always held out.
HELD_OUT, STEP = 0.25, (math.sqrt(5) - 1) / 2
# Files hold signed 8-bit integers, in steps of this fraction of the largest magnitude.
STEP_OF_LARGEST = 1 / 127
# Added to correlations so that they have a Cholesky factor, and increased until they do. Less than
# packing adds.
MIN_DAMPING = 1e-5
# Types of the tensors of a file.
FILE_DTYPES = {"counts": torch.int64, "scales": torch.float32, "factor": torch.int8,
               "steps": torch.float32, "sketch": torch.int8, "widths": torch.float32}


class SecondMoments:
    """Sums over tokens of products of a layer's inputs, on the device of the inputs.

    For inputs a, (tokens, K), the moments are a.T @ a, of which B blocks of k adjacent columns
    along the diagonal are kept; B = 1 is the whole matrix. The tokens of about every fourth call
    are held out: they are not in the moments, so that they can judge what was fitted to the others.
    A sketch is kept of them, whose rows are sums of tokens with random signs. So for any matrix D
    of errors, the expectation of |D sketch.T|^2 is the sum of |D a|^2 over the tokens, also across
    blocks.

    Attributes:
        columns: K.
        blocks: float32 (B, k, k); the last block may be padded with zeros.
        sketch: float32 (64, K), or (16, K) from a file.
        count: Tokens in the moments.
        held_out_count: Tokens in the sketch.
    """

    def __init__(self, columns: int, blocks: torch.Tensor, sketch: torch.Tensor, count: int = 0,
                 held_out_count: int = 0, calls: int = 0):
        self.columns = columns
        self.blocks = blocks
        self.sketch = sketch
        self.count = count
        self.held_out_count = held_out_count
        self._calls = calls

    @classmethod
    def zeros(cls, columns: int, block: int | None = None,
              device: torch.device | str = "cpu") -> "SecondMoments":
        """Returns the moments of no tokens.

        Args:
            columns: K.
            block: Columns of a block, a multiple of 256; None: all, which takes columns**2 * 4
                bytes.
            device: Of the inputs.

        Raises:
            ValueError: `block` is not a multiple of 256.
        """
        size = columns if block is None or block >= columns else block
        if size < columns and size % BLOCK:
            raise ValueError(
                f"Blocks of moments need a multiple of {BLOCK} columns, not {block}.")
        blocks = torch.zeros(-(-columns // size), size, size, dtype=torch.float32, device=device)
        sketch = torch.zeros(SKETCH_ROWS, columns, dtype=torch.float32, device=device)
        return cls(columns, blocks, sketch)

    @property
    def block(self) -> int:
        return self.blocks.shape[-1]

    def spans(self) -> list[slice]:
        """Returns the columns of each block."""
        return [
            slice(start, min(self.columns, start + self.block))
            for start in range(0, self.columns, self.block)
        ]

    @property
    def diagonal(self) -> torch.Tensor:
        """Sum of squares of each column, float32 (K,)."""
        return self.blocks.diagonal(dim1=-2, dim2=-1).reshape(-1)[:self.columns]

    @property
    def importance(self) -> torch.Tensor:
        """Mean square of each column, float32 (K,)."""
        return self.diagonal / max(1, self.count)

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, hold_out: bool | None = None):
        """Adds the tokens of one call of the layer.

        Args:
            inputs: (..., K) of any float dtype.
            hold_out: Whether to hold these tokens out; None: for about every fourth call, never the
                first.

        Raises:
            ValueError: The inputs have another number of columns.
        """
        if inputs.shape[-1] != self.columns:
            raise ValueError(
                f"Inputs of shape {tuple(inputs.shape)} do not go with moments of {self.columns}"
                " columns.")
        if hold_out is None:
            hold_out = (0.5 + self._calls * STEP) % 1 < HELD_OUT
        self._calls += 1
        slice_tokens = max(SKETCH_ROWS, SLICE_VALUES // self.columns)
        flat = inputs.reshape(-1, self.columns)
        for start in range(0, len(flat), slice_tokens):
            tokens = flat[start:start + slice_tokens].to(self.blocks)
            if hold_out:
                self._add_to_sketch(tokens)
                self.held_out_count += len(tokens)
            else:
                parts = self._split_columns(tokens)
                self.blocks.baddbmm_(parts.mT, parts)
                self.count += len(tokens)

    def _split_columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns (tokens, K) as (B, tokens, k)."""
        padded = torch.nn.functional.pad(tokens, (0, len(self.blocks) * self.block - self.columns))
        return padded.unflatten(-1, (-1, self.block)).transpose(0, 1)

    def _add_to_sketch(self, tokens: torch.Tensor):
        signs = self._random_signs(len(tokens)).unsqueeze(-1)
        rows = len(self.sketch)
        start, row = 0, self.held_out_count % rows  # continues, so that short calls fill all rows
        while start < len(tokens):
            stop = min(len(tokens), start + rows - row)
            self.sketch[row:row + stop - start].addcmul_(tokens[start:stop], signs[start:stop])
            start, row = stop, 0

    def _random_signs(self, count: int) -> torch.Tensor:
        """Returns signs, float32 (count,), seeded by the counts of calls and held-out tokens."""
        generator = torch.Generator().manual_seed(self.held_out_count * 1_000_003 + self._calls)
        return (torch.randint(2, (count,), generator=generator) * 2 - 1).to(self.blocks)

    def merge(self, other: "SecondMoments"):
        """Adds other moments of the same layer.

        Raises:
            ValueError: They have other columns or blocks.
        """
        if self.blocks.shape != other.blocks.shape or self.sketch.shape != other.sketch.shape:
            raise ValueError(
                f"Moments of {other.columns} columns in blocks of {other.block} cannot be added to"
                f" moments of {self.columns} columns in blocks of {self.block}.")
        self._calls += other._calls
        # With equal signs, rows would add up to more than their tokens.
        signs = self._random_signs(len(self.sketch)).unsqueeze(-1)
        self.blocks += other.blocks.to(self.blocks.device)
        self.sketch += other.sketch.to(self.sketch.device) * signs
        self.count += other.count
        self.held_out_count += other.held_out_count

    # --- files ---

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Returns tensors for a file, on the CPU: about columns * (block / 2 + 28) bytes.

        The correlations are stored as their Cholesky factor L, L @ L.T = correlations, whose rows
        have length 1. However its elements are rounded, the result is positive semidefinite and has
        the exact diagonal. Correlations rounded themselves would need 12 bits.

        | name   | dtype, shape              | meaning                                             |
        |--------|---------------------------|-----------------------------------------------------|
        | counts | int64 (4,)                | columns, tokens, tokens held out, calls             |
        | scales | float32 (B, k)            | square roots of the moments' diagonal               |
        | factor | int8 (B, k * (k - 1) / 2) | L below the diagonal, row by row, in steps a column |
        | steps  | float32 (B, k)            | those steps                                         |
        | sketch | int8 (16, K)              | sketch, its rows added up to 16, in steps a column  |
        | widths | float32 (K,)              | those steps                                         |

        Raises:
            ValueError: The moments are not finite.
        """
        blocks, sketch = self.blocks.cpu(), self.sketch.cpu()
        if not blocks.isfinite().all():
            raise ValueError("The moments of the layer's inputs hold NaN or infinite values.")
        scales = blocks.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        below = torch.ones(self.block, self.block, dtype=torch.bool).tril(-1)
        factor = torch.empty(len(blocks), int(below.sum()), dtype=torch.int8)
        steps = torch.empty_like(scales)
        for index, (block, scale) in enumerate(zip(blocks, scales)):
            correlations = block / _without_zeros(scale).unsqueeze(-1) / _without_zeros(scale)
            codes, steps[index] = _round_to_steps(_factor(correlations).tril(-1))
            factor[index] = codes[below]
        if len(sketch) > FILE_ROWS:
            sketch = sketch.view(-1, FILE_ROWS, self.columns).sum(0)
        codes, widths = _round_to_steps(sketch)
        counts = [self.columns, self.count, self.held_out_count, self._calls]
        return {"counts": torch.tensor(counts, dtype=torch.int64), "scales": scales,
                "factor": factor, "steps": steps, "sketch": codes, "widths": widths}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "SecondMoments":
        """Returns the moments that `to_tensors` made some tensors of.

        Raises:
            ValueError: A tensor is missing, or its dtype or shape does not match the others'.
        """
        try:
            missing = [name for name in FILE_DTYPES if name not in tensors]
            if missing:
                raise ValueError(f"{', '.join(missing)} missing")
            dtypes = {name: tensors[name].dtype for name in FILE_DTYPES}
            if dtypes != FILE_DTYPES:
                raise ValueError(f"types {', '.join(map(str, dtypes.values()))}")
            if tensors["counts"].shape != (4,):
                raise ValueError(f"counts of {tuple(tensors['counts'].shape)}")
            columns, count, held_out_count, calls = tensors["counts"].tolist()
            scales, factor, steps, sketch, widths = (
                tensors[name] for name in ("scales", "factor", "steps", "sketch", "widths"))
            number, size = scales.shape
            shapes = (factor.shape, steps.shape, sketch.shape, widths.shape)
            expected = ((number, size * (size - 1) // 2), (number, size), (FILE_ROWS, columns),
                        (columns,))
            # no blocks could be of any size
            if shapes != expected or not number or not 0 <= number * size - columns < size:
                raise ValueError(
                    f"shapes {tuple(scales.shape)}, {tuple(factor.shape)}, {tuple(sketch.shape)}")
        except ValueError as error:
            raise ValueError(f"These are not the tensors of a layer's moments: {error}.") from error
        below = torch.ones(size, size, dtype=torch.bool).tril(-1)
        blocks = torch.zeros(number, size, size, dtype=torch.float32)
        for block, scale, codes, step in zip(blocks, scales, factor, steps):
            rows = torch.zeros_like(block).masked_scatter_(below, codes.float()).mul_(step)
            length = rows.square().sum(1)
            rows /= length.sqrt().clamp(min=1).unsqueeze(-1)
            rows.diagonal().copy_((1 - length).clamp(min=0).sqrt())
            rows *= scale.unsqueeze(-1)
            torch.mm(rows, rows.T, out=block)
        return cls(columns, blocks, sketch * widths, count, held_out_count, calls)


def _factor(correlations: torch.Tensor) -> torch.Tensor:
    """Returns the lower triangular L with L @ L.T = correlations, float32 (k, k)."""
    damping = MIN_DAMPING
    while True:
        damped = correlations.clone()
        damped.diagonal().fill_(1 + damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        damping *= 10


def _round_to_steps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float32 values (n, K) as int8 (n, K), and the step of each column, float32 (K,)."""
    steps = values.abs().amax(0) * STEP_OF_LARGEST
    return (values / _without_zeros(steps)).round_().clamp_(-127, 127).to(torch.int8), steps


def _without_zeros(divisor: torch.Tensor) -> torch.Tensor:
    return torch.where(divisor == 0, 1, divisor)
