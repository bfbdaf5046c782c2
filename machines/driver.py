"""The process between ComfyUI and Ray: a cluster that goes away, or Ray itself, ends no ComfyUI, which imports no ray.

ComfyUI (`machines/pool.py`) writes to its standard input, and it answers on its standard output: messages as `pickled` makes
them. It ends when its input does, so it does not outlive ComfyUI, nor does a Ray that it started itself.
"""
import asyncio
import logging
import os
import pickle
import struct
import sys

from . import by_value
from .graph import one_line
from .joining import join
from .place import MachineError
from .replica import AHEAD, deploy, plan

ATTEMPTS = 3


def install() -> str:
    return f'Run on Ray needs Ray. Install it with: "{sys.executable}" -m pip install "ray[data,serve]"'


def pickled(message) -> bytes:
    data = pickle.dumps(message, protocol=5)
    return struct.pack(">Q", len(data)) + data


def read(stream):
    """The next message of a stream, None at its end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    length = struct.unpack(">Q", head)[0]
    data = stream.read(length)
    return pickle.loads(data) if len(data) == length else None


def connect(address: str):
    """Be a driver of that cluster; with no address, of a Ray on this machine which no other can reach. Raises MachineError."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        join(address or "local")
        import ray
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise MachineError(f"{install()} ({error})") from error
    by_value(ray.cloudpickle)


class Driver:
    """say: takes a message for ComfyUI."""

    def __init__(self, say):
        self.say, self.running = say, {}

    async def serve(self, stream, address: str):
        """Answer the messages of a stream until it ends: ("run", number, request) and ("cancel", number)."""
        loop = asyncio.get_running_loop()
        try:
            connect(address)
        except MachineError as error:
            self.say((None, "error", str(error)))
            return
        while (message := await loop.run_in_executor(None, read, stream)) is not None:
            kind, number, *rest = message
            if kind == "run":
                self.running[number] = asyncio.ensure_future(self.answer(number, *rest))
            elif number in self.running:
                self.running[number].cancel()

    async def answer(self, number: int, request: dict):
        try:
            await self.run(number, **request)
            self.say((number, "done", None))
        except asyncio.CancelledError:
            self.say((number, "cancelled", None))
        except MachineError as error:
            self.say((number, "error", str(error)))
        except Exception as error:
            logging.exception("Run on Ray")
            self.say((number, "error", f"Ray failed: {type(error).__name__}: {one_line(error, 600)}"))
        finally:
            self.running.pop(number, None)

    async def run(self, number: int, graphs: list[dict], extra: dict, workers: int, idle_seconds: float, elsewhere: str,
                  on_cpu: bool):
        """Tells (number, (item, event), data) with the events of `Replica.draw`, and ("lost", None) of an item that goes to
        another worker because its own is gone."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        size, options = plan(machines, workers, on_cpu)
        if not size:
            raise MachineError("The Ray cluster has no machine with a GPU or a CPU to run on.")
        handle = await asyncio.get_running_loop().run_in_executor(None, deploy, size, options, idle_seconds, elsewhere)
        self.say((number, "workers", size))
        free = asyncio.Semaphore(size * AHEAD)
        drawing = [asyncio.ensure_future(self.draw(number, handle, index, graph, extra, free))
                   for index, graph in enumerate(graphs)]
        try:
            await asyncio.gather(*drawing)
        finally:
            for task in drawing:
                task.cancel()
            await asyncio.gather(*drawing, return_exceptions=True)

    async def draw(self, number: int, handle, index: int, graph: dict, extra: dict, free: asyncio.Semaphore):
        from ray.exceptions import ObjectLostError, RayActorError

        async with free:
            for attempt in range(1, ATTEMPTS + 1):
                response = handle.options(stream=True).draw.remote(graph, extra)
                try:
                    async for event, data in response:
                        self.say((number, (index, event), data))
                    return
                except (RayActorError, ObjectLostError) as error:
                    if attempt == ATTEMPTS:
                        raise MachineError(
                            f"Item {index + 1} was lost {ATTEMPTS} times, as its worker ended each time: a machine may lack"
                            f" memory. Ray says: {one_line(error, 300)}") from error
                    self.say((number, (index, "lost"), None))
                finally:
                    response.cancel()  # nothing, where it has ended


def main():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here goes to the log

    def say(message):
        answers.write(pickled(message))
        answers.flush()

    asyncio.run(Driver(say).serve(sys.stdin.buffer, sys.argv[1]))
    answers.close()
