"""Types per tensor under a budget of bytes: the least sum of costs.

Each tensor has a few types, each with bytes and a cost. Tensor after tensor, the best sums are kept: of all sums whose bytes
fall into one of `STEPS` equal steps, the cheapest. The steps do not know the budget, so a larger budget never has a dearer
plan. Where the steps are finer than the differences in bytes, what is found is the optimum.
"""
from collections.abc import Mapping

import torch

STEPS = 1 << 14


def best_mix(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], budget: int) -> dict[str, str]:
    """Name -> type with the least sum of costs among plans of at most `budget` bytes.

    costs, sizes: name -> type -> cost (finite, in a unit that adds up) and bytes, of the same types. Raises ValueError when
    the smallest types together are above the budget.
    """
    kinds = {name: sorted(of_types, key=sizes[name].__getitem__) for name, of_types in costs.items()}
    least = sum(sizes[name][types[0]] for name, types in kinds.items())
    most = sum(sizes[name][types[-1]] for name, types in kinds.items())
    if least > budget:
        raise ValueError(f"The smallest types take {least} bytes, the budget is {budget}.")
    step = -(-(most - least + 1) // STEPS)
    above, total = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)  # bytes above `least`, costs
    taken = []
    for name, types in kinds.items():
        more = torch.tensor([sizes[name][kind] - sizes[name][types[0]] for kind in types], dtype=torch.int64)
        cost = torch.tensor([costs[name][kind] for kind in types], dtype=torch.float64)
        sums, totals = (above[:, None] + more).view(-1), (total[:, None] + cost).view(-1)
        kept = _cheapest(sums, totals, step)
        above, total = sums[kept], totals[kept]
        taken.append((kept // len(types), kept % len(types)))
    at = torch.where(above <= budget - least, total, torch.inf).argmin()
    chosen = {}
    for (name, types), (before, kind) in zip(reversed(kinds.items()), reversed(taken), strict=True):
        chosen[name] = types[kind[at]]
        at = before[at]
    return {name: chosen[name] for name in costs}


def _cheapest(sums: torch.Tensor, totals: torch.Tensor, step: int) -> torch.Tensor:
    """Indices of the cheapest sum of each step of bytes, the smaller of equals, without those dearer than a smaller one.

    sums: int64 (n,), bytes above the least. totals: float64 (n,), costs. Returns int64, ascending by bytes; the least is one.
    """
    steps = sums // step
    count = int(steps.max()) + 1
    cheapest = totals.new_full((count,), torch.inf).scatter_reduce(0, steps, totals, "amin")
    equal = torch.where(totals == cheapest[steps], sums, sums.max() + 1)
    smallest = sums.new_full((count,), int(sums.max()) + 1).scatter_reduce(0, steps, equal, "amin")
    index = torch.arange(len(sums))
    first = torch.where(equal == smallest[steps], index, len(sums))
    found = index.new_full((count,), len(sums)).scatter_reduce(0, steps, first, "amin")
    before = torch.cat([totals.new_full((1,), torch.inf), cheapest.cummin(0).values[:-1]])
    found = found[(cheapest < before)]
    return found if sums[found[0]] == 0 else torch.cat([index.new_tensor([int(sums.argmin())]), found])
