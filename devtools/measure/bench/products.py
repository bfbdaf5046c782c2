"""Cases on one weight: dequantising it, and the product with it."""
import functools
import importlib.util

from devtools.measure.bench.timing import device, has_bfloat16, side_by_side
from devtools.measure.weights import format_for, random_weight

import gguf
import torch

from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels import cpp_backend, private_files
from featherweight.ops.kernels.cpp_backend import CppCompiler, CpuKernels
from featherweight.ops.kernels.selector import Selector
from featherweight.ops.layers import int8, product
from featherweight.ops.layers.low_rank import LowRank, Slice
from featherweight.ops.tensor.packed_layout import packed_tensors

LORA_CASES = {"2 of rank 16": (2, 16), "4 of rank 32": (4, 32)}


def bench_shapes(options):
    """The product with a packed weight against `F.linear` with a dense one, in bfloat16 and in
    float32, for each layer shape N x K and M rows of input. int8: with `compute` int8, for as many
    rows as it takes."""
    dtypes = [torch.bfloat16, torch.float32] if has_bfloat16() else [torch.float32]
    for shape in options.sizes.shapes:
        dense = {dtype: torch.randn(shape, dtype=dtype, device=device()) for dtype in dtypes}
        packed = {name: random_weight(name, shape).to(device()) for name in options.formats}
        for count in options.sizes.tokens:
            variants = {}
            for dtype in dtypes:
                rows = torch.randn(count, shape[1], dtype=dtype, device=device())
                variants[dtype,
                         "dense"] = lambda rows=rows, dtype=dtype: torch.nn.functional.linear(
                             rows, dense[dtype])
                for name, weight in packed.items():
                    variants[dtype,
                             name] = lambda rows=rows, weight=weight: product.linear(rows, weight)
                    if in_int8(count):
                        variants[dtype,
                                 f"{name} int8"] = lambda rows=rows, weight=weight: int8.linear(
                                     rows, weight)
            times = side_by_side(variants, options.rounds)
            for dtype in dtypes:
                row = {name: taken for (of, name), taken in times.items() if of == dtype}
                yield (
                    f"{shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}, M = {count}",
                    row,
                )


def bench_compilers(options):
    """The product with a packed weight, by the kernels of this machine's C++ compiler, by those of
    the package ziglang and by torch, against `F.linear` with a dense one, in bfloat16 and in
    float32."""
    commands = {"compiler": cpp_backend.cpp_compiler(), "ziglang": cpp_backend.zig()}
    if None in commands.values():
        print(f"  needs {' and '.join(commands)}")
        return
    folder = private_files.cache_folder() / "kernels"
    made = {name: vars(CpuKernels(CppCompiler(command, folder)))
            for name, command in commands.items()}
    with_kernels, without = kernels._selectors, {device(): Selector(device(), None)}
    shape = options.sizes.shapes[-1]

    def multiply(by, rows, weight):
        kernels._selectors = with_kernels if by in made else without
        vars(cpp_backend._kernels()).update(made.get(by, {}))
        return product.linear(rows, weight)

    for dtype in [torch.bfloat16, torch.float32] if has_bfloat16() else [torch.float32]:
        dense = torch.randn(shape, dtype=dtype)
        for count in (options.sizes.tokens[0], options.sizes.tokens[-1]):
            rows = torch.randn(count, shape[1], dtype=dtype)
            variants = {"dense": lambda: torch.nn.functional.linear(rows, dense)}
            variants |= {f"{name}, {by}": functools.partial(multiply, by, rows, weight)
                         for name in options.formats for weight in [random_weight(name, shape)]
                         for by in (*made, "torch")}
            yield (f"{shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}, M = {count}",
                   side_by_side(variants, options.rounds))
    kernels._selectors = with_kernels


def in_int8(tokens: int) -> bool:
    """Whether this many rows of input are multiplied in whole numbers, if there is a kernel."""
    return int8.multiplies_integers(device()) and tokens >= int8.MIN_TOKENS[device().type]


def bench_dequantize(options):
    """A whole weight to float32: by the kernels of this machine and by torch in chunks, both into
    one reused buffer; by torch all at once; by gguf's numpy reference."""
    shape = options.sizes.weight
    out = torch.empty(shape, device=device())
    for name in options.formats:
        packed_format = format_for(name, shape[1])
        tensors = packed_tensors(random_weight(name, shape).to(device()))
        count = out.numel() // packed_format.block_length
        variants = {
            "kernels": lambda: kernels.dequantize_into(packed_format, tensors, out),
            "torch, chunks": lambda: packed_format.dequantize_into(tensors, out),
            "torch, whole": lambda: packed_format.dequantize(*packed_format.blocks(
                tensors, 0, count))
        }
        if packed_format.ggml_type is not None and device().type == "cpu":
            variants["gguf (numpy)"] = lambda: gguf.quants.dequantize(
                tensors[0].numpy(), gguf.GGMLQuantizationType[name])
        yield name, side_by_side(variants, options.rounds)


def bench_nf4(options):
    """An NF4 weight in blocks of 64 to bfloat16 into a reused buffer, by the kernels of this
    machine and by torch, beside copying it dense and bitsandbytes' own."""
    if not importlib.util.find_spec("bitsandbytes"):
        print("  bitsandbytes is not installed")
        return
    from bitsandbytes import functional

    dense = torch.randn(options.sizes.weight, dtype=torch.bfloat16)
    out = torch.empty_like(dense)
    codes, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    yield "NF4", side_by_side({
        "copy_": lambda: out.copy_(dense),
        "kernels": lambda: kernels.dequantize_into(FORMATS["NF4"], [codes, state.absmax], out),
        "torch, chunks": lambda: FORMATS["NF4"].dequantize_into([codes, state.absmax], out),
        "bitsandbytes": lambda: functional.dequantize_4bit(codes, state),
    }, options.rounds)


def bench_lora(options):
    """The product of one weight in Q4_K and a bias, without LoRAs and with LoRAs on it, in bfloat16
    where the device has it."""
    rows, columns = options.sizes.weight
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    weight = random_weight("Q4_K", (rows, columns)).to(device())
    bias = torch.randn(rows, dtype=dtype, device=device())
    for tokens in options.sizes.lora_tokens:
        input = torch.randn(tokens, columns, dtype=dtype, device=device())
        variants = {"no LoRA": lambda input=input: product.linear(input, weight, bias)}
        for title, (count, rank) in LORA_CASES.items():
            ranks = count * rank
            down, up = (torch.randn(shape, dtype=dtype, device=device())
                        for shape in ((ranks, columns), (rows, ranks)))
            branch = LowRank(down, (up,), (Slice(0, rows, 0, ranks),))
            variants[title] = lambda input=input, branch=branch: product.linear(
                input, weight, bias, branch)
        yield (
            f"{rows} x {columns}, {str(dtype).removeprefix('torch.')}, M = {tokens}",
            side_by_side(variants, options.rounds),
        )
