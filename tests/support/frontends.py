"""ComfyUI's editor in its newest version, beside the one that the host is installed with."""
import importlib.metadata
import sys
import tempfile
import zipfile
from pathlib import Path

from devtools.host.environment import DEV, pip
from devtools.host.matrix import newest

PACKAGE = "comfyui-frontend-package"
FRONTENDS = DEV / "frontends"


def newest_frontend() -> Path | None:
    """Returns the folder for the host's --front-end-root, fetched once; None: the host has it.

    Raises SetupError if the package index cannot be reached.
    """
    requirement, = newest([PACKAGE])
    version = requirement.partition("==")[2]
    if version == importlib.metadata.version(PACKAGE):
        return None
    folder = FRONTENDS / version
    if not folder.exists():
        FRONTENDS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FRONTENDS, prefix="part-") as partial:
            pip(Path(sys.executable), "--no-deps", "-d", partial, requirement, action="download")
            wheel, = Path(partial).glob("*.whl")
            with zipfile.ZipFile(wheel) as files:
                files.extractall(Path(partial, version))
            Path(partial, version).rename(folder)
    return folder / "comfyui_frontend_package" / "static"
