"""dev.py matrix: which ComfyUIs it runs, and with which tests."""
import re
import shutil
import subprocess

import oracles
import pytest

from devtools.host import matrix
from devtools.host.environment import HOST_VERSION, SetupError


@pytest.mark.parametrize(
    ("arguments", "versions", "tests"),
    [
        ([], list(matrix.VERSIONS), matrix.TESTS),
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
    monkeypatch.setattr(matrix, "run_tests", lambda *given, **options: run.append(given))
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
    assert [arguments[-2:] for arguments in installed] == [
        ("comfy-kitchen==0.2.31", matrix.import_guard.PACKAGE)]
    assert matrix.prepare(version) == (folder, packages) and len(installed) == 1


def test_a_host_that_is_neither_a_version_nor_a_comfyui_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        matrix.main(["--host", str(tmp_path)])
    assert (
        f"{tmp_path} is neither one of {', '.join(matrix.VERSIONS)} nor a folder with a ComfyUI"
        in capsys.readouterr().err
    )


def test_a_failure_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(matrix, "run_tests",
                        lambda version, tests, **options: int(version == matrix.NEWEST))
    assert matrix.main(["--newest"]) == 1
    assert "newest   failed" in capsys.readouterr().out


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit of a ComfyUI; gives its folder and the commit."""
    folder = tmp_path / "repository"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text("main")
    (folder / "comfy" / "vocab.json").write_text("large")
    author = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "tree"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder, subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True,
                                  text=True).stdout.strip()


@needs_git
def test_a_commit_of_a_mirror_is_checked_out_and_what_it_lacks_taken_from_the_index(
        repository, tmp_path, monkeypatch):
    folder, commit = repository
    spare = tmp_path / "spare"
    (spare / "comfy").mkdir(parents=True)
    (spare / "comfy" / "vocab.json").write_text("large")
    monkeypatch.setattr(matrix, "prepare", lambda version: (spare, tmp_path))
    blob = subprocess.run(["git", "hash-object", spare / "comfy" / "vocab.json"],
                          capture_output=True, text=True, check=True).stdout.strip()
    (folder / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    matrix.clone(tmp_path / "host", str(folder), commit)
    assert (tmp_path / "host" / "main.py").read_text() == "main"
    assert (tmp_path / "host" / "comfy" / "vocab.json").read_text() == "large"
    (spare / "comfy" / "vocab.json").write_text("another")
    with pytest.raises(SetupError, match="lacks comfy/vocab.json"):
        matrix.clone(tmp_path / "again", str(folder), commit)


@needs_git
def test_a_repository_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(SetupError, match="could not be cloned.*--repository"):
        matrix.clone(tmp_path / "host", str(tmp_path / "none"), "0" * 40)


@needs_git
def test_the_packs_sources_are_held_against_a_host(tmp_path, capfd):
    """A ComfyUI without what the pack imports breaks it."""
    packages = oracles.installed(matrix.import_guard.PACKAGE)
    host = tmp_path / "host"
    (host / "comfy").mkdir(parents=True)
    (host / "comfy" / "__init__.py").touch()
    (host / "comfy" / "ops.py").write_text("def cast_bias_weight(s):\n    pass\n")
    assert not matrix.import_guard.check_imports(host, packages)
    assert "comfy.ops.uncast_bias_weight" in capfd.readouterr().out
