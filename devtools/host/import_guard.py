"""Holds the pack's sources against a ComfyUI without running either, by comfy-import-guard.

It finds names of `comfy.*` that are gone, calls that no longer bind, and replacements that are
behind the signature of what they replace.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from devtools import ROOT
from devtools.host.package import packed_files

PACKAGE = "comfy-import-guard==1.3.0"


def check_imports(host: Path, packages: Path) -> bool:
    """Prints what comfy-import-guard says of the pack on a ComfyUI; returns whether nothing breaks.

    host: the ComfyUI's folder. packages: the folder that comfy-import-guard is installed in.
    """
    with tempfile.TemporaryDirectory(prefix="featherweight-guard-") as folder:
        tree, install = Path(folder) / "ComfyUI", Path(folder) / "install"
        names = [path.relative_to(host).as_posix() for path in host.rglob("*.py")]
        _copy(host, tree, (name for name in names if not name.startswith((".", "custom_nodes/"))))
        _copy(ROOT, install / "custom_nodes" / "featherweight",
              (name for name in packed_files() if name.endswith(".py")))
        # it reads a ComfyUI from a git repository only
        author = ["-c", "user.name=matrix", "-c", "user.email=matrix@localhost"]
        for command in (["init", "-q"], ["add", "-Af"], [*author, "commit", "-qm", "tree"]):
            subprocess.run(["git", *command], cwd=tree, check=True)
        command = [sys.executable, "-m", "comfy_import_guard.cli", "--offline", "--cache-dir",
                   folder, "check", "--comfy-dir", str(install), "--target", "HEAD", "--no-update",
                   "--strict"]
        return subprocess.call(command, env=os.environ | {"PYTHONPATH": str(packages)}) == 0


def _copy(source: Path, target: Path, names):
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, path)
