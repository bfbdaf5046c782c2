"""What runs in each module while the host builds a model and loads its state dict."""
import contextlib
import itertools

import torch

from . import product
from .layers import PackedLayer
from .packed_layout import is_packed, squeeze_to


def dequantize_plain_parameters() -> contextlib.AbstractContextManager:
    """While the host builds and loads a model: what its modules own outside of our layers is
    dequantised on the way in.

    Such parameters (position embeddings, registers, pad tokens, custom norms) are used by the model
    as plain tensors.
    """
    return before_each_load(lambda name, module: not isinstance(module, PackedLayer),
                            _dequantize_own_parameters)


def before_each_load(chosen, hook) -> contextlib.AbstractContextManager:
    """While the host builds and loads a model: `hook` runs before a chosen module takes its part of
    the state dict.

    chosen(name, module): name of a module in its parent -> bool. hook(module, state_dict, prefix,
    ...): as torch calls what `register_load_state_dict_pre_hook` is given.
    """
    return _on_each_module(chosen, lambda module: module.register_load_state_dict_pre_hook(hook))


def after_each_load(chosen, hook) -> contextlib.AbstractContextManager:
    """The same for after that. hook(module, names): `names` has `missing_keys` and
    `unexpected_keys` of all that is loaded."""
    return _on_each_module(chosen, lambda module: module.register_load_state_dict_post_hook(hook))


@contextlib.contextmanager
def _on_each_module(chosen, register):
    hooks = []

    def on_submodule(parent, name, module):
        if module is not None and chosen(name, module):
            hooks.append(register(module))

    hooks.append(torch.nn.modules.module.register_module_module_registration_hook(on_submodule))
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()


def _dequantize_own_parameters(module, state_dict, prefix, *args):
    for name, param in itertools.chain(module._parameters.items(), module._buffers.items()):
        value = state_dict.get(prefix + name)
        if value is None or param is None:
            continue
        if is_packed(value):
            value = product.dequantize(value, param.dtype)
        state_dict[prefix + name] = squeeze_to(value, param.shape)
