"""What each file of tests takes: seconds of processor and on the clock, in a table."""
import os
from collections import defaultdict
from pathlib import Path

import pytest


def processor_seconds() -> float:
    """Return what this process and the children that it has waited for have taken so far."""
    return sum(os.times()[:4])


class FileTimes:
    """pytest's plugin that writes a table of the files of tests, the longest first.

    Each process of a run sends its tests' seconds along with their results.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        item.started = processor_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        now = processor_seconds()
        report.processor, item.started = now - item.started, now
        return report

    def pytest_runtest_logreport(self, report):
        sums = self.sums[report.nodeid.partition("::")[0]]
        sums[0] += report.processor
        sums[1] += report.duration
        sums[2] += report.when == "call" and not report.skipped

    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):
            rows = sorted(self.sums.items(), key=lambda row: -row[1][0])
            total = [sum(column) for column in zip(*self.sums.values())]
            self.path.write_text("".join(
                f"{seconds:8.1f} {clock:8.1f} {tests:6d} {name}\n"
                for name, (seconds, clock, tests) in [("all files", total), *rows]))
