"""python -m devtools.host.lock [PACKAGE==VERSION ...]: writes locked.txt, which pins the packages
of the environment for every Python and system that the pack runs on, each at its newest version if
none is named."""
import subprocess
import sys
import tempfile
from pathlib import Path

from devtools.host.environment import (
    COMPANIONS,
    EXTRAS,
    LOCKED,
    OPTIONAL,
    Environment,
    prepare,
    requirements,
    uv_of,
)

OLDEST_PYTHON = "3.10"  # of pyproject.toml


def lock(environment: Environment, *held: str):
    """Write `LOCKED`. held: packages that stay at a version, such as `torch==2.13.0`."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, pins = Path(folder, "wanted.txt"), Path(folder, "pins.txt")
        packages = [*COMPANIONS, *requirements(environment.host), *EXTRAS, *OPTIONAL]
        wanted.write_text("\n".join(packages))
        pins.write_text("\n".join(held))
        done = subprocess.run(
            [*uv_of(environment.python), "pip", "compile", "--quiet", "--universal",
             "--no-annotate", "--no-header", "--python-version", OLDEST_PYTHON, "-c", str(pins),
             str(wanted)],
            stdout=subprocess.PIPE, text=True, check=True)
    LOCKED.write_text("# Written by python -m devtools.host.lock, for every Python and system\n"
                      + done.stdout)


if __name__ == "__main__":
    lock(prepare({}), *sys.argv[1:])
