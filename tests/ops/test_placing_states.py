"""Whatever happens to a model or a text encoder with a budget, in whatever order: each step gives the bits of the model as it
lies wholly on the device, with the LoRAs it was loaded with, and no more lies there than the budget says and the host counts.
"""
import gc
import random

import comfy.model_management
import pytest
import torch
from featherweight.loaders.placing import place, place_clip
from featherweight.ops.patcher.placing import PAGE
from gpu_memory import larger_flux, lies_on, of_no_layer, step
from patched_models import flux_file, lora_for, packed_flux, packed_layers, patched
from small_encoders import encode, lora_for_t5, patched_clip, small_t5

GIB = 1 << 30
TENSORS = 512 * 200  # bytes by which used memory is rounded up, of so many tensors
ROOM = 300 << 20  # beside the weights: for activations, and for the buffers that layers travel through
STATIC, DYNAMIC = pytest.mark.fake_gpus(), pytest.mark.fake_gpus(dynamic=True)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, one_thread):
    import fakegpu

    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: ROOM)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 1)
    yield fakegpu
    fakegpu.set_capacity(4 * GIB)
    comfy.model_management.unload_all_models()
    gc.collect()


class Machine:
    """A packed model with a budget in the hands of the host, and the operations of the walk."""

    def __init__(self, model, values: dict, seed: int, gpu):
        self.packed, self.gpu, self.random = getattr(model, "patcher", model), gpu, random.Random(seed)
        self.size, self.count = self.packed.model_size(), len(packed_layers(self.packed))
        first, second = self.lora_for(values, seed=1), self.lora_for(values, "lokr", seed=2)
        self.models = {name: self.patched(model, *stack) for name, stack in {
            "none": [], "lora": [(first, 1.0)], "weaker": [(first, 0.4)], "two": [(first, 0.5), (second, -0.7)]}.items()}
        self.expected = {name: self.run(model) for name, model in self.models.items()}
        assert not torch.equal(self.expected["lora"], self.expected["weaker"])
        self.other = packed_flux("Q4_K", 1)
        self.other_expected = Machine.run(self, self.other)
        comfy.model_management.unload_all_models()
        comfy.model_management.reset_cast_buffers()
        self.empty = gpu.used()
        self.operations = {self.step: 4, self.change_lora: 4, self.change_budget: 4, self.other_model: 2, self.cancel: 2,
                           self.out_of_memory: 1, self.unload_all: 1, self.clone: 1, self.free: 3, self.forget: 1}
        self.name, self.budget, self.done = "lora", 0.5 * self.size, []
        self.load()

    lora_for, patched = staticmethod(lora_for), staticmethod(patched)

    def run(self, model) -> torch.Tensor:
        comfy.model_management.load_models_gpu([model])
        return step(model)

    def run_current(self) -> torch.Tensor:
        return step(self.current)

    def place(self):
        self.current = place(self.models[self.name], self.budget)

    def clone_current(self):
        self.current = self.current.clone()

    # --- operations ---

    def load(self):
        """The run ends, and one begins."""
        if hasattr(self, "current"):
            self.current.cleanup()
        self.place()
        comfy.model_management.load_models_gpu([self.current])
        self.current.pre_run()

    def step(self):
        assert (self.run_current() - self.expected[self.name]).abs().max() == 0

    def change_lora(self):
        self.name = self.random.choice(list(self.models))
        self.load()
        self.step()

    def change_budget(self):
        self.budget = self.random.choice((0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.5)) * self.size
        self.load()
        self.step()

    def other_model(self):
        other = self.random.choice((self.other, place(self.other, 0.5 * self.other.model_size())))
        assert torch.equal(Machine.run(self, other), self.other_expected)
        self.step()

    def cancel(self):
        """The user cancels in the midst of a step."""
        def cancelled(*args):
            raise comfy.model_management.InterruptProcessingException

        hook = self.random.choice(packed_layers(self.current)).register_forward_pre_hook(cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            self.run_current()
        hook.remove()
        self.end()
        self.load()
        self.step()

    def end(self):
        """What the host does at the end of a prompt."""
        self.current.cleanup()
        comfy.model_management.reset_cast_buffers()

    def out_of_memory(self):
        """Something else takes the device, and the host gives up."""
        self.gpu.set_capacity(1000)
        with pytest.raises((torch.OutOfMemoryError, RuntimeError)):  # the second from dynamic VRAM
            self.run_current()
        self.end()
        comfy.model_management.unload_all_models()
        self.gpu.set_capacity(4 * GIB)
        self.load()
        self.step()

    def unload_all(self):
        self.end()
        comfy.model_management.unload_all_models()
        gc.collect()
        assert not self.packed.model.packed_patches.layers and not any(layer.lora for layer in packed_layers(self.packed))
        assert self.gpu.used() <= self.empty + TENSORS
        self.load()
        self.step()

    def clone(self):
        self.current.cleanup()
        self.clone_current()
        assert self.current.placement.gpu_bytes == int(self.budget)
        comfy.model_management.load_models_gpu([self.current])
        self.current.pre_run()
        self.step()

    def free(self):
        """Another program wants memory in the midst of a run."""
        wanted = self.random.choice((0.1, 0.5, 1, 3)) * self.size
        comfy.model_management.free_memory(comfy.model_management.get_free_memory(self.current.load_device) + wanted,
                                           self.current.load_device)
        self.step()

    def forget(self):
        self.end()
        del self.current
        gc.collect()
        self.load()
        self.step()

    # --- the walk ---

    def walk(self, operations: int):
        chosen = self.random.choices(list(self.operations), list(self.operations.values()), k=operations)
        for index, operation in enumerate(chosen):
            self.done.append(f"{index} {operation.__name__} ({self.name}, {self.budget / self.size:.1f})")
            try:
                operation()
                self.check()
            except Exception as error:
                raise AssertionError(f"{error!r} after {self.done[-8:]}") from error
        self.unload_all()

    def check(self):
        current, applied = self.current, self.current.model.packed_patches
        assert len(packed_layers(self.packed)) == self.count
        beside = applied.nbytes + of_no_layer(current)
        limit = max(self.budget, beside)
        if current.is_dynamic():
            assert current._vbar_get().loaded_size() <= max(0, self.budget - beside + PAGE) // PAGE * PAGE
            assert current.loaded_size() <= limit + SMALL_WEIGHTS
        else:
            assert lies_on(current.model) <= limit
            assert applied.evicted or lies_on(current.model) == current.loaded_size()
        buffers = 3 * PAGE if current.is_dynamic() else comfy.model_management.NUM_STREAMS * max(
            entry[-4] for model in (current, self.other) for entry in model._load_list())
        others = self.other.loaded_size() if self.other.is_dynamic() else lies_on(self.other.model)
        here = current.loaded_size() if current.is_dynamic() else lies_on(current.model)
        assert self.gpu.used() <= self.empty + here + others + buffers + TENSORS


class EncoderMachine(Machine):
    """A text encoder, which the host loads for every prompt. The other model is the diffusion model that follows it."""

    lora_for, patched, run = map(staticmethod, (lora_for_t5, patched_clip, encode))

    def run_current(self):
        return self.run(self.clip)

    def place(self):
        self.clip = place_clip(self.models[self.name], self.budget)
        self.current = self.clip.patcher

    def clone_current(self):
        self.clip = self.clip.clone()
        self.current = self.clip.patcher


def encoder_machine(format_name: str, layers: int, seed: int, gpu) -> EncoderMachine:
    return EncoderMachine(*small_t5(format_name, layers), seed, gpu)


SMALL_WEIGHTS = 1 << 20  # of up to 16 KiB each, which the host keeps on the device in dynamic VRAM


@STATIC
@pytest.mark.parametrize("format_name", ["Q8_0"])
def test_a_budget_holds_whatever_happens(format_name, gpu):
    Machine(packed_flux(format_name), flux_file(format_name)[1], 0, gpu).walk(30)


@DYNAMIC
def test_a_budget_holds_in_dynamic_vram_whatever_happens(gpu):
    with larger_flux("Q8_0") as (packed, values):
        Machine(packed, values, 0, gpu).walk(12)


@STATIC
def test_a_budget_of_a_text_encoder_holds_whatever_happens(gpu):
    encoder_machine("Q8_0", 4, 0, gpu).walk(30)


@DYNAMIC
def test_a_budget_of_a_text_encoder_holds_in_dynamic_vram_whatever_happens(gpu):
    encoder_machine("Q8_0", 10, 0, gpu).walk(8)


@STATIC
@pytest.mark.heavy
@pytest.mark.parametrize("format_name", ["Q8_0", "Q4_K"])
def test_a_budget_of_a_text_encoder_holds_on_longer_walks(format_name, gpu):
    encoder_machine(format_name, 4, 1, gpu).walk(200)


@DYNAMIC
@pytest.mark.heavy
@pytest.mark.parametrize("format_name", ["Q8_0", "Q4_0"])
def test_a_budget_of_a_text_encoder_holds_in_dynamic_vram_on_longer_walks(format_name, gpu):
    encoder_machine(format_name, 10, 1, gpu).walk(200)


@STATIC
@pytest.mark.heavy
@pytest.mark.parametrize("format_name", ["Q8_0", "Q4_K", "INT8", "float8_e4m3fn"])
def test_a_budget_holds_on_longer_walks(format_name, gpu):
    Machine(packed_flux(format_name), flux_file(format_name)[1], 1, gpu).walk(200)


@DYNAMIC
@pytest.mark.heavy
@pytest.mark.parametrize("format_name", ["Q8_0", "Q4_0"])
def test_a_budget_holds_in_dynamic_vram_on_longer_walks(format_name, gpu):
    with larger_flux(format_name) as (packed, values):
        Machine(packed, values, 1, gpu).walk(200)
