"""Loads a GGUF Flux, or a T5-XXL, runs it and prints as JSON what memory that took: python memory_probe.py model|encoder FILE

Runs in a process of its own, so that what else a test or a bench holds does not count. Linux only.
"""
import json
import operator
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


def probe_model(path: str) -> dict:
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


def probe_encoder(path: str) -> dict:
    import comfy.sd  # noqa: F401  imports the rest of the host before memory is counted
    import torch
    from featherweight.loaders.text_encoder import load_text_encoder

    before = status("VmRSS")
    started = time.perf_counter()
    clip = load_text_encoder([path], "sd3")
    load_seconds, peak = time.perf_counter() - started, status("VmHWM")

    def encode(text: str) -> tuple[float, int]:
        with PeakAnonymous() as growth, torch.inference_mode():
            started = time.perf_counter()
            clip.encode_from_tokens_scheduled(clip.tokenize(text))
            seconds = time.perf_counter() - started
        return seconds, growth.growth

    def places() -> list[int]:
        tensors = (getattr(weight, "_qdata", weight) for weight in clip.patcher.model.parameters())
        return [tensor.data_ptr() for tensor in tensors]

    first, before_second = encode("feather " * 250), places()
    second = encode("anvil " * 250)
    return {
        "weights_moved": sum(map(operator.ne, before_second, places())),
        "file_bytes": Path(path).stat().st_size, "model_size": clip.patcher.model_size(), "resident_before": before,
        "load_seconds": load_seconds, "peak_after_load": peak, "peak_after_encoding": status("VmHWM"),
        "encode_seconds": [first[0], second[0]], "anonymous_growth": [first[1], second[1]],
    }


if __name__ == "__main__":
    print(json.dumps({"model": probe_model, "encoder": probe_encoder}[sys.argv[1]](sys.argv[2])))
