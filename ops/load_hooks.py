"""Hooks that run in each module while the host builds a model and loads its state dict."""
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import product
from .layers import PackedLayer, make_packed
from .packed_layout import is_packed, squeeze_to

ModuleFilter = Callable[[str, torch.nn.Module], bool]  # (name in its parent, module)


def dequantize_plain_parameters() -> contextlib.AbstractContextManager:
    """While the host builds and loads a model, dequantises what is not in one of our layers.

    The model uses such parameters (position embeddings, registers, pad tokens, custom norms) as
    plain tensors.
    """
    return before_each_load(lambda name, module: not isinstance(module, PackedLayer),
                            _dequantize_own_parameters)


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


def before_each_load(is_chosen: ModuleFilter,
                     hook: Callable[..., None]) -> contextlib.AbstractContextManager:
    """While the host builds and loads a model, calls `hook` before a chosen module loads.

    Args:
        is_chosen: whether to hook a module.
        hook: (module, state_dict, prefix, ...), as `register_load_state_dict_pre_hook` takes it.
    """
    return _on_each_module(is_chosen,
                           lambda module: module.register_load_state_dict_pre_hook(hook))


def after_each_load(is_chosen: ModuleFilter,
                    hook: Callable[..., None]) -> contextlib.AbstractContextManager:
    """While the host builds and loads a model, calls `hook` after a chosen module has loaded.

    Args:
        is_chosen: whether to hook a module.
        hook: (module, keys), as `register_load_state_dict_post_hook` takes it; `keys` has the
            `missing_keys` and `unexpected_keys` of the whole load.
    """
    return _on_each_module(is_chosen,
                           lambda module: module.register_load_state_dict_post_hook(hook))


@contextlib.contextmanager
def _on_each_module(is_chosen: ModuleFilter,
                    register: Callable[[torch.nn.Module], Any]) -> Iterator[None]:
    handles = []

    def on_submodule(parent, name, module):
        if module is not None and is_chosen(name, module):
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
        state_dict[prefix + name] = squeeze_to(value, param.shape)
