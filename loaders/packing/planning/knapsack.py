"""Types per tensor under a budget of bytes: the least sum of costs.

Each tensor has a few types, each with bytes and a cost. Tensor after tensor, the best sums are
kept: of all sums whose bytes fall into one of `STEPS` equal steps, the cheapest. The steps do not
know the budget, so a larger budget never has a dearer plan. Where the steps are finer than the
differences in bytes, what is found is the optimum.
"""
from collections.abc import Mapping

import torch

STEPS = 1 << 14


def choose_types(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]],
                 budget: int) -> dict[str, str]:
    """Name -> type with the least sum of costs among plans of at most `budget` bytes.

    costs, sizes: name -> type -> cost (finite, in a unit that adds up) and bytes, of the same
    types. Raises ValueError when the smallest types together are above the budget.
    """
    options = {
        name: sorted(of_types, key=sizes[name].__getitem__) for name, of_types in costs.items()
    }
    least = sum(sizes[name][types[0]] for name, types in options.items())
    most = sum(sizes[name][types[-1]] for name, types in options.items())
    if least > budget:
        raise ValueError(f"The smallest types take {least} bytes, the budget is {budget}.")
    step = -(-(most - least + 1) // STEPS)
    above = torch.zeros(1, dtype=torch.int64)  # bytes above `least` of each of the best sums
    total = torch.zeros(1, dtype=torch.float64)  # their costs
    steps = []  # of each tensor: for each best sum the one before, and the number of the type
    for name, types in options.items():
        more = torch.tensor([sizes[name][kind] - sizes[name][types[0]] for kind in types],
                            dtype=torch.int64)
        cost = torch.tensor([costs[name][kind] for kind in types], dtype=torch.float64)
        sums = (above[:, None] + more).view(-1)
        totals = (total[:, None] + cost).view(-1)
        best = _cheapest(sums, totals, step)
        above, total = sums[best], totals[best]
        steps.append((best // len(types), best % len(types)))
    at = torch.where(above <= budget - least, total, torch.inf).argmin()
    chosen = {}
    for (name, types), (before, number) in zip(reversed(options.items()), reversed(steps),
                                               strict=True):
        chosen[name] = types[number[at]]
        at = before[at]
    return {name: chosen[name] for name in costs}


def _cheapest(sums: torch.Tensor, totals: torch.Tensor, step: int) -> torch.Tensor:
    """Indices of the cheapest sum of each step of bytes, the smaller of equals, without those
    dearer than a smaller one.

    sums: int64 (n,), bytes above the least. totals: float64 (n,), costs. Returns int64, ascending
    by bytes; the least is one.
    """
    steps = sums // step
    count = int(steps.max()) + 1
    cheapest = totals.new_full((count,), torch.inf).scatter_reduce(0, steps, totals, "amin")
    equal = torch.where(totals == cheapest[steps], sums, sums.max() + 1)
    smallest = sums.new_full((count,), int(sums.max()) + 1).scatter_reduce(0, steps, equal, "amin")
    index = torch.arange(len(sums))
    first = torch.where(equal == smallest[steps], index, len(sums))
    best = index.new_full((count,), len(sums)).scatter_reduce(0, steps, first, "amin")
    before = torch.cat([totals.new_full((1,), torch.inf), cheapest.cummin(0).values[:-1]])
    best = best[cheapest < before]
    return best if sums[best[0]] == 0 else torch.cat([index.new_tensor([int(sums.argmin())]), best])
