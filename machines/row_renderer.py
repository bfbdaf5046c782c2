"""Draws the rows of a batch: an actor of Ray with one ComfyUI, one row at a time."""
import json
import os
import time

from .graph import GraphError, changed, one_line
from .place import MachineError
from .store import RemoteStore, Store
from .worker import Worker


class RowRenderer(Worker):
    """Draws rows and saves their pictures.

    Args:
        graph: the workflow.
        out: where pictures go, see `Store`.
        home: Ray's id of the node whose folder `out` is, "" where every node sees it.
        writer: the actor that writes there for other nodes.
        comfyui, expected: see `Worker`.
    """

    def __init__(self, graph: dict, out: str, home: str, writer, comfyui: str, expected: dict):
        super().__init__(comfyui, expected)
        self.graph, self.name = graph, f"{self.info['name']}:{os.getpid()}"
        try:
            self.store = Store(out) if home in ("", self.info["node"]) else RemoteStore(writer)
        except (OSError, ValueError) as error:
            self.unfit = f"cannot write to {out}: {error}"

    def render(self, row: dict) -> dict:
        """Draws and saves a row, {"id", "changes", "stamp"}.

        Returns:
            {"id", "status", "message", "worker", "seconds"}. status: "drawn" (by an earlier attempt too), "failed" (by its
            own fault), or "refused" (another machine may draw it).
        """
        started = time.monotonic()
        status, message = "drawn", ""
        try:
            self._render(row, started)
        except MachineError as error:
            status, message = "refused", f"{self.info['name']} {error}"
        except GraphError as error:
            status, message = "failed", str(error)
        except Exception as error:
            status, message = "failed", one_line(f"{type(error).__name__}: {error}")
        return {"id": row["id"], "status": status, "message": message, "worker": self.name,
                "seconds": time.monotonic() - started}

    def _render(self, row: dict, started: float):
        try:
            if self.store.done(row["id"], row["stamp"]):
                return
            changes = json.loads(row["changes"])
            answer = self.host.run(changed(self.graph, changes))
            if not answer.files:
                raise GraphError("the workflow saved no file: it needs a node such as Save Image.")
            self.store.save(row["id"], answer.files, {
                "stamp": row["stamp"], "changes": changes, "worker": self.name,
                "seconds": round(time.monotonic() - started, 3)})
        except OSError as error:
            raise MachineError(f"could not write the pictures: {getattr(error, 'cause', error)}") from error
