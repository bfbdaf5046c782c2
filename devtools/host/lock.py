"""python -m devtools.host.lock [PACKAGE==VERSION ...]: writes locked.txt, which pins the packages
of the environment for every Python and system that the pack runs on, each at its newest version if
none is named."""
import subprocess
import sys
import tempfile
from pathlib import Path

from devtools.host.environment import (
    COMPANIONS,
    DEV,
    EXTRAS,
    LOCKED,
    OPTIONAL,
    Environment,
    pip,
    prepare,
    requirements,
)

UV = ("uv==0.13.9", "d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19")
OLDEST_PYTHON = "3.10"  # of pyproject.toml


def fetch_uv(folder: Path) -> str:
    """Return the path of uv, which resolves for other systems than the one it runs on, in a folder
    where it is installed if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{UV[0]} --hash=sha256:{UV[1]}\n")
    pip(Path(sys.executable), "--require-hashes", "--no-deps", "--target", str(folder), "--upgrade",
        "-r", str(requirement))
    return str(folder / "bin" / "uv")


def lock(environment: Environment, *held: str):
    """Write `LOCKED`. held: packages that stay at a version, such as `torch==2.13.0`."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, pins = Path(folder, "wanted.txt"), Path(folder, "pins.txt")
        packages = [*COMPANIONS, *requirements(environment.host), *EXTRAS, *OPTIONAL]
        wanted.write_text("\n".join(packages))
        pins.write_text("\n".join(held))
        done = subprocess.run(
            [fetch_uv(DEV / "uv"), "pip", "compile", "--quiet", "--universal", "--no-annotate",
             "--no-header", "--python-version", OLDEST_PYTHON, "-c", str(pins), str(wanted)],
            stdout=subprocess.PIPE, text=True, check=True)
    LOCKED.write_text("# Written by python -m devtools.host.lock, for every Python and system\n"
                      + done.stdout)


if __name__ == "__main__":
    lock(prepare({}), *sys.argv[1:])
