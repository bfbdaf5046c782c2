"""Cases on one layer: dequantising its weight, the product with it, attention."""
import functools
import importlib.util
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import cast

from devtools.measure.random_models import LORA_CASES, flux_file, packs, randn, random_branch
from devtools.measure.timing import (
    copies,
    device,
    device_facts,
    fast_dtype,
    float_dtypes,
    queued,
    side_by_side,
)
from devtools.measure.weights import format_for, random_weight

import comfy.model_management
import gguf
import psutil
import torch

from devtools.files.tiny_models import flux_shapes
from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels import cpp_backend, private_files
from featherweight.ops.kernels.cpp_backend import CppCompiler, CpuKernels
from featherweight.ops.kernels.decider import Decider
from featherweight.ops.kernels.kernel import dtype_name
from featherweight.ops.layers import cpu_attention as attention
from featherweight.ops.layers import fast_by_kitchen, fast_on_cpu, joint_product, product
from featherweight.ops.tensor.packed_layout import is_packed, packed_tensors
from featherweight.ops.tensor.packed_tensor import PackedTensor

dense_linear = torch.nn.functional.linear

# heads, queries, keys, width of a head; Flux and Wan with fewer tokens and heads than in use
ATTENTION = {"SD 1.5": (8, 4096, 4096, 40), "SD 1.5, text": (8, 4096, 77, 40),
             "SDXL": (20, 1024, 1024, 64), "Flux": (8, 2304, 2304, 128),
             "Wan": (4, 6000, 6000, 128)}
FEW_ROWS = 16  # of input, for which a kernel may multiply without dequantising
QUICK_ATTENTION = {"small": (2, 64, 64, 40)}


def bench_import(options):
    """How long torch, ComfyUI and this pack take to be imported, the first time."""
    yield "imports", {"seconds": time.time() - psutil.Process().create_time()}


def bench_device(options):
    """The device: its name and what is installed; bytes that it copies and products that it makes a
    second."""
    place = device()
    facts = {name: str(value) for name, value in device_facts(place).items() if value}
    yield "device", facts | {"torch": torch.__version__, "driver": _driver()}
    size, side = (1 << 20, 256) if options.quick else (1 << 28, 8192)
    here, elsewhere = (torch.empty(size, dtype=torch.uint8, device=place) for _ in range(2))
    kept = torch.empty(size, dtype=torch.uint8, pin_memory=place.type == "cuda")
    mapped = torch.empty(size, dtype=torch.uint8)
    times = side_by_side({"pinned memory to it": lambda: here.copy_(kept, non_blocking=True),
                          "other memory to it": lambda: here.copy_(mapped),
                          "within it": lambda: elsewhere.copy_(here)}, options.rounds)
    yield "copying", {f"GB a second, {name}": size / 1e9 / taken["median"]
                      for name, taken in times.items()}
    for dtype in (torch.bfloat16, torch.float16):
        left = randn(side, side, dtype=dtype)
        taken = side_by_side({"product": functools.partial(torch.matmul, left, left)},
                             options.rounds)["product"]["median"]
        yield f"{side} squared, {dtype_name(dtype)}", {
            "TFLOP a second": 2 * side**3 / taken / 1e12}


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True).stdout.split() or ["unknown"])[0]


def bench_shapes(options):
    """The product with a packed weight against `F.linear` with a dense one, in bfloat16 and in
    float32, for each layer shape N x K and M rows of input. int8: with `compute` int8, for as many
    rows as it takes; on a GPU, dequantised: by torch's product, for few rows."""
    for shape in options.sizes.shapes:
        packed = {name: _copies(random_weight(name, shape)) for name in options.formats}
        for dtype in float_dtypes():
            dense = _copies(torch.randn(shape, dtype=dtype))
            for count in options.sizes.tokens:
                calls = functools.partial(_calls, randn(count, shape[1], dtype=dtype))
                variants = {"dense": calls(dense_linear, dense)}
                for name, weights in packed.items():
                    variants[name] = calls(product.linear, weights)
                    if _in_int8(count, dtype):
                        variants[f"{name} int8"] = calls(
                            functools.partial(product.linear, fast=True), weights)
                    if device().type == "cuda" and count <= FEW_ROWS:
                        variants[f"{name}, dequantised"] = calls(_dequantised_linear, weights)
                yield _title(shape, dtype, count), queued(variants, options.rounds)


def _copies(weight: torch.Tensor) -> list:
    """Returns a weight of the CPU on the device as often as one call after another shall not find
    it in a cache."""
    tensors = packed_tensors(weight) if is_packed(weight) else [weight]
    count = copies(sum(tensor.nbytes for tensor in tensors))
    return [weight.to(device()) for _ in range(count)]


def _calls(input: torch.Tensor, multiply: Callable, weights: Sequence[torch.Tensor],
           *others) -> list[Callable]:
    """Returns one call for each copy of a weight."""
    return [functools.partial(multiply, input, weight, *others) for weight in weights]


def _dequantised_linear(input: torch.Tensor, weight: PackedTensor) -> torch.Tensor:
    return product._by_torch(input, weight.params.format, packed_tensors(weight), len(weight),
                             None, None)


def _title(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> str:
    return f"{shape[0]} x {shape[1]}, {dtype_name(dtype)}, M = {tokens}"


def _in_int8(tokens: int, dtype: torch.dtype) -> bool:
    """Whether this many rows of input are multiplied in whole numbers, if there is a kernel."""
    least = (fast_on_cpu.MIN_TOKENS if device().type == "cpu"
             else fast_by_kitchen.PRODUCTS[fast_by_kitchen.INT8].least)
    return tokens >= least and not fast_by_kitchen.why_not_fast(device(), dtype)


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
            for name, command in commands.items() if command}
    with_kernels, without = kernels._deciders, {device(): Decider(device(), None)}
    shape = options.sizes.shapes[-1]

    def multiply(by, rows, weight):
        kernels._deciders, kernels._found = (with_kernels if by in made else without), {}
        vars(cpp_backend._kernels()).update(made.get(by, {}))
        return product.linear(rows, weight)

    for dtype in float_dtypes():
        dense = torch.randn(shape, dtype=dtype)
        for count in (options.sizes.tokens[0], options.sizes.tokens[-1]):
            rows = torch.randn(count, shape[1], dtype=dtype)
            variants = {"dense": functools.partial(dense_linear, rows, dense)}
            variants |= {f"{name}, {by}": functools.partial(multiply, by, rows, weight)
                         for name in options.formats for weight in [random_weight(name, shape)]
                         for by in (*made, "torch")}
            yield _title(shape, dtype, count), side_by_side(variants, options.rounds)
    kernels._deciders, kernels._found = with_kernels, {}


def bench_dequantize(options):
    """A whole weight to bfloat16 into one reused buffer: by the kernels of this machine and by
    torch in chunks; beside it a copy of the dense weight, and what the packages gguf (numpy) and
    bitsandbytes make of theirs."""
    dense = randn(*options.sizes.weight, dtype=torch.bfloat16)
    out, on_a_cpu = torch.empty_like(dense), device().type == "cpu"
    for name in options.formats:
        packed_format = format_for(name, dense.shape[1])
        copied = [packed_tensors(weight) for weight in _copies(random_weight(name, dense.shape))]
        variants: dict[str, list[Callable]] = {
            "copy_": [functools.partial(out.copy_, dense)],
            "kernels": [functools.partial(kernels.dequantize_into, packed_format, tensors, out)
                        for tensors in copied],
            "torch, chunks": [functools.partial(packed_format.dequantize_into, tensors, out)
                              for tensors in copied]}
        if packed_format.ggml_type is not None and on_a_cpu:
            variants["gguf (numpy)"] = [functools.partial(
                gguf.quants.dequantize, copied[0][0].numpy(), gguf.GGMLQuantizationType[name])]
        if name in ("NF4", "FP4") and importlib.util.find_spec("bitsandbytes") and on_a_cpu:
            from bitsandbytes import functional

            packed = functional.quantize_4bit(dense, blocksize=64, quant_type=name.lower())
            variants["bitsandbytes"] = [functools.partial(functional.dequantize_4bit, *packed)]
        yield name, queued(variants, options.rounds)


def bench_lora(options):
    """The product of one weight in Q4_K and a bias, in bfloat16 where the device has it: without
    LoRAs, with LoRAs as they run, beside it (on a GPU), and added to the dequantised weight in
    float32, rounded once."""
    rows, columns = options.sizes.weight
    dtype = fast_dtype()
    weights, bias = _copies(random_weight("Q4_K", (rows, columns))), randn(rows, dtype=dtype)

    def in_the_weight(input, weight, branch):
        merged = product.dequantize(weight, torch.float32)
        branch.add_to(merged)
        return dense_linear(input, merged.to(dtype), bias)

    def apart(input, weight, branch):
        is_off, joint_product.is_off = joint_product.is_off, lambda: True
        try:
            return product.linear(input, weight, bias, branch)
        finally:
            joint_product.is_off = is_off

    branches = {title: random_branch(rows, columns, count * rank, dtype)
                for title, (count, rank) in LORA_CASES.items()}
    for tokens in options.sizes.lora_tokens:
        calls = functools.partial(_calls, randn(tokens, columns, dtype=dtype))
        variants = {"no LoRA": calls(product.linear, weights, bias)}
        for title, branch in branches.items():
            variants[title] = calls(product.linear, weights, bias, branch)
            if device().type == "cuda":
                variants[f"{title}, apart"] = calls(apart, weights, branch)
            variants[f"{title}, in the weight"] = calls(in_the_weight, weights, branch)
        yield _title((rows, columns), dtype, tokens), queued(variants, options.rounds)


def bench_peer(options):
    """One layer of a model in each pack, for each GGUF format: dequantising its whole weight,
    Featherweight's into a reused buffer; and running it, with M = 1 row nearly all of the time
    going into dequantising. Takes --peer."""
    sizes = options.sizes
    for name in options.formats if options.peer else ():
        if FORMATS[name].ggml_type is None:
            continue
        with flux_file(flux_shapes(sizes.hidden, 1, 1, sizes.context), name) as path:
            models = {pack: load(path) for pack, load in packs(options.peer).items()}
            comfy.model_management.load_models_gpu(list(models.values()))
            layers = {pack: model.model.diffusion_model.double_blocks[0].img_mlp[2]
                      for pack, model in models.items()}
            yield from _layer_rows(f"{name}, {sizes.hidden} x {4 * sizes.hidden}", layers, options)


@torch.no_grad()
def _layer_rows(title: str, layers: dict[str, torch.nn.Module], options):
    """Yields rows of a layer of ours and one of a peer's."""
    ours, theirs = layers.values()
    weight, dequantize = cast(PackedTensor, ours.weight), cast(Callable, theirs.get_weight)
    packed = weight.params.format, packed_tensors(weight)
    for dtype in (torch.bfloat16, torch.float32):
        buffer = torch.empty(weight.shape, dtype=dtype, device=device())
        yield f"{title}, to {dtype_name(dtype)}", side_by_side({
            "Featherweight": functools.partial(kernels.dequantize_into, *packed, buffer),
            options.peer.name: functools.partial(dequantize, theirs.weight, dtype)
        }, options.rounds)
    for tokens in (1, options.sizes.model_tokens):
        rows = randn(tokens, weight.shape[1])
        yield f"{title}, M = {tokens}", side_by_side(
            {pack: functools.partial(layer, rows) for pack, layer in layers.items()},
            options.rounds)


def bench_attention(options):
    """Attention with the shapes of models' layers on a CPU: by the kernel, in one pass; in slices
    of the scores, as without the kernel in bfloat16; and by torch's
    `scaled_dot_product_attention`."""
    shapes = QUICK_ATTENTION if options.quick else ATTENTION
    for name, (heads, queries, keys, width) in shapes.items():
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
            yield f"{name}, {dtype_name(dtype)}", side_by_side(variants, options.rounds)
