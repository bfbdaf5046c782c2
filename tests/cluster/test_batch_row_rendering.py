"""RowRun on workers that answer at once: retries, failures and the spread of rows. No Ray runs."""
import re
import time
from types import SimpleNamespace

import pytest

from featherweight.cluster import batch_row_rendering
from featherweight.cluster.actor_pool import ActorPool, PoolWorker
from featherweight.cluster.batch_progress import BatchProgress
from featherweight.cluster.batch_row_rendering import RowRun

ray = pytest.importorskip("ray")


class Cluster(ActorPool):
    """Nodes whose workers answer at once.

    Args:
        answer: (a row's id, node) -> "drawn", "refused" or "failed", or None if the worker ends.
        nodes: names of the nodes, with one worker each.
        problems: node -> why its workers cannot render.
        starts: whether workers start; otherwise they end while they do.
    """

    def __init__(self, answer, nodes=("one", "two"), problems=(), starts=True):
        self.answer = answer
        self.nodes = dict.fromkeys(nodes, 1)  # node -> workers that fit
        self.problems = dict(problems)
        self.starts = starts
        self.free = self.nodes
        self.share = SimpleNamespace(capacity=lambda: dict(self.nodes),
                                     free=lambda: dict(self.free))
        self.members = []
        self.printed = []
        self.began = []  # (row's id, node)
        self.started = []  # nodes
        self.ended = 0  # workers

    def start(self, node):
        self.started.append(node)
        info = {"name": node}, self.problems.get(node, "")
        actor = SimpleNamespace(ready=self.call(lambda: info if self.starts else None),
                                render=self.call(lambda graph, row: self.render(row, node)))
        self.members.append(PoolWorker(actor, node, calls={actor.ready.remote(): None}))

    def call(self, function):
        class Call:
            def __init__(self, *arguments):
                self.arguments = arguments

            def get(self):
                return function(*self.arguments)

        return SimpleNamespace(remote=Call)

    def render(self, row, node):
        self.began.append((row["id"], node))
        status = self.answer(row["id"], node)
        return status and {
            "id": row["id"],
            "status": status,
            "message": f"{node} has no file",
            "worker": f"{node}:1",
        }

    def get(self, call):
        if (answer := call.get()) is None:
            raise ray.exceptions.ActorDiedError
        return answer

    def draw(self, names, workers=(1, 0)):
        """Returns how many rows ended with each status."""
        progress = BatchProgress(len(names), lambda text, **_: self.printed.append(text.strip()))
        try:
            RowRun(self, {}, [{"id": name} for name in names], workers, progress).render()
        finally:
            self.end_all()
        return dict(progress.counts)

    def kill(self, actor):
        self.ended += 1


@pytest.fixture
def cluster(monkeypatch):
    """Returns a function that makes a `Cluster` in place of Ray."""
    def make(*arguments, **options):
        made = Cluster(*arguments, **options)
        monkeypatch.setattr(ray, "wait", lambda calls, num_returns=1, timeout=None:
                            (list(calls), []))
        monkeypatch.setattr(ray, "get", made.get)
        monkeypatch.setattr(ray, "kill", made.kill)
        return made

    monkeypatch.setattr(batch_row_rendering, "NODE_POLL_SECONDS", 0.01)
    monkeypatch.setattr(RowRun, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(batch_row_rendering, "MAX_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(batch_row_rendering, "NO_NODE_SECONDS", 0.1)
    return make


def test_what_one_machine_cannot_do_another_does(cluster):
    pool = cluster(lambda name, node: "refused" if node == "one" else "drawn")
    assert pool.draw("abc") == {"drawn": 3}
    assert sum("goes to another machine: one has no file" in text for text in pool.printed) == 1
    assert len(pool.started) == pool.ended == 2


def test_what_no_machine_can_do_fails_with_the_last_ones_words(cluster):
    pool = cluster(lambda name, node: "drawn" if name == "b" else "refused")
    assert pool.draw("ab") == {"drawn": 1, "failed": 1}
    assert {"a: one has no file", "a: two has no file"} & {*pool.printed}
    assert sorted(pool.began[-2:]) != [("a", "one")] * 2


def test_a_row_that_only_one_machine_can_draw_reaches_it(cluster):
    """Each machine lacks something, none everything."""
    able = {"a": "one", "b": "two", "c": "three"}
    for order in ("abc", "cba", "bca"):
        pool = cluster(lambda name, node: "drawn" if able[name] == node else "refused",
                        ("one", "two", "three"))
        assert pool.draw(order) == {"drawn": 3}


def test_rows_for_a_machine_that_goes_fail_with_the_last_words(cluster):
    def answer(name, node):
        if node == "one":
            return "refused"
        if name == "a":
            pool.nodes.pop("two")
        return "drawn" if name == "a" else None

    pool = cluster(answer)
    assert pool.draw("abc") == {"drawn": 1, "failed": 2}
    assert {"b: one has no file", "c: one has no file"} <= {*pool.printed}


def test_without_a_machine_the_rest_fails_after_a_while_with_a_sentence(cluster):
    pool = cluster(lambda name, node: "drawn", ())
    assert pool.draw("ab") == {"failed": 2}
    assert pool.printed[0] == "No machine is left that could run the rest; waiting 0.1 s for one."
    assert "a: no machine is left that could run it" in pool.printed


def test_a_machine_that_comes_back_in_time_draws_the_rest(cluster, monkeypatch):
    monkeypatch.setattr(batch_row_rendering, "NO_NODE_SECONDS", 60)
    pool = cluster(lambda name, node: "drawn", ())
    monkeypatch.setattr(time, "sleep", lambda seconds: pool.nodes.update(one=1))
    assert pool.draw("ab") == {"drawn": 2}
    assert pool.started == ["one"]


def test_a_machine_that_comes_later_gets_workers(cluster):
    def answer(name, node):
        pool.nodes["late"] = 2
        time.sleep(0.02)
        return "drawn"

    pool = cluster(answer, ("one",))
    assert pool.draw([f"{index}" for index in range(20)]) == {"drawn": 20}
    assert pool.started == ["one", "late", "late"] and "late" in {node for _, node in pool.began}


def test_a_row_whose_worker_always_ends_fails_and_no_other_does(cluster):
    pool = cluster(lambda name, node: "drawn" if name != "b" else None)
    assert pool.draw("abcd") == {"drawn": 3, "failed": 1}
    assert any(re.match(r"b: its worker ended \d+ times", text) for text in pool.printed)
    assert sum(name == "b" for name, _ in pool.began) == RowRun.LOSSES


def test_what_waited_behind_a_row_that_ends_its_worker_is_not_blamed(cluster):
    pool = cluster(lambda name, node: None if name == "a" else "drawn", ("one",))
    assert pool.draw("ab") == {"drawn": 1, "failed": 1}
    assert pool.began.count(("b", "one")) == 1


def test_a_machine_that_is_unusable_takes_no_part_and_is_named(cluster):
    pool = cluster(lambda name, node: "drawn", problems={"one": "did not start."})
    assert pool.draw("ab") == {"drawn": 2}
    assert {node for _, node in pool.began} == {"two"} and pool.started.count("one") == 1
    assert pool.printed.count("one did not start: it takes no part.") == 1


def test_where_all_are_unusable_every_row_fails_with_the_reason(cluster):
    pool = cluster(lambda name, node: "drawn", ("one",), problems={"one": "cannot write to /out."})
    assert pool.draw("ab") == {"failed": 2}
    assert {"a: one cannot write to /out", "b: one cannot write to /out"} <= {*pool.printed}


def test_a_machine_whose_comfyui_never_starts_is_given_up(cluster):
    pool = cluster(lambda name, node: "drawn", ("one",), starts=False)
    assert pool.draw("a") == {"failed": 1}
    assert len(pool.started) == RowRun.FAILED_STARTS
    assert any("ended 10 times while ComfyUI started there" in text for text in pool.printed)


@pytest.mark.parametrize(("workers", "count"), [((1, 0), 3), ((1, 2), 2), ((5, 0), 5), ((9, 9), 8)])
def test_there_are_as_many_workers_as_rows_and_room_and_as_asked(cluster, workers, count):
    pool = cluster(lambda name, node: "drawn")
    pool.nodes = {"one": 4, "two": 4}
    assert pool.draw("abc", workers) == {"drawn": 3}
    assert len(pool.started) == count
    assert abs(pool.started.count("one") - pool.started.count("two")) <= 1


def test_a_machine_that_another_program_uses_comes_last(cluster):
    pool = cluster(lambda name, node: "drawn")
    pool.nodes, pool.free = {"one": 4, "two": 2}, {"two": 2}
    assert pool.draw("ab") == {"drawn": 2}
    assert pool.started == ["two", "two"]
    pool.started.clear()
    assert pool.draw("abc") == {"drawn": 3}
    assert sorted(pool.started) == ["one", "two", "two"]
