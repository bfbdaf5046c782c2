"""Chooses a type for each tensor within a budget of bytes, with the least sum of costs.

Of few tensors, a multiple-choice knapsack by dynamic programming: tensor by tensor, the cheapest
sum is kept in each of STEPS equal steps of bytes. The steps do not depend on the budget, so a
larger budget never gives a more expensive plan. With steps finer than the differences in bytes the
result is the optimum.

Of many tensors, whose sums would be too many for the steps, the larger types that save the most
cost for their bytes are taken one after another, on the lower convex hull of each tensor's types
(the linear relaxation of that knapsack). What this misses is less than one such step of a tensor.
"""
import itertools
from collections.abc import Mapping

import torch

STEPS = 1 << 14
FEW = 256  # tensors
ROUNDING = 1e-9  # of sums of costs


def choose_types(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]],
                 budget: int) -> dict[str, str]:
    """Chooses the types with the least sum of costs among plans of at most `budget` bytes.

    Args:
        costs: name -> type -> cost, finite and additive.
        sizes: name -> type -> bytes, of the same types.
        budget: bytes for all tensors together.

    Returns:
        Name -> type.

    Raises:
        ValueError: where the smallest types together are above the budget.
    """
    options = {
        name: sorted(type_costs, key=sizes[name].__getitem__) for name, type_costs in costs.items()
    }
    smallest = sum(sizes[name][types[0]] for name, types in options.items())
    largest = sum(sizes[name][types[-1]] for name, types in options.items())
    if smallest > budget:
        raise ValueError(f"The smallest types take {smallest} bytes, the budget is {budget}.")
    if len(options) > FEW:
        return choose_in_order(costs, sizes, budget)
    step = -(-(largest - smallest + 1) // STEPS)
    # Of the best sums: their bytes above `smallest`, and their costs.
    best_bytes = torch.zeros(1, dtype=torch.int64)
    best_costs = torch.zeros(1, dtype=torch.float64)
    # Of each tensor, for each best sum: the index of the previous one, and of the type.
    choices = []
    for name, types in options.items():
        type_bytes = torch.tensor(
            [sizes[name][type_name] - sizes[name][types[0]] for type_name in types],
            dtype=torch.int64)
        type_costs = torch.tensor([costs[name][type_name] for type_name in types],
                                  dtype=torch.float64)
        sums = (best_bytes[:, None] + type_bytes).view(-1)
        totals = (best_costs[:, None] + type_costs).view(-1)
        best = _find_best(sums, totals, step)
        best_bytes, best_costs = sums[best], totals[best]
        choices.append((best // len(types), best % len(types)))
    index = torch.where(best_bytes <= budget - smallest, best_costs, torch.inf).argmin()
    chosen = {}
    for (name, types), (previous, type_index) in zip(
            reversed(options.items()), reversed(choices), strict=True):
        chosen[name] = types[type_index[index]]
        index = previous[index]
    return {name: chosen[name] for name in costs}


def bytes_for_costs(costs: Mapping[str, Mapping[str, float]],
                    sizes: Mapping[str, Mapping[str, int]], limit: float) -> int:
    """Returns a budget with which `choose_types` stays within a sum of costs, nearly the least one.

    Args:
        costs, sizes: as for `choose_types`.
        limit: the sum of costs; where no types reach it, the budget is that of the cheapest ones.
    """
    smallest, steps = _hull_steps(costs, sizes)
    nbytes = sum(sizes[name][type_name] for name, type_name in smallest.items())
    total = sum(costs[name][type_name] for name, type_name in smallest.items())
    for saving, more, _, _ in steps:
        if total <= limit * (1 + ROUNDING):
            break
        nbytes += more
        total -= saving * more
    return nbytes


def choose_in_order(costs: Mapping[str, Mapping[str, float]],
                    sizes: Mapping[str, Mapping[str, int]], budget: int) -> dict[str, str]:
    """Chooses types by what each byte of a larger one saves, as for `choose_types`.

    Among tensors that save alike, earlier ones come first.
    """
    chosen, steps = _hull_steps(costs, sizes)
    budget -= sum(sizes[name][type_name] for name, type_name in chosen.items())
    full = set()
    for _, more, name, type_name in steps:
        if name in full or more > budget:
            full.add(name)
            continue
        chosen[name] = type_name
        budget -= more
    return chosen


def _hull_steps(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]]
                ) -> tuple[dict[str, str], list[tuple[float, int, str, str]]]:
    """Returns name -> smallest type; and (cost saved by a byte, bytes, name, type) of each larger
    type on the hulls, those that save the most for a byte first."""
    chosen, steps = {}, []
    for name, type_costs in costs.items():
        hull = _hull({key: (sizes[name][key], cost) for key, cost in type_costs.items()})
        chosen[name] = hull[0][2]
        for (size, cost, _), (larger, lower, type_name) in itertools.pairwise(hull):
            steps.append(((cost - lower) / (larger - size), larger - size, name, type_name))
    return chosen, sorted(steps, key=lambda step: -float(f"{step[0]:.9g}"))


def _hull(types: Mapping[str, tuple[int, float]]) -> list[tuple[int, float, str]]:
    """Returns (bytes, cost, type) of the types on the lower convex hull, ascending by bytes.

    Args:
        types: type -> (bytes, cost).
    """
    hull: list[tuple[int, float, str]] = []
    for (size, cost), name in sorted((pair, name) for name, pair in types.items()):
        if hull and cost >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (first, high, _), (last, low, _) = hull[-2:]
            if (low - cost) * (last - first) < (high - low) * (size - last):
                break
            hull.pop()
        hull.append((size, cost, name))
    return hull


def _find_best(sums: torch.Tensor, totals: torch.Tensor, step: int) -> torch.Tensor:
    """Finds the cheapest sum in each step of bytes, the smaller of equally cheap ones.

    A sum that costs no less than a smaller one is left out, except for the smallest of all.

    Args:
        sums: bytes above the smallest, int64 (n,).
        totals: costs, float64 (n,).
        step: bytes of a step.

    Returns:
        Indices, int64, ascending by bytes.
    """
    steps = sums // step
    count = int(steps.max()) + 1
    beyond = int(sums.max()) + 1
    cheapest = totals.new_full((count,), torch.inf).scatter_reduce(0, steps, totals, "amin")
    candidates = torch.where(totals == cheapest[steps], sums, beyond)
    smallest = sums.new_full((count,), beyond).scatter_reduce(0, steps, candidates, "amin")
    indices = torch.arange(len(sums))
    first = torch.where(candidates == smallest[steps], indices, len(sums))
    best = indices.new_full((count,), len(sums)).scatter_reduce(0, steps, first, "amin")
    cheapest_before = torch.cat(
        [totals.new_full((1,), torch.inf), cheapest.cummin(0).values[:-1]])
    best = best[cheapest < cheapest_before]
    if sums[best[0]] == 0:
        return best
    return torch.cat([indices.new_tensor([int(sums.argmin())]), best])
