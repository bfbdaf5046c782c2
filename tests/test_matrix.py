"""dev.py matrix: which ComfyUIs it runs, and with which tests."""
import re

import pytest

from devtools.host import matrix
from devtools.host.environment import HOST_VERSION


@pytest.mark.parametrize(
    ("arguments", "versions", "tests"),
    [
        ([], list(matrix.HOSTS), matrix.TESTS),
        (["--host", "0.24.0"], ["0.24.0"], matrix.TESTS),
        (["--newest"], [matrix.NEWEST], matrix.NEWEST_TESTS),
        (
            ["--newest", "--host", HOST_VERSION, "tests/ops", "-q"],
            [HOST_VERSION, matrix.NEWEST],
            ["tests/ops", "-q"],
        ),
    ],
)
def test_arguments_choose_the_hosts_and_the_tests(arguments, versions, tests, monkeypatch, capsys):
    run = []
    monkeypatch.setattr(matrix, "run_tests", lambda *given: run.append(given))
    assert matrix.main(arguments) == 0
    assert [version for version, _ in run] == versions
    assert all(given == matrix.TOO_OLD.get(version, tests) for version, given in run)
    assert all(
        re.search(rf"^  {re.escape(version)} +passed",
                  capsys.readouterr().out, re.M) for version in versions[:1])


def test_a_folder_with_a_comfyui_is_a_host_with_the_packages_that_it_pins(tmp_path, monkeypatch):
    host, installed = tmp_path / "ComfyUI", []
    host.mkdir()
    (host / "main.py").touch()
    (host / "requirements.txt").write_text("torch\ncomfy-kitchen==0.2.31\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matrix, "DEV", tmp_path / ".dev")
    monkeypatch.setattr(matrix, "pip", lambda python, *arguments: installed.append(arguments))
    version = matrix.parse_host("ComfyUI")
    folder, packages = matrix.prepare(version)
    assert (version, folder) == (str(host), host) and packages.is_relative_to(tmp_path / ".dev")
    assert [arguments[-1] for arguments in installed] == ["comfy-kitchen==0.2.31"]
    assert matrix.prepare(version) == (folder, packages) and len(installed) == 1


def test_a_host_that_is_neither_a_version_nor_a_comfyui_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        matrix.main(["--host", str(tmp_path)])
    assert (
        f"{tmp_path} is neither one of {', '.join(matrix.HOSTS)} nor a folder with a ComfyUI"
        in capsys.readouterr().err
    )


def test_a_failure_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(matrix, "run_tests", lambda version, tests: int(version == matrix.NEWEST))
    assert matrix.main(["--newest"]) == 1
    assert "newest   failed" in capsys.readouterr().out


def test_the_newest_packages_are_those_that_the_newest_host_pins():
    host = next(iter(matrix.HOSTS))
    assert (
        host
        == HOST_VERSION
        == max(matrix.HOSTS, key=lambda version: [int(part) for part in version.split(".")])
    )
