"""Renders the items of *Run on Ray* and passes on what their workers report."""
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from .actor_pool import ActorPool, PoolWorker, Run
from .comfyui_install import MachineError
from .workflow_graph import apply_changes, one_line


class PromptRun(Run):
    """Renders the items of one run on workers of `PromptWorker`.

    Args:
        pool: the workers.
        graph: the workflow.
        changes: for each item, its changes to the workflow.
        extra: see `EmbeddedComfyUI.run`.
        workers: at most this many.
        on_event: is called with (item, event, data): the events of `PromptWorker.render`,
            ("unusable", reason) for a worker that cannot render, and ("lost", None) for an item
            that goes to another worker because its own has ended.
        check: is called ten times a second, and may raise to end the run.
    """
    LOSSES = FAILED_STARTS = 3
    WAIT_SECONDS = 0.1

    def __init__(self, pool: ActorPool, graph: dict, changes: Sequence[dict], extra: dict,
                 workers: int, on_event: Callable[[int, str, object], None],
                 check: Callable[[], None]):
        items = [{"id": number, "changes": change} for number, change in enumerate(changes)]
        super().__init__(pool, items, (1, workers))
        pool.members.sort(key=lambda member: not member.is_ready)
        self.graph = graph
        self.extra = extra
        self.on_event = on_event
        self.check = check

    def render(self):
        """Renders all items. If it raises, it cancels those that run.

        Raises:
            GraphError, MachineError
        """
        try:
            super().render()
        finally:
            for member in self.pool.members:
                for call, item in list(member.calls.items()):
                    if item:
                        member.calls.pop(call)
                        member.actor.cancel.remote(item["prompt_id"])

    def start_task(self, member: PoolWorker, task: dict):
        task["prompt_id"] = str(uuid.uuid4())
        return member.actor.render.options(num_returns="streaming").remote(
            apply_changes(self.graph, task["changes"]), self.extra, task["prompt_id"])

    def on_answer(self, member: PoolWorker, call: Any, task: dict):
        import ray

        try:
            while True:
                self.on_event(task["id"], *ray.get(next(call)))
                if not ray.wait([call], timeout=0)[0]:
                    return
        except StopIteration:
            del member.calls[call]
            self.remaining -= 1

    def on_lost(self, task: dict):
        self.on_event(task["id"], "lost", None)

    def give_up(self, task: dict, error: Exception):
        raise MachineError(f"Job {task['id'] + 1} was lost {self.LOSSES} times, as its worker"
                           " ended each time: a machine may lack memory. Ray says:"
                           f" {one_line(error, 300)}")

    def on_failed_starts(self, node: str, error: Exception):
        raise MachineError(f"A worker ended {self.FAILED_STARTS} times while its ComfyUI started: a"
                           f" machine may lack memory. Ray says: {one_line(error, 300)}")

    def on_unusable(self, node: str, name: str, reason: str):
        """Ends the run. The node is not excluded: a worker of the next run may find it repaired."""
        item = next((item["id"] for item in [*self.returned, *self.waiting]), 0)
        self.on_event(item, "unusable", f"{name}: {reason}.")
