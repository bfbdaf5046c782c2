"""Times the steps of a model in each way to compute it, with and without its LoRAs."""
import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import comfy.model_management
import psutil
import torch
from comfy.model_patcher import ModelPatcher

from ..comfyui.model_summary import arithmetic_text, dequantize_backend_text
from ..models.compute_choice import EXACTLY, FAST
from ..out_of_memory import is_out_of_memory
from ..packing.calibration.sampling import (
    SamplingRun,
    SamplingStep,
    random_conditioning,
    stop_where_cancelled,
)
from ..progress import Progress
from .timing import peak, time_in_turn
from .ways import WAYS, NotMeasured, computing, has_fast_way, without_loras

BUDGET = 110.0  # seconds for everything; no step is begun after that
ROW_SECONDS, MAX_STEPS = 6.0, 10  # of one row


@dataclass(frozen=True)
class Row:
    """One way to compute the model.

    Attributes:
        way: one of `WAYS`.
        has_loras: whether the model's LoRAs were applied.
        seconds: of each timed step.
        held: bytes of the model's weights and LoRAs.
        peak: largest memory while the steps ran, in bytes: of the GPU, or of the process.
        kernels: in use, in words.
        reason: why it was not measured, or "".
    """

    way: str
    has_loras: bool
    seconds: tuple[float, ...] = ()
    held: int = 0
    peak: int = 0
    kernels: str = ""
    reason: str = ""

    @property
    def step(self) -> float:
        """Seconds of a step: the median."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Measurement:
    """The times of a model.

    Attributes:
        rows: in the order of `WAYS`, each without and with LoRAs.
        shape: of the latents of a step.
        difference: of a step's result, "fast" against "exact": (decibels, largest difference as a
            share of the largest value); None if both are the same or one was not measured.
        seconds: that the whole measurement took.
    """

    rows: tuple[Row, ...]
    shape: tuple[int, ...]
    difference: tuple[float, float] | None
    seconds: float


class _Done(Exception):
    """Ends the sampler once its first step has been measured."""


def measure_speed(patcher: ModelPatcher, prompt: list | None = None,
                  latent: dict | None = None, budget: float = BUDGET,
                  row_seconds: float = ROW_SECONDS) -> Measurement:
    """Measures a model with random noise.

    Args:
        patcher: the host's, of a diffusion model; it is as before afterwards.
        prompt: a CONDITIONING, None for random numbers.
        latent: a LATENT of the size to measure, None for a picture of 512 x 512.
        budget: seconds; what does not fit into them is not measured.
        row_seconds: of the timed steps of one row, at most MAX_STEPS.

    Raises:
        WeightFileError: The model takes more than a text, and no prompt was given.
    """
    started = time.perf_counter()
    deadline = started + budget
    run = SamplingRun([prompt] if prompt else [], latent, samples=1, steps=1)
    if not run.prompts:
        run = replace(run, prompts=random_conditioning(patcher, run, 1))
    rows, results = [], {}
    shape: tuple[int, ...] = ()
    with_loras = (True, False) if patcher.patches else (False,)
    progress = Progress(*WAYS)
    for way in WAYS:
        rows_of_way = {has_loras: Row(way, has_loras) for has_loras in with_loras}
        try:
            if way == FAST and not has_fast_way(patcher):
                raise NotMeasured("it is the same as exact on this device")
            _reject_late(deadline)
            with computing(patcher, way) as model:
                for has_loras in with_loras:
                    _reject_late(deadline)
                    current = model if has_loras else without_loras(model)
                    row, result, shape = _measure_row(current, run, rows_of_way[has_loras],
                                                      deadline, row_seconds)
                    rows_of_way[has_loras] = row
                    results.setdefault(way, result)
                    del current
                del model
        except NotMeasured as error:
            reason = str(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = "the device ran out of memory"
        else:
            reason = ""
        rows += [row if row.seconds else replace(row, reason=reason)
                 for row in reversed(rows_of_way.values())]
        progress.stage()
        gc.collect()
        comfy.model_management.soft_empty_cache()
    difference = None
    if EXACTLY in results and FAST in results:
        difference = _difference(results[FAST], results[EXACTLY])
    return Measurement(tuple(rows), shape, difference, time.perf_counter() - started)


def _reject_late(deadline: float):
    if time.perf_counter() > deadline:
        raise NotMeasured("no time was left")


def _measure_row(patcher: ModelPatcher, run: SamplingRun, row: Row, deadline: float,
                 row_seconds: float) -> tuple[Row, torch.Tensor, tuple[int, ...]]:
    """Measures one row.

    Returns:
        The row, the result of a step on the CPU, and the shape of its latents.
    """
    seconds, shape, largest = [], (), 0
    result = torch.empty(0, dtype=torch.float32)

    def on_step(number: int, step: SamplingStep):
        nonlocal seconds, result, shape, largest
        shape = tuple(step.x.shape)

        def run() -> torch.Tensor:
            stop_where_cancelled()
            return step.run(patcher.model).cpu()  # the copy waits for the device

        with torch.no_grad(), _peak_memory(patcher.load_device) as memory:
            result = run()  # not timed: it compiles, fills caches
            end = min(deadline, time.perf_counter() + row_seconds)
            seconds = time_in_turn({row.way: run}, MAX_STEPS, end=end)[row.way]
        largest = memory()
        raise _Done

    with contextlib.suppress(_Done):
        run.run(patcher, on_step)
    words = dequantize_backend_text(patcher), arithmetic_text(patcher)
    row = replace(row, seconds=tuple(seconds), held=patcher.model_size(), peak=largest,
                  kernels=", ".join(filter(None, words)))
    return row, result, shape


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that returns the largest memory in the block: of a GPU that counts it, else
    of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    process = psutil.Process()
    with peak(lambda: process.memory_info().rss) as largest:
        yield largest


def _difference(fast: torch.Tensor, exact: torch.Tensor) -> tuple[float, float] | None:
    """Returns (decibels, largest difference over the largest value) of two results, None where
    they are the same."""
    error = (fast - exact).double()
    if not error.any():
        return None
    power, lost = exact.double().square().sum(), error.square().sum()
    return 10 * math.log10(float(power / lost)), float(error.abs().max() / exact.abs().max())
