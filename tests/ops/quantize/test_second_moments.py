"""Second moments of a layer's inputs: what they sum, what is held out, and what a file keeps of
them."""
import pytest
import torch
from pack_api import SecondMoments

from featherweight.ops.quantize.second_moments import FILE_ROWS, SKETCH_ROWS

WHOLE = 10**6
pytestmark = pytest.mark.usefixtures("small_models")


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, some columns much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = (
        torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.7
    )
    return torch.randn(tokens, columns, generator=generator) @ mixed.T


@pytest.mark.parametrize(
    ("columns", "block"), [(96, None), (512, 256), (700, 256), (700, WHOLE), (1100, 512)]
)
def test_blocks_are_the_products_of_neighbouring_columns(columns, block):
    moments, tokens = SecondMoments.zeros(columns, block), inputs(300, columns)
    moments.add(tokens[:200].view(2, 100, columns), hold_out=False)
    moments.add(tokens[200:].to(torch.float64), hold_out=False)
    whole, size = tokens.T @ tokens, moments.block
    assert moments.count == 300 and moments.blocks.dtype == torch.float32
    for index, start in enumerate(range(0, columns, size)):
        part = whole[start:start + size, start:start + size]
        width = len(part)
        torch.testing.assert_close(moments.blocks[index, :width, :width], part, rtol=1e-4,
                                   atol=1e-3)
        assert (
            not moments.blocks[index, width:].any() and not moments.blocks[index, :, width:].any()
        )
    torch.testing.assert_close(moments.importance, tokens.square().mean(0), rtol=1e-4, atol=1e-4)


def test_blocks_that_no_format_divides_are_refused():
    with pytest.raises(ValueError, match="multiple of 256"):
        SecondMoments.zeros(1000, 200)


def test_inputs_of_another_layer_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 128\) do not go with moments of 256 columns"):
        SecondMoments.zeros(256).add(torch.ones(4, 128))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 20, 50])
def test_tokens_held_out_are_a_quarter_and_come_from_every_step(steps):
    """Each call has one token, whose column says which step of the sampler it is of."""
    moments = SecondMoments.zeros(64)
    for call in range(40 * steps):
        moments.add(torch.eye(64)[call % steps:call % steps + 1])
        assert moments.count, "the first call's tokens were held out"
    assert moments.held_out_count == pytest.approx(10 * steps, abs=2)
    assert (moments.blocks.diagonal(dim1=-2, dim2=-1)[0, :steps]
            > 20).all(), "a step was hardly seen"
    if 40 * steps <= 4 * SKETCH_ROWS:
        assert moments.sketch[:, :steps].any(0).all(), "a step was never held out"


@pytest.mark.parametrize("lengths", [(5000,), (100,) * 50, (1,) * 400, (77, 4096, 3)])
def test_the_sketch_tells_the_error_that_any_matrix_makes_for_the_tokens_held_out(lengths):
    tokens, moments = inputs(sum(lengths), 192), SecondMoments.zeros(192)
    for part in tokens.split(lengths):
        moments.add(part.bfloat16(), hold_out=True)
    assert moments.held_out_count == len(tokens) and not moments.count and not moments.blocks.any()
    errors = torch.randn(400, 192, generator=torch.Generator().manual_seed(1))
    told, true = (float((errors @ part.T).square().sum()) for part in (moments.sketch, tokens))
    assert told == pytest.approx(true, rel=0.25)


@pytest.mark.parametrize("block", [None, 256])
def test_merged_moments_are_those_of_all_tokens(block):
    first, second, both = (SecondMoments.zeros(512, block) for _ in range(3))
    for moments, seed in ((first, 0), (second, 1)):
        for part in inputs(600, 512, seed).split(100):
            before = moments.held_out_count
            moments.add(part)
            both.add(part, hold_out=moments.held_out_count > before)
    first.merge(second)
    torch.testing.assert_close(first.blocks, both.blocks, rtol=1e-4, atol=1e-2)
    assert (first.count, first.held_out_count) == (both.count, both.held_out_count)
    errors = torch.randn(400, 512, generator=torch.Generator().manual_seed(1))
    told, as_one = (float((errors @ moments.sketch.T).square().sum()) for moments in (first, both))
    assert told == pytest.approx(as_one, rel=0.3)
    with pytest.raises(ValueError, match="cannot be added"):
        first.merge(SecondMoments.zeros(256))


def test_tokens_merged_from_two_equal_runs_count_twice_in_the_sketch():
    """Rows with the same signs would add up to four times."""
    runs = [SecondMoments.zeros(64) for _ in range(2)]
    for moments in runs:
        moments.add(inputs(4000, 64), hold_out=True)
    once = float(runs[0].sketch.square().sum())
    runs[0].merge(runs[1])
    assert float(runs[0].sketch.square().sum()) == pytest.approx(2 * once, rel=0.25)


@pytest.mark.parametrize(("columns", "block"), [(96, None), (700, 256)])
def test_a_file_keeps_moments_in_an_eighth_of_the_bytes(columns, block):
    moments = SecondMoments.zeros(columns, block)
    for seed in range(8):
        moments.add(inputs(200, columns, seed) * torch.logspace(-4, 3, columns))
    tensors = moments.to_tensors()
    kept = SecondMoments.from_tensors(tensors)
    scale = moments.blocks.diagonal(dim1=-2, dim2=-1).sqrt()
    off = (kept.blocks - moments.blocks).abs() / (scale.unsqueeze(-1) * scale.unsqueeze(-2)).clamp(
        min=1e-30
    )
    assert off.max() < 0.01
    torch.testing.assert_close(kept.importance, moments.importance, rtol=1e-5, atol=1e-8)
    assert (kept.columns, kept.count, kept.held_out_count, kept._calls) == (
        columns,
        moments.count,
        moments.held_out_count,
        8,
    )
    assert tensors["factor"].nbytes <= moments.blocks.nbytes / 8 and sum(
        map(torch.Tensor.numel, tensors.values())
    ) == (
        4
        + tensors["factor"].numel()
        + 2 * moments.blocks.shape[:2].numel()
        + (FILE_ROWS + 1) * columns
    )
    again = SecondMoments.from_tensors(kept.to_tensors())
    torch.testing.assert_close(again.sketch, kept.sketch)
    assert again.blocks.isfinite().all()
    kept.add(inputs(4, columns))  # and a later run goes on


def test_what_comes_back_from_a_file_has_no_direction_of_negative_power():
    """Inputs that nearly lie in a plane: rounded correlations would have eigenvalues below zero,
    far beyond any damping."""
    plane = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -2, 1, 256
    )
    moments = SecondMoments.zeros(256)
    moments.add(
        torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)) @ plane, hold_out=False)
    kept = SecondMoments.from_tensors(moments.to_tensors()).blocks[0].double()
    scale = kept.diagonal().sqrt()
    assert torch.linalg.eigvalsh(kept / scale / scale.unsqueeze(-1)).min() > -1e-5
    rounded = (moments.blocks[0].double() / scale / scale.unsqueeze(-1) * 127).round() / 127
    assert torch.linalg.eigvalsh(rounded).min() < -0.01


def test_a_file_tells_the_error_that_any_matrix_makes_nearly_as_well():
    tokens, moments = inputs(5000, 192), SecondMoments.zeros(192)
    moments.add(tokens, hold_out=True)
    errors = torch.randn(400, 192, generator=torch.Generator().manual_seed(1))
    kept = SecondMoments.from_tensors(moments.to_tensors())
    told, true = (float((errors @ part.T).square().sum()) for part in (kept.sketch, tokens))
    assert len(kept.sketch) == FILE_ROWS < SKETCH_ROWS and told == pytest.approx(true, rel=0.35)


def test_columns_that_never_saw_anything_come_back_as_nothing():
    moments = SecondMoments.zeros(64)
    moments.add(torch.nn.functional.pad(inputs(100, 60), (0, 4)))
    kept = SecondMoments.from_tensors(moments.to_tensors())
    assert (
        not kept.blocks[0, 60:].any()
        and not kept.blocks[0, :, 60:].any()
        and kept.blocks[0, :60, :60].any()
    )
    assert not SecondMoments.from_tensors(SecondMoments.zeros(300, 256).to_tensors()).blocks.any()


def test_moments_that_are_no_numbers_go_into_no_file():
    moments = SecondMoments.zeros(64)
    moments.add(torch.full((3, 64), torch.inf))
    with pytest.raises(ValueError, match="NaN or infinite"):
        moments.to_tensors()


def test_tensors_that_are_not_of_moments_are_refused():
    tensors = SecondMoments.zeros(96).to_tensors()
    size = 1 << 20
    no_blocks = {"scales": torch.zeros(0, size), "steps": torch.zeros(0, size),
                 "factor": torch.zeros(0, size * (size - 1) // 2, dtype=torch.int8),
                 "sketch": torch.zeros(FILE_ROWS, 0, dtype=torch.int8), "widths": torch.zeros(0),
                 "counts": torch.tensor([0, 1, 1, 1])}
    for wrong in ({}, no_blocks, tensors | {"counts": tensors["counts"].view(2, 2)},
                  tensors | {"factor": tensors["factor"][:, 1:]},
                  tensors | {"sketch": torch.zeros(FILE_ROWS, 97)},
                  tensors | {"counts": tensors["counts"] + 100}):
        with pytest.raises(ValueError, match="not the tensors of a layer's moments"):
            SecondMoments.from_tensors(wrong)
