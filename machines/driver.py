"""The process between ComfyUI and Ray: a cluster that goes away, or Ray itself, ends no ComfyUI, which imports no ray.

ComfyUI (`machines/pool.py`) writes requests to its standard input, and it answers on its standard output, see `messages.py`. It
ends when its input does, so it does not outlive ComfyUI, nor does a Ray that it started itself.
"""
import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time

from . import by_value
from .actor_pool import ActorPool, Run, plan
from .graph import GraphError, one_line
from .joining import join, named_cluster
from .messages import MessageError, read, write
from .place import MachineError

END_SECONDS = 5  # that Ray has to end after ComfyUI


def install() -> str:
    return f'Run on Ray needs Ray. Install it with: "{sys.executable}" -m pip install ray'


class Driver:
    """say: takes a header and data for ComfyUI."""

    def __init__(self, say):
        self.say, self.runs, self.pool = say, {}, None

    def take(self, header: dict):
        """Answers a request: {"op": "run", "number", ...} (see `run`), or {"op": "cancel", "number"}."""
        request = dict(header)
        op, number = request.pop("op"), request.pop("number")
        if op == "run":
            self.runs[number] = asyncio.ensure_future(self.answer(number, request))
        elif number in self.runs:
            self.runs[number].cancel()

    async def answer(self, number: int, request: dict):
        ended = {"number": number, "event": "done"}
        try:
            await self.run(number, **request)
        except asyncio.CancelledError:
            ended = {"number": number, "event": "cancelled"}
        except (MachineError, GraphError, MessageError) as error:
            ended = {"number": number, "event": "error", "message": str(error)}
        except Exception as error:
            logging.exception("Run on Ray")
            ended = {"number": number, "event": "error",
                     "message": f"Ray failed: {type(error).__name__}: {one_line(error, 600)}"}
        self.runs.pop(number, None)
        self.say(ended)

    async def run(self, number: int, graph: dict, changes: list[dict], extra: dict, workers: int, idle_seconds: float,
                  comfyui: str, on_cpu: bool):
        """Draws the items of a run.

        Says {"number", "event", "item", "value"} for each event of `Run`, where a preview is the data, and for each picture
        {"number", "event": "image", "item", "index", "of", "shape"} with its values as the data.
        """
        import ray

        def tell(item: int, event: str, data):
            header = {"number": number, "event": event, "item": item}
            if event == "preview":
                self.say(header, data)
            elif event == "images":
                for index, image in enumerate(data):
                    self.say({**header, "event": "image", "index": index, "of": len(data), "shape": image.shape},
                             memoryview(image).cast("B"))
            else:
                self.say({**header, "value": data})

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        size, share = plan(machines, workers, on_cpu)
        size = min(size, len(changes))
        if not size:
            raise MachineError("The Ray cluster has no machine with a GPU or a CPU to run on.")
        self.say({"number": number, "event": "workers", "value": size})
        self.pool = self.pool or ActorPool(comfyui)
        try:
            await Run(self.pool, graph, changes, extra, tell).run(size, share)
        finally:
            self.pool.end_later(idle_seconds)


def main():
    """Connects to the cluster that the environment names, or else starts a Ray for this computer alone, and serves runs."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here goes to the log
    loop = asyncio.new_event_loop()
    driver = Driver(lambda header, data=b"": write(answers, header, data))

    def listen():
        with contextlib.suppress(MessageError):
            while (message := read(sys.stdin.buffer)) is not None:
                loop.call_soon_threadsafe(driver.take, message[0])
        loop.call_soon_threadsafe(loop.stop)
        time.sleep(END_SECONDS)  # a daemon's thread: there is no such time if all ends by itself
        if hasattr(os, "killpg"):
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        join(named_cluster() or "local")
        import ray
    except (ImportError, MachineError) as error:
        message = str(error) if isinstance(error, MachineError) else f"{install()} ({error})"
        with contextlib.suppress(OSError):  # ComfyUI may have ended meanwhile
            driver.say({"number": None, "event": "error", "message": message})
        os._exit(1)  # a thread that waits for an address would hold this process
    by_value(ray.cloudpickle)
    driver.say({"number": None, "event": "joined"})
    asyncio.set_event_loop(loop)
    loop.run_forever()
    ray.shutdown()
