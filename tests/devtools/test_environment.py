"""The first set-up: a line for each step; of pip nothing unless it fails, of uv nothing. A
Python of the user's own needs no more than a command uses. What is run ends with dev.py."""
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from process_tree import start_interruptible

from devtools import ROOT
from devtools.host import environment
from devtools.host.server import HOST


def test_each_step_is_a_line_with_its_number(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    for name in ("_make_venv", "fetch_tree", "try_uv", "try_install", "_install_shim"):
        monkeypatch.setattr(environment, name, lambda *arguments: None)
    monkeypatch.setattr(environment, "DEV", tmp_path)
    monkeypatch.setattr(environment, "OPTIONAL", [])
    monkeypatch.setattr(environment.subprocess, "run", lambda *arguments, **options: None)
    environment.prepare()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("]")[0] for line in lines[:-1]] == [
        f"[{number} of 6" for number in range(1, 7)]
    assert lines[-1].startswith("Environment ready after ")


@pytest.mark.skipif(sys.platform != "linux", reason="fake GPUs are built on Linux only")
@pytest.mark.parametrize("found", [0, 1, 2])
def test_torch_for_cpus_comes_first_and_another_build_is_told(found, monkeypatch, capsys):
    asked = []

    def install(python, *arguments) -> str | None:
        asked.append(arguments)
        return None if len(asked) > found else "none matches"

    for name in ("try_install", "try_uv"):
        monkeypatch.setattr(environment, name, install)
    environment._install_torch(Path("python"))
    torch = asked[0][0].removesuffix("+cpu")
    assert re.match(r"torch==[\d.]+$", torch)
    assert asked == [(f"{torch}+cpu",), ("--torch-backend", "cpu", torch), (torch,)][:found + 1]
    assert ("tests on fake GPUs are skipped" in capsys.readouterr().out) == (found == 2)


PLATFORMS = {"linux": ("Linux", "x86_64"), "darwin": ("Darwin", "arm64"),
             "win32": ("Windows", "AMD64")}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_one_version_of_each_package_is_locked(python, platform):
    system, machine = PLATFORMS[platform]
    machines = {"python_version": python, "python_full_version": f"{python}.4",
                "sys_platform": platform, "platform_system": system, "platform_machine": machine}

    def hold(lines) -> list[Requirement]:
        found = [Requirement(line) for line in lines]
        return [one for one in found if one.marker is None or one.marker.evaluate(machines)]

    locked = hold(re.findall(r"(?m)^\w.*", environment.read(environment.LOCKED)))
    assert len({one.name for one in locked}) == len(locked) > 100
    versions = {canonicalize_name(one.name): next(iter(one.specifier)) for one in locked}
    assert {version.operator for version in versions.values()} == {"=="}
    wanted = hold([*environment.COMPANIONS, *environment.requirements(HOST), *environment.EXTRAS,
                   *environment.OPTIONAL])
    wrong = [str(one) for one in wanted
             if not one.specifier.contains(versions[canonicalize_name(one.name)].version)]
    assert len(wanted) > 40 and not wrong


@pytest.mark.skipif(not Path(sys.prefix).is_relative_to(environment.DEV),
                    reason="this Python is the user's own")
def test_the_environment_has_what_is_locked():
    pairs = re.findall(r"(?m)^(\S+)==(\S+)", environment.read(environment.LOCKED))
    installed = {canonicalize_name(one.name): one.version.partition("+")[0]
                 for one in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])}
    assert {name for name, _ in pairs if name in installed} == {
        name for name, version in pairs if installed.get(name) == version}


@pytest.fixture
def own_python(tmp_path, monkeypatch):
    """A path next to which pip's mark can be written, that runs this Python, or the system's."""
    monkeypatch.setenv("PIP_BREAK_SYSTEM_PACKAGES", "1")
    if sys.platform == "win32":
        pytest.skip("makes a link")
    path = tmp_path / "venv" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.symlink_to(sys.executable)
    return path


def test_pip_is_silent_where_it_works(own_python, capfd):
    environment.pip(own_python, action="list")
    assert capfd.readouterr() == ("", "")


def test_pips_message_is_printed_where_it_fails(own_python, capfd):
    with pytest.raises(environment.SetupError, match="its message is above"):
        environment.pip(own_python, "--no-index", "featherweight-not-a-package")
    assert "No matching distribution" in capfd.readouterr().out


def test_packages_come_by_uv_and_by_pip_where_uv_finds_none(tmp_path, monkeypatch):
    """uv looks where pip's settings say."""
    pytest.importorskip("uv", reason="this Python is the user's own")
    own_python = Path(sys.executable)
    monkeypatch.setattr(environment, "_unfinished", lambda python: tmp_path / "unfinished")
    index = tmp_path / "index"
    index.mkdir()
    for name in ("a-package-of-nobody", "another-of-nobody"):
        module = name.replace("-", "_")
        with zipfile.ZipFile(index / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{module}.py", "")
            about = f"{module}-1.0.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\n"
                                                "Version: 1.0\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                             "Tag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setattr(environment, "UV_CACHE", tmp_path / "cache")
    used = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: (
        used.append("uv" if "uv" in command else "pip" if "install" in command else ""),
        run(command, **options))[1])
    folder = str(tmp_path / "packages")
    assert environment.try_install(own_python, "--target", folder, "a-package-of-nobody") is None
    assert [name for name in used if name] == ["uv"]
    assert Path(folder, "a_package_of_nobody.py").is_file()
    (tmp_path / "index" / "another_of_nobody-1.0-py3-none-any.whl").rename(
        tmp_path / "another_of_nobody-1.0-py3-none-any.whl")
    monkeypatch.setenv("UV_FIND_LINKS", str(index))  # which hides from uv what pip finds
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert environment.try_install(own_python, "--target", folder, "another-of-nobody") is None
    assert [name for name in used if name] == ["uv", "uv", "pip"]
    assert Path(folder, "another_of_nobody.py").is_file()
    assert "No matching distribution" in environment.try_install(
        own_python, "--target", folder, "featherweight-not-a-package")


def test_serve_needs_no_linter_in_a_python_of_the_users_own(tmp_path):
    if sys.platform == "win32":
        pytest.skip("makes a link")
    venv.create(tmp_path, with_pip=False)
    python, packages = (sysconfig.get_path(name, vars={"base": str(tmp_path)})
                        for name in ("scripts", "purelib"))
    tools = environment.LINTING.keys() | environment.TESTING.keys() - environment.SERVING.keys()
    Path(packages, "tools.pth").write_text(f"{sysconfig.get_path('purelib')}\nimport no_tools\n")
    Path(packages, "no_tools.py").write_text(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(tools)}))\n")  # importing them is an error

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([f"{python}/python", "dev.py", *arguments], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, "COMFYUI_PATH": str(HOST)})

    served, linted = run("serve", "--help"), run("lint")
    assert served.returncode == 0 and "--base" in served.stdout, served.stdout + served.stderr
    assert re.search(r"Failed: .* lacks ruff, 'pyright\[nodejs\]'\. ", linted.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_a_command_runs_gets_its_signals(name, tmp_path):
    command = ("import sys; from pathlib import Path; from devtools.host.environment import *; "
               f"print(Environment(Path('.'), Path({sys.executable!r})).run('-c', "
               "'import time; print(1, flush=True); time.sleep(600)'))")
    process = start_interruptible([sys.executable, "-c", command], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "1\n"
        children = psutil.Process(process.pid).children()
        process.send_signal(getattr(signal, name))
        assert process.wait(30) == 0 and not any(child.is_running() for child in children)
        assert process.stdout.read() == f"{-getattr(signal, name)}\n"
    finally:
        process.kill()
        process.wait()


def test_a_clone_in_a_folder_of_the_repositorys_name_passes_the_linter(tmp_path):
    pytest.importorskip("ruff")
    clone = tmp_path / "ComfyUI-Featherweight"
    clone.mkdir()
    for name in ("pyproject.toml", "__init__.py"):
        shutil.copyfile(ROOT / name, clone / name)
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", str(clone)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
