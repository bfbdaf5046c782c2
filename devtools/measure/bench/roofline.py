"""What a step of Flux.1 would take on cards that nobody has measured: reckoned, not measured.

The linear layers take the time of their products at the card's rate plus that of the bytes that
`step_traffic` counts at its bandwidth: products wait for arithmetic, all other kernels for memory.
Both reach `SHARE` of what the maker says. Attention, norms and launches are left out.
"""
from typing import NamedTuple

from devtools.measure.step_traffic import LAYERS, count_step

from devtools import markdown_table

SHARE = 0.75
# (title, arguments of `count_step`)
WAYS = {"exact": ("Q4_K", False, 0), "exact, two LoRAs": ("Q4_K", False, 2),
        "fast": ("Q4_K", True, 0), "fast, two LoRAs": ("Q4_K", True, 2)}


class Card(NamedTuple):
    """A card, by its maker's figures.

    Attributes:
        units: SMs or compute units.
        clock: of boost, in GHz.
        half, int8: operations of 16-bit floats, with sums in float32, and of 8-bit integers that a
            unit makes in a clock; int8 0: `fast` is exact there.
        bandwidth: of its memory, GB/s.
    """

    units: int
    clock: float
    half: int
    int8: int
    bandwidth: float

    def seconds(self, operations: float, nbytes: float, fast: bool) -> float:
        """Returns the time of some operations and bytes."""
        rate = self.units * self.clock * 1e9 * (self.int8 if fast else self.half)
        return (operations / rate + nbytes / (self.bandwidth * 1e9)) / SHARE


CARDS = {
    "RTX 3060": Card(28, 1.777, 512, 2048, 360),
    "RTX 4070": Card(46, 2.475, 512, 2048, 504),
    "RTX 4090": Card(128, 2.52, 512, 2048, 1008),
    "RTX 5080": Card(84, 2.617, 512, 2048, 960),
    "RX 7900 XTX": Card(96, 2.5, 512, 0, 960),
}


def step_seconds() -> dict[str, dict[str, float]]:
    """Returns card -> way -> seconds of a step."""
    operations = sum(2.0 * count * tokens * rows * columns
                     for count, tokens, rows, columns in LAYERS)
    nbytes = {way: count_step(*arguments).nbytes for way, arguments in WAYS.items()}
    found: dict[str, dict[str, float]] = {}
    for name, card in CARDS.items():
        found[name] = {}
        for way, (_, fast, _) in WAYS.items():
            is_fast = fast and bool(card.int8)
            found[name][way] = card.seconds(
                operations, nbytes[way if is_fast else way.replace("fast", "exact")], is_fast)
    return found


def table() -> str:
    """Returns the table of docs/choosing.md."""
    rows = [[card, *(f"{seconds:.2f}" for seconds in ways.values())]
            for card, ways in step_seconds().items()]
    return markdown_table(["seconds", *WAYS], rows)


def bench_roofline(options):
    """The linear layers of a step of Flux.1 in Q4_K, 1024 x 1024, reckoned from makers' figures."""
    for card, ways in step_seconds().items():
        yield card, {way: f"{seconds:.2f} s" for way, seconds in ways.items()}
