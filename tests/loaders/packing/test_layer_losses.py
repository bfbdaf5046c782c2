"""What the report says of the losses of layers, and of the same layer in all blocks."""
import math
import random
import re

import pytest
import torch

from featherweight.loaders.packing.layer_losses import LayerLosses
from featherweight.ops.quantize.relative_error import RelativeError


def test_the_worst_layers_and_kinds_of_layers_are_named_with_their_decibels():
    losses, errors, powers = LayerLosses(), {}, {}
    for block in range(random.randint(3, 6)):
        for kind in ("img_mlp.0", "img_mlp.2", "txt_attn.qkv"):
            values = torch.randn(8, random.randint(16, 64))
            piece = values + torch.randn(values.shape) * random.choice([1e-3, 1e-2, 1e-1])
            measured = RelativeError()
            measured.add(values, piece)
            losses.add(f"double_blocks.{block}.{kind}.weight", measured)
            for name in (f"double_blocks.{block}.{kind}", f"double_blocks.*.{kind}", ""):
                errors[name] = errors.get(name, 0) + (piece - values).double().square().sum()
                powers[name] = powers.get(name, 0) + values.double().square().sum()
    expected = {name: 10 * math.log10(powers[name] / errors[name]) for name in errors}
    (total,), (layers, kinds) = losses.total_lines(), losses.layer_lines()
    assert total == f"The packed weights are {expected['']:.1f} dB above their rounding errors."
    for line, names in ((layers, [name for name in expected if re.search(r"\d\.\w+\.", name)]),
                        (kinds, [name for name in expected if "*" in name])):
        told = re.findall(r"(\S+) (-?[\d.]+)(?:, |$)", line.partition(": ")[2])
        assert [name for name, _ in told] == sorted(names, key=expected.__getitem__)[:5]
        for name, decibels in told:
            assert float(decibels) == pytest.approx(expected[name], abs=0.051)


def test_without_errors_nothing_is_said():
    losses, measured = LayerLosses(), RelativeError()
    measured.add(torch.ones(2, 2), torch.ones(2, 2))
    losses.add("blocks.0.a.weight", measured)
    assert losses.total_lines() == losses.layer_lines() == []
