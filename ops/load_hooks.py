"""Hooks that run in each module while the host builds a model and loads its state dict."""
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import product
from .layers import PackedLayer, make_packed
from .packed_layout import is_packed, reshape_to

ModuleFilter = Callable[[str, torch.nn.Module], bool]  # (name in its parent, module)


def dequantize_plain_parameters() -> contextlib.AbstractContextManager:
    """While the host builds and loads a model, dequantises what is not in one of our layers.

    The model uses such parameters (position embeddings, registers, pad tokens, custom norms) as
    plain tensors.
    """
    return on_each_module(
        lambda name, module: not isinstance(module, PackedLayer),
        lambda module: module.register_load_state_dict_pre_hook(_dequantize_own_parameters))


@contextlib.contextmanager
def pack_layers() -> Iterator[None]:
    """While the host builds a model from its own layers, such as a VAE, makes these packed ones.

    What other threads build meanwhile stays as it is.
    """
    thread = threading.get_ident()

    def on_submodule(parent, name, module):
        if module is not None and threading.get_ident() == thread:
            make_packed(module)

    handle = torch.nn.modules.module.register_module_module_registration_hook(on_submodule)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def on_each_module(is_chosen: ModuleFilter,
                   register: Callable[[torch.nn.Module], Any]) -> Iterator[None]:
    """While the host builds and loads a model, registers a hook of loading on chosen modules.

    What other threads build meanwhile stays as it is.

    Args:
        is_chosen: whether to hook a module.
        register: takes a module and returns the handle of its hook, as
            `register_load_state_dict_pre_hook` does.
    """
    thread, handles = threading.get_ident(), []

    def on_submodule(parent, name, module):
        if module is not None and threading.get_ident() == thread and is_chosen(name, module):
            handles.append(register(module))

    handles.append(torch.nn.modules.module.register_module_module_registration_hook(on_submodule))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dequantize_own_parameters(module, state_dict, prefix, *args):
    for name, param in itertools.chain(module._parameters.items(), module._buffers.items()):
        value = state_dict.get(prefix + name)
        if value is None or param is None:
            continue
        if is_packed(value):
            value = product.dequantize(value, param.dtype)
        state_dict[prefix + name] = reshape_to(value, param.shape)
