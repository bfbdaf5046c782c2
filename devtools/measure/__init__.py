"""Speed, memory, sizes and quality. Importing this puts the host and the pack where they can be
imported."""
import os
import sys

import torch

from devtools import ROOT

if torch.accelerator.is_available():
    os.environ.setdefault("HOST_ARGUMENTS", "")
if "featherweight" not in sys.modules:  # as it is in a test
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import comfyui_and_pack  # noqa: F401  the host and the pack
