"""Chooses a type for each tensor within a budget of bytes, with nearly the least sum of costs.

The larger types that save the most cost for their bytes are taken one after another, on the lower
convex hull of each tensor's types: the linear relaxation of a multiple-choice knapsack. What this
misses is less than one such step of a tensor.
"""
import itertools
from collections.abc import Mapping

ROUNDING = 1e-9  # of sums of costs


def choose_types(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]],
                 budget: int) -> dict[str, str]:
    """Chooses the types of tensors within a budget.

    Among tensors that save alike, earlier ones come first.

    Args:
        costs: name -> type -> cost, finite and additive.
        sizes: name -> type -> bytes, of the same types.
        budget: bytes for all tensors together, at least those of the smallest types.

    Returns:
        Name -> type.
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
