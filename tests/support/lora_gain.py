"""How much of a LoRA arrives: the projection of what it changed on what it should change, which is
1 where nothing is lost.

An error norm cannot see a weak LoRA that loses half its strength: what rounding the outputs makes
hides it. The projection averages the rounding out over millions of outputs and leaves what is lost
on each.
"""
import math

import torch

# of the change of the weight, divided by the norm of the weight
NORMS = (0.0005, 0.001, 0.003, 0.01, 0.05)
ALLOWED = 0.005
# Outputs over which the rounding of a dtype averages out, to a third of what is allowed at the
# least norm.
OUTPUTS = {torch.bfloat16: 1 << 23, torch.float16: 1 << 19, torch.float32: 1 << 16}


class Gain:
    """Sums the projection over several runs."""

    def __init__(self):
        self.along = self.whole = 0.0

    def add(self, change: torch.Tensor, exact: torch.Tensor):
        """Add what changed and what should have: a difference of two outputs, exact in float32, and
        its like."""
        # a row in its own precision: a sum in float64 takes several times as long
        self.along += torch.linalg.vecdot(change.to(exact.dtype), exact).double().sum().item()
        self.whole += torch.linalg.vecdot(exact, exact).double().sum().item()

    @property
    def value(self) -> float:
        return self.along / self.whole

    def assert_full(self, what):
        assert abs(self.value - 1) <= ALLOWED, f"{what}: {self.value:.4f} of the LoRA arrives"


def assert_full_strength(run, inputs, weight_change, norms=NORMS, base: float = 1.0):
    """Every norm of `norms` has its effect.

    run(input, strength) -> output. inputs: tensors (..., K). weight_change(strength): what that
    strength adds to the weight, float32 (N, K). The strength goes from minus to plus its value,
    which doubles what is measured beside the rounding.
    base: norm of the weight divided by the norm of `weight_change(1)`.

    Of the inputs a norm gets as many as average the rounding out as far as all do at the least
    norm: their number falls with the square of the norm.
    """
    for norm in norms:
        gain, strength = Gain(), norm * base
        exact = (weight_change(strength) - weight_change(-strength)).t()
        for input in inputs[:math.ceil(len(inputs) * (norms[0] / norm) ** 2)]:
            change = run(input, strength).float().sub_(run(input, -strength))
            gain.add(change, input.float() @ exact)
        gain.assert_full(f"a norm of {norm:.2%}")
