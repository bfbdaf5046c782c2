"""What becomes of the rows of a batch: what a machine cannot draw another does, or it fails."""
import collections
import time
from collections.abc import Collection, Sequence

from .actor_pool import ActorPool, PoolWorker, Run
from .batch_progress import Progress
from .graph import one_line

GONE_SECONDS = 600.0  # that a node has to come back, or a cluster to start another
MAX_REST_SECONDS = 10  # of a node that refuses rows, which others must then draw


class RowRun(Run):
    """Rows, {"id", "changes", "stamp"}, on workers of `RowRenderer`.

    progress: is told each row's last answer, once.
    """
    LOSSES, FAILED_STARTS = 6, 10

    def __init__(self, pool: ActorPool, rows: Sequence[dict], workers: tuple[int, int],
                 progress: Progress):
        super().__init__(pool, rows, workers)
        self.progress = progress
        self.reason = "no machine is left that could draw it"
        self.refusing = collections.defaultdict(set)  # id of a row -> nodes that have refused it
        self.reasons: dict[str, str] = {}  # id of a row -> why the last of them has
        self.refusals = collections.Counter()  # of nodes, one after another
        self.gone_since = None

    def begin(self, member: PoolWorker, row: dict):
        return member.actor.render.remote(row)

    def take(self, member: PoolWorker, call, row: dict):
        import ray

        answer = ray.get(call)
        del member.calls[call]
        if answer["status"] == "refused":
            self._refuse(member.node, row, answer["message"])
        else:
            self.refusals[member.node] = 0
            self._finish(answer)

    def next_task(self, node: str) -> dict | None:
        for index, row in enumerate(self.returned):
            if node not in self.refusing[row["id"]]:
                return self.returned.pop(index)
        return self.waiting.popleft() if self.waiting else None

    # --- what cannot be drawn ---

    def look(self, usable: dict[str, int], has_excluded: bool):
        """Gives up rows that no node can draw."""
        if usable:
            self.gone_since = None
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
        """Whether there may soon be a node again."""
        now = time.monotonic()
        if self.gone_since is None:
            self.gone_since = now
            self.progress.tell("No machine is left that could draw the rest; waiting"
                               f" {GONE_SECONDS:g} s for one.")
        return now - self.gone_since < GONE_SECONDS

    def _refuse(self, node: str, row: dict, reason: str):
        """Hands a row on to another node."""
        if node not in self.rests_until:
            self.progress.tell(f"{row['id']} goes to another machine: {reason}")
        self.refusing[row["id"]].add(node)
        self.reasons[row["id"]] = reason
        self.refusals[node] += 1
        seconds = min(2 ** self.refusals[node] / 2, MAX_REST_SECONDS)
        self.rests_until[node] = time.monotonic() + seconds
        if not self._fail_if_refused_by(self.pool.share.capacity().keys() - self.excluded, row):
            self.returned.append(row)

    def _fail_if_refused_by(self, nodes: Collection[str], row: dict) -> bool:
        """Gives a row up that all of the nodes have refused. Returns whether it has."""
        if set(nodes) - self.refusing[row["id"]]:
            return False
        self._fail(row, self.reasons.get(row["id"], self.reason))
        return True

    def unfit(self, node: str, name: str, reason: str):
        self._exclude(node, f"{name} {reason}")

    def never_starts(self, node: str, error: Exception):
        self._exclude(node, f"A machine's workers ended {self.FAILED_STARTS} times while ComfyUI"
                            f" started there: it may lack memory ({one_line(error, 300)})")

    def _exclude(self, node: str, reason: str):
        if node not in self.excluded:
            self.progress.tell(f"{reason}: it takes no part.")
        self.excluded.add(node)
        self.reason = reason

    def give_up(self, row: dict, error: Exception):
        self._fail(row, f"its worker ended {self.LOSSES} times while it was drawn")

    def _fail(self, row: dict, reason: str):
        self._finish({"id": row["id"], "status": "failed", "message": reason, "worker": ""})

    def _finish(self, answer: dict):
        self.left -= 1
        self.progress.add(answer)
