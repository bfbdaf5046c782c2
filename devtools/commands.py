"""The commands of dev.py.

Standard library only: dev.py imports it before anything is installed.
"""
import argparse
import os
import random
import tempfile
import time
from pathlib import Path

from devtools import ROOT
from devtools.changed import changed_tests
from devtools.gpu import offline_bundle
from devtools.growth import growth_text
from devtools.host.environment import (
    LINTING,
    SERVING,
    TESTING,
    Environment,
    fetch_chromium,
    fetch_llama_cpp,
    prepare,
)

PROCESS_GIB = 7  # memory of a process that runs tests, and of what it starts
# Each runs whole files, and those that share a server together: see tests/support/processes.py.
WHOLE_FILES = ["--dist", "loadfile", "--no-loadscope-reorder",
               # else what a process held that dies is waited for without end
               "--max-worker-restart", "0"]
# or each of the tests' many processes compiles the pack and its tests
COMPILED_ONCE = {"PYTHONDONTWRITEBYTECODE": ""}


def setup(arguments: list[str]) -> int:
    """Only make the environment."""
    environment = prepare(TESTING | LINTING)
    print(f"Done: run ComfyUI's own code with {environment.python}")
    return 0


def lint(arguments: list[str]) -> int:
    """Check style and types, and say what has grown."""
    code = _lint(prepare(LINTING))
    print(growth_text(ROOT))
    return code


def _lint(environment: Environment) -> int:
    """Run ruff over everything and pyright over the pack. Returns 0 without a complaint.

    ComfyUI and what it is installed with are the environment's own, wherever they lie.
    """
    packages = ROOT / ".dev" / "packages"  # where pyright finds the pack under its own name
    packages.mkdir(exist_ok=True)
    if not (packages / "featherweight").is_symlink():  # relative: it stays right where .dev moves
        (packages / "featherweight").symlink_to(Path("..", ".."), target_is_directory=True)
    codes = [environment.run("-m", "ruff", "check", "--quiet", "--output-format", "concise", ".")]
    codes.append(environment.run("-m", "pyright", "--pythonpath", str(environment.python),
                                 PYTHONPATH=str(environment.host)))
    return 1 if any(codes) else 0


def test(arguments: list[str]) -> int:
    """Lint, then run pytest with `arguments`: the whole suite in a process for each core.

    Of tests with many cases it runs a few (`--drawn`). Where the arguments name files, only these
    run, whole, and nothing is linted or downloaded. `--heavy` runs the heavy tests and the cases
    that may be left out, folder after folder. `--windows` runs them with Python for Windows.
    `--changed` runs whole files, those nearest to what has changed.
    """
    if arguments[:1] == ["--changed"]:
        files = changed_tests()
        print("\n".join(files) or "No test is near what has changed since the last commit.")
        return test([*files, "-n", str(processes()), *arguments[1:]]) if files else 0
    if arguments[:1] == ["--windows"]:
        if os.name == "nt":
            return test(arguments[1:])
        return prepare(TESTING).run("-m", "devtools.windows.lane", *arguments[1:])
    if arguments[:1] == ["--heavy"] and not any(".py" in argument for argument in arguments):
        environment = prepare(TESTING)
        fetch_chromium(environment.python)
        return environment.run("-m", "devtools.heavy", *arguments[1:], **COMPILED_ONCE)
    if any(argument.partition("::")[0].endswith(".py") or (ROOT / argument).is_dir()
           for argument in arguments if not argument.startswith("-")):
        return prepare(TESTING).run("-m", "pytest", *arguments, **COMPILED_ONCE)
    environment = prepare(TESTING | LINTING)
    fetch_llama_cpp(environment.python)
    fetch_chromium(environment.python)
    started = time.monotonic()
    print("Linting", flush=True)
    lint_code = _lint(environment)
    print("Running the tests", flush=True)
    tests = environment.run("-m", "pytest", "-n", str(processes()), *WHOLE_FILES, "--drawn",
                            "--durations=40", "--durations-min=10", "tests", *arguments,
                            OMP_NUM_THREADS="1", **COMPILED_ONCE)
    failed = [name for name, code in (("the linters", lint_code), ("tests", tests)) if code]
    took = f"{time.monotonic() - started:.0f} s"
    print(f"Failed: {' and '.join(failed)}, see above ({took})"
          if failed else f"Done: everything passed ({took})")
    return 1 if failed else 0


def processes() -> int:
    """One process more than there are cores, where the memory is enough for them.

    Half of them begin with tests that wait for a server, a browser or Ray while a core is idle.
    """
    cores = (os.cpu_count() or 1) + 1
    if hasattr(os, "sysconf"):
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        cores = min(cores, int(gib / PROCESS_GIB))
    return max(1, cores)


def _module(name: str, *packages: dict[str, str]):
    """Makes the command that runs a module of `devtools` with the same arguments."""
    def command(arguments: list[str]) -> int:
        return prepare(*packages).run("-m", f"devtools.{name}", *arguments)
    return command


def serve(arguments: list[str]) -> int:
    """Open ComfyUI with the demo's models and workflows, in place of this process."""
    return prepare(SERVING).become("-m", "devtools.serve", *arguments)


def gpu(arguments: list[str]) -> int:
    """Measure what only a GPU can show; or gather what a bare machine lacks for it."""
    parser = argparse.ArgumentParser(prog="python3 dev.py gpu", add_help=False)
    parser.add_argument("--pack", type=Path, metavar="FOLDER")
    parser.add_argument("--packed", type=Path, metavar="FOLDER")
    own, _ = parser.parse_known_args(arguments)
    if own.pack:
        offline_bundle.pack(own.pack)
        return 0
    if not own.packed:
        return prepare().run("-m", "devtools.gpu", *arguments)
    with tempfile.TemporaryDirectory(prefix="featherweight-gpu-") as place:
        environment, site = offline_bundle.environment(own.packed, Path(place))
        return environment.run("-m", "devtools.gpu", *arguments, PYTHONPATH=site)


def fuzz(arguments: list[str]) -> int:
    """Run the tests of tests/fuzz with more inputs, drawn by another seed; the rest goes to pytest.

    An input that breaks a rule goes into .dev/fuzz.
    """
    parser = argparse.ArgumentParser(prog="python3 dev.py fuzz", description=fuzz.__doc__)
    parser.add_argument("--inputs", type=int, default=500, help="of each target; %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    own, others = parser.parse_known_args(arguments)
    print(f"To draw the same inputs again: dev.py fuzz --seed {own.seed} --inputs {own.inputs}",
          flush=True)
    return prepare(TESTING).run(
        "-m", "pytest", "tests/fuzz/test_targets.py", "--hypothesis-seed", str(own.seed),
        "--fuzz", str(own.inputs), *others, **COMPILED_ONCE)


COMMANDS = {
    "setup": setup, "test": test, "lint": lint, "serve": serve, "gpu": gpu,
    "demo": _module("demo", SERVING), "bench": _module("measure.bench"),
    "quality": _module("measure.quality"), "sizes": _module("measure.model_sizes"),
    "inspect": _module("inspect_file"), "matrix": _module("host.matrix"),
    "fuzz": fuzz, "soak": _module("soak")
}
