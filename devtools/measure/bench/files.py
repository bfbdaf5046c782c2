"""Cases on files: opening them, loading them, what that takes in memory, and a whole Flux.1-dev."""
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from devtools.measure.bench.models import packs, step_of
from devtools.measure.bench.timing import device, has_bfloat16, side_by_side

import comfy.model_management
import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from devtools.files.gguf_files import gguf_writer, write_all, write_random_gguf
from devtools.files.tiny_models import flux_shapes
from featherweight.loaders.comfyui.weight_keys import to_comfy_keys
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.diffusion import build_model

PROBE = Path(__file__).resolve().parent.parent / "memory_probe.py"


def bench_header(options):
    """Opening a text encoder file with a 262,144-token vocabulary."""
    vocabulary = options.sizes.vocabulary
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = gguf_writer(path, "gemma3")
        writer.add_token_list([f"token{number}" for number in range(vocabulary)])
        writer.add_token_scores([0.0] * vocabulary)
        writer.add_token_types([1] * vocabulary)
        writer.add_token_merges([f"left{number} right{number}" for number in range(2 * vocabulary)])
        writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
        write_all(writer)
        variants = {
            "Featherweight": lambda: open_weights(path),
            "gguf package": lambda: gguf.GGUFReader(path)
        }
        yield "open", side_by_side(variants, 1)


def bench_load(options):
    """Loading a 2 GB Q8_0 Flux, and loading it and running its first step, at 16 tokens, against
    reading the whole file and a later step. The file is in the page cache, since it is read before
    everything else: no disk is timed."""
    sizes = options.sizes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-q8_0.gguf"
        write_random_gguf(path, flux_shapes(sizes.hidden, *sizes.file_blocks, sizes.context),
                          "Q8_0")
        for pack, load in packs(options.peer).items():
            def loaded():
                patcher = load(str(path))
                comfy.model_management.load_models_gpu([patcher])
                return patcher

            def first_step():
                step_of(loaded(), 16, sizes.context)()

            loaded.prepare = first_step.prepare = comfy.model_management.unload_all_models
            later_step = step_of(loaded(), 16, sizes.context)
            variants = {
                "read the file": lambda: read(path), "load": loaded, "load, first step": first_step,
                "later step": later_step
            }
            yield f"{pack}, {path.stat().st_size / 1e9:.1f} GB", side_by_side(
                variants, options.rounds)


def read(path: Path):
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def probed(kind: str, path: Path) -> dict:
    """What the memory probe measures with a file, in a process of its own."""
    probe = subprocess.run(
        [sys.executable, str(PROBE), kind, str(path)], capture_output=True, text=True)
    if probe.returncode:
        raise RuntimeError(f"The memory probe failed with {path.name}:\n{probe.stderr[-2000:]}")
    return json.loads(probe.stdout.splitlines()[-1])


def bench_memory(options):
    """Loading a 2 GB Q8_0 Flux of real layer sizes and running one step of it, in a process of its
    own."""
    sizes = options.sizes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-q8_0.gguf"
        write_random_gguf(path, flux_shapes(sizes.hidden, *sizes.file_blocks, sizes.context),
                          "Q8_0")
        yield "Q8_0", probed("model", path)


def bench_train(options):
    """Training a LoRA with ComfyUI's node on a Flux of real layer sizes, dense and in each format,
    each in a process of its own: bytes of the model, growth of the process, seconds that one thread
    spends on a step. The dense model and the first format train in the node's bypass mode too."""
    sizes = options.sizes
    shapes = flux_shapes(sizes.hidden, *(options.blocks or sizes.model_blocks), sizes.context)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "flux.safetensors"
        save_file({name: torch.randn(shape, dtype=torch.bfloat16) / math.sqrt(shape[-1])
                   for name, shape in shapes.items()}, dense)
        for name in ("dense", *options.formats):
            yield name, probed(f"training-{name}", dense)
        for name in ("dense", options.formats[0]):
            yield f"{name}, bypass mode", probed(f"bypass-{name}", dense)


def bench_scale(options):
    """A whole Flux.1-dev in Q4_K, 19 + 38 blocks, 6.7 GB: memory, in a process of its own, for a
    picture of 512 x 512 with 512 tokens of text; seconds of a step for more tokens and for more
    blocks, on a CPU those of one thread spent computing."""
    sizes = options.sizes
    tokens = [sizes.scale_tokens * times for times in (1, 2, 4)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-dev-q4_k.gguf"
        write_random_gguf(path, flux_dev(sizes), "Q4_K")
        if sys.platform == "linux":
            yield "memory", probed("picture", path)
        clock, threads = time.perf_counter, torch.get_num_threads()
        if device().type == "cpu":
            # the steps are too long for a median of many, and other processes would count
            clock = time.process_time
            torch.set_num_threads(1)
        rounds = min(options.rounds, 2)
        models = {share: share_of_model(path, share) for share in (1, 1 / 2, 1 / 4)}
        steps = {
            f"{count} tokens": step_of(models[1 / 4], count, sizes.context) for count in tokens
        }
        yield "1/4 of the blocks", side_by_side(steps, rounds, clock)
        blocks = {"1/4 of the blocks": 1 / 4, "1/2": 1 / 2, "all": 1}
        steps = {
            name: step_of(models[share], tokens[0], sizes.context)
            for name, share in blocks.items()
        }
        yield f"{tokens[0]} tokens", side_by_side(steps, rounds, clock)
        torch.set_num_threads(threads)


def flux_dev(sizes) -> dict[str, tuple]:
    """Shapes of a Flux.1-dev: with guidance and with pooled text."""
    return flux_shapes(sizes.hidden, *sizes.scale_blocks, sizes.context, guidance=True,
                       pooled_text=True)


def share_of_model(path: Path, share: float):
    """The model in a Flux file, with the first `share` of its blocks of both kinds."""
    file = open_weights(path)
    kept, counts = to_comfy_keys(file.state_dict()), {}
    found = {name: re.match(r"(\w+_blocks)\.(\d+)\.", name) for name in kept}
    for block in filter(None, found.values()):
        counts[block[1]] = max(counts.get(block[1], 0), int(block[2]) + 1)
    kept = {name: tensor for name, tensor in kept.items()
            if not found[name] or int(found[name][2]) < round(share * counts[found[name][1]])}
    patcher = build_model(file, kept)
    if has_bfloat16():
        patcher.set_model_compute_dtype(torch.bfloat16)
    return patcher
