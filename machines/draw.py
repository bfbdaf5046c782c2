"""A worker of a batch: one ComfyUI in an actor of Ray Data's pool, one row at a time."""
import json
import os
import time

from .graph import GraphError, changed
from .machine import difference
from .place import MachineError, arguments, find, versions
from .store import Sent, Store
from .worker import boot, machine

SLOWEST = 10  # seconds that a worker which can draw nothing keeps a row, so that it does not eat those of others


class Draw:
    """What a pool's actor does with a row. home: Ray's id of the node whose folder `out` is, or "" where each node sees it.

    expected: `versions` of the machines that take part. elsewhere: see `place.find`. boot: what starts a ComfyUI there.
    """
    boot = staticmethod(boot)

    def __init__(self, graph: dict, out: str, home: str, writer, expected: dict, elsewhere: str):
        import ray

        self.graph, self.machine, self.host, self.unfit, self.refused = graph, machine(), None, "", 0
        self.name = f"{self.machine['name']}:{os.getpid()}"
        try:
            self.store = Store(out) if home in ("", self.machine["node"]) else Sent(writer)
        except (OSError, ValueError) as error:
            self.unfit = f"cannot write to {out}: {error}"
            return
        try:
            comfyui = find(elsewhere)
            self.unfit = difference(versions(comfyui, arguments(bool(ray.get_gpu_ids()))), expected)
            if not self.unfit:
                self.host = self.boot(elsewhere)
        except MachineError as error:
            self.unfit = str(error)

    def __call__(self, row: dict) -> dict:
        """Draws and saves {"id", "changes", "stamp"}: {"id", "status", "said", "node", "worker", "seconds"}.

        status: drawn (by an earlier attempt too), failed (by its own fault), or left (this machine cannot do it).
        """
        started = time.monotonic()
        try:
            status, said = self._draw(row, started)
            self.refused = 0
        except GraphError as error:
            status, said = "failed", str(error)
        except MachineError as error:
            status, said = "left", f"{self.machine['name']} {error}"
            self.refused += 1
            time.sleep(min(2 ** self.refused / 2, SLOWEST))
        return {"id": row["id"], "status": status, "said": said, "node": self.machine["node"],
                "worker": self.name, "seconds": time.monotonic() - started}

    def _draw(self, row: dict, started: float) -> tuple[str, str]:
        if self.unfit:
            raise MachineError(self.unfit)
        try:
            if self.store.done(row["id"], row["stamp"]):
                return "drawn", ""
            answer = self.host.run(changed(self.graph, json.loads(row["changes"])))
            if not answer.files:
                raise GraphError("the workflow saved no file: it needs a node such as Save Image.")
            self.store.save(row["id"], answer.files, {
                "stamp": row["stamp"], "changes": json.loads(row["changes"]), "worker": self.name,
                "seconds": round(time.monotonic() - started, 3)})
        except OSError as error:
            raise MachineError(f"could not write the pictures: {getattr(error, 'cause', error)}") from error
        return "drawn", ""
