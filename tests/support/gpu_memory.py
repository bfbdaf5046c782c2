"""Memory of fake GPUs: emptying it, the bytes of a model in it, models loaded in part, and steps of
small Fluxes there."""
import contextlib
import functools
import gc

import comfy.model_management
import comfy.sample
import pytest
import torch
from fake_gpus import CAPACITY
from pack_api import load_diffusion_model
from patched_models import flux_inputs, folder, parts

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.ops.patches.adapters import adapter_tensors

# for `pytest.mark.parametrize`: a model's kind of loading
BOTH = [pytest.param(False, marks=pytest.mark.fake_gpus, id="static"),
        pytest.param(True, marks=pytest.mark.fake_gpus(dynamic=True), id="dynamic")]


@contextlib.contextmanager
def empty_gpus(capacity: int = CAPACITY):
    """Yields the counters of the fake GPUs, which hold no model before and after.

    Args:
        capacity: bytes of each GPU until then.
    """
    import fakegpu

    def clear(capacity: int):
        for device in range(torch.cuda.device_count()):
            fakegpu.set_capacity(capacity, device)
        comfy.model_management.unload_all_models()
        gc.collect()

    clear(capacity)
    yield fakegpu
    clear(CAPACITY)


def lies_on(model, device="cuda:0") -> int:
    """Bytes of weights and of LoRAs' factors that lie on a device."""
    tensors = [part for weight in (*model.parameters(), *model.buffers()) for part in parts(weight)]
    tensors += [
        tensor for layer in model.packed_patches.layers.values() if layer.low_rank is not None
        for tensor in (layer.low_rank.down, *layer.low_rank.ups)
    ]
    tensors += [
        tensor for layer in model.packed_patches.layers.values() for patch in layer.weight_patches
        for tensor in adapter_tensors(patch[1])
    ]
    return sum(tensor.nbytes for tensor in tensors if tensor.device == torch.device(device))


def of_no_layer(patcher) -> int:
    """Bytes of what is in no layer and so always lies on the device, such as a table of sigmas."""
    listed = {id(param) for *_, params in patcher._load_list() for param in params.values()}
    return sum(tensor.nbytes for tensor in (*patcher.model.parameters(), *patcher.model.buffers())
               if id(tensor) not in listed)


def load(patcher, room: float):
    """Load a model while this many bytes are free for weights, as other programs come and go."""
    import fakegpu

    fakegpu.set_capacity(comfy.model_management.minimum_inference_memory() + room + fakegpu.used() -
                         lies_on(patcher.model))
    comfy.model_management.load_models_gpu([patcher])


def step(patcher):
    inputs = {name: value.cuda() for name, value in flux_inputs().items()}
    with torch.no_grad():
        return patcher.model.apply_model(**inputs).float().cpu()


def sample(patcher, steps: int = 2, hooks=None, callback=None) -> torch.Tensor:
    """Steps that run the model twice each, which devices can share. The conditions differ in
    length, so that the host never puts them together."""
    inputs = flux_inputs()
    text = inputs["c_crossattn"]
    options = {} if hooks is None else {"hooks": hooks}
    conditions = [[[part, options]] for part in (text, torch.cat([text, -text[:, :2]], 1))]
    with torch.inference_mode():
        return comfy.sample.sample(patcher, inputs["x"], steps, 2.0, "euler", "simple", *conditions,
                                   torch.zeros_like(inputs["x"]), seed=1, disable_pbar=True,
                                   callback=callback)


def copied_by(function, *arguments) -> int:
    """Bytes that a call copies to the GPU."""
    import fakegpu

    before = fakegpu.copied().up
    function(*arguments)
    return fakegpu.copied().up - before


def largest_layer(patcher) -> int:
    """Its bytes."""
    return max(size for *_, size, _, _, _ in patcher._load_list())


def larger_flux(format_name: str, hidden: int = 512, double_blocks: int = 2,
                single_blocks: int = 6):
    """(packed model, its dense values); without other sizes one of 45 million weights, more than a
    page of dynamic VRAM."""
    path, values = write_flux(format_name, hidden, double_blocks, single_blocks)
    return load_diffusion_model(path), dict(values)


@functools.cache
def write_flux(format_name: str, hidden: int, double_blocks: int,
               single_blocks: int) -> tuple[str, dict[str, torch.Tensor]]:
    """(path of a packed Flux, its dense values), written once."""
    values = tiny_models.flux(0, hidden=hidden, double_blocks=double_blocks,
                              single_blocks=single_blocks, context=256)
    path = f"{folder().name}/{format_name} {hidden} {double_blocks} {single_blocks}"
    if format_name == "NF4":
        from devtools.files.bnb_files import write_bnb  # takes the bitsandbytes package

        path += ".safetensors"
        seen = write_bnb(path, {name: torch.from_numpy(value) for name, value in values.items()})
    else:
        path += ".gguf"
        seen = write_gguf(path, values, lambda name, value: format_name
                          if value.ndim > 1 else "F32")
    return path, {name: torch.as_tensor(value) for name, value in seen.items()}
