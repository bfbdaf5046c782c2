"""What the device is."""
import shutil
import subprocess

import devtools.measure  # noqa: F401  the host
from devtools.measure.bench.timing import device, side_by_side

import comfy.model_management
import torch


def describe(options):
    """Its name and what is installed; bytes it copies and products it makes a second."""
    place = device()
    found = {
        "name": f"{comfy.model_management.get_torch_device_name(place)}, torch {torch.__version__}"
    }
    if place.type == "cuda":
        found |= {
            "driver": _driver(),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(place)),
            "memory": comfy.model_management.get_total_memory(place)
        }
    yield "device", found
    size = 1 << (20 if options.quick else 28)
    here, elsewhere = (
        torch.empty(size, dtype=torch.uint8, device=place),
        torch.empty(size, dtype=torch.uint8, device=place),
    )
    kept = torch.empty(size, dtype=torch.uint8, pin_memory=place.type == "cuda")
    mapped = torch.empty(size, dtype=torch.uint8)
    times = side_by_side({"pinned memory to it": lambda: here.copy_(kept, non_blocking=True),
                          "other memory to it": lambda: here.copy_(mapped),
                          "within it": lambda: elsewhere.copy_(here)}, options.rounds)
    yield "copying", {
        f"GB a second, {name}": size / 1e9 / taken["median"] for name, taken in times.items()
    }
    side = 256 if options.quick else 8192
    for dtype in (torch.bfloat16, torch.float16):
        left = torch.randn(side, side, dtype=dtype, device=place)
        taken = side_by_side({"product": lambda left=left: left @ left},
                             options.rounds)["product"]["median"]
        yield f"{side} squared, {str(dtype).removeprefix('torch.')}", {
            "TFLOP a second": 2 * side**3 / taken / 1e12
        }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True).stdout.split() or ["unknown"])[0]
