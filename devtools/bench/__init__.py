"""Speed and memory, side by side in one run: `python3 dev.py bench`."""
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
if torch.accelerator.is_available():
    os.environ.setdefault("HOST_ARGUMENTS", "")
import conftest  # noqa: E402, F401  the host and the pack, as in the tests
