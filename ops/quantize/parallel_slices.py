"""Slices of a weight side by side, each on one thread of a CPU.

Packing a slice takes about a hundred operations on a few hundred kilobytes. Shared among the
threads of a CPU, each of them waits for the others longer than it works; on a busy machine that
takes several times as long as one thread does alone.
"""
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def parallel_slices(work: Callable[[int], None], items: Sequence[int], device: torch.device):
    """Calls `work` with every item, in no order; on a CPU as many at a time as torch has threads,
    each with one of its own.

    The first error ends it. In `work` no gradients are recorded, and tensors are made as the
    caller's are: ComfyUI runs nodes in inference mode, which each thread has of its own.
    """
    before = torch.get_num_threads()
    threads = min(before, len(items))
    if device.type != "cpu" or threads == 1:
        for item in items:
            work(item)
        return
    inference = torch.is_inference_mode_enabled()

    def in_the_callers_mode(item: int):
        with torch.inference_mode(inference), torch.no_grad():
            work(item)

    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in pool.map(in_the_callers_mode, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what threads that are started from here on have, too
