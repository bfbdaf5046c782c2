"""The driver: a process between ComfyUI and Ray, so that no failure of Ray ends ComfyUI.

ComfyUI (`cluster/ray_driver_pool.py`) imports no ray. It writes requests to the driver's standard
input and reads events from its standard output, see `ray_driver_messages.py`. The driver ends when
its input does, so neither it nor a Ray that it started outlives ComfyUI.
"""
import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable

from . import by_value
from .actor_pool import ActorPool, Share, machine_resources, share_out
from .comfyui_install import MachineError
from .prompt_run import PromptRun
from .ray_connection import connect, named_cluster
from .ray_driver_messages import MessageError, read, write
from .worker import PromptWorker
from .workflow_graph import GraphError, one_line

END_SECONDS = 5  # for Ray to end after ComfyUI
THREADS = 64  # of a worker: for prompts that are being cancelled, one that runs and one that waits


class RequestCancelled(Exception):
    """ComfyUI has cancelled this run, or ended."""


def plan_workers(machines: list[dict[str, float]], workers: int = 0,
                 on_cpu: bool = False) -> tuple[int, Share]:
    """Returns how many workers to start and what each of them gets.

    Args:
        machines: resources of each, {"CPU": 8.0, "GPU": 1.0}.
        workers: 0 for one on each GPU, or on each machine if none has a GPU.
        on_cpu: whether GPUs are left unused.
    """
    share = share_out(machines, gpus=0.0 if on_cpu else None, workers=workers)
    counts = [count for count in map(share.worker_count, machines) if count]
    if not workers:
        workers = sum(counts) if share.gpus else len(counts)
    return min(workers, sum(counts)), share


class Driver:
    """Serves the requests of ComfyUI.

    Args:
        send: sends ComfyUI a header, and bytes of data if there are any.
    """

    def __init__(self, send: Callable[..., None]):
        self.send = send
        self.pool: ActorPool | None = None
        self.inbox = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.is_ending = False

    def accept(self, header: dict | None):
        """Accepts a request in any thread.

        Args:
            header: {"op": "run", "number", ...} (see `run`), {"op": "cancel", "number"}, or None
                to end.
        """
        self.is_ending = header is None
        if header and header["op"] == "cancel":
            self.cancelled.add(header["number"])
        else:
            self.inbox.put(header)

    def serve(self):
        """Answers requests in turn, and ends workers that were idle for the last request's time."""
        idle_seconds = None
        while True:
            try:
                request = self.inbox.get(timeout=idle_seconds)
            except queue.Empty:
                if self.pool is not None:
                    self.pool.end_all()
                idle_seconds = None
                continue
            if request is None:
                return
            arguments = {
                name: value for name, value in request.items() if name not in ("op", "number")
            }
            self.answer(request["number"], arguments)
            idle_seconds = request["idle_seconds"] if self.pool else None

    def answer(self, number: int, arguments: dict):
        """Runs a request and sends its last event: done, cancelled or error."""
        header = {"number": number, "event": "done"}
        try:
            self.run(number, **arguments)
        except RequestCancelled:
            header["event"] = "cancelled"
        except (MachineError, GraphError, MessageError) as error:
            header |= {"event": "error", "message": str(error)}
        except Exception as error:
            logging.exception("Run on Ray")
            message = f"Ray failed: {type(error).__name__}: {one_line(error, 600)}"
            header |= {"event": "error", "message": message}
        self.cancelled.discard(number)
        self.send(header)

    def run(self, number: int, graph: dict, changes: list[dict], extra: dict, workers: int,
            idle_seconds: float, comfyui: str, on_cpu: bool):
        """Renders the items of a run.

        Sends {"number", "event", "item", "value"} for each event of `PromptRun`, with a preview as
        data, and for each image {"number", "event": "image", "item", "index", "of", "shape"} with
        its float32 values as data.

        Args:
            number: of the run.
            graph: the workflow.
            changes: for each item, its changes to the workflow.
            extra: see `EmbeddedComfyUI.run`.
            workers: how many to start, see `plan_workers`.
            idle_seconds: after which idle workers end.
            comfyui: the fallback of `find_comfyui`.
            on_cpu: whether GPUs are left unused.
        """
        def on_event(item: int, event: str, data):
            header = {"number": number, "event": event, "item": item}
            if event == "preview":
                self.send(header, data)
            elif event == "images":
                for index, image in enumerate(data):
                    position = {"index": index, "of": len(data), "shape": image.shape}
                    self.send({**header, "event": "image", **position}, memoryview(image).cast("B"))
            else:
                self.send({**header, "value": data})

        def check():
            if self.is_ending or number in self.cancelled:
                raise RequestCancelled

        count, share = plan_workers(list(machine_resources().values()), workers, on_cpu)
        count = min(count, len(changes))
        if not count:
            raise MachineError("The Ray cluster has no machine with a GPU or a CPU to run on.")
        self.send({"number": number, "event": "workers", "value": count})
        if self.pool and self.pool.share != share:
            self.pool.end_all()
            self.pool = None
        self.pool = self.pool or ActorPool(PromptWorker, (comfyui,), share, THREADS)
        PromptRun(self.pool, graph, changes, extra, count, on_event, check).render()


def main():
    """Connects to the cluster that the environment names, or a private Ray, and serves runs."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what this process prints goes to the log
    driver = Driver(lambda header, data=b"": write(output, header, data))

    def listen():
        with contextlib.suppress(MessageError):
            while (message := read(sys.stdin.buffer)) is not None:
                driver.accept(message[0])
        driver.accept(None)
        time.sleep(END_SECONDS)  # cut short if all ends by itself, as this is a daemon thread
        if hasattr(os, "killpg"):
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        connect(named_cluster() or "local")
    except MachineError as error:
        with contextlib.suppress(OSError):  # ComfyUI may have ended meanwhile
            driver.send({"number": None, "event": "error", "message": str(error)})
        os._exit(1)  # a thread that still waits for an address would keep this process alive
    import ray
    from ray import cloudpickle

    by_value(cloudpickle)
    driver.send({"number": None, "event": "joined"})
    with contextlib.suppress(OSError):  # ComfyUI may have ended meanwhile
        driver.serve()
    ray.shutdown()
