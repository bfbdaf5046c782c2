"""dev.py matrix: which ComfyUIs it runs, and with which tests."""
import re

import pytest

from devtools.host import matrix
from devtools.host.environment import HOST_VERSION


@pytest.mark.parametrize("arguments, versions, tests", [
    ([], list(matrix.HOSTS), matrix.TESTS),
    (["--host", "0.24.0"], ["0.24.0"], matrix.TESTS),
    (["--newest"], [matrix.NEWEST], matrix.NEWEST_TESTS),
    (["--newest", "--host", HOST_VERSION, "tests/ops", "-q"], [HOST_VERSION, matrix.NEWEST], ["tests/ops", "-q"]),
])
def test_arguments_choose_the_hosts_and_the_tests(arguments, versions, tests, monkeypatch, capsys):
    run = []
    monkeypatch.setattr(matrix, "run_tests", lambda *given: run.append(given))
    assert matrix.main(arguments) == 0
    assert [version for version, _ in run] == versions
    assert all(given == matrix.TOO_OLD.get(version, tests) for version, given in run)
    assert all(re.search(rf"^  {re.escape(version)} +passed", capsys.readouterr().out, re.M) for version in versions[:1])


def test_a_failure_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(matrix, "run_tests", lambda version, tests: int(version == matrix.NEWEST))
    assert matrix.main(["--newest"]) == 1
    assert "newest   failed" in capsys.readouterr().out


def test_the_newest_packages_are_those_that_the_newest_host_pins():
    host = next(iter(matrix.HOSTS))
    assert host == HOST_VERSION == max(matrix.HOSTS, key=lambda version: [int(part) for part in version.split(".")])
