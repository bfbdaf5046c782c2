"""The case of attention on a CPU: in one pass, in slices, and torch's."""
import functools

from devtools.measure.bench.timing import device, side_by_side

import torch

from featherweight.ops import kernels
from featherweight.ops.cpu import attention

# heads, queries, keys, width of a head; Flux and Wan with fewer tokens and heads than in use
SHAPES = {"SD 1.5": (8, 4096, 4096, 40), "SD 1.5, text": (8, 4096, 77, 40),
          "SDXL": (20, 1024, 1024, 64), "Flux": (8, 2304, 2304, 128), "Wan": (4, 6000, 6000, 128)}
QUICK_SHAPES = {"small": (2, 64, 64, 40)}


def bench_attention(options):
    """Attention with the shapes of models' layers on a CPU: by the kernel, in one pass; in slices
    of the scores, as without the kernel in bfloat16; and by torch's
    `scaled_dot_product_attention`."""
    if device().type != "cpu":
        print("  the device is no CPU")
        return
    for name, (heads, queries, keys, width) in (QUICK_SHAPES if options.quick else SHAPES).items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            operands = [torch.randn(1, count, heads, width).to(dtype).transpose(1, 2)
                        for count in (queries, keys, keys)]
            scale = width**-0.5
            variants = {"torch": functools.partial(
                torch.nn.functional.scaled_dot_product_attention, *operands, scale=scale)}
            if dtype == torch.bfloat16:
                variants["in slices"] = functools.partial(attention.attention_in_slices, *operands,
                                                          scale)
            run = kernels.find("attention", device(), None, dtype)
            if run is not None:
                variants["in one pass"] = functools.partial(
                    attention.attention_in_one_pass, *operands, scale, run, None)
            yield f"{name}, {str(dtype).removeprefix('torch.')}", side_by_side(variants,
                                                                               options.rounds)
