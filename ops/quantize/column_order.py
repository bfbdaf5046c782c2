"""Chooses the codes of a weight's columns in order; later columns compensate earlier errors.

Columns lie along the first dimension, (columns, rows), so that each step is one operation on
contiguous memory.
"""
from collections.abc import Callable
from typing import Any

import torch

from .damped_hessian import DampedHessian

CHUNK = 256  # about how many columns are chosen before all later ones compensate their errors
SWEEPS = 2  # of coordinate descent over the columns


def choose_in_order(values: torch.Tensor, shares: torch.Tensor, levels: torch.Tensor,
                    begin: Callable[[int], Any], group: int, is_first: bool):
    """Chooses the codes of columns in order. Each column passes a residual on to the later ones.

    Args:
        values: float32 (k, n). At first the values to represent, and the residual is what the codes
            lack of them; later what to add to the values of `levels`, and the residual is what was
            added to these. Overwritten by the residuals.
        shares: float32 (k, k). shares[i, j] times the residual of column i is added to column j,
            for all i < j.
        levels: float32 (k, n), overwritten.
        begin: Returns the rounder of the group of columns that begins with a number:
            rounder(column) returns levels and values of the nearest codes, rounder.value(levels)
            values.
        group: Columns with one scale.
        is_first: Whether `levels` have no values yet.
    """
    for first in range(0, len(values), group):
        stop = min(len(values), first + group)
        rounder = begin(first)
        for column in range(first, stop):
            target = values[column]  # a view, which the residual replaces
            if column > first:
                target.addmv_(values[first:column].T, shares[first:column, column])
            if is_first:
                levels[column], value = rounder(target)
                target -= value
            else:
                before = rounder.value(levels[column])
                levels[column], value = rounder(target.add_(before))
                torch.sub(value, before, out=target)
        values[stop:].addmm_(shares[first:stop, stop:].T, values[first:stop])


def feed_back(choose: Callable[[torch.Tensor, torch.Tensor, slice, bool], None],
              values_of_codes: Callable[[], torch.Tensor], target: torch.Tensor,
              damped: DampedHessian, chunk: int):
    """Chooses the codes of all columns, then each code anew given all others (coordinate descent).

    Args:
        choose: Called with values, shares, the columns that they are of, and whether it is for the
            first time; see `choose_in_order`.
        values_of_codes: Returns the values of the codes so far, (k, n), in new memory.
        target: float32 (k, n), the values to represent.
        damped: Of the k columns.
        chunk: The most columns that `choose` takes.
    """
    def in_chunks(values: torch.Tensor, shares: torch.Tensor, is_first: bool):
        for first in range(0, len(values), chunk):
            last = min(len(values), first + chunk)
            columns = slice(first, last)
            choose(values[columns], shares[columns, columns].contiguous(), columns, is_first)
            values[last:].addmm_(shares[columns, last:].T, values[columns])

    in_chunks(target.clone(), damped.shares, True)
    steps = damped.steps
    for _ in range(SWEEPS):
        # half the slope of the loss along each column, divided by its curvature
        in_chunks(steps.T @ values_of_codes().sub_(target), steps, False)
