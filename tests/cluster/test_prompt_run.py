"""PromptRun on workers that only send events. No Ray is started."""
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
    """A pool of at most two workers, which send events at once.

    Args:
        events_of: item -> (event, data) each; None stands for a worker that ends.
        problem: why workers cannot render.
    """

    def __init__(self, events_of, problem=""):
        self.events_of = events_of
        self.problem = problem
        self.members = []
        self.share = SimpleNamespace(capacity=lambda: {"node": 2}, free=lambda: {"node": 2})
        self.started = 0
        self.events = []
        self.begun = []
        self.cancelled = []

    def start(self, node):
        self.started += 1
        render = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.render))
        actor = SimpleNamespace(render=render, cancel=SimpleNamespace(remote=self.cancelled.append))
        self.members.append(
            PoolWorker(actor, node, calls={iter([({"name": "desk"}, self.problem)]): None}))

    def render(self, graph, extra, prompt_id):
        item = graph["7"]["inputs"]["seed"]
        self.begun.append((item, prompt_id))
        return iter(self.events_of(item))

    def run(self, count, workers=2, check=lambda: None):
        PromptRun(self, GRAPH, [{"7.seed": item} for item in range(count)], {}, workers,
                  lambda *event: self.events.append(event), check).render()


def answer(call):
    """Returns what `ray.get` does for a call of `ready`, or for an event of a stream."""
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


def test_events_of_each_item_come_in_their_order(editor):
    pool = editor(drawn)
    pool.run(5)
    for item in range(5):
        assert [event for event in pool.events if event[0] == item] == [
            (item, "begins", "desk"),
            (item, "images", item),
        ]
    assert len(pool.events) == 10


def test_workers_stay_for_the_next_run_and_no_more_draw_than_are_asked_for(editor):
    pool = editor(drawn)
    pool.run(4)
    members = list(pool.members)
    pool.run(4, workers=1)
    assert (
        pool.members == members
        and pool.started == 2
        and not any(member.calls for member in members)
    )


def test_an_item_whose_worker_ends_goes_to_another(editor):
    ends = [None]
    pool = editor(lambda item: [("begins", "desk"), ends.pop()] if ends else drawn(item))
    pool.run(1)
    assert pool.events == [
        (0, "begins", "desk"),
        (0, "lost", None),
        (0, "begins", "desk"),
        (0, "images", 0),
    ]


def test_an_item_that_always_ends_its_worker_ends_the_run(editor):
    with pytest.raises(MachineError,
                       match="Job 1 was lost 3 times, as its worker ended each time"):
        editor(lambda item: [None]).run(1)


def test_workers_that_never_start_end_the_run(editor, monkeypatch):
    pool = editor(drawn)
    monkeypatch.setattr(ray, "get", lambda call: answer(None))
    with pytest.raises(MachineError, match="A worker ended 3 times while its ComfyUI started"):
        pool.run(1)
    assert pool.members == []


def test_a_worker_that_cannot_draw_is_named_with_an_item_that_waits(editor):
    pool = editor(drawn, problem="no ComfyUI was pool.")

    def check():
        if pool.events:
            raise Stopped

    with pytest.raises(Stopped):
        pool.run(1, check=check)
    assert pool.events == [(0, "unusable", "desk: no ComfyUI was pool.")]


def test_a_cancelled_run_frees_its_workers_for_the_next(editor, monkeypatch):
    def events_of(item):
        return drawn(item) if pool.cancelled else iter(lambda: ("progress", None), 0)

    def wait(calls, num_returns=1, timeout=None):
        return list(calls) if timeout else [], []

    pool = editor(events_of)
    monkeypatch.setattr(ray, "wait", wait)

    def check():
        if len(pool.begun) == 3:  # two run, one waits
            raise Stopped

    with pytest.raises(Stopped):
        pool.run(3, check=check)
    assert sorted(pool.cancelled) == sorted(prompt_id for _, prompt_id in pool.begun)
    pool.begun.clear()
    pool.run(2)
    assert pool.started == 2 and [event for event in pool.events if event[1] == "images"] == [
        (0, "images", 0), (1, "images", 1)]
