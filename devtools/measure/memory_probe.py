"""Loads a file, runs the model and prints as JSON what memory that took: python memory_probe.py
KIND FILE

model: a GGUF Flux, one step at a few tokens. picture: one step at the size of a picture. encoder: a
T5-XXL in GGUF. packing-TYPE: any diffusion model, packed to that type while it is loaded.
training-FORMAT: a dense Flux, or its shapes with random weights of that format, some steps of
ComfyUI's node Train LoRA; training-dense: as the file. bypass-FORMAT: the same in its bypass mode.
Runs in a process of its own, so that what else a test or a bench holds does not count. Linux only.
"""
import json
import operator
import os
import re
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["HOST_ARGUMENTS"] = "--cpu"
import devtools.measure  # noqa: F401  puts the host and the pack on the path

TRAINED_STEPS = 2  # that are timed


def status(field: str) -> int:
    """Bytes of one field of this process: VmHWM (peak), VmRSS (now), RssAnon (now, without file
    pages)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


class PeakAnonymous:
    """Peak of RssAnon inside a `with` block, sampled: the kernel keeps a peak only for the sum with
    file pages."""

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
    import comfy.sd
    import torch

    from featherweight.loaders.files.open_weights import open_weights
    from featherweight.loaders.models.diffusion import load_diffusion_model

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


def probe_picture(path: str) -> dict:
    """512 x 512 pixels, 512 tokens of text, in bfloat16 on a CPU that has it."""
    from devtools.measure.bench.timing import has_bfloat16

    import comfy.model_management
    import torch

    from featherweight.loaders.models.diffusion import load_diffusion_model

    started = time.perf_counter()
    patcher = load_diffusion_model(path)
    if has_bfloat16():
        patcher.set_model_compute_dtype(torch.bfloat16)
    comfy.model_management.load_models_gpu([patcher])
    loaded = time.perf_counter()
    context = patcher.model.diffusion_model.txt_in.in_features
    inputs = {
        "c_crossattn": torch.randn(1, 512, context), "y": torch.randn(1, 768),
        "guidance": torch.tensor([3.5])
    }
    with PeakAnonymous() as step, torch.no_grad():
        picture = patcher.model.apply_model(torch.randn(1, 16, 64, 64), torch.tensor([0.5]),
                                            **inputs)
    return {
        "file_bytes": Path(path).stat().st_size, "model_size": patcher.model_size(),
        "peak": status("VmHWM"), "peak_anonymous": step.peak,
        "finite": picture.isfinite().all().item(), "load_seconds": loaded - started,
        "step_seconds": time.perf_counter() - loaded
    }


def probe_training(path: str, format_name: str, bypass: bool = False) -> dict:
    """A latent of 256 x 256 pixels and 64 tokens of text, rank 16, in bfloat16. Seconds are those
    that one thread spends computing, so that other processes do not count."""
    from devtools.measure.bench.models import packed_model, random_weights
    from devtools.measure.bench.timing import as_in_use

    import torch
    from comfy_extras.nodes_train import TrainLoraNode

    from featherweight.loaders.files.open_weights import open_weights
    from featherweight.loaders.models.diffusion import load_diffusion_model

    torch.set_num_threads(1)
    with as_in_use():
        before = status("VmRSS")
        if format_name == "dense":
            patcher = load_diffusion_model(path)
        else:
            entries = open_weights(path).entries
            shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
            weights = random_weights(shapes, format_name)

            def load(disable_dynamic=False):
                return packed_model(dict(weights))

            patcher = load()
            patcher.cached_patcher_init = load, ()
        context = patcher.model.diffusion_model.txt_in.in_features
        inputs = {
            name: options[1]["default"]
            for group in TrainLoraNode.INPUT_TYPES().values() for name, options in group.items()
            if len(options) > 1 and "default" in options[1]
        }
        text = [torch.randn(1, 64, context), {"pooled_output": torch.randn(1, 768)}]
        seconds = {}
        for steps in (1, TRAINED_STEPS + 1):  # the first loads the model
            values = {**inputs, "model": patcher, "positive": [text], "steps": steps, "rank": 16,
                      "bypass_mode": bypass}
            values["latents"] = {"samples": torch.randn(1, 16, 32, 32)}
            started = time.process_time()
            TrainLoraNode.execute(**{name: [value] for name, value in values.items()})
            seconds[steps] = time.process_time() - started
        return {
            "model_size": patcher.model_size(), "peak_growth": status("VmHWM") - before,
            "step_seconds": (seconds[TRAINED_STEPS + 1] - seconds[1]) / TRAINED_STEPS
        }


def probe_bypass(path: str, format_name: str) -> dict:
    return probe_training(path, format_name, bypass=True)


def probe_encoder(path: str) -> dict:
    import comfy.sd  # noqa: F401  imports the rest of the host before memory is counted
    import torch

    from featherweight.loaders.models.text_encoder import load_text_encoder

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
        "file_bytes": Path(path).stat().st_size, "model_size": clip.patcher.model_size(),
        "resident_before": before, "load_seconds": load_seconds, "peak_after_load": peak,
        "peak_after_encoding": status("VmHWM"), "encode_seconds": [first[0], second[0]],
        "anonymous_growth": [first[1], second[1]]
    }


def probe_packing(path: str, type_name: str) -> dict:
    import comfy.sd  # noqa: F401  imports the rest of the host before memory is counted

    from featherweight.loaders.files.open_weights import open_weights
    from featherweight.loaders.models.diffusion import load_diffusion_model

    file = open_weights(path)
    largest = max(entry.nbytes for entry in file.entries.values())
    before, started = status("VmRSS"), time.perf_counter()
    with PeakAnonymous() as loading:
        patcher = load_diffusion_model(path, pack_to=type_name)
    return {
        "tensor_bytes": file.tensor_bytes, "model_size": patcher.model_size(),
        "largest_dense_tensor": largest, "peak_growth": status("VmHWM") - before,
        "anonymous_growth": loading.growth, "file_pages_left": status("RssFile"),
        "seconds": time.perf_counter() - started
    }


if __name__ == "__main__":
    probes = {
        "model": probe_model, "picture": probe_picture, "encoder": probe_encoder,
        "packing": probe_packing, "training": probe_training, "bypass": probe_bypass
    }
    kind, *arguments = sys.argv[1].split("-", 1)
    print(json.dumps(probes[kind](sys.argv[2], *arguments)))
