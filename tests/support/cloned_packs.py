"""Other packs that somebody has cloned into .dev/packs, for heavy tests."""
from pathlib import Path

import pytest

from devtools.host.environment import DEV

PACKS = DEV / "packs"


def cloned(name: str) -> Path:
    """Returns the folder of a clone; skips the test where there is none. name: of its repository.
    """
    if not (PACKS / name).is_dir():
        pytest.skip(f"no clone of {name} in .dev/packs")
    return PACKS / name
