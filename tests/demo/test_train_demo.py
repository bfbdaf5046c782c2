"""The training of the demo's model: it goes on where it stopped, on the same numbers, and its
captions never lie."""
import pytest
import torch

from devtools import train_demo

PLAN = (6, 4, 1e-2)  # steps, batch, rate


class Stopped(Exception):
    pass


def trained(path, stop_at=None):
    """The averaged weights of a small model after the plan, and its run; Stopped before step
    `stop_at`."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    run = train_demo.Run(path, dict(model.named_parameters()), PLAN, average=0.9)

    def batch_of(generator):
        run.save()
        if run.step == stop_at:
            raise Stopped
        return torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)

    run.train(batch_of, lambda x, y: (model(x) - y).square().mean(), 2)
    return run.means, model


def test_a_stopped_training_goes_on_where_it_stopped(tmp_path):
    expected, model = trained(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        trained(tmp_path / "stopped.pt", stop_at=3)
    means, resumed = trained(tmp_path / "stopped.pt")
    assert all(torch.equal(means[name], expected[name]) for name in expected)
    assert torch.equal(resumed.weight, model.weight)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    """Two threads with half of a batch each are one with all of it."""
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        run = train_demo.Run(tmp_path / f"{threads}.pt", dict(model.named_parameters()), PLAN)
        run.train(lambda generator: (torch.randn(4, 3, generator=generator),),
                  lambda x: model(x).square().mean(), threads)
        results.append(model.weight.detach())
    assert torch.allclose(*results, atol=1e-6)


def test_captions_may_leave_phrases_out_but_never_lie():
    texts = train_demo.Texts()
    generator, seen = torch.Generator().manual_seed(0), set()
    for number in range(200):
        scene = texts.scenes[number]
        caption = texts.caption(scene, torch.rand(6, generator=generator).tolist())
        asked = train_demo.scenes.asked_for(caption)
        assert asked.items() <= vars(scene).items()
        seen.add(len(asked))
    assert seen >= {6, 4, 2}
