"""Joins a diffusion model with a module: a file of further layers for it, such as VACE for Wan."""
import contextlib
from collections.abc import Iterator, Mapping

import comfy.model_patcher
import torch

from ..container.weight_file import WeightFile, WeightFileError, model_name, safe_repr
from ..refusals.wrong_kind import describe_other_kind
from .comfy_quant_weights import pack_plain_fp8
from .detection import is_diffusion_model

CHECKPOINT_PREFIX = "model.diffusion_model."


def module_layers(file: WeightFile, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights of a module by their names in a model.

    Args:
        file: of the module.
        state_dict: of the file, with the host's names; of a whole checkpoint, only the model's
            weights are returned.

    Raises:
        WeightFileError: if the file holds a whole model, a text encoder or a LoRA.
    """
    of_model = {name.removeprefix(CHECKPOINT_PREFIX): weight for name, weight in state_dict.items()
                if name.startswith(CHECKPOINT_PREFIX)}
    layers = of_model or state_dict
    other = describe_other_kind(layers, "module")
    if other is None and is_diffusion_model(layers):
        other = "a complete diffusion model"
    if other is not None:
        raise WeightFileError(
            f"{file.name} is {other}, expected a module: a file with further"
            " layers for a model, such as VACE's for Wan.")
    return layers


def join_module(state_dict: Mapping[str, torch.Tensor], prefix: str,
                module: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights of a model and of a module for it under the names of one model.

    Plain fp8 weights of both become packed ones: the host would build all layers in fp8, or none.

    Args:
        state_dict: of the model, with the host's names.
        prefix: of its names.
        module: of `module_layers`.
    """
    return pack_plain_fp8(
        {**state_dict, **{prefix + name: weight for name, weight in module.items()}})


@contextlib.contextmanager
def explain_module_errors(model_path: str, module_path: str) -> Iterator[None]:
    """Raises WeightFileError with both names if the host cannot build the model of two files."""
    try:
        yield
    except WeightFileError as error:
        raise _unfit_error(model_path, module_path, str(error)) from error


def reject_unused_module(patcher: comfy.model_patcher.ModelPatcher,
                         module: Mapping[str, torch.Tensor], model_path: str, module_path: str):
    """Raises WeightFileError if a model has none of the layers of a module.

    Args:
        patcher: the model's.
        module: of `module_layers`.
        model_path: of the model.
        module_path: of the module.
    """
    network = patcher.model.diffusion_model
    used = {name for name, _ in network.named_parameters()} | {
        name for name, _ in network.named_buffers()}
    if used.isdisjoint(module):
        name = safe_repr(next(iter(module), "none"))
        raise _unfit_error(model_path, module_path,
                           f"The model has no layer of the module's ({len(module)} tensors, first"
                           f" {name}).")


def _unfit_error(model_path: str, module_path: str, reason: str) -> WeightFileError:
    return WeightFileError(
        f"{model_name(module_path)} is not a module for {model_name(model_path)}:"
        f" pick one that was made for a model of this kind and size. {reason}")
