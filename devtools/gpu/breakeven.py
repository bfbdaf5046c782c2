"""Where one of two ways overtakes another: LoRAs beside the product or in the weight, exact or in
whole numbers."""
import devtools.measure  # noqa: F401  the host
from devtools.measure.bench.timing import device, has_bfloat16, side_by_side
from devtools.measure.weights import random_weight

import torch

from featherweight.ops.layers import int8, product
from featherweight.ops.layers.low_rank import LowRank, Slice, dense_linear

RANKS = (16, 64, 256)
TOKENS = (256, 1024, 2048, 4608)
INT8_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def bench_lora_ways(options):
    """A LoRA beside the product of one weight in Q4_K, as it is; and added to the dequantised
    weight in float32, rounded once."""
    rows, columns = options.sizes.weight
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    weight = random_weight("Q4_K", (rows, columns)).to(device())

    def in_the_weight(input: torch.Tensor, branch: LowRank) -> torch.Tensor:
        merged = product.dequantize(weight, torch.float32)
        branch.add_to(merged)
        return dense_linear(input, merged.to(dtype))

    for rank in RANKS[:1] if options.quick else RANKS:
        down, up = (torch.randn(shape, dtype=dtype, device=device())
                    for shape in ((rank, columns), (rows, rank)))
        branch = LowRank(down, (up,), (Slice(0, rows, 0, rank),))
        for tokens in TOKENS[:1] if options.quick else TOKENS:
            input = torch.randn(tokens, columns, dtype=dtype, device=device())
            yield f"{rows} x {columns}, rank {rank}, M = {tokens}", side_by_side(
                {
                    "no LoRA": lambda input=input: product.linear(input, weight), "beside": lambda
                    input=input, branch=branch: product.linear(input, weight, None, branch),
                    "in the weight": lambda input=input, branch=branch: in_the_weight(
                        input, branch)
                }, options.rounds)


def bench_int8_rows(options):
    """The exact product and that in whole numbers, by rows of the input; only the latter's first
    number of rows is a rule of ours, `MIN_TOKENS` in ops/layers/int8.py."""
    if not int8.multiplies_integers(device()):
        yield "int8", {"units for it": False}
        return
    least, without = (table[device().type]
                      for table in (int8.MIN_TOKENS, int8.MIN_TOKENS_WITHOUT_KERNEL))
    yield "int8", {"from rows on": f"{least}, {without} without a kernel"}
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    for name in options.formats:
        weight = random_weight(name, options.sizes.weight).to(device())
        for tokens in (count for count in (INT8_TOKENS[2:4] if options.quick else INT8_TOKENS)
                       if count >= least):
            input = torch.randn(tokens, options.sizes.weight[1], dtype=dtype, device=device())
            yield f"{name}, M = {tokens}", side_by_side({
                "exact": lambda input=input: product.linear(input, weight),
                "int8": lambda input=input: int8.linear(input, weight)}, options.rounds)
