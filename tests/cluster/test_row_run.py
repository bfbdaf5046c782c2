"""Rows on workers that only answer: who gets which row, what is begun again, and what is given up.
No Ray is started."""
import re
import time
from types import SimpleNamespace

import pytest

from featherweight.cluster import actor_pool, row_run
from featherweight.cluster.actor_pool import ActorPool, PoolWorker
from featherweight.cluster.batch_progress import Progress
from featherweight.cluster.row_run import RowRun

ray = pytest.importorskip("ray")


class Cluster(ActorPool):
    """Nodes whose workers answer at once.

    Args:
        answer: (a row's id, node) -> "drawn", "refused" or "failed", or None where the worker ends.
        nodes: node -> workers that it has room for.
        unfit: node -> what keeps its workers from drawing.
    """

    def __init__(self, answer, nodes=("one", "two"), unfit=(), starts=True):
        self.answer, self.nodes, self.unfit, self.starts = (
            answer,
            dict.fromkeys(nodes, 1),
            dict(unfit),
            starts,
        )
        self.free = self.nodes
        self.share = SimpleNamespace(capacity=lambda: dict(self.nodes),
                                     free=lambda: dict(self.free))
        self.members, self.said, self.began, self.started, self.ended = [], [], [], [], 0

    def start(self, node):
        self.started.append(node)
        info = {"name": node}, self.unfit.get(node, "")
        actor = SimpleNamespace(ready=self.call(lambda: info if self.starts else None),
                                render=self.call(lambda row: self.render(row, node)))
        self.members.append(PoolWorker(actor, node, calls={actor.ready.remote(): None}))

    def call(self, function):
        class Call:
            def __init__(self, given):
                self.given, self.answer = given, None

        return SimpleNamespace(remote=lambda *given: Call((function, given)))

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
        function, given = call.given
        if (answer := function(*given)) is None:
            raise ray.exceptions.ActorDiedError
        return answer

    def draw(self, names, workers=(1, 0)):
        """Returns how the rows ended, as counts."""
        progress = Progress(len(names), lambda text, **_: self.said.append(text.strip()))
        try:
            RowRun(self, [{"id": name} for name in names], workers, progress).draw()
        finally:
            self.end_all()
        return dict(progress.counts)

    def ends(self, actor):
        self.ended += 1


@pytest.fixture
def cluster(monkeypatch):
    """Makes a `Cluster` that stands in Ray's place."""
    def make(*given, **options):
        made = Cluster(*given, **options)
        monkeypatch.setattr(ray, "wait", lambda calls, num_returns=1, timeout=None:
                            (list(calls), []))
        monkeypatch.setattr(ray, "get", made.get)
        monkeypatch.setattr(ray, "kill", made.ends)
        return made

    monkeypatch.setattr(actor_pool, "NODE_POLL_SECONDS", 0.01)
    monkeypatch.setattr(RowRun, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(row_run, "MAX_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(row_run, "NO_NODE_SECONDS", 0.1)
    return make


def test_what_one_machine_cannot_do_another_does(cluster):
    found = cluster(lambda name, node: "refused" if node == "one" else "drawn")
    assert found.draw("abc") == {"drawn": 3}
    assert sum("goes to another machine: one has no file" in text for text in found.said) == 1
    assert len(found.started) == found.ended == 2


def test_what_no_machine_can_do_fails_with_the_last_ones_words(cluster):
    found = cluster(lambda name, node: "drawn" if name == "b" else "refused")
    assert found.draw("ab") == {"drawn": 1, "failed": 1}
    assert {"a: one has no file", "a: two has no file"} & {*found.said}
    assert sorted(found.began[-2:]) != [("a", "one")] * 2


def test_a_row_that_only_one_machine_can_draw_reaches_it(cluster):
    """Each machine lacks something, none everything."""
    able = {"a": "one", "b": "two", "c": "three"}
    for order in ("abc", "cba", "bca"):
        found = cluster(lambda name, node: "drawn"
                        if able[name] == node else "refused", ("one", "two", "three"))
        assert found.draw(order) == {"drawn": 3}


def test_rows_for_a_machine_that_goes_fail_with_the_last_words(cluster):
    def answer(name, node):
        if node == "one":
            return "refused"
        if name == "a":
            found.nodes.pop("two")
        return "drawn" if name == "a" else None

    found = cluster(answer)
    assert found.draw("abc") == {"drawn": 1, "failed": 2}
    assert {"b: one has no file", "c: one has no file"} <= {*found.said}


def test_without_a_machine_the_rest_fails_after_a_while_with_a_sentence(cluster):
    found = cluster(lambda name, node: "drawn", ())
    assert found.draw("ab") == {"failed": 2}
    assert found.said[0] == "No machine is left that could draw the rest; waiting 0.1 s for one."
    assert "a: no machine is left that could draw it" in found.said


def test_a_machine_that_comes_back_in_time_draws_the_rest(cluster, monkeypatch):
    monkeypatch.setattr(row_run, "NO_NODE_SECONDS", 60)
    found = cluster(lambda name, node: "drawn", ())
    monkeypatch.setattr(time, "sleep", lambda seconds: found.nodes.update(one=1))
    assert found.draw("ab") == {"drawn": 2}
    assert found.started == ["one"]


def test_a_machine_that_comes_later_gets_workers(cluster):
    def answer(name, node):
        found.nodes["late"] = 2
        time.sleep(0.02)
        return "drawn"

    found = cluster(answer, ("one",))
    assert found.draw([f"{index}" for index in range(20)]) == {"drawn": 20}
    assert found.started == ["one", "late", "late"] and "late" in {node for _, node in found.began}


def test_a_row_whose_worker_always_ends_fails_and_no_other_does(cluster):
    found = cluster(lambda name, node: "drawn" if name != "b" else None)
    assert found.draw("abcd") == {"drawn": 3, "failed": 1}
    assert any(re.match(r"b: its worker ended \d+ times", text) for text in found.said)
    assert sum(name == "b" for name, _ in found.began) == RowRun.LOSSES


def test_what_waited_behind_a_row_that_ends_its_worker_is_not_blamed(cluster):
    found = cluster(lambda name, node: None if name == "a" else "drawn", ("one",))
    assert found.draw("ab") == {"drawn": 1, "failed": 1}
    assert found.began.count(("b", "one")) == 1


def test_a_machine_that_is_unfit_takes_no_part_and_is_named(cluster):
    found = cluster(lambda name, node: "drawn", unfit={"one": "did not start."})
    assert found.draw("ab") == {"drawn": 2}
    assert {node for _, node in found.began} == {"two"} and found.started.count("one") == 1
    assert found.said.count("one did not start: it takes no part.") == 1


def test_where_all_are_unfit_every_row_fails_with_the_reason(cluster):
    found = cluster(lambda name, node: "drawn", ("one",), unfit={"one": "cannot write to /out."})
    assert found.draw("ab") == {"failed": 2}
    assert {"a: one cannot write to /out", "b: one cannot write to /out"} <= {*found.said}


def test_a_machine_whose_comfyui_never_starts_is_given_up(cluster):
    found = cluster(lambda name, node: "drawn", ("one",), starts=False)
    assert found.draw("a") == {"failed": 1}
    assert len(found.started) == RowRun.FAILED_STARTS
    assert any("ended 10 times while ComfyUI started there" in text for text in found.said)


@pytest.mark.parametrize(("workers", "count"), [((1, 0), 3), ((1, 2), 2), ((5, 0), 5), ((9, 9), 8)])
def test_there_are_as_many_workers_as_rows_and_room_and_as_asked(cluster, workers, count):
    found = cluster(lambda name, node: "drawn")
    found.nodes = {"one": 4, "two": 4}
    assert found.draw("abc", workers) == {"drawn": 3}
    assert (
        len(found.started) == count
        and abs(found.started.count("one") - found.started.count("two")) <= 1
    )


def test_a_machine_that_another_program_uses_comes_last(cluster):
    found = cluster(lambda name, node: "drawn")
    found.nodes, found.free = {"one": 4, "two": 2}, {"two": 2}
    assert found.draw("ab") == {"drawn": 2}
    assert found.started == ["two", "two"]
    found.started.clear()
    assert found.draw("abc") == {"drawn": 3}
    assert sorted(found.started) == ["one", "two", "two"]
