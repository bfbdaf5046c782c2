"""Weights of 16 bits beside which a tool left scales."""
import torch

from .base import Written, damaged, grid, weight


def of_codes(dtype=torch.float16, shape=(48,)):
    """Values as those of fp8 codes, which need a scale; a power of two, so that nothing rounds."""
    codes = (weight(48, 256) * 7000).clamp(-420, 420).to(dtype)
    scale = 0.5 ** torch.arange(1, 49).remainder(9)[:torch.Size(shape).numel()].view(shape)
    return Written({"weight": codes, "weight_scale": scale}, codes.float() * scale.view(-1, 1))


WRITERS = grid("codes", of_codes, dtype=[torch.float16, torch.bfloat16],
               shape=[(), (48,), (48, 1)])
BAD = damaged(
    of_codes,
    scales_of_other_rows=({"weight_scale": torch.full((7,), 0.5)},
                          r"weight_scale of float32 \(7,\), expected one number or .* N = 48"),
    factors_of_other_columns=({"pre_quant_scale": torch.full((7,), 0.5)},
                              "it has pre_quant_scale of .* expected K numbers with K = 256"),
)
