"""Hooks that run in each module while the host builds a model and loads its state dict."""
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..tensor.packed_layout import is_packed, reshape_to
from . import product
from .packed_layers import PackedLayer, make_packed

ModuleFilter = Callable[[str, torch.nn.Module], bool]  # (name in its parent, module)


def dequantize_plain_parameters() -> contextlib.AbstractContextManager:
    """While the host builds and loads a model, dequantises what is not in one of our layers.

    The model uses such parameters (position embeddings, registers, pad tokens, custom norms) as
    plain tensors.
    """
    return on_each_module(
        lambda name, module: not isinstance(module, PackedLayer),
        lambda module: module.register_load_state_dict_pre_hook(_dequantize_own_parameters))


def pack_layers() -> contextlib.AbstractContextManager:
    """While the host builds a model from its own layers, such as a VAE, makes these packed ones."""
    return on_each_registration(lambda parent, name, module: make_packed(module))


@contextlib.contextmanager
def on_each_module(is_chosen: ModuleFilter,
                   register: Callable[[torch.nn.Module], Any]) -> Iterator[None]:
    """While the host builds and loads a model, registers a hook of loading on chosen modules.

    Args:
        is_chosen: whether to hook a module.
        register: takes a module and returns the handle of its hook, as
            `register_load_state_dict_pre_hook` does.
    """
    with contextlib.ExitStack() as handles:

        def hook(parent, name, module):
            if is_chosen(name, module):
                handles.callback(register(module).remove)

        with on_each_registration(hook):
            yield


@contextlib.contextmanager
def on_each_registration(
        use: Callable[[torch.nn.Module, str, torch.nn.Module], Any]) -> Iterator[None]:
    """Calls a function for each module that becomes a part of another one.

    What other threads build meanwhile stays as it is.

    Args:
        use: takes the other module, the name there and the module.
    """
    thread = threading.get_ident()

    def on_submodule(parent, name, module):
        if module is not None and threading.get_ident() == thread:
            use(parent, name, module)

    handle = torch.nn.modules.module.register_module_module_registration_hook(on_submodule)
    try:
        yield
    finally:
        handle.remove()


class FillEmpty(TorchFunctionMode):
    """Calls a function with each tensor of memory that `torch.empty` does not initialise.

    Args:
        fill: takes the tensor and writes into it.
    """

    def __init__(self, fill: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.fill = fill

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like):
            self.fill(out)
        return out


def _dequantize_own_parameters(module, state_dict, prefix, *args):
    for name, param in itertools.chain(module._parameters.items(), module._buffers.items()):
        value = state_dict.get(prefix + name)
        if value is None or param is None:
            continue
        if is_packed(value):
            value = product.dequantize(value, param.dtype)
        state_dict[prefix + name] = reshape_to(value, param.shape)
