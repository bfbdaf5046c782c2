"""Renders the rows of a batch; a row that one machine cannot render goes to another, or fails."""
import collections
import math
import time
from collections.abc import Collection, Sequence
from typing import Any

from .actor_pool import ActorPool, PoolWorker
from .batch_progress import BatchProgress
from .workflow_graph import one_line

ROWS_PER_WORKER = 2  # one is rendered, one waits
GATHER_SECONDS = 0.02  # to collect further answers after one, instead of polling for each
NODE_POLL_SECONDS = 2.0  # between two queries of the cluster's nodes
NO_NODE_SECONDS = 600.0  # to wait for a node when none is left
MAX_PAUSE_SECONDS = 10  # of a node that refuses rows, so that others get them


class RowRun:
    """Renders rows on workers of `RowRenderer`, as many as fit on the nodes.

    Attributes:
        LOSSES: how many workers may end while they render a row before it fails.
        FAILED_STARTS: how many workers of a node may end in a row while they start.

    Args:
        pool: the workers, which stay from run to run.
        graph: the workflow, or Ray's reference to it.
        rows: {"id", "changes", "stamp"} each.
        workers: (minimum, maximum); no more than there are rows, but the minimum in any case.
            maximum 0: as many as fit.
        progress: gets each row's last answer, once.
    """
    LOSSES = 6
    FAILED_STARTS = 10
    WAIT_SECONDS = NODE_POLL_SECONDS  # for answers, between two calls of `check`

    def __init__(self, pool: ActorPool, graph: Any, rows: Sequence[dict],
                 workers: tuple[int, int], progress: BatchProgress):
        self.pool = pool
        pool.members.sort(key=lambda member: not member.is_ready)
        self.graph = graph
        self.workers = workers
        self.progress = progress
        self.waiting = collections.deque(rows)
        self.returned: list[dict] = []  # for other workers, before those that wait
        self.remaining = len(self.waiting)
        self.excluded: set[str] = set()  # nodes that take no part
        self.losses = collections.Counter()  # row's id -> workers that ended while rendering it
        self.failed_starts = collections.Counter()  # by node, in a row
        self.paused_until: dict[str, float] = {}  # node -> time when it gets rows again
        self.reason = "no machine is left that could run it"
        self.refused_by = collections.defaultdict(set)  # row's id -> nodes that refused it
        self.reasons: dict[str, str] = {}  # row's id -> why the last of them refused it
        self.refusals = collections.Counter()  # by node, in a row
        self.without_node_since: float | None = None

    def render(self):
        """Renders all rows."""
        polled = -math.inf
        while self.remaining:
            self.check()
            if time.monotonic() - polled > NODE_POLL_SECONDS:
                self._start_workers()
                polled = time.monotonic()
            self._assign()
            self._wait()

    def check(self):
        """Is called now and then; a subclass may raise here to end the run."""

    def _start_workers(self):
        """Starts workers where they fit, first where no other program runs, and spread evenly."""
        capacity = self.pool.share.capacity()
        usable = {node: count for node, count in capacity.items() if node not in self.excluded}
        self._on_capacity(usable, bool(capacity) and not usable)
        minimum, maximum = self.workers
        target = min(sum(usable.values()), max(self.remaining, minimum), maximum or math.inf)
        nodes = [member.node for member in self.pool.members]
        counts = collections.Counter(node for node in nodes if node in usable)
        free = self.pool.share.free() if counts.total() < target else {}
        while counts.total() < target:
            node = min(usable, key=lambda node: (
                free.get(node, 0) <= 0, counts[node] / usable[node]))
            self.pool.start(node)
            counts[node] += 1
            free[node] = free.get(node, 0) - 1

    def _assign(self):
        """Gives each idle worker a row, and a busy one a second that no idle one can begin."""
        now = time.monotonic()
        members = self.pool.members[:self.workers[1] or None]
        ready = [member for member in members
                 if member.is_ready and self.paused_until.get(member.node, 0) <= now]
        for busy_with in range(ROWS_PER_WORKER):
            idle = sum(not member.calls or not member.is_ready for member in members)
            for member in ready:
                if len(member.calls) != busy_with:
                    continue
                if busy_with and len(self.waiting) + len(self.returned) <= idle:
                    break
                if row := self._next_row(member.node):
                    member.calls[member.actor.render.remote(self.graph, row)] = row

    def _wait(self):
        """Waits for answers, and takes all that have come."""
        import ray

        calls = [call for member in self.pool.members for call in member.calls]
        if not calls:
            time.sleep(min(self.WAIT_SECONDS, 0.5))
            return
        if ray.wait(calls, timeout=self.WAIT_SECONDS)[0]:
            answered = set(ray.wait(calls, num_returns=len(calls), timeout=GATHER_SECONDS)[0])
            for member in list(self.pool.members):
                for call in [call for call in member.calls if call in answered]:
                    if call in member.calls:
                        self._take_answer(member, call)

    def _take_answer(self, member: PoolWorker, call):
        import ray.exceptions

        row = member.calls[call]
        try:
            answer: Any = ray.get(call)
        except ray.exceptions.RayError as error:  # the worker or its node has ended
            self._on_end(member, error)
            return
        del member.calls[call]
        if row is None:
            self._on_ready(member, *answer)
        elif answer["status"] == "refused":
            self._on_refused(member.node, row, answer["message"])
        else:
            self.refusals[member.node] = 0
            self._finish(answer)

    def _on_ready(self, member: PoolWorker, info: dict, problem: str):
        if problem:
            self.pool.end(member)
            self._exclude(member.node, f"{info['name']} {problem.rstrip('.')}")
        else:
            member.is_ready = True
            self.failed_starts[member.node] = 0

    def _on_end(self, member: PoolWorker, error: Exception):
        """Returns an ended worker's rows. A loss is counted for the first, which it rendered."""
        rows = [row for row in member.calls.values() if row is not None]
        self.pool.end(member)
        if not member.is_ready:
            self.failed_starts[member.node] += 1
            if self.failed_starts[member.node] == self.FAILED_STARTS:
                self._exclude(
                    member.node, f"A machine's workers ended {self.FAILED_STARTS} times while"
                    f" ComfyUI started there: it may lack memory ({one_line(error, 300)})")
            return
        member.calls.clear()
        self.losses[rows[0]["id"]] += 1
        if self.losses[rows[0]["id"]] == self.LOSSES:
            self._fail(rows.pop(0), f"its worker ended {self.LOSSES} times while it ran")
        self.returned += rows

    def _next_row(self, node: str) -> dict | None:
        """Takes a row for a node from those that wait."""
        for index, row in enumerate(self.returned):
            if node not in self.refused_by[row["id"]]:
                return self.returned.pop(index)
        return self.waiting.popleft() if self.waiting else None

    # --- what cannot be rendered ---

    def _on_capacity(self, usable: dict[str, int], has_excluded: bool):
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

    def _exclude(self, node: str, reason: str):
        if node not in self.excluded:
            self.progress.log(f"{reason}: it takes no part.")
        self.excluded.add(node)
        self.reason = reason

    def _fail(self, row: dict, reason: str):
        self._finish({"id": row["id"], "status": "failed", "message": reason, "worker": ""})

    def _finish(self, answer: dict):
        self.remaining -= 1
        self.progress.add(answer)
