"""One ComfyUI in one process of Ray: actors of a program and those of *Run on Ray* share this class.

Ray Data's workers (`machines/batch.py`) take its `boot`.
"""
import asyncio
import concurrent.futures
import os
import platform
import uuid

from .host import Host
from .place import arguments, find


def boot(elsewhere: str = "") -> Host:
    """This machine's ComfyUI, started in this process. elsewhere: see `place.find`. Raises MachineError."""
    import ray

    return Host(find(elsewhere), arguments(bool(ray.get_gpu_ids())))


def machine() -> dict[str, str]:
    """{"name": of this machine, "node": Ray's id of it}: several of Ray's nodes may be on one machine."""
    import ray

    return {"name": os.environ.get("FEATHERWEIGHT_MACHINE") or platform.node(), "node": ray.get_runtime_context().get_node_id()}


class Worker:
    """`elsewhere`: see `place.find`. One prompt runs at a time, further ones wait."""

    def __init__(self, elsewhere: str = ""):
        self.host, self.machine = boot(elsewhere), machine()
        self.threads = concurrent.futures.ThreadPoolExecutor(64)  # prompts that wait in the host's own queue

    async def run(self, graph: dict, extra: dict | None = None) -> tuple[dict[str, bytes], object]:
        """(files, images) of `Answer`. Cancelling the call ends this prompt and no other."""
        return [data async for event, data in self.stream(graph, extra) if event == "answer"][0]

    async def stream(self, graph: dict, extra: dict | None = None, prompt_id: str = ""):
        """What the host tells about a prompt as it comes, (event, data), and at last ("answer", (files, images)).

        extra, prompt_id: see `Host.run`. Ending the stream early ends this prompt and no other. Raises GraphError,
        MachineError and Cancelled.
        """
        loop, prompt_id, events = asyncio.get_running_loop(), prompt_id or str(uuid.uuid4()), asyncio.Queue()

        def heard(*event):
            loop.call_soon_threadsafe(events.put_nowait, event)

        running = loop.run_in_executor(self.threads, self.host.run, graph, heard, prompt_id, extra)
        running.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            answer = await running
            yield "answer", (answer.files, answer.images)
        finally:
            if not running.done():
                self.host.cancel(prompt_id)
                running.add_done_callback(lambda found: found.cancelled() or found.exception())  # nobody waits for it

    async def facts(self) -> dict:
        """Of this worker: its machine, process, and how long its ComfyUI took to start."""
        return {**self.machine, "pid": os.getpid(), "boot": self.host.boot_seconds, "comfyui": os.getcwd()}
