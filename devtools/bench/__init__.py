"""Speed and memory, side by side in one run: `python3 dev.py bench`."""
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent

if torch.accelerator.is_available():
    os.environ.setdefault("HOST_ARGUMENTS", "")
if "featherweight" not in sys.modules:  # as it is in a test
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest  # noqa: F401  the host and the pack
