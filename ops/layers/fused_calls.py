"""The fused calls of ComfyUI's linear layers: an activation before the product, a residual after.

| ComfyUI | what calls a layer so                                                                  |
|---------|----------------------------------------------------------------------------------------|
| 0.33    | `comfy.ops.linear_input_act(linear, x, input_act)`, which reads an int8 weight itself  |
| 0.36    | the same with act_weight, act_eps, residual and residual_scale                         |
| 0.40    | `forward(input, input_act, act_weight, residual, residual_scale)`, which hands all of  |
|         | them on to `forward_comfy_cast_weights` in each call                                   |
| later   | a helper that calls a layer's `forward` where it has `comfy_force_forward`             |
"""
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.ops
import torch

from ..host_versions import HOST_VERSION, VERSION, tested_range, where_to_update
from ..stable_names import short_error_name

POSITIONAL = ("input_act", "act_weight", "residual", "residual_scale")  # of `forward`


@short_error_name
class UnknownArgumentError(TypeError):
    """The host calls a layer in a way that this version does not know."""

    def __init__(self, layer: str, what: str):
        super().__init__(
            f"ComfyUI {HOST_VERSION} calls {layer} with {what}, which Featherweight {VERSION} does"
            f" not know. {tested_range()}. {where_to_update()}")


class FusedCall(NamedTuple):
    """What a fused call computes around the product: residual + residual_scale * product(act(x)).

    Attributes:
        input_act: name of the activation, as the host's; None: there is none.
        act_weight: of the activation "rms_norm": the norm's weight, or the norm itself.
        act_eps: of the same.
        residual: of the shape of the output, or None.
        residual_scale: broadcast over `residual`; None: one.
    """

    input_act: str | None = None
    act_weight: torch.Tensor | torch.nn.Module | None = None
    act_eps: float = 0.0
    residual: torch.Tensor | None = None
    residual_scale: torch.Tensor | None = None

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> "FusedCall":
        """Reads the arguments of a layer's call that follow its input.

        Raises:
            UnknownArgumentError: an argument is unknown and neither None nor False.
        """
        if len(args) > len(POSITIONAL):
            raise UnknownArgumentError("a linear layer", f"{len(args)} further arguments")
        given = dict(zip(POSITIONAL, args))
        return cls(**given, **known_arguments("a linear layer", kwargs, *cls._fields))

    def activated(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the activation of `input`, by the host's own function."""
        if self.input_act is None:
            return input
        activate = vars(comfy.ops).get("_eager_input_act")  # from 0.36 on
        try:
            if activate is None:
                return vars(comfy.ops).get("INPUT_ACT_EAGER", {})[self.input_act](input)
            eps = (self.act_eps,) if self.act_eps else ()  # a norm itself knows its own
            return activate(input, self.input_act, self.act_weight, *eps)
        except KeyError as error:
            what = f"the activation {self.input_act!r}"
            raise UnknownArgumentError("a linear layer", what) from error

    def with_residual(self, out: torch.Tensor) -> torch.Tensor:
        """Adds a product to the residual, as the host does where it has no fused kernel."""
        if self.residual is None:
            return out
        if self.residual_scale is None:
            return self.residual + out
        return torch.addcmul(self.residual, out, self.residual_scale)

    def around(self, product: Callable[[torch.Tensor], torch.Tensor],
               input: torch.Tensor) -> torch.Tensor:
        """Computes the call with a layer's plain `product`."""
        return self.with_residual(product(self.activated(input)))


def known_arguments(layer: str, kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    """Returns the arguments of these `names`; others must carry nothing: None or False.

    Args:
        layer: what is called, in a message.
        kwargs: arguments by name.
        names: that the layer knows.

    Raises:
        UnknownArgumentError: another argument carries something.
    """
    if kwargs.keys() <= set(names):
        return kwargs
    for name, value in kwargs.items():
        if name not in names and value is not None and value is not False:
            raise UnknownArgumentError(layer, f"the argument {name!r}")
    return {name: value for name, value in kwargs.items() if name in names}


@functools.cache
def fuses_in_forward(forward: Callable) -> bool:
    """Returns whether a layer's `forward` names the arguments of a fused call.

    Those of ComfyUI to 0.39 take any arguments and ignore them.
    """
    return set(POSITIONAL) <= inspect.signature(forward).parameters.keys()


@functools.cache
def keep_forward():
    """Has the host's helper for fused calls call `forward` of layers with `comfy_force_forward`.

    That is what the helper does by itself in later versions; that of ComfyUI 0.33 reads an
    int8 weight past a layer's LoRA.
    """
    helper = vars(comfy.ops).get("linear_input_act")
    if helper is None or hasattr(comfy.ops.CastWeightBiasOp, "comfy_force_forward"):
        return
    @functools.wraps(helper)
    def linear_input_act(linear, x, *args, **kwargs):
        if not getattr(linear, "comfy_force_forward", False):
            return helper(linear, x, *args, **kwargs)
        known = known_arguments("a linear layer", kwargs, *FusedCall._fields)
        return FusedCall(*args, **known).around(linear, x)

    setattr(comfy.ops, "linear_input_act", linear_input_act)  # noqa: B010  not in older hosts
