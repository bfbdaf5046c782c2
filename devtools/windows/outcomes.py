"""A plugin of pytest: writes "OUTCOME ID" for each test into the file of FEATHERWEIGHT_OUTCOMES."""
import os


def pytest_runtest_logreport(report):
    """A test has one line: of its call, or of what failed or skipped it before or after."""
    if (report.when == "call" or not report.passed) and report.outcome != "rerun":
        _write(report)


def pytest_collectreport(report):
    """A file that cannot be collected counts as a test that fails."""
    if report.failed:
        _write(report)


def _write(report):
    with open(os.environ["FEATHERWEIGHT_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(f"{report.outcome} {report.nodeid}\n")
