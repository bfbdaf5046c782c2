"""The process between ComfyUI and Ray: a cluster that goes away, or Ray itself, ends no ComfyUI,
which imports no ray.

ComfyUI (`cluster/driver_pool.py`) writes requests to its standard input, and it answers on its
standard output, see `messages.py`. It ends when its input does, so it does not outlive ComfyUI, nor
does a Ray that it started itself.
"""
import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time

from . import by_value
from .actor_pool import ActorPool, Share, machine_resources, share_out
from .comfyui_install import MachineError
from .graph import GraphError, one_line
from .messages import MessageError, read, write
from .prompt_run import PromptRun
from .ray_connection import connect, named_cluster
from .worker import PromptWorker

END_SECONDS = 5  # that Ray has to end after ComfyUI
THREADS = 64  # of a worker: prompts that are cancelled, one that is drawn, and one that waits


class Cancelled(Exception):
    """ComfyUI has cancelled this run, or ended."""


def plan(machines: list[dict[str, float]], workers: int = 0,
         on_cpu: bool = False) -> tuple[int, Share]:
    """How many workers there are, and what each of them gets.

    Args:
        machines: {"CPU": .., "GPU": ..} of each.
        workers: 0 for one on each GPU, or on each machine where none has a GPU.
        on_cpu: whether GPUs are left unused.
    """
    share = share_out(machines, gpus=0.0 if on_cpu else None, workers=workers)
    rooms = [room for room in map(share.room, machines) if room]
    return min(workers or (sum(rooms) if share.gpus else len(rooms)), sum(rooms)), share


class Driver:
    """say: takes a header and data for ComfyUI."""

    def __init__(self, say):
        self.say, self.pool = say, None
        self.inbox, self.cancelled, self.is_ending = queue.SimpleQueue(), set(), False

    def take(self, header: dict | None):
        """Takes a request in any thread.

        header: {"op": "run", "number", ...} (see `run`), {"op": "cancel", "number"}, None to end.
        """
        self.is_ending = header is None
        if header and header["op"] == "cancel":
            self.cancelled.add(header["number"])
        else:
            self.inbox.put(header)

    def serve(self):
        """Answers requests in turn. Workers end when none comes for as long as the last one
        said."""
        idle_seconds = None
        while True:
            try:
                request = self.inbox.get(timeout=idle_seconds)
            except queue.Empty:
                self.pool.end_all()
                idle_seconds = None
                continue
            if request is None:
                return
            given = {name: value for name, value in request.items() if name not in ("op", "number")}
            self.answer(request["number"], given)
            idle_seconds = request["idle_seconds"] if self.pool else None

    def answer(self, number: int, request: dict):
        ended = {"number": number, "event": "done"}
        try:
            self.run(number, **request)
        except Cancelled:
            ended = {"number": number, "event": "cancelled"}
        except (MachineError, GraphError, MessageError) as error:
            ended = {"number": number, "event": "error", "message": str(error)}
        except Exception as error:
            logging.exception("Run on Ray")
            ended = {"number": number, "event": "error",
                     "message": f"Ray failed: {type(error).__name__}: {one_line(error, 600)}"}
        self.cancelled.discard(number)
        self.say(ended)

    def run(self, number: int, graph: dict, changes: list[dict], extra: dict, workers: int,
            idle_seconds: float, comfyui: str, on_cpu: bool):
        """Draws the items of a run.

        Says {"number", "event", "item", "value"} for each event of `PromptRun`, where a preview is
        the data, and for each picture {"number", "event": "image", "item", "index", "of", "shape"}
        with its values as the data.
        """
        def tell(item: int, event: str, data):
            header = {"number": number, "event": event, "item": item}
            if event == "preview":
                self.say(header, data)
            elif event == "images":
                for index, image in enumerate(data):
                    position = {"index": index, "of": len(data), "shape": image.shape}
                    self.say({**header, "event": "image", **position}, memoryview(image).cast("B"))
            else:
                self.say({**header, "value": data})

        def check():
            if self.is_ending or number in self.cancelled:
                raise Cancelled

        size, share = plan(list(machine_resources().values()), workers, on_cpu)
        size = min(size, len(changes))
        if not size:
            raise MachineError("The Ray cluster has no machine with a GPU or a CPU to run on.")
        self.say({"number": number, "event": "workers", "value": size})
        if self.pool and self.pool.share != share:
            self.pool.end_all()
            self.pool = None
        self.pool = self.pool or ActorPool(PromptWorker, (comfyui,), share, THREADS)
        PromptRun(self.pool, graph, changes, extra, size, tell, check).draw()


def main():
    """Connects to the cluster that the environment names, or else starts a Ray for this computer
    alone, and serves runs."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here goes to the log
    driver = Driver(lambda header, data=b"": write(answers, header, data))

    def listen():
        with contextlib.suppress(MessageError):
            while (message := read(sys.stdin.buffer)) is not None:
                driver.take(message[0])
        driver.take(None)
        time.sleep(END_SECONDS)  # a daemon's thread: there is no such time if all ends by itself
        if hasattr(os, "killpg"):
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        connect(named_cluster() or "local")
    except MachineError as error:
        with contextlib.suppress(OSError):  # ComfyUI may have ended meanwhile
            driver.say({"number": None, "event": "error", "message": str(error)})
        os._exit(1)  # a thread that waits for an address would hold this process
    import ray

    by_value(ray.cloudpickle)
    driver.say({"number": None, "event": "joined"})
    with contextlib.suppress(OSError):  # ComfyUI may have ended meanwhile
        driver.serve()
    ray.shutdown()
