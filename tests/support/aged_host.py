"""The ComfyUI under test, saying that it is of another version."""
from pathlib import Path

from devtools.host.server import HOST, link_or_copy


def host_of_version(folder: Path, version: str) -> Path:
    """Make a folder with that ComfyUI in it; return the folder."""
    folder.mkdir()
    for path in HOST.iterdir():
        if path.name not in ("comfyui_version.py", "__pycache__"):
            link_or_copy(path, folder / path.name)
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder
