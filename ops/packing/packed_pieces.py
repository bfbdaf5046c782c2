"""Packs a weight in pieces of rows, and measures what that loses."""
from typing import Any

import torch

from ..quantize.row_source import RowSource
from ..quantize.second_moments import SecondMoments
from ..tensor.packed_layout import is_packed
from ..tensor.row_slicing import take_rows
from .method_choice import SAMPLED_ROWS, output_errors
from .pack_types import PackType
from .relative_error import SAMPLE_VALUES, RelativeError


class PackedPieces:
    """A weight in one type, by pieces of its rows.

    Args:
        pack_type: of the weight.
        moments: of the layer's inputs, by which a weight of one piece is packed.
        device: packs it; the pieces are on the CPU.
        measures_output: whether `output_error` is measured even where `error` is small: the power
            of the error of the layer's output over the output's, None where it is not known.
    """

    def __init__(self, pack_type: PackType, moments: SecondMoments | None, device: torch.device,
                 measures_output: bool = False):
        self.pack_type = pack_type
        self.moments = moments
        self.device = device
        self.measures_output = measures_output
        self.pieces: list[torch.Tensor] = []
        self.error = RelativeError()
        self.output_error: float | None = None

    def pack(self, values: Any, is_plain: bool = False) -> torch.Tensor:
        """Returns rows in the type, on the CPU; arguments and errors as for `PackType.pack`."""
        if isinstance(values, torch.Tensor) and not self.pack_type.is_plain:
            values = values.to(self.device)
        return self.pack_type.pack(values, self.moments, is_plain=is_plain).to("cpu")

    def add(self, values: torch.Tensor | RowSource, piece: torch.Tensor):
        """Adds the next rows, `piece` of `pack`, and what they lose of their values."""
        self.pieces.append(piece)
        if isinstance(values, RowSource):
            rows = min(values.shape[0], max(1, SAMPLE_VALUES // values.columns))
            self.error.add(values.read(0, rows).cpu(), take_rows(piece, slice(0, rows)))
        else:
            self.error.add(values, piece)
        if (self.moments is not None and is_packed(piece)
                and (self.measures_output or not self.error.is_small)):
            self.output_error, = output_errors(values, [piece], self.moments, SAMPLED_ROWS)

    @property
    def is_held(self) -> bool:
        """See `RelativeError.is_held`."""
        return self.error.is_held(self.output_error)
