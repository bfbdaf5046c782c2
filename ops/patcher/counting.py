"""What one step of a run shows of a model's layers: how often each runs, and how much is multiplied before it.

It is counted, not timed: a device works on while the host is done with its part, and the same step always shows the same.
"""
import functools

import torch


class Step:
    """How often each layer runs in a step, by its name, and the work before it runs first: multiplications by weights.

    Where nothing is known, each runs once.
    """

    def __init__(self):
        self._times, self._begins = {}, {}
        self._work = 0

    def add(self, name: str, work: int):
        """A layer has run."""
        self._times[name] = self._times.get(name, 0) + 1
        self._begins.setdefault(name, self._work)
        self._work += work

    def times(self, name: str) -> int:
        return self._times.get(name, 0) if self._times else 1

    def begin(self, name: str) -> int:
        return self._begins.get(name, 0)


class Counter:
    """Counts a step of a model from now until it is stopped. moment: the step's, which others differ from."""

    def __init__(self, model: torch.nn.Module, moment: torch.Tensor):
        self.moment = moment
        self._step = Step()
        self._layers = {name: module for name, module in model.named_modules() if hasattr(module, "comfy_cast_weights")}
        self._hooks = [module.register_forward_hook(functools.partial(_count, self._step, name))
                       for name, module in self._layers.items()]

    def stop(self) -> Step:
        """The step; nothing of it where half of the weights or more ran out of sight, as in layers that were compiled."""
        for hook in self._hooks:
            hook.remove()
        sizes = {name: sum(map(torch.numel, module.parameters(recurse=False))) for name, module in self._layers.items()}
        seen = sum(size for name, size in sizes.items() if self._step.times(name))
        return self._step if 2 * seen > sum(sizes.values()) else Step()


def _count(step: Step, name: str, module, inputs, output):
    if not torch.compiler.is_compiling():  # the hook would stay in what is compiled
        step.add(name, _work(module, output))


def _work(module, output) -> int:
    """Multiplications by the weight of a layer of which each row gives one part of the output, at every place of it."""
    shape = getattr(getattr(module, "weight", None), "shape", ())
    return output.numel() // shape[0] * shape.numel() if len(shape) and isinstance(output, torch.Tensor) else 0
