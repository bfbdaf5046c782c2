"""Packages that only heavy tests compare with, each in a folder of its own."""
import logging
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch
from filelock import FileLock

FOLDER = Path(__file__).parents[2] / ".dev" / "oracles"


def installed(*requirements: str, complete: bool = False) -> Path:
    """The folder that holds these packages, `complete` with what they need; skips the test where
    the package index cannot be reached."""
    folder = FOLDER / requirements[0]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet",
                       *([] if complete else ["--no-deps"]), "--target", f"{folder}.new",
                       *requirements]
            if subprocess.run(command).returncode:
                pytest.skip("the package index cannot be reached")
            Path(f"{folder}.new").rename(folder)
    return folder


def sources(requirement: str) -> Path:
    """The folder that holds the sources of a package that is built where it is installed; skips the
    test where the package index cannot be reached."""
    folder = FOLDER / f"{requirement}.sources"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            new = Path(f"{folder}.new")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                       "--no-binary", ":all:", "--dest", str(new), requirement]
            if subprocess.run(command).returncode:
                pytest.skip("the package index cannot be reached")
            archive, = new.glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(new, filter="data")
            new.rename(folder)
    return next(path for path in folder.iterdir() if path.is_dir())


def auto_round(monkeypatch):
    """Makes modules of auto-round importable, of whose packages nothing else runs: that imports
    much more than they need."""
    folder = installed("auto-round==0.16.1", "loguru")
    monkeypatch.syspath_prepend(folder)
    used = {
        "auto_round": {},
        "auto_round.utils": {"get_packing_device": lambda device: torch.device("cpu"),
                             "check_to_quantized": bool, "is_gaudi2": lambda: False,
                             "logger": logging.getLogger("auto_round")},
        "auto_round.data_type": {}, "auto_round.data_type.gguf": {"_imatrix_handle_zero": None},
        "auto_round.export": {}, "auto_round_extension": {},
        "auto_round.export.export_to_autoround": {},
        "auto_round.compressors": {},
        "auto_round.compressors.utils": {
            "BackendDataType": types.SimpleNamespace(MX_FP="mx_fp", NV_FP="nv_fp"),
            "is_mx_fp": lambda name: "mx_fp" in name, "is_nv_fp": lambda name: "nv_fp" in name},
    }
    for name, attributes in used.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes, __path__=[str(folder.joinpath(*name.split(".")))])
        monkeypatch.setitem(sys.modules, name, module)
