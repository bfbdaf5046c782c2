"""Runs work on slices of a weight in parallel, each slice on one thread of the CPU.

Packing a slice takes about a hundred operations on a few hundred kilobytes. If torch splits each
operation over all threads, they wait for each other longer than they work; on a busy machine that
takes several times as long as one thread takes alone.
"""
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def parallel_slices(work: Callable[[int], None], items: Sequence[int], device: torch.device):
    """Calls `work` with every item, in any order, and raises its first error.

    On a CPU it uses as many threads as torch has, each limited to one of torch's. `work` records no
    gradients, and runs in the caller's inference mode, which ComfyUI sets for nodes and which every
    thread has its own of.

    Args:
        work: Called with one item.
        items: For example, the starts of slices.
        device: Where `work` computes.
    """
    torch_threads = torch.get_num_threads()
    threads = min(torch_threads, len(items))
    if device.type != "cpu" or threads == 1:
        for item in items:
            work(item)
        return
    inference = torch.is_inference_mode_enabled()

    def work_in_mode(item: int):
        with torch.inference_mode(inference), torch.no_grad():
            work(item)

    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in pool.map(work_in_mode, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)  # also the default of threads started later
