"""Loads a GGUF Flux, runs one step and prints as JSON what memory that took: python memory_probe.py FILE

Runs in a process of its own, so that what else a test or a bench holds does not count. Linux only.
"""
import json
import re
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]
import conftest  # noqa: E402, F401  the host and the pack, as in the tests


def status(field: str) -> int:
    """Bytes of one field of this process: VmHWM (peak), VmRSS (now), RssAnon (now, without file pages)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


class PeakAnonymous:
    """Peak of RssAnon inside a `with` block, sampled: the kernel keeps a peak only for the sum with file pages."""

    def __enter__(self):
        self.start = self.peak = status("RssAnon")
        self._running = True
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self):
        while self._running:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(0.002)

    def __exit__(self, *_):
        self._running = False
        self._thread.join()
        self.growth = self.peak - self.start


def probe(path: str) -> dict:
    import comfy.model_management
    import comfy.sd  # noqa: F401  imports the rest of the host before memory is counted
    import torch
    from featherweight.loaders.container import open_weights
    from featherweight.loaders.diffusion import load_diffusion_model

    before = status("VmRSS")
    with PeakAnonymous() as loading:
        patcher = load_diffusion_model(path)
        comfy.model_management.load_models_gpu([patcher])
    peak = status("VmHWM")
    model = patcher.model
    context = model.diffusion_model.txt_in.in_features
    inputs = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
    largest = max(p.numel() * 4 for p in model.parameters())
    with PeakAnonymous() as step, torch.no_grad():
        started = time.perf_counter()
        model.apply_model(*inputs, c_crossattn=torch.randn(1, 8, context), y=torch.zeros(1, 768))
        seconds = time.perf_counter() - started
    return {
        "file_bytes": Path(path).stat().st_size, "tensor_bytes": open_weights(path).tensor_bytes,
        "model_size": patcher.model_size(), "resident_before": before, "peak_after_load": peak,
        "anonymous_growth_load": loading.growth, "anonymous_growth_step": step.growth,
        "largest_dense_layer": largest, "peak_after_step": status("VmHWM"), "step_seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))
