"""Second moments of what enters a layer: by them error feedback knows which errors of a weight the
layer's output shows."""
import math

import torch

# Columns whose moments are kept together, where not all are: a multiple of every format's block
# length.
BLOCK = 256
# Tokens that go into one product, so that their copy in float32 stays small.
VALUES_AT_A_TIME = 1 << 23
# Rows of the sketch of held-out tokens, and of what a file keeps of it. The error they tell is off
# by sqrt(2 / rows), 18 and 35 %, at the very worst. A file's tells only which of two ways to pack
# is better, and one mostly has half the other's error.
SKETCH_ROWS, FILE_ROWS = 64, 16
# The share of calls whose tokens are held out, and the step that spreads them: the golden ratio
# falls in with no number of steps or prompts, so no step of a sampler is always held out.
HELD_OUT, STEP = 0.25, (math.sqrt(5) - 1) / 2
# Files hold signed integers of 8 bits in steps of this part of the largest.
STEP_OF_LARGEST = 1 / 127
# Added to correlations so that they have a factor, and more where this is too little: below what
# packing adds to them.
LEAST_DAMPING = 1e-5
# Types of the tensors of a file, in the order of `SecondMoments.from_tensors`.
KINDS = [torch.float32, torch.int8, torch.float32, torch.int8, torch.float32, torch.int64]


class SecondMoments:
    """Sums over tokens of products of a layer's inputs, on the device of the inputs.

    With inputs a (tokens, K), the moments are a.T @ a, kept in blocks of k neighbouring columns
    along the diagonal; B = 1 is all of it. About every fourth call's tokens are held out: they are
    not in the moments, so that what was fitted to those can be judged by others. Of them a sketch
    is kept: each row is a sum of tokens with random signs, so that for any matrix D of errors the
    expectation of |D sketch.T|^2 is the sum of |D a|^2 over the tokens, across the blocks too.

    In a pair, the inputs are those of a model whose earlier layers are packed, and beside them are
    the inputs that the same layer has in the dense model: `cross` holds dense.T @ inputs, in the
    same blocks.

    columns: K. count, held_out_count: tokens in the moments, and in the sketch.
    blocks, cross: float32 (B, k, k); the last block may be filled up with zeros. sketch,
    dense_sketch: float32 (64, K), or (16, K) from a file. `cross` and `dense_sketch` are None where
    there is no pair.
    """

    def __init__(self, columns: int, blocks: torch.Tensor, sketch: torch.Tensor,
                 cross: torch.Tensor | None = None, dense_sketch: torch.Tensor | None = None,
                 count: int = 0, held_out_count: int = 0, calls: int = 0):
        self.columns, self.blocks, self.sketch = columns, blocks, sketch
        self.cross, self.dense_sketch = cross, dense_sketch
        self.count, self.held_out_count, self._calls = count, held_out_count, calls

    @classmethod
    def zeros(cls, columns: int, block: int | None = None, device="cpu",
              pair: bool = False) -> "SecondMoments":
        """Of no tokens yet. block: columns of a block, a multiple of 256; None: all, which takes
        columns**2 * 4 bytes."""
        size = columns if block is None or block >= columns else block
        if size < columns and size % BLOCK:
            raise ValueError(
                f"Moments are kept in blocks of a multiple of {BLOCK} columns, not of {block}.")
        blocks = torch.zeros(-(-columns // size), size, size, dtype=torch.float32, device=device)
        sketch = torch.zeros(SKETCH_ROWS, columns, dtype=torch.float32, device=device)
        of_pair = (torch.zeros_like(blocks), torch.zeros_like(sketch)) if pair else ()
        return cls(columns, blocks, sketch, *of_pair)

    @property
    def block(self) -> int:
        return self.blocks.shape[-1]

    def spans(self) -> list[slice]:
        """The columns of each block."""
        return [
            slice(start, min(self.columns, start + self.block))
            for start in range(0, self.columns, self.block)
        ]

    @property
    def importance(self) -> torch.Tensor:
        """Mean square of each column, float32 (K,)."""
        return self.blocks.diagonal(dim1=-2, dim2=-1).reshape(-1)[: self.columns] / max(
            1, self.count
        )

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, dense: torch.Tensor | None = None,
            hold_out: bool | None = None):
        """Takes the tokens of one call of the layer.

        inputs: any float dtype, (..., K). dense: in a pair, what entered the layer of the dense
        model, of the same shape.
        hold_out: whether these tokens are held out; None: about every fourth call's are, never the
        first's.
        """
        if inputs.shape[-1] != self.columns or (dense is None) != (self.cross is None):
            raise ValueError(
                f"Inputs of shape {tuple(inputs.shape)} do not go with moments of {self.columns}"
                f" columns{' of a pair' if self.cross is not None else ''}.")
        if hold_out is None:
            hold_out = (0.5 + self._calls * STEP) % 1 < HELD_OUT
        self._calls += 1
        pairs = [
            part.reshape(-1, self.columns).split(max(SKETCH_ROWS, VALUES_AT_A_TIME // self.columns))
            for part in (inputs, inputs if dense is None else dense)
        ]
        for tokens, of_dense in zip(*pairs):
            tokens = tokens.to(self.blocks)
            of_dense = None if dense is None else of_dense.to(self.blocks)
            if hold_out:
                self._sketch(tokens, of_dense)
                self.held_out_count += len(tokens)
            else:
                self._sum(tokens, of_dense)
                self.count += len(tokens)

    def _sum(self, tokens: torch.Tensor, dense: torch.Tensor | None):
        parts = self._parts(tokens)
        self.blocks.baddbmm_(parts.mT, parts)
        if dense is not None:
            self.cross.baddbmm_(self._parts(dense).mT, parts)

    def _parts(self, tokens: torch.Tensor) -> torch.Tensor:
        """(tokens, K) as (B, tokens, k)."""
        padded = torch.nn.functional.pad(tokens, (0, len(self.blocks) * self.block - self.columns))
        return padded.unflatten(-1, (-1, self.block)).transpose(0, 1)

    def _sketch(self, tokens: torch.Tensor, dense: torch.Tensor | None):
        signs = self._signs(len(tokens)).unsqueeze(-1)
        rows = len(self.sketch)
        start, row = 0, self.held_out_count % rows  # so that short calls fill all rows
        while start < len(tokens):
            stop = min(len(tokens), start + rows - row)
            for sketch, part in ((self.sketch, tokens), (self.dense_sketch, dense)):
                if part is not None:
                    sketch[row:row + stop - start].addcmul_(part[start:stop], signs[start:stop])
            start, row = stop, 0

    def _signs(self, count: int) -> torch.Tensor:
        """Random signs, float32 (count,), others for each number of calls and of tokens held
        out."""
        generator = torch.Generator().manual_seed(self.held_out_count * 1_000_003 + self._calls)
        return (torch.randint(2, (count,), generator=generator) * 2 - 1).to(self.blocks)

    def merge(self, other: "SecondMoments"):
        """Adds the tokens of moments of the same layer."""
        if (other.blocks.shape, other.sketch.shape, other.cross is None) != (
            self.blocks.shape,
            self.sketch.shape,
            self.cross is None,
        ):
            raise ValueError(
                f"Moments of {other.columns} columns in blocks of {other.block} do not add to"
                f" moments of {self.columns} columns in blocks of {self.block}.")
        self._calls += other._calls
        # With equal signs rows would add up to more than their tokens.
        signs = self._signs(len(self.sketch)).unsqueeze(-1)
        self.blocks += other.blocks.to(self.blocks.device)
        self.sketch += other.sketch.to(self.sketch.device) * signs
        if self.cross is not None:
            self.cross += other.cross.to(self.cross.device)
            self.dense_sketch += other.dense_sketch.to(self.sketch.device) * signs
        self.count += other.count
        self.held_out_count += other.held_out_count

    def to(self, device) -> "SecondMoments":
        parts = self.blocks, self.sketch, self.cross, self.dense_sketch
        moved = [None if part is None else part.to(device) for part in parts]
        return SecondMoments(self.columns, *moved, self.count, self.held_out_count, self._calls)

    # --- files ---

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """What a file needs to hold, on the CPU: about columns * (block / 2 + 28) bytes. Not for a
        pair.

        Kept is the factor of the correlations, L with L @ L.T = correlations, lower triangular with
        rows of length 1: whatever its elements are rounded to, what comes back is positive
        semidefinite with the diagonal it had. Correlations that are rounded themselves would have
        to have 12 bits.

        | name     | dtype, shape                 | meaning                                                               |
        |----------|------------------------------|-----------------------------------------------------------------------|
        | counts   | int64 (4,)                   | columns, tokens, tokens held out, calls                               |
        | scales   | float32 (B, k)               | roots of the moments' diagonal                                        |
        | factor   | int8 (B, k * (k - 1) / 2)    | L below the diagonal, row by row, in steps of its columns             |
        | steps    | float32 (B, k)               | those steps                                                           |
        | sketch   | int8 (16, K)                 | sketch, its rows added up to fewer, in steps of its columns           |
        | widths   | float32 (K,)                 | those steps                                                           |
        """
        if self.cross is not None:
            raise ValueError(
                "SecondMoments of a pair are for one packed model, and not kept in files.")
        blocks, sketch = self.blocks.cpu(), self.sketch.cpu()
        if not blocks.isfinite().all():
            raise ValueError("The moments of the layer's inputs hold NaN or infinite values.")
        scales = blocks.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        below = torch.ones(self.block, self.block, dtype=torch.bool).tril(-1)
        factor = torch.empty(len(blocks), int(below.sum()), dtype=torch.int8)
        steps = torch.empty_like(scales)
        for index, (block, scale) in enumerate(zip(blocks, scales)):
            correlations = block / _safe(scale).unsqueeze(-1) / _safe(scale)
            codes, steps[index] = _in_steps(_factor(correlations).tril(-1))
            factor[index] = codes[below]
        if len(sketch) > FILE_ROWS:
            sketch = sketch.view(-1, FILE_ROWS, self.columns).sum(0)
        codes, widths = _in_steps(sketch)
        counts = torch.tensor([self.columns, self.count, self.held_out_count, self._calls],
                              dtype=torch.int64)
        return {
            "counts": counts, "scales": scales, "factor": factor, "steps": steps, "sketch": codes,
            "widths": widths
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], device="cpu") -> "SecondMoments":
        """The inverse of `to_tensors`. Raises ValueError where they do not fit together."""
        try:
            scales, factor, steps, sketch, widths = (tensors[name].to(device)
                                                     for name in ("scales", "factor", "steps",
                                                                  "sketch", "widths"))
            columns, count, held_out_count, calls = tensors["counts"].tolist()
            kinds = [
                tensor.dtype
                for tensor in (scales, factor, steps, sketch, widths, tensors["counts"])
            ]
            if kinds != KINDS:
                raise ValueError(f"types {', '.join(map(str, kinds))}")
            number, size = scales.shape
            wanted = (
                (number, size * (size - 1) // 2),
                (number, size),
                (FILE_ROWS, columns),
                (columns,),
            )
            if (
                factor.shape,
                steps.shape,
                sketch.shape,
                widths.shape,
            ) != wanted or not 0 <= number * size - columns < size:
                raise ValueError(
                    f"shapes {tuple(scales.shape)}, {tuple(factor.shape)}, {tuple(sketch.shape)}")
        except (KeyError, ValueError) as error:
            raise ValueError(f"These are not the tensors of a layer's moments: {error}.") from error
        below = torch.ones(size, size, dtype=torch.bool, device=device).tril(-1)
        blocks = torch.zeros(number, size, size, dtype=torch.float32, device=device)
        for block, scale, codes, step in zip(blocks, scales, factor, steps):
            rows = torch.zeros_like(block).masked_scatter_(below, codes.float()).mul_(step)
            length = rows.square().sum(1)
            rows /= length.sqrt().clamp(min=1).unsqueeze(-1)
            rows.diagonal().copy_((1 - length).clamp(min=0).sqrt())
            rows *= scale.unsqueeze(-1)
            torch.mm(rows, rows.T, out=block)
        return cls(columns, blocks, sketch * widths, None, None, count, held_out_count, calls)


def _factor(correlations: torch.Tensor) -> torch.Tensor:
    """The lower triangular L with L @ L.T = correlations, float32 (k, k)."""
    damping = LEAST_DAMPING
    while True:
        damped = correlations.clone()
        damped.diagonal().fill_(1 + damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        damping *= 10


def _in_steps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 (n, K), the step of each column, float32 (K,)) of values, float32 (n, K)."""
    steps = values.abs().amax(0) * STEP_OF_LARGEST
    return (values / _safe(steps)).round_().clamp_(-127, 127).to(torch.int8), steps


def _safe(divisor: torch.Tensor) -> torch.Tensor:
    return torch.where(divisor == 0, 1, divisor)
