"""Runs are timed in turn, and charts show what was measured."""
import itertools

from devtools.measure.chart import Value, bar_chart
from devtools.measure.in_turn import peak, time_in_turn

from featherweight.loaders.lora.block_chart import BAD, ROW


def test_variants_run_in_turn_and_what_prepares_one_is_not_timed():
    calls, now = [], itertools.count()
    variants = {name: lambda name=name: calls.append(name) for name in ("first", "second")}
    variants["second"].prepare = lambda: [calls.append("prepare"), *itertools.islice(now, 50)]
    times = time_in_turn(variants, 2, clock=lambda: next(now))
    assert calls == ["first", "prepare", "second"] * 2
    assert times == {"first": [1, 1], "second": [1, 1]}


def test_the_peak_is_the_largest_number_seen():
    numbers = itertools.chain([1, 5, 2], itertools.repeat(3))
    seen = []

    def read():
        seen.append(next(numbers))
        return seen[-1]

    with peak(read, interval=0.0001) as largest:
        while len(seen) < 4:
            pass
    assert largest() == 5


def test_the_longest_bar_of_each_group_is_as_long_as_those_of_others():
    groups = {"seconds": [Value("a", 2.0, "2 s", BAD), Value("b", 1.0, "1 s"), Value("c", 0, "")],
              "ratios": [Value("a", 1000.0, "1000", BAD)]}
    chart = bar_chart("A title", groups)
    pixels = chart.image.load()
    widths = {y: sum(pixels[x, y] == BAD for x in range(chart.image.width))
              for y in range(chart.image.height)}
    bars = [width for width in widths.values() if width > 100]
    assert len(set(bars)) == 1 and len(bars) == 2 * (ROW - 6)
    taller = bar_chart("A title of many words " * 8, groups)
    assert taller.image.height > chart.image.height
