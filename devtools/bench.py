"""python3 dev.py bench: speed and memory, side by side in one run.

Each case runs its variants in turn, round after round, so that a noisy machine disturbs all of them alike: read the
ratios, not the milliseconds.
"""
import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  the host and the pack, as in the tests
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from featherweight.loaders.container import open_weights  # noqa: E402
from featherweight.loaders.diffusion import load_diffusion_model  # noqa: E402
from featherweight.ops import product  # noqa: E402
from featherweight.ops.format import FORMATS  # noqa: E402
from featherweight.ops.tensor import packed_tensor  # noqa: E402

from devtools.gguf_files import block_pool, write_gguf, write_random_gguf  # noqa: E402
from devtools.tiny_models import flux, flux_shapes  # noqa: E402

SHAPE = (3072, 12288)
VOCABULARY = 262_144


def side_by_side(variants: dict, rounds: int) -> dict[str, dict]:
    """Seconds of each variant: median, least and most of `rounds` interleaved runs after one to warm up.

    A variant's attribute `prepare`, if it has one, is called before each run and not timed.
    """
    times = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, run in variants.items():
            if hasattr(run, "prepare"):
                run.prepare()
            started = time.perf_counter()
            run()
            if round_number:
                times[name].append(time.perf_counter() - started)
    return {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def show(title: str, result: dict[str, dict]):
    """One line per case: the first variant is what the others are compared with."""
    first = next(iter(result.values()))["median"]
    cells = [f"{name} {t['median'] * 1e3:8.1f} ms ({t['min'] * 1e3:.1f}-{t['max'] * 1e3:.1f}), x{t['median'] / first:.2f}"
             for name, t in result.items()]
    print(f"  {title:24s}" + " | ".join(cells), flush=True)


def random_weight(format_name: str):
    packed_format = FORMATS[format_name]
    pool = block_pool(format_name)
    picks = np.random.default_rng(0).integers(0, len(pool), SHAPE[0] * SHAPE[1] // packed_format.block_length)
    return packed_tensor(packed_format, torch.from_numpy(pool[picks]).view(packed_format.packed_shape(SHAPE)), SHAPE)


def bench_unpack(options) -> dict:
    """A whole weight to float32: in chunks into one reused buffer, all at once, and by gguf's numpy reference."""
    results = {}
    out = torch.empty(SHAPE)
    for name in options.formats:
        weight = random_weight(name)
        packed_format, blocks = FORMATS[name], weight._qdata.view(-1, FORMATS[name].block_bytes)
        results[name] = side_by_side({
            "chunks, reused buffer": lambda: packed_format.unpack_into([weight._qdata], out),
            "whole": lambda: packed_format.unpack(blocks),
            "gguf (numpy)": lambda: gguf.quants.dequantize(weight._qdata.numpy(), gguf.GGMLQuantizationType[name]),
        }, options.rounds)
        show(name, results[name])
    return results


def bench_nf4(options) -> dict:
    """An NF4 weight in blocks of 64 to bfloat16 into a reused buffer, beside copying it dense and bitsandbytes' own."""
    if not importlib.util.find_spec("bitsandbytes"):
        print("  bitsandbytes is not installed")
        return {}
    from bitsandbytes import functional

    dense, out = torch.randn(SHAPE, dtype=torch.bfloat16), torch.empty(SHAPE, dtype=torch.bfloat16)
    codes, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    result = side_by_side({
        "copy_": lambda: out.copy_(dense),
        "Featherweight": lambda: FORMATS["NF4"].unpack_into([codes, state.absmax], out),
        "bitsandbytes": lambda: functional.dequantize_4bit(codes, state),
    }, options.rounds)
    show("NF4", result)
    return result


def bench_linear(options) -> dict:
    """The product with a packed weight against `F.linear` with the same weight dense."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.randn(SHAPE, dtype=dtype)
        for tokens in (1, 64, 1024):
            rows = torch.randn(tokens, SHAPE[1], dtype=dtype)
            variants = {"dense": lambda: torch.nn.functional.linear(rows, dense)}
            for name in options.formats:
                variants[name] = lambda weight=random_weight(name): product.linear(rows, weight)
            title = f"{str(dtype).removeprefix('torch.')} M={tokens}"
            results[title] = side_by_side(variants, options.rounds)
            show(title, results[title])
    return results


def bench_header(options) -> dict:
    """Opening a text encoder file with a 262,144-token vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(str(path), "gemma3")
        writer.add_token_list([f"token{number}" for number in range(VOCABULARY)])
        writer.add_token_scores([0.0] * VOCABULARY)
        writer.add_token_types([1] * VOCABULARY)
        writer.add_token_merges([f"left{number} right{number}" for number in range(2 * VOCABULARY)])
        writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        result = side_by_side({"Featherweight": lambda: open_weights(path), "gguf package": lambda: gguf.GGUFReader(path)}, 1)
    show("open", result)
    return result


def bench_memory(options) -> dict:
    """Loading a 2 GB Q8_0 Flux of real layer sizes and running one step of it, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-q8_0.gguf"
        write_random_gguf(path, flux_shapes(hidden=3072, double_blocks=4, single_blocks=4, context=4096), "Q8_0")
        probe = subprocess.run([sys.executable, str(Path(__file__).with_name("memory_probe.py")), "model", str(path)],
                               capture_output=True, text=True, check=True)
    result = json.loads(probe.stdout.splitlines()[-1])
    for name, value in result.items():
        print(f"  {name:24s}{value:14.1f} s" if name.endswith("seconds") else f"  {name:24s}{value / 1e6:14.1f} MB")
    return result


def bench_lora_error(options) -> dict:
    """Error of a small quantised Flux against the unquantised one, without and with a LoRA on both (growth 1: none)."""
    tensors = flux()
    lora = lora_file({name: value.shape for name, value in tensors.items()}, 16, 0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"float32": dense_flux(tensors), "fp8 (ComfyUI)": dense_flux(tensors, torch.float8_e4m3fn)}
        for name in ("Q8_0", "Q5_0", "Q4_0"):
            path = Path(folder) / f"{name}.gguf"
            write_gguf(path, tensors, lambda key, values, name=name: name if values.ndim == 2 else "F32")
            models[name] = load_diffusion_model(str(path))
        patched = {name: comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0] for name, model in models.items()}
        pictures = {name: (prediction(models[name]), prediction(patched[name])) for name in models}
    exact = pictures.pop("float32")
    for name, found in pictures.items():
        without, with_lora = (((a - b).norm() / b.norm()).item() for a, b in zip(found, exact))
        results[name] = {"without": without, "with": with_lora, "growth": with_lora / without}
        print(f"  {name:24s}without {without:.4f} | with {with_lora:.4f} | growth {with_lora / without:.2f}", flush=True)
    return results


def dense_flux(tensors, dtype=torch.float32):
    weights = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})


def prediction(patcher) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latent, context = (torch.randn(shape, generator=generator) for shape in ((1, 16, 32, 32), (1, 32, 1024)))
    comfy.model_management.load_models_gpu([patcher])
    with torch.no_grad():
        return patcher.model.apply_model(latent, torch.tensor([0.5]), c_crossattn=context) - latent


def lora_file(shapes: dict[str, tuple], rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA in BFL's key names on every matrix of a model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{layer}.lora_up.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.01
            tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, shape[1], generator=generator) * 0.01
    return tensors


LORA_CASES = {"2 of rank 16": (2, 16), "4 of rank 32": (4, 32)}


def bench_lora(options) -> dict:
    """The product of 3072 x 12288 in Q4_K with 1024 tokens, with and without LoRAs on it."""
    weight, rows = random_weight("Q4_K"), torch.randn(1024, SHAPE[1])
    variants = {"no LoRA": lambda: product.linear(rows, weight)}
    for title, (count, rank) in LORA_CASES.items():
        down, up = torch.randn(count * rank, SHAPE[1]), torch.randn(SHAPE[0], count * rank)
        slices = [0, SHAPE[0], 0, count * rank]
        variants[title] = lambda down=down, up=up, slices=slices: product.linear(rows, weight, None, None, down, [up], slices)
    result = side_by_side(variants, options.rounds)
    show("Q4_K M=1024", result)
    return result


def bench_step(options) -> dict:
    """A step of a Flux of one double and one single block, real layer sizes, 256 tokens, Q4_K, with and without LoRAs."""
    shapes = flux_shapes(hidden=3072, double_blocks=1, single_blocks=1, context=4096)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-q4_k.gguf"
        write_random_gguf(path, shapes, "Q4_K")
        packs = {"Featherweight": load_diffusion_model}
        if options.peer:
            packs[options.peer.name] = peer_loader(options.peer)
        for pack, load in packs.items():
            models = {"no LoRA": load(str(path))}
            for title, (count, rank) in LORA_CASES.items():
                model = models["no LoRA"]
                for seed in range(count):
                    model, _ = comfy.sd.load_lora_for_models(model, None, lora_file(shapes, rank, seed), 1.0, 0.0)
                models[title] = model
            results[pack] = side_by_side({title: step_of(model) for title, model in models.items()}, options.rounds)
            show(pack, results[pack])
    return results


def step_of(patcher):
    """A function that runs one step at 256 tokens; what it runs first loads the model, which is not timed."""
    latent, time_step, context = torch.randn(1, 16, 32, 32), torch.tensor([0.5]), torch.randn(1, 8, 4096)

    def prepare():
        comfy.model_management.load_models_gpu([patcher])

    def run():
        with torch.no_grad():
            patcher.model.apply_model(latent, time_step, c_crossattn=context)

    run.prepare = prepare
    return run


def peer_loader(folder: Path):
    """The function behind `UnetLoaderGGUF` of another installed pack, loaded into this host."""
    import asyncio

    import folder_paths
    import nodes

    asyncio.run(nodes.load_custom_node(str(folder)))
    node = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]

    def load(path: str):
        folder_paths.add_model_folder_path("diffusion_models", str(Path(path).parent))
        return getattr(node(), node.FUNCTION)(unet_name=Path(path).name)[0]

    return load


CASES = {"unpack": bench_unpack, "nf4": bench_nf4, "linear": bench_linear, "lora": bench_lora, "step": bench_step,
         "lora_error": bench_lora_error, "header": bench_header, "memory": bench_memory}
if sys.platform != "linux":
    del CASES["memory"]


def main():
    parser = argparse.ArgumentParser(prog="python3 dev.py bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", type=Path, help="folder of another pack with the node UnetLoaderGGUF, to run a step on")
    parser.add_argument("--json", type=Path, default=ROOT / ".dev" / "bench.json", help="where to write the figures")
    options = parser.parse_args()
    scratch = product.shared_scratch()  # held, as the layers of a model hold it
    figures = {"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
               "torch": torch.__version__}
    print(f"{figures['machine']}, torch {torch.__version__}, weight {SHAPE[0]} x {SHAPE[1]}")
    for name in options.only:
        print(f"{name}: {CASES[name].__doc__}", flush=True)
        figures[name] = CASES[name](options)
    figures["scratch_bytes"] = scratch.nbytes
    options.json.write_text(json.dumps(figures, indent=1))
    print(f"Done: figures in {options.json}")


if __name__ == "__main__":
    main()
