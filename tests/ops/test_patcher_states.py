"""Whatever the host does to a patched model, in whatever order, each step has the LoRAs it was loaded with.

A random walk over what the host can do: it loads wholly and in part, frees memory in the midst of a run, evicts the model for
another one, switches between clones. Each step is compared with the host's own dense model of the same patches.
"""
import random

import comfy.hooks
import comfy.model_management
import fake_gpus
import pytest
import torch
from patched_models import (
    LIMIT, dense_flux, error_by_effect, flux_file, forget_models, forward, lora_for, packed_flux, packed_layers, parts,
    patched, run,
)

if fake_gpus.ON_FAKE_GPUS:
    import fakegpu

LOAD, OFFLOAD = torch.device("cuda:0" if fake_gpus.ON_FAKE_GPUS else "cpu:0"), torch.device("cpu")  # cpu:0 is not "the CPU"
GAIN = 1e-3  # how far from 1 the realised strength of the LoRAs may be
WALKS = {"Q8_0": 300, "Q4_K": 40, "INT8": 40, "float8_e4m3fn": 40}  # in which format -> how many operations
ON_GPUS = {("Q8_0", False): 40, ("Q4_K", True): 60, ("INT8", True): 20, ("float8_e4m3fn", True): 20}  # ..., in dynamic VRAM ->


def on_gpus(walks: dict):
    """The walks as parameters of a test that runs on fake GPUs."""
    return [pytest.param(*walk, operations, marks=pytest.mark.fake_gpus(dynamic=walk[1])) for walk, operations in walks.items()]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget_models()


def with_dense_keys(lora: dict, values: dict) -> dict:
    """`lora` and changes of the norms and biases, which the host patches by itself."""
    for seed, (name, value) in enumerate(values.items()):
        if value.ndim == 1:
            layer, _, param = name.replace(".scale", ".weight").rpartition(".")  # as the host names norms
            generator = torch.Generator().manual_seed(seed)
            change = torch.randn(value.shape, generator=generator) * 0.1
            lora[f"diffusion_model.{layer}.{'diff_b' if param == 'bias' else 'diff'}"] = change
    return lora


def stacks_for(values: dict) -> dict[str, list]:
    first, dora = lora_for(values, seed=1), lora_for(values, "dora", seed=2)
    lokr, loha = lora_for(values, "lokr", seed=3), lora_for(values, "loha", seed=4)
    dense_keys = with_dense_keys(lora_for(values, seed=5), values)
    return {"none": [], "lora": [(first, 1.0)], "weaker": [(first, 0.3)], "dora": [(dora, 0.8)], "lokr": [(lokr, 0.7)],
            "dense keys": [(dense_keys, 0.8)], "oft and lora": [(lora_for(values, "oft", seed=6), 0.5), (first, 0.5)],
            "three": [(loha, 0.5), (first, -0.4), (dense_keys, 0.5)]}


class Device:
    """Memory of the simulated device, as the host sees it: `total` bytes less what loaded models take."""

    total = 1e9

    def free(self, device=None, torch_free_too=False):
        free = self.total - sum(loaded.model_loaded_memory() for loaded in comfy.model_management.current_loaded_models
                                if loaded.model is not None and loaded.device == LOAD)
        return (free, 0) if torch_free_too else free


class GPU(Device):
    """A fake GPU, whose capacity follows `total`, with room beside the weights for activations and for buffers, 32 MiB each."""

    room = 192 << 20

    def __setattr__(self, name, value):
        fakegpu.set_capacity(value + self.room)

    def free(self, device=None):
        return comfy.model_management.get_free_memory(LOAD) - self.room


@pytest.fixture
def device(monkeypatch):
    if fake_gpus.ON_FAKE_GPUS:
        monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: GPU.room)
        monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 1)
        yield GPU()
        fakegpu.set_capacity(4 << 30)
        return
    device = Device()
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == OFFLOAD)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", device.free)
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 1)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 1)
    yield device


def on_the_device(patcher):
    patcher = patcher.clone()
    patcher.load_device, patcher.offload_device = LOAD, OFFLOAD
    return patcher


class Machine:
    """A packed model in the hands of the host, and the operations of the walk."""

    def __init__(self, format_name: str, is_dynamic: bool, seed: int, device: Device):
        self.random = random.Random(f"{format_name} {is_dynamic} {seed}")
        self.device, self.is_dynamic = device, is_dynamic
        values = flux_file(format_name)[1]
        self.dense, self.stacks = dense_flux(format_name), stacks_for(values)
        packed = packed_flux(format_name)
        names = {f"{name.removeprefix('diffusion_model.')}.weight" for name, layer in packed.model.named_modules()
                 if layer in packed_layers(packed)}  # of others the host mixes the order of hooks and LoRAs, where offloaded
        self.hook_lora, self.hooks = lora_for({name: values[name] for name in names}, "dora", seed=7), None
        self.packed = packed if is_dynamic else on_the_device(packed)
        self.count, self.size = len(packed_layers(packed)), packed.model_size()
        other = lora_for(flux_file("Q4_K", 1)[1])
        self.other = on_the_device(patched(packed_flux("Q4_K", 1), (other, 0.7)))
        self.other_expected = run(patched(dense_flux("Q4_K", 1), (other, 0.7)))
        self.clones, self.references, self.done = {}, {}, []
        self.without = self.reference("none", None)
        self.operations = {self.step: 8, self.switch: 3, self.switch_to_a_clone: 1, self.pressure: 3, self.other_model: 2,
            self.other_budget: 2, self.unload_in_part: 2, self.load_again: 1, self.unload_all_in_the_run: 1,
            self.end_and_unload: 1, (self.restore_backups if is_dynamic else self.change_hooks): 2}
        self.switch()

    def reference(self, name: str, hook_strength: float | None) -> torch.Tensor:
        if (name, hook_strength) not in self.references:
            patcher = patched(self.dense, *self.stacks[name]).clone()
            hooks = self.hooked(patcher, hook_strength)
            comfy.model_management.load_models_gpu([patcher])
            patcher.apply_hooks(hooks)
            self.references[name, hook_strength] = forward(patcher)
            patcher.clean_hooks()
        return self.references[name, hook_strength]

    def hooked(self, patcher, strength: float | None) -> comfy.hooks.HookGroup | None:
        """A hook of this strength, registered with the patcher as the sampler does before it loads."""
        if strength is None:
            return None
        hooks = comfy.hooks.create_hook_lora(self.hook_lora, strength, 0.0)
        patcher.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
        return hooks

    # --- operations ---

    def step(self):
        self.current.apply_hooks(self.hooks)
        actual, expected = forward(self.current), self.reference(self.name, self.hook_strength)
        if self.name == "none" and self.hooks is None:
            assert (actual - expected).norm() < 1e-5 * expected.norm()
            return
        assert error_by_effect(actual, expected, self.without) < LIMIT
        effect = expected - self.without
        assert abs(((actual - self.without) * effect).sum() / effect.square().sum() - 1) < GAIN

    def switch(self, name: str | None = None):
        """The run ends, and one with other LoRAs begins."""
        if hasattr(self, "current"):
            self.current.cleanup()
        self.name = name or self.random.choice(list(self.stacks))
        if self.name not in self.clones:
            self.clones[self.name] = patched(self.packed, *self.stacks[self.name]).clone()
        self.hook_strength = None if self.is_dynamic or self.random.random() < 0.6 else self.random.choice((0.5, 0.9))
        self.current = self.clones[self.name].clone()
        self.hooks = self.hooked(self.current, self.hook_strength)
        self.load_again()
        self.current.pre_run()
        self.step()

    def switch_to_a_clone(self):
        self.clones[self.name] = self.clones[self.name].clone()
        self.switch(self.name)

    def change_hooks(self):
        self.current.set_hook_mode(self.random.choice(list(comfy.hooks.EnumHookMode)))
        self.hook_strength = None if self.hook_strength else self.random.choice((0.5, 0.9))
        self.hooks = self.hooked(self.current, self.hook_strength)
        self.load_again()
        self.step()

    def load_again(self):
        comfy.model_management.load_models_gpu([self.current])

    def other_budget(self):
        self.device.total = self.random.choice((0.02, 0.2, 0.5, 0.8, 1.2, 3)) * self.size
        self.load_again()

    def pressure(self):
        needed = self.random.choice((0.01, 0.1, 0.4, 0.9, 2)) * self.size
        comfy.model_management.free_memory(self.device.free() + needed, LOAD)
        self.step()

    def other_model(self):
        comfy.model_management.load_models_gpu([self.other])
        self.step()
        assert (forward(self.other) - self.other_expected).norm() < 1e-5 * self.other_expected.norm()

    def unload_in_part(self):
        self.current.partially_unload(OFFLOAD, self.random.random() * self.size)
        self.step()

    def restore_backups(self):
        loaded = self.current.loaded_size()
        freed = self.current.restore_loaded_backups()
        assert self.current.loaded_size() == loaded - freed
        self.step()

    def unload_all_in_the_run(self):
        comfy.model_management.free_memory(1e30, LOAD)
        assert all(patches.offloaded for patches in self.current.model.packed_patches.layers.values())
        self.step()

    def end_and_unload(self):
        self.current.cleanup()
        comfy.model_management.free_memory(1e30, LOAD)
        assert not self.current.model.packed_patches.layers and not any(layer.lora for layer in packed_layers(self.packed))
        assert self.current.model.model_loaded_weight_memory == 0
        self.switch()

    # --- the walk ---

    def walk(self, operations: int):
        chosen = self.random.choices(list(self.operations), list(self.operations.values()), k=operations)
        for index, operation in enumerate(chosen):
            self.done.append(f"{index} {operation.__name__} ({self.name}, hooks {self.hook_strength})")
            try:
                operation()
                self.check()
            except Exception as error:
                raise AssertionError(f"{error!r} after {self.done[-8:]}") from error
        self.switch("none")

    def check(self):
        applied = self.current.model.packed_patches
        assert len(packed_layers(self.packed)) == self.count
        assert applied.nbytes == sum(patches.nbytes for patches in applied.layers.values())
        assert applied.counted in (0, applied.nbytes)
        if self.is_dynamic:
            assert self.current.model.model_loaded_weight_memory >= applied.counted
        else:  # the host subtracts more than it has added, where a new budget leaves out what lies on the device
            assert self.current.loaded_size() <= self.current.model_size()
            if fake_gpus.ON_FAKE_GPUS and not applied.evicted:  # then the host no longer counts it
                assert self.current.loaded_size() == self.lies_on_the_gpu()

    def lies_on_the_gpu(self) -> int:
        applied = self.current.model.packed_patches
        weights = sum(part.nbytes for weight in (*self.current.model.parameters(), *self.current.model.buffers())
                      for part in parts(weight) if part.device == LOAD)
        return weights + applied.counted


@pytest.mark.parametrize("format_name, operations", WALKS.items())
def test_every_step_has_its_loras_whatever_the_host_did_before(format_name, operations, device):
    Machine(format_name, False, 0, device).walk(operations)


@pytest.mark.parametrize("format_name, is_dynamic, operations", on_gpus(ON_GPUS))
def test_every_step_has_its_loras_on_a_gpu_on_which_lies_what_is_counted(format_name, is_dynamic, operations, device):
    Machine(format_name, is_dynamic, 0, device).walk(operations)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("format_name", WALKS)
def test_every_step_has_its_loras_on_longer_walks(format_name, seed, device):
    Machine(format_name, False, seed, device).walk(500)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("format_name, is_dynamic, operations", on_gpus(dict.fromkeys(ON_GPUS, 300)))
def test_every_step_has_its_loras_on_longer_walks_on_a_gpu(format_name, is_dynamic, operations, seed, device):
    Machine(format_name, is_dynamic, seed, device).walk(operations)
