"""Renders the rows of a batch; a row that one machine cannot render goes to another, or fails."""
import collections
import time
from collections.abc import Collection, Sequence
from typing import Any

from .actor_pool import ActorPool, PoolWorker, Run
from .batch_progress import BatchProgress
from .workflow_graph import one_line

NO_NODE_SECONDS = 600.0  # to wait for a node when none is left
MAX_PAUSE_SECONDS = 10  # of a node that refuses rows, so that others get them


class RowRun(Run):
    """Renders rows on workers of `RowRenderer`.

    Args:
        pool: the workers.
        rows: {"id", "changes", "stamp"} each.
        workers: (minimum, maximum), see `Run`.
        progress: gets each row's last answer, once.
    """
    LOSSES = 6
    FAILED_STARTS = 10

    def __init__(self, pool: ActorPool, rows: Sequence[dict], workers: tuple[int, int],
                 progress: BatchProgress):
        super().__init__(pool, rows, workers)
        self.progress = progress
        self.reason = "no machine is left that could run it"
        self.refused_by = collections.defaultdict(set)  # row's id -> nodes that refused it
        self.reasons: dict[str, str] = {}  # row's id -> why the last of them refused it
        self.refusals = collections.Counter()  # by node, in a row
        self.without_node_since: float | None = None

    def start_task(self, member: PoolWorker, task: dict):
        return member.actor.render.remote(task)

    def on_answer(self, member: PoolWorker, call: Any, task: dict):
        import ray

        answer: Any = ray.get(call)
        del member.calls[call]
        if answer["status"] == "refused":
            self._on_refused(member.node, task, answer["message"])
        else:
            self.refusals[member.node] = 0
            self._finish(answer)

    def next_task(self, node: str) -> dict | None:
        for index, row in enumerate(self.returned):
            if node not in self.refused_by[row["id"]]:
                return self.returned.pop(index)
        return self.waiting.popleft() if self.waiting else None

    # --- what cannot be rendered ---

    def on_capacity(self, usable: dict[str, int], has_excluded: bool):
        """Gives up rows that no node can render."""
        if usable:
            self.without_node_since = None
            rows = self.returned
            self.returned = [row for row in rows if not self._fail_if_refused_by(usable, row)]
        elif any(member.calls for member in self.pool.members):
            return
        elif has_excluded or not self._waits_for_node():
            for row in [*self.returned, *self.waiting]:
                self._fail(row, self.reasons.get(row["id"], self.reason))
            self.returned.clear()
            self.waiting.clear()

    def _waits_for_node(self) -> bool:
        """Starts to wait for a node, or returns whether the wait goes on."""
        now = time.monotonic()
        if self.without_node_since is None:
            self.without_node_since = now
            self.progress.log("No machine is left that could run the rest; waiting"
                              f" {NO_NODE_SECONDS:g} s for one.")
        return now - self.without_node_since < NO_NODE_SECONDS

    def _on_refused(self, node: str, row: dict, reason: str):
        """Returns a row for another node, and pauses the one that refused it."""
        if node not in self.paused_until:
            self.progress.log(f"{row['id']} goes to another machine: {reason}")
        self.refused_by[row["id"]].add(node)
        self.reasons[row["id"]] = reason
        self.refusals[node] += 1
        seconds = min(2 ** self.refusals[node] / 2, MAX_PAUSE_SECONDS)
        self.paused_until[node] = time.monotonic() + seconds
        if not self._fail_if_refused_by(self.pool.share.capacity().keys() - self.excluded, row):
            self.returned.append(row)

    def _fail_if_refused_by(self, nodes: Collection[str], row: dict) -> bool:
        """Gives a row up if all of the nodes have refused it. Returns whether it did."""
        if set(nodes) - self.refused_by[row["id"]]:
            return False
        self._fail(row, self.reasons.get(row["id"], self.reason))
        return True

    def on_unusable(self, node: str, name: str, reason: str):
        self._exclude(node, f"{name} {reason}")

    def on_failed_starts(self, node: str, error: Exception):
        self._exclude(node, f"A machine's workers ended {self.FAILED_STARTS} times while ComfyUI"
                            f" started there: it may lack memory ({one_line(error, 300)})")

    def _exclude(self, node: str, reason: str):
        if node not in self.excluded:
            self.progress.log(f"{reason}: it takes no part.")
        self.excluded.add(node)
        self.reason = reason

    def give_up(self, task: dict, error: Exception):
        self._fail(task, f"its worker ended {self.LOSSES} times while it ran")

    def _fail(self, row: dict, reason: str):
        self._finish({"id": row["id"], "status": "failed", "message": reason, "worker": ""})

    def _finish(self, answer: dict):
        self.remaining -= 1
        self.progress.add(answer)
