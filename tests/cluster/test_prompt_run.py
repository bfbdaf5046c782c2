"""Items of Run on Ray on workers that only tell: what ComfyUI hears, and what becomes of workers.
No Ray is started."""
from types import SimpleNamespace

import pytest

from featherweight.cluster import actor_pool
from featherweight.cluster.actor_pool import ActorPool, PoolWorker
from featherweight.cluster.comfyui_install import MachineError
from featherweight.cluster.prompt_run import PromptRun

ray = pytest.importorskip("ray")
GRAPH = {"7": {"class_type": "KSampler", "inputs": {"seed": 0}}}


class Stopped(Exception):
    pass


class Editor(ActorPool):
    """Workers, two at most, which tell at once what `tells` gives for an item, (event, data) each.
    In it None stands for a worker that ends.

    unfit: what keeps workers from drawing.
    """

    def __init__(self, tells, unfit=""):
        self.tells, self.unfit, self.members = tells, unfit, []
        self.share = SimpleNamespace(capacity=lambda: {"node": 2}, free=lambda: {"node": 2})
        self.started, self.told, self.begun, self.cancelled = 0, [], [], []

    def start(self, node):
        self.started += 1
        draw = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.draw))
        actor = SimpleNamespace(draw=draw, cancel=SimpleNamespace(remote=self.cancelled.append))
        self.members.append(
            PoolWorker(actor, node, calls={iter([({"name": "desk"}, self.unfit)]): None}))

    def draw(self, graph, extra, prompt_id):
        item = graph["7"]["inputs"]["seed"]
        self.begun.append((item, prompt_id))
        return iter(self.tells(item))

    def run(self, count, workers=2, check=lambda: None):
        PromptRun(self, GRAPH, [{"7.seed": item} for item in range(count)], {}, workers,
                  lambda *event: self.told.append(event), check).draw()


def answer(call):
    """What Ray gives for a call of `ready`, or for what a stream told."""
    value = next(call) if hasattr(call, "__next__") else call
    if value is None:
        raise ray.exceptions.ActorDiedError
    return value


@pytest.fixture
def editor(monkeypatch):
    monkeypatch.setattr(ray, "wait", lambda calls, num_returns=1, timeout=None: (list(calls), []))
    monkeypatch.setattr(ray, "get", answer)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(actor_pool, "NODE_POLL_SECONDS", 0.01)
    monkeypatch.setattr(PromptRun, "WAIT_SECONDS", 0.01)
    return Editor


def drawn(item):
    return [("begins", "desk"), ("images", item)]


def test_what_workers_tell_of_each_item_is_told_in_its_order(editor):
    found = editor(drawn)
    found.run(5)
    for item in range(5):
        assert [event for event in found.told if event[0] == item] == [
            (item, "begins", "desk"),
            (item, "images", item),
        ]
    assert len(found.told) == 10


def test_workers_stay_for_the_next_run_and_no_more_draw_than_are_asked_for(editor):
    found = editor(drawn)
    found.run(4)
    members = list(found.members)
    found.run(4, workers=1)
    assert (
        found.members == members
        and found.started == 2
        and not any(member.calls for member in members)
    )


def test_an_item_whose_worker_ends_goes_to_another(editor):
    ends = [None]
    found = editor(lambda item: [("begins", "desk"), ends.pop()] if ends else drawn(item))
    found.run(1)
    assert found.told == [
        (0, "begins", "desk"),
        (0, "lost", None),
        (0, "begins", "desk"),
        (0, "images", 0),
    ]


def test_an_item_that_always_ends_its_worker_ends_the_run(editor):
    with pytest.raises(MachineError,
                       match="Item 1 was lost 3 times, as its worker ended each time"):
        editor(lambda item: [None]).run(1)


def test_workers_that_never_start_end_the_run(editor, monkeypatch):
    found = editor(drawn)
    monkeypatch.setattr(ray, "get", lambda call: answer(None))
    with pytest.raises(MachineError, match="A worker ended 3 times while its ComfyUI started"):
        found.run(1)
    assert found.members == []


def test_a_worker_that_cannot_draw_is_named_with_an_item_that_waits(editor):
    found = editor(drawn, unfit="no ComfyUI was found.")

    def check():
        if found.told:
            raise Stopped

    with pytest.raises(Stopped):
        found.run(1, check=check)
    assert found.told == [(0, "unusable", "desk: no ComfyUI was found.")]


def test_a_cancelled_run_frees_its_workers_for_the_next(editor, monkeypatch):
    found = editor(lambda item: iter(lambda: ("progress", None), 0)
                   if not found.cancelled else drawn(item))
    monkeypatch.setattr(
        ray, "wait", lambda calls, num_returns=1, timeout=None: (list(calls) if timeout else [], [])
    )

    def check():
        if len(found.begun) == 3:  # two are drawn, one waits
            raise Stopped

    with pytest.raises(Stopped):
        found.run(3, check=check)
    assert sorted(found.cancelled) == sorted(prompt_id for _, prompt_id in found.begun)
    found.begun.clear()
    found.run(2)
    assert found.started == 2 and [event for event in found.told if event[1] == "images"] == [
        (0, "images", 0), (1, "images", 1)]
