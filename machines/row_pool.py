"""Draws rows on actors of Ray on all nodes that can: what a node cannot draw another does, what ends is begun again."""
import collections
import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .graph import one_line
from .progress import Progress

AHEAD = 2  # rows that a worker has: one is drawn, one waits
LOSSES = 6  # workers that may end while they draw one row
FAILED_STARTS = 10  # workers of a node, one after another, that may end while their ComfyUI starts
GATHER_SECONDS = 0.02  # after an answer, for those of other workers, so that a thousand of them are not asked each time
LOOK_SECONDS = 2.0  # between two looks at the nodes
GONE_SECONDS = 600.0  # that a node has to come back, or a cluster to start another
MAX_REST_SECONDS = 10  # of a node that refuses rows, so that it does not draw what others must draw again


@dataclass(eq=False)
class Member:
    """A worker. calls: Ray's reference -> the row that it will answer, None for `Worker.ready`; in their order."""
    actor: object
    node: str
    is_ready: bool = False
    calls: dict[object, dict | None] = field(default_factory=dict)


class RowPool:
    """Workers that draw rows, as many as the nodes have room for.

    Args:
        start: starts an actor of `RowRenderer` on a node.
        capacity, free: say for how many workers each node has room, with what other programs use of it and without.
        excluded: nodes that take no part.
        workers: (fewest, most): no more than rows, but `fewest` in any case; most: 0 for as many as fit.
        progress: is told each row's last answer, once.
    """

    def __init__(self, start: Callable, capacity: Callable[[], dict[str, int]], free: Callable[[], dict[str, int]],
                 excluded: Collection[str], workers: tuple[int, int], progress: Progress):
        self.start, self.capacity, self.free = start, capacity, free
        self.workers, self.progress = workers, progress
        self.excluded, self.reason = set(excluded), "no machine is left that could draw it"
        self.members: list[Member] = []
        self.waiting, self.returned = collections.deque(), []  # returned: to go to another worker
        self.refusing = collections.defaultdict(set)  # id of a row -> nodes that have refused it
        self.reasons: dict[str, str] = {}  # id of a row -> why the last of them has
        self.losses = collections.Counter()  # id of a row -> workers that ended while they drew it
        self.failed_starts, self.refusals = collections.Counter(), collections.Counter()  # of nodes
        self.rests_until: dict[str, float] = {}  # node -> when it gets rows again
        self.gone_since = None

    def render(self, rows: Sequence[dict]):
        """Draws rows, {"id", "changes", "stamp"}, and ends the workers."""
        self.waiting.extend(rows)
        self.left, looked = len(rows), 0.0
        try:
            while self.left:
                if time.monotonic() - looked > LOOK_SECONDS:
                    self._look()
                    looked = time.monotonic()
                self._assign()
                self._wait()
        finally:
            for member in list(self.members):
                self._end(member)

    # --- nodes and workers ---

    def _look(self):
        """Starts workers where there is room, and gives up rows that no node can draw."""
        capacity = self.capacity()
        usable = {node: count for node, count in capacity.items() if node not in self.excluded}
        if usable:
            self.gone_since = None
            self.returned = [row for row in self.returned if not self._fail_if_refused_by(usable, row)]
        elif not any(member.calls for member in self.members) and not self._waits_for_node(bool(capacity)):
            for row in [*self.returned, *self.waiting]:
                self._fail(row, self.reasons.get(row["id"], self.reason))
            self.returned.clear()
            self.waiting.clear()
        fewest, most = self.workers
        target = min(sum(usable.values()), max(self.left, fewest), most or math.inf)
        counts = collections.Counter(member.node for member in self.members if member.node in usable)
        free = self.free() if counts.total() < target else {}
        while counts.total() < target:  # first where no other program is, and on all nodes alike
            node = max(usable, key=lambda node: (free.get(node, 0) > 0, usable[node] - counts[node]))
            self._start(node)
            counts[node] += 1
            free[node] = free.get(node, 0) - 1

    def _waits_for_node(self, has_excluded: bool) -> bool:
        """Whether to wait, where no node can draw. has_excluded: whether there are nodes that take no part."""
        if has_excluded:
            return False
        now = time.monotonic()
        if self.gone_since is None:
            self.gone_since = now
            self.progress.tell("No machine is left that could draw the rest; waiting"
                               f" {GONE_SECONDS:g} s for one.")
        return now - self.gone_since < GONE_SECONDS

    def _start(self, node: str):
        actor = self.start(node)
        self.members.append(Member(actor, node, calls={actor.ready.remote(): None}))

    def _end(self, member: Member):
        """Ends a worker, which may have ended already."""
        import ray

        self.members.remove(member)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(member.actor)

    # --- rows ---

    def _assign(self):
        """Gives each idle worker a row, and then busy ones a second, if there are more than others could begin."""
        now = time.monotonic()
        ready = [member for member in self.members
                 if member.is_ready and self.rests_until.get(member.node, 0) <= now]
        for held in range(AHEAD):
            idle = sum(not member.calls or not member.is_ready for member in self.members)
            for member in ready:
                if len(member.calls) != held or held and len(self.waiting) + len(self.returned) <= idle:
                    continue
                if row := self._next_row(member.node):
                    member.calls[member.actor.render.remote(row)] = row

    def _next_row(self, node: str) -> dict | None:
        for index, row in enumerate(self.returned):
            if node not in self.refusing[row["id"]]:
                return self.returned.pop(index)
        return self.waiting.popleft() if self.waiting else None

    def _wait(self):
        """Waits for answers, and takes all that have come."""
        import ray

        calls = [call for member in self.members for call in member.calls]
        if not calls:
            time.sleep(min(LOOK_SECONDS, 0.5))
            return
        if ray.wait(calls, timeout=LOOK_SECONDS)[0]:
            answered = set(ray.wait(calls, num_returns=len(calls), timeout=GATHER_SECONDS)[0])
            for member in list(self.members):
                for call in [call for call in member.calls if call in answered]:
                    if call in member.calls:
                        self._take(member, call)

    def _take(self, member: Member, call):
        """Takes what a worker answers."""
        import ray

        try:
            answer = ray.get(call)
        except ray.exceptions.RayError as error:  # the worker has ended, or its node
            self._lose(member, error)
            return
        row = member.calls.pop(call)
        if row is None:
            self._greet(member, *answer)
        elif answer["status"] == "refused":
            self._refuse(member.node, row, answer)
        else:
            self.refusals[member.node] = 0
            self._finish(answer)

    def _greet(self, member: Member, info: dict, unfit: str):
        if unfit:
            self._exclude(member.node, f"{info['name']} {unfit.rstrip('.')}")
            self._end(member)
        else:
            member.is_ready, self.failed_starts[member.node] = True, 0

    def _exclude(self, node: str, reason: str):
        if node not in self.excluded:
            self.progress.tell(f"{reason}: it takes no part.")
        self.excluded.add(node)
        self.reason = reason

    def _refuse(self, node: str, row: dict, answer: dict):
        """Hands a row on to another node."""
        if node not in self.rests_until:
            self.progress.tell(f"{row['id']} goes to another machine: {answer['message']}")
        self.refusing[row["id"]].add(node)
        self.reasons[row["id"]] = answer["message"]
        self.refusals[node] += 1
        self.rests_until[node] = time.monotonic() + min(2 ** self.refusals[node] / 2, MAX_REST_SECONDS)
        if not self._fail_if_refused_by(self.capacity().keys() - self.excluded, row):
            self.returned.append(row)

    def _fail_if_refused_by(self, nodes: Collection[str], row: dict) -> bool:
        """Gives a row up that all of the nodes have refused. Returns whether it has."""
        if set(nodes) - self.refusing[row["id"]]:
            return False
        self._fail(row, self.reasons.get(row["id"], self.reason))
        return True

    def _lose(self, member: Member, error: Exception):
        """Hands on what an ended worker had: the first of its rows it was drawing, others it had not begun."""
        rows = list(member.calls.values())
        member.calls.clear()
        self._end(member)
        if not member.is_ready:
            self.failed_starts[member.node] += 1
            if self.failed_starts[member.node] == FAILED_STARTS:
                self._exclude(member.node, f"A machine's workers ended {FAILED_STARTS} times while ComfyUI started there: it"
                                           f" may lack memory ({one_line(error, 300)})")
            return
        drawn, *others = rows
        self.losses[drawn["id"]] += 1
        if self.losses[drawn["id"]] == LOSSES:
            self._fail(drawn, f"its worker ended {LOSSES} times while it was drawn")
        else:
            others.insert(0, drawn)
        self.returned += others

    def _fail(self, row: dict, reason: str):
        self._finish({"id": row["id"], "status": "failed", "message": reason, "worker": ""})

    def _finish(self, answer: dict):
        self.left -= 1
        self.progress.add(answer)
