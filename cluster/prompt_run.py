"""What becomes of the items of *Run on Ray*: ComfyUI hears what their workers tell."""
import uuid
from collections.abc import Callable, Sequence

from .actor_pool import ActorPool, PoolWorker, Run
from .comfyui_install import MachineError
from .graph import apply_changes, one_line


class PromptRun(Run):
    """The items of one run, on workers of `PromptWorker`.

    Args:
        graph: the workflow; changes: for each item its changes to it; extra: see
        `EmbeddedComfyUI.run`.
        workers: at most so many.
        tell: is called with (item, event, data), the events of `PromptWorker.draw` and
            ("lost", None) for an item that goes to another worker because its own has ended.
        check: is called ten times a second, and may raise.
    """
    LOSSES = FAILED_STARTS = 3
    WAIT_SECONDS = 0.1

    def __init__(self, pool: ActorPool, graph: dict, changes: Sequence[dict], extra: dict,
                 workers: int, tell: Callable, check: Callable):
        items = [{"id": number, "changes": each} for number, each in enumerate(changes)]
        super().__init__(pool, items, (1, workers))
        pool.members.sort(key=lambda member: not member.is_ready)
        self.graph, self.extra, self.tell, self.check = graph, extra, tell, check

    def draw(self):
        """Draws all items. When it raises, none goes on. Raises GraphError, MachineError."""
        try:
            super().draw()
        finally:
            for member in self.pool.members:
                for call in [call for call, item in member.calls.items() if item]:
                    member.actor.cancel.remote(member.calls.pop(call)["prompt_id"])

    def begin(self, member: PoolWorker, item: dict):
        item["prompt_id"] = str(uuid.uuid4())
        return member.actor.draw.options(num_returns="streaming").remote(
            apply_changes(self.graph, item["changes"]), self.extra, item["prompt_id"])

    def take(self, member: PoolWorker, call, item: dict):
        import ray

        try:
            while True:
                self.tell(item["id"], *ray.get(next(call)))
                if not ray.wait([call], timeout=0)[0]:
                    return
        except StopIteration:
            del member.calls[call]
            self.left -= 1

    def lost(self, item: dict):
        self.tell(item["id"], "lost", None)

    def give_up(self, item: dict, error: Exception):
        raise MachineError(f"Item {item['id'] + 1} was lost {self.LOSSES} times, as its worker"
                           " ended each time: a machine may lack memory. Ray says:"
                           f" {one_line(error, 300)}")

    def never_starts(self, node: str, error: Exception):
        raise MachineError(f"A worker ended {self.FAILED_STARTS} times while its ComfyUI started: a"
                           f" machine may lack memory. Ray says: {one_line(error, 300)}")

    def unfit(self, node: str, name: str, reason: str):
        """Ends the run; a worker that starts later may find it mended."""
        item = next((item["id"] for item in [*self.returned, *self.waiting]), 0)
        self.tell(item, "unfit", f"{name}: {reason}.")
