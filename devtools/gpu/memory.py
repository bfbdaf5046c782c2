"""A model larger than the memory it is left, on the real host and, in dynamic VRAM, the real
comfy-aimdo.

What each step gives is held to the bits of the same model with all of the device to itself. Memory
is what the driver says is used, of everything.
"""
import contextlib
import gc
import os

import comfy_aimdo.control

DYNAMIC = not {"--cpu", "--disable-dynamic-vram"} & set(
    os.environ.get("HOST_ARGUMENTS", "").split()
)
ON_FAKE_GPUS = "FAKEGPU" in os.environ  # where the tests' own process starts dynamic VRAM
if DYNAMIC and not ON_FAKE_GPUS:
    # before torch is asked for anything, as the host's main.py does
    comfy_aimdo.control.init(nvml_pressure=False)

# ruff: noqa: E402
import devtools.measure  # noqa: F401  the host
from devtools.measure.in_turn import peak, time_in_turn
from devtools.measure.random_models import (
    flux_file,
    lora_file,
    packed_model,
    random_weights,
    step_of,
)
from devtools.measure.timing import device, median_and_range

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch.utils.benchmark import timer

from devtools.files.tiny_models import flux_shapes
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.placement import place, placed_text
from featherweight.ops.patcher.residency_order import LayerProfile

BLOCKS, TOKENS = (4, 8), 1024
INTERVAL = 0.001  # seconds between two looks at the memory
PART = 0.6  # of the model's bytes that the device is left for weights


def walk(options):
    """Rows: whether the step's bits are those of the model alone on the device, its seconds, the
    most memory that was used."""
    if device().type != "cuda":
        yield "memory", {"measured": "on a CUDA device only"}
        return
    _start_dynamic()
    sizes, (double_blocks, single_blocks) = options.sizes, (1, 1) if options.quick else BLOCKS
    shapes = flux_shapes(sizes.hidden, double_blocks, single_blocks, sizes.context)
    with flux_file(shapes, "Q8_0") as path:
        yield from Walk(load_diffusion_model(path), packed_model(random_weights(shapes, "NF4")),
                        shapes, options).rows()


def _start_dynamic():
    """What else the host's main.py does."""
    if (
        DYNAMIC
        and not ON_FAKE_GPUS
        and comfy_aimdo.control.init_devices([(device().index or 0, 0)])
    ):
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


class Walk:
    def __init__(self, model, other, shapes: dict, options):
        self.options, self.model, self.other = options, model, other
        self.size = model.model_size()
        first, second = (lora_file(shapes, 16, seed) for seed in (0, 1))
        self.models = {
            "without LoRAs": model, "a LoRA": self.patched((first, 1.0)), "at 0.5": self.patched(
                (first, 0.5)), "two LoRAs": self.patched((first, 1.0), (second, -0.7))
        }
        self.expected, self.taken = {}, 0

    def patched(self, *loras):
        model = self.model
        for lora, strength in loras:
            model, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
        return model

    def rows(self):
        yield "sizes", {"model": self.size, "dynamic VRAM": comfy.memory_management.aimdo_enabled}
        torch.manual_seed(0)
        for name, model in [*self.models.items(), ("another model", self.other)]:
            self.expected[name], row = self.step(model)
            yield f"alone: {name}", row
        empty = self.unload()
        with self.less_memory():
            for name in ("without LoRAs", "a LoRA", "at 0.5", "another model", "two LoRAs",
                         "without LoRAs", "a LoRA"):
                yield f"room for {PART:.0%}: {name}", self.compared(
                    name, self.models.get(name, self.other))
            placed = place(self.models["two LoRAs"], 0.3 * self.size)
            row = self.compared("two LoRAs", placed)
            yield "a budget of 30 %: two LoRAs", {
                **row, "says": placed_text(placed).replace("\n", ", ")
            }
            yield "a budget of 30 %", self.by_order(placed)
        after = self.unload()
        yield "after unloading", {"more memory used than before": after - empty}

    def compared(self, name: str, model) -> dict:
        found, row = self.step(model)
        return {"same bits": bool(torch.equal(found, self.expected[name])), **row}

    def by_order(self, placed) -> dict:
        """A step whose layers that stay are chosen in plain order, and by its profile."""
        residency = placed.model.packed_residency
        profiled, times = residency.profile, {"plain": [], "profiled": []}
        for _ in range(self.options.rounds):
            for name, seconds in times.items():
                residency.profile = profiled if name == "profiled" else LayerProfile()
                seconds.append(self.step(placed)[1]["seconds"])
        return {name: median_and_range(seconds) for name, seconds in times.items()}

    def step(self, model) -> tuple[torch.Tensor, dict]:
        """What a step gives; its time, loading apart, and the most memory that was used."""
        torch.manual_seed(1)
        outputs = []
        run = step_of(model, min(TOKENS, self.options.sizes.model_tokens),
                      self.options.sizes.context)
        diffusion_model = model.model.diffusion_model
        handle = diffusion_model.register_forward_hook(
            lambda module, inputs, output: outputs.append(output.clone()))
        try:
            run.prepare()
            model.pre_run()
            run.prepare = lambda: None
            with peak(_used, INTERVAL) as most:
                (seconds,) = time_in_turn({"step": run}, 1, timer)["step"]
        finally:
            handle.remove()
            model.cleanup()
            comfy.model_management.reset_cast_buffers()
        return outputs[0].cpu(), {"seconds": seconds, "used": most() - self.taken}

    @contextlib.contextmanager
    def less_memory(self):
        """All but a part of the model's bytes, and what the host wants for activations, is
        taken."""
        wanted = int(PART * self.size + comfy.model_management.minimum_inference_memory())
        self.taken = max(0, torch.cuda.mem_get_info()[0] - wanted)
        taken = torch.empty(self.taken, dtype=torch.uint8, device=device())
        try:
            yield
        finally:
            del taken
            self.taken = 0

    def unload(self) -> int:
        """Bytes used when no model is loaded."""
        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache(True)
        return _used()


def _used() -> int:
    """Bytes of the device, whoever uses them."""
    free, total = torch.cuda.mem_get_info()
    return total - free
