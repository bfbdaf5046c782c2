"""Whatever is done to a packed model, in whatever order: each step gives what a dense model gives.

Hypothesis chooses sequences of what people and the host do: LoRAs come and go and change their
strength, models are cloned, placed, moved, merged and saved, memory is taken in the midst of a run.
The sequences are the same in each run. With `--heavy` there are many, and one that fails is
shortened to the few steps that show the fault.
"""
import functools
import gc

import comfy.hooks
import comfy.model_management
import fake_gpus
import hypothesis
import pytest
import torch
from gpu_memory import lies_on, of_no_layer
from hypothesis import strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from patched_models import (
    LIMIT,
    dense_flux,
    flux_file,
    forget_models,
    forward,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
    run,
)
from patcher_models import with_dense_parts
from small_encoders import encode, lora_for_t5, patched_clip, small_t5

from featherweight.loaders.models.placement import place, place_clip

if fake_gpus.ON_FAKE_GPUS:
    import fakegpu

GPU, SECOND_GPU, CPU = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
NOT_THE_CPU = torch.device("cpu:0")  # to the host another device than "cpu"
PREFIX = "diffusion_model."
GIB = 1 << 30
SMALL = 1 << 20  # bytes of the weights of up to 16 KiB each, which dynamic VRAM keeps on the device
FEW = 20  # of so few examples one that fails is told as it is; to shorten it takes minutes
ROUNDED = 200 * 512  # bytes by which used memory is rounded up, of so many tensors
SCALE = 4  # bytes of a text encoder that are in no layer, and that the host leaves on the device
KINDS = ("lora", "dora", "lokr", "loha", "oft")
STATIC, DYNAMIC = pytest.mark.fake_gpus, pytest.mark.fake_gpus(dynamic=True)

strengths = strategies.sampled_from((1.0, 0.4, -0.5))
loras = strategies.tuples(strategies.sampled_from(KINDS), strengths)
stacks = strategies.lists(loras, min_size=1, max_size=2, unique_by=lambda lora: lora[0]).map(tuple)
hook_strengths = strategies.sampled_from((0.5, 0.9, None))
hook_modes = strategies.sampled_from(list(comfy.hooks.EnumHookMode))
budgets = strategies.sampled_from((None, 0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.5))  # of a model's size


class SimulatedMemory:
    """Memory of a device that is none: to the host `total` less what loaded models take."""

    room = 1
    total = 1e9

    def free(self, device=None, torch_free_too=False):
        models = [model for model in comfy.model_management.current_loaded_models
                  if model.model is not None and model.device == NOT_THE_CPU]
        free = self.total - sum(model.model_loaded_memory() for model in models)
        return (free, 0) if torch_free_too else free

    def used(self) -> int:
        return 0


class FakeGPUMemory:
    """Memory of a fake GPU, with `room` beside the weights for activations and for buffers."""

    room = 300 << 20

    def __setattr__(self, name, value):
        for device in (GPU, SECOND_GPU):
            fakegpu.set_capacity(int(value) + self.room, device.index)

    def free(self, device):
        return comfy.model_management.get_free_memory(device) - self.room

    def used(self) -> int:
        return fakegpu.used(GPU.index) + fakegpu.used(SECOND_GPU.index)


@pytest.fixture
def memory(monkeypatch, one_thread):
    memory = FakeGPUMemory() if fake_gpus.ON_FAKE_GPUS else SimulatedMemory()
    host = comfy.model_management
    monkeypatch.setattr(host, "minimum_inference_memory", lambda: memory.room)
    monkeypatch.setattr(host, "extra_reserved_memory", lambda: 1)
    if not fake_gpus.ON_FAKE_GPUS:
        monkeypatch.setattr(host, "is_device_cpu", lambda device: device == CPU)
        monkeypatch.setattr(host, "vram_state", host.VRAMState.NORMAL_VRAM)
        monkeypatch.setattr(host, "get_free_memory", memory.free)
    yield memory
    memory.total = 4 * GIB
    forget_models()
    gc.collect()


class DenseFlux:
    """The host's own dense model, and what it gives with stacks of LoRAs: (kind, strength) each.

    part: kinds that are only for some layers, as each product of these layers takes long: what is
    in the layers' names.
    noise: the share of the output that a product of the packed model may add, which quantises its
    input.
    """

    part = {"dora": "img_attn", "lokr": "txt_mlp", "loha": "img_mlp", "oft": "linear"}
    lora_for, patched = staticmethod(lora_for), staticmethod(patched)

    def __init__(self, dense, values: dict, noise: float = 0.0):
        self.dense, self.values, self.noise = dense, values, noise

    @functools.cache
    def lora(self, kind: str) -> dict:
        values = {name: value for name, value in self.values.items()
                  if self.part.get(kind, "") in name}
        lora = self.lora_for(values, kind, seed=len(kind))
        return with_dense_parts(lora, self.values) if kind == "lora" else lora

    @functools.cache
    def hook_lora(self, names: tuple[str, ...]) -> dict:
        return self.lora_for({name: self.values[name] for name in names}, "dora", seed=7)

    def with_patches(self, model, stack: tuple):
        return self.patched(model, *((self.lora(kind), strength) for kind, strength in stack))

    def hook(self, patcher, strength: float | None, names: tuple[str, ...]):
        """A hook of this strength, registered with the patcher as the sampler does it."""
        if strength is None:
            return None
        hooks = comfy.hooks.create_hook_lora(self.hook_lora(names), strength, 0.0)
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        patcher.register_all_hook_patches(hooks, target, {})
        return hooks

    @functools.cache
    def output(self, stack: tuple, hook_strength: float | None = None, names=()) -> torch.Tensor:
        patcher = self.with_patches(self.dense, stack).clone()
        hooks = self.hook(patcher, hook_strength, names)
        comfy.model_management.load_models_gpu([patcher])
        patcher.apply_hooks(hooks)
        output = forward(patcher)
        patcher.clean_hooks()
        return output

    @functools.cache
    def weights(self, stack: tuple) -> dict[str, torch.Tensor]:
        patcher = self.with_patches(self.dense, stack)
        comfy.model_management.load_models_gpu([patcher])
        return {name: weight.clone() for name, weight in patcher.model_state_dict(PREFIX).items()}

    @functools.cache
    def merged_output(self, stack: tuple, other: "DenseFlux") -> torch.Tensor:
        return run(merged(other.dense, self.with_patches(self.dense, stack)))


class WholeT5(DenseFlux):
    """A packed text encoder on the CPU, which is never loaded in part."""

    part = {"dora": "Attention.q", "lokr": "Attention.k", "loha": "Attention.v", "oft": "Dense.wo"}
    lora_for, patched = staticmethod(lora_for_t5), staticmethod(patched_clip)

    @functools.cache
    def output(self, stack: tuple, *hooks) -> torch.Tensor:
        return encode(self.with_patches(self.dense, stack))


def merged(model, other):
    """A model with a part of another one in it, as the host's ModelMergeSimple makes it."""
    model = model.clone()
    for key, patches in other.get_key_patches(PREFIX).items():
        model.add_patches({key: patches}, 0.3, 0.7)
    return model


OPERATIONS = {}  # name -> (whether a sequence may go on with it now, strategies for its arguments)


def operation(when=lambda sequence: True, **arguments):
    """Let sequences go on with this method.

    Of several rules Hypothesis would leave out some in each example, and with few examples many.
    """
    def add(method):
        OPERATIONS[method.__name__] = when, strategies.fixed_dictionaries(arguments)
        return method

    return add


class PatcherSequence(RuleBasedStateMachine):
    """A packed model in the hands of the host."""

    def __init__(self, load_packed, dense: DenseFlux, other_dense: DenseFlux, memory):
        super().__init__()
        self.load_packed, self.memory = load_packed, memory
        self.dense, self.other_dense = dense, other_dense
        self.current = None

    @initialize(stack=stacks)
    def load_models(self, stack):
        self.memory.total = 2 * GIB
        self.used_before = self.memory.used()
        self.model = self.packed = self.loaded = self.load_packed()
        self.other = packed_flux("Q4_K", 1)
        patcher = self.patcher_of(self.packed)
        self.is_dynamic = patcher.is_dynamic()
        if not fake_gpus.ON_FAKE_GPUS:
            for device in (patcher, self.other):
                device.load_device, device.offload_device = NOT_THE_CPU, CPU
        self.size, self.count = patcher.model_size(), len(packed_layers(patcher))
        packed = set(packed_layers(patcher))
        # Of other layers the host mixes the order of hooks and LoRAs, where they are offloaded.
        self.hooked = tuple(f"{name.removeprefix(PREFIX)}.weight"
                            for name, layer in patcher.model.named_modules() if layer in packed)
        self.moved = None
        self.stack, self.budget, self.hook_strength, self.hooks = stack, None, None, None
        self.outputs = {}
        self.begin_run()

    @rule(data=strategies.data())
    def go_on(self, data):
        possible = [name for name, (when, _) in OPERATIONS.items() if when(self)]
        name = data.draw(strategies.sampled_from(possible))
        getattr(self, name)(**data.draw(OPERATIONS[name][1], label=name))

    # --- a model, or a text encoder ---

    is_text_encoder = False
    place = staticmethod(place)

    def patcher_of(self, model):
        return model

    def step(self):
        self.current.apply_hooks(self.hooks)
        self.check_output(forward(self.current))

    def check_output(self, actual: torch.Tensor):
        """The dense model's output, and on a GPU the same bits wherever the weights lie."""
        expected = self.dense.output(self.stack, self.hook_strength, self.hooked)
        without = self.dense.output(())
        effect = (expected - without).norm() if self.stack or self.hooks else without.norm()
        allowed = LIMIT * max(effect, 0.02 * without.norm()) + self.dense.noise * without.norm()
        assert (actual - expected).norm() < allowed
        if fake_gpus.ON_FAKE_GPUS:  # elsewhere the host cuts attention as memory allows
            first = self.outputs.setdefault((self.stack, self.hook_strength), actual)
            assert torch.equal(actual, first)

    # --- what people do: each time a run ends and another one begins ---

    def begin_run(self):
        if self.current is not None:
            self.current.cleanup()
        self.model = self.dense.with_patches(self.packed, self.stack)
        if self.budget is not None:
            self.model = self.place(self.model, *self.budget)
        self.continue_with(self.model.clone())

    def continue_with(self, model):
        self.model, self.current = model, self.patcher_of(model)
        self.hooks = self.dense.hook(self.current, self.hook_strength, self.hooked)
        self.load_again()
        self.current.pre_run()
        self.step()

    def load_again(self):
        comfy.model_management.load_models_gpu([self.current])

    @operation(stack=stacks | stacks | stacks | strategies.just(()))
    def apply_loras(self, stack):
        self.stack = stack
        self.begin_run()

    @operation(when=lambda self: self.stack, strength=strengths)
    def change_strength(self, strength):
        *others, (kind, _) = self.stack
        self.stack = *others, (kind, strength)
        self.begin_run()

    @operation(how=strategies.sampled_from(("clone", "unload", "forget", "force patches")))
    def begin_again(self, how):
        """With a clone, unloaded by the host, opened anew, or with patches written into weights."""
        if how == "clone":
            self.current.cleanup()
            self.continue_with(self.model.clone())
        elif how == "force patches" and not self.is_dynamic and not self.is_text_encoder:
            comfy.model_management.load_models_gpu([self.current], force_patch_weights=True)
            self.step()
        elif how == "unload":
            self.unload()
            self.begin_run()
        else:
            self.current.cleanup()
            self.model = self.current = None
            gc.collect()
            self.begin_run()

    @operation(
        when=lambda self: not self.is_dynamic and not self.is_text_encoder,
        strength=hook_strengths, mode=hook_modes)
    def change_hooks(self, strength, mode):
        self.current.set_hook_mode(mode)
        self.hook_strength = strength
        self.hooks = self.dense.hook(self.current, strength, self.hooked)
        self.load_again()
        self.step()

    @operation(
        when=lambda self: fake_gpus.ON_FAKE_GPUS,
        budget=budgets, stored=strategies.sampled_from((0, 0, 0.2, 2)))
    def change_budget(self, budget, stored):
        has_stores = not self.is_dynamic and self.packed is self.loaded
        stores = [(SECOND_GPU, stored * self.size)] if has_stores else []
        self.budget = None if budget is None else (budget * self.size, stores)
        self.begin_run()

    @operation(
        when=lambda self: self.hooks is None and not self.is_text_encoder,
        how=strategies.sampled_from(("save", "merge")))
    def take_weights(self, how):
        (self.save if how == "save" else self.merge_into_another)()
        self.step()

    def save(self):
        expected = self.dense.weights(self.stack)
        saved = self.current.model_state_dict_for_saving()
        for name, weight in expected.items():
            value = saved[name].to(CPU).float()
            if f"{name}_scale" in saved:  # the host's formats are saved as they are, unless patched
                value *= saved[f"{name}_scale"].to(CPU)
            assert torch.allclose(value, weight, rtol=1e-5, atol=1e-5), name

    def merge_into_another(self):
        expected = self.dense.merged_output(self.stack, self.other_dense)
        without = self.other_dense.output(())
        actual = run(merged(self.other, self.current))
        assert (actual - expected).norm() < LIMIT * (expected - without).norm()
        self.load_again()

    @operation(
        when=lambda self: fake_gpus.ON_FAKE_GPUS and not self.is_text_encoder,
        device=strategies.sampled_from((GPU, SECOND_GPU)))
    def move(self, device):
        """As the host's Select Model Device does."""
        if device == SECOND_GPU and self.moved is None:
            self.moved = self.loaded.deepclone_multigpu(SECOND_GPU)
        self.packed, self.budget = self.loaded if device == GPU else self.moved, None
        self.begin_run()

    # --- what the host does ---

    @operation(share=strategies.sampled_from((0.02, 0.2, 0.5, 0.8, 1.2, 3)))
    def other_programs_come_and_go(self, share):
        self.memory.total = share * self.size
        self.load_again()
        self.step()

    @operation(
        how=strategies.sampled_from(("free", "unload in part", "evict", "put back")),
        share=strategies.sampled_from((0.01, 0.1, 0.4, 0.9, 2)))
    def take_memory_in_the_run(self, how, share):
        device = self.current.load_device
        if how == "free":
            comfy.model_management.free_memory(self.memory.free(device) + share * self.size, device)
        elif how == "unload in part":
            self.current.partially_unload(CPU, share * self.size)
        elif how == "put back" and self.is_dynamic:
            loaded, freed = self.current.loaded_size(), self.current.restore_loaded_backups()
            assert self.current.loaded_size() == loaded - freed
        else:
            comfy.model_management.free_memory(1e30, device)
        self.step()

    @operation(budget=strategies.sampled_from((None, 0.5)))
    def run_another_model(self, budget):
        other = self.other
        if budget is not None and fake_gpus.ON_FAKE_GPUS:
            other = place(self.other, budget * self.other.model_size())
        output = run(other)
        assert (output - self.other_dense.output(())).norm() < 1e-5 * output.norm()
        self.step()

    @operation(how=strategies.sampled_from(("cancel", "out of memory")))
    def fail(self, how):
        (self.cancel if how == "cancel" or not fake_gpus.ON_FAKE_GPUS else self.run_out_of_memory)()
        self.current.cleanup()
        comfy.model_management.reset_cast_buffers()
        if how != "cancel":  # as the host does then
            comfy.model_management.unload_all_models()
            self.memory.total = 2 * GIB
        self.begin_run()

    def cancel(self):
        """The user cancels in the midst of a step."""
        def cancelled(*args):
            raise comfy.model_management.InterruptProcessingException

        layers = packed_layers(self.current)
        hook = layers[len(layers) // 2].register_forward_pre_hook(cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            self.step()
        hook.remove()

    def run_out_of_memory(self):
        """Something else takes the device."""
        fakegpu.set_capacity(1000, self.current.load_device.index)
        with pytest.raises(RuntimeError) as error:
            self.step()
        assert (comfy.model_management.is_oom(error.value)
                or (self.is_dynamic and "VRAM grow failed" in str(error.value)))  # comfy-aimdo's

    def unload(self):
        self.current.cleanup()
        comfy.model_management.free_memory(1e30, self.current.load_device)
        comfy.model_management.reset_cast_buffers()
        assert self.current.model.model_loaded_weight_memory == 0
        assert not any(layer.lora for layer in packed_layers(self.current))
        if fake_gpus.ON_FAKE_GPUS:
            assert lies_on(self.current.model, self.current.load_device) <= SCALE

    # --- what always holds ---

    @invariant()
    def weights_are_packed_and_counted_where_they_lie(self):
        if self.current is None:
            return
        current = self.current
        assert len(packed_layers(current)) == self.count
        if not current.is_dynamic() and self.budget is None:
            # The host subtracts more than it has added, where a budget leaves out what lies there.
            assert current.loaded_size() <= current.model_size()
        if not fake_gpus.ON_FAKE_GPUS:
            return
        lies = lies_on(current.model, current.load_device)
        factors = current.model.packed_patches.nbytes
        # what is in no layer stays uncounted after an eviction in a run
        if not current.is_dynamic():
            assert lies - current.loaded_size() in (0, of_no_layer(current))
        if self.budget is not None:
            most = max(self.budget[0], factors + of_no_layer(current))
            assert lies <= most + (SMALL if self.is_dynamic else 0)
            if self.is_dynamic:  # a page is more than the model
                assert current._vbar_get().loaded_size() == 0

    def teardown(self):
        if self.current is not None:
            self.unload()
        self.loaded = self.packed = self.other = self.moved = self.current = self.model = None
        comfy.model_management.unload_all_models()
        gc.collect()
        assert self.memory.used() <= self.used_before + ROUNDED


class TextEncoderSequence(PatcherSequence):
    """A packed text encoder, which the host loads for every prompt."""

    is_text_encoder = True
    place = staticmethod(place_clip)

    def patcher_of(self, model):
        return model.patcher

    def step(self):
        self.check_output(encode(self.model))


def check(machine, load_packed, dense, memory, examples: int, steps: int = 10):
    phases = [hypothesis.Phase.generate]
    if examples > FEW:
        phases.append(hypothesis.Phase.shrink)
    settings = hypothesis.settings(
        max_examples=examples, stateful_step_count=steps, derandomize=True, deadline=None,
        database=None, phases=phases, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck))
    other = DenseFlux(dense_flux("Q4_K", 1), flux_file("Q4_K", 1)[1])
    run_state_machine_as_test(lambda: machine(load_packed, dense, other, memory), settings=settings)


def more(*values):
    return pytest.param(*values, marks=pytest.mark.heavy)


@pytest.mark.parametrize(("format_name", "examples"), [
    ("Q8_0", 9), ("INT8", 2), ("float8_e4m3fn", 2), ("int8_tensorwise", 2),
    more("Q8_0", 80), more("Q4_K", 80), more("INT8", 80), more("float8_e4m3fn", 40),
    more("int8_tensorwise", 40), more("asym_w4a8_int8 exact", 40)])
def test_every_step_gives_what_the_dense_model_gives(format_name, examples, memory):
    dense = DenseFlux(dense_flux(format_name), flux_file(format_name)[1],
                      0.005 if format_name == "int8_tensorwise" else 0.0)
    check(PatcherSequence, lambda: packed_flux(format_name), dense, memory, examples)


def on_gpus(few: int):
    return pytest.mark.parametrize("examples", [
        pytest.param(count, marks=[kind, *heavy]) for kind in (STATIC, DYNAMIC)
        for count, heavy in ((few, []), (60, [pytest.mark.heavy]))
    ])


@on_gpus(5)
def test_every_step_on_a_gpu_gives_what_the_dense_model_gives(examples, memory):
    dense = DenseFlux(dense_flux("Q8_0"), flux_file("Q8_0")[1])
    check(PatcherSequence, lambda: packed_flux("Q8_0"), dense, memory, examples)


@on_gpus(3)
def test_every_run_of_a_text_encoder_gives_what_one_on_the_cpu_gives(examples, memory):
    whole, values = small_t5("Q8_0", 2, width=256, load_device=CPU, offload_device=CPU)

    def load_packed():
        return small_t5("Q8_0", 2, width=256)[0]

    check(TextEncoderSequence, load_packed, WholeT5(whole, values), memory, examples)
