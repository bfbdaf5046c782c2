"""LoRAs on the trainable Flux: every linear layer inside its blocks but the modulations."""
import torch
from torch import nn

RANK = 8


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank branch beside it."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + (x @ self.down.T) @ self.up.T


def add_lora(model: nn.Module, rank: int = RANK) -> dict[str, nn.Parameter]:
    """Give each layer a branch; returns the factors, `layer.down` (rank, K) and `layer.up` (N,
    rank)."""
    names = [name for name, layer in model.named_modules()
             if isinstance(layer, nn.Linear) and "blocks" in name and not name.endswith(".lin")]
    factors = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        branch = Adapted(model.get_submodule(name), rank)
        setattr(model.get_submodule(owner), last, branch)
        factors |= {f"{name}.down": branch.down, f"{name}.up": branch.up}
    return factors


def file_tensors(factors: dict[str, torch.Tensor], kohya: bool) -> dict[str, torch.Tensor]:
    """The factors under the names of kohya's trainers, or else of PEFT."""
    renamed = {}
    for name, value in factors.items():
        layer, _, part = name.rpartition(".")
        if kohya:
            renamed[f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight"] = value.contiguous()
        else:
            renamed[f"diffusion_model.{layer}.lora_{'A' if part == 'down' else 'B'}.weight"] = (
                value.contiguous()
            )
    return renamed
