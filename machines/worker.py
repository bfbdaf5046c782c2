"""One ComfyUI in one actor of Ray: what a batch and *Run on Ray* share, and the actor of *Run on Ray*."""
import asyncio
import concurrent.futures
import os
import platform

from .graph import GraphError, one_line
from .heard import PREVIEW_WITH_METADATA
from .host import Cancelled, Host
from .place import MachineError, arguments, difference, find, versions

CANCEL_SECONDS = 0.2  # between two attempts to cancel a prompt


def boot(comfyui: str) -> Host:
    """Starts the ComfyUI of a folder in this process. Raises MachineError."""
    import ray

    return Host(comfyui, arguments(bool(ray.get_gpu_ids())))


def node_info() -> dict[str, str]:
    """{"name": of this machine, "node": Ray's id}: several of Ray's nodes may be on one machine."""
    import ray

    return {"name": os.environ.get("FEATHERWEIGHT_MACHINE") or platform.node(),
            "node": ray.get_runtime_context().get_node_id()}


class Worker:
    """A ComfyUI in this process. unfit: what keeps it from drawing, or "".

    Args:
        comfyui: where ComfyUI is on a machine that does not name one, see `place.find`.
        expected: `place.versions` that it must have, if any.
    """
    boot = staticmethod(boot)

    def __init__(self, comfyui: str = "", expected: dict[str, str] | None = None):
        self.info, self.host, self.unfit = node_info(), None, ""
        try:
            folder = find(comfyui)
            self.unfit = difference(versions(folder, arguments(True)), expected or {})
            if not self.unfit:
                self.host = self.boot(folder)
        except MachineError as error:
            self.unfit = str(error)
        except Exception as error:  # one that is raised here would only end the actor
            self.unfit = f"its ComfyUI did not start: {one_line(f'{type(error).__name__}: {error}')}"

    def ready(self) -> tuple[dict, str]:
        """Returns ({"name", "node", "pid"}, what keeps it from drawing or "")."""
        return {**self.info, "pid": os.getpid()}, self.unfit


class PromptWorker(Worker):
    """Draws prompts of one editor. One runs at a time, further ones wait."""

    def __init__(self, comfyui: str = ""):
        super().__init__(comfyui)
        self.running = set()
        self.threads = concurrent.futures.ThreadPoolExecutor(64)  # prompts that wait in ComfyUI's queue

    async def stream(self, graph: dict, extra: dict, prompt_id: str):
        """Yields ComfyUI's (event, data) of a prompt as they come, and at last ("answer", Answer).

        Args:
            extra, prompt_id: see `Host.run`.

        Raises:
            GraphError, MachineError, Cancelled: see `Host.run`.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def on_event(*event):
            loop.call_soon_threadsafe(events.put_nowait, event)

        self.running.add(prompt_id)
        try:
            answer = loop.run_in_executor(self.threads, self.host.run, graph, on_event, prompt_id, extra)
            answer.add_done_callback(lambda _: events.put_nowait(None))
            while (event := await events.get()) is not None:
                yield event
            yield "answer", await answer
        finally:
            self.running.discard(prompt_id)

    async def draw(self, graph: dict, extra: dict, prompt_id: str):
        """Draws a prompt, as a stream of (event, data) in values that need no class of this pack.

        ("begins", machine's name), ("progress", (node, value, maximum)), ("preview", JPEG or PNG), and at last one of
        ("images", array (N, H, W, C)), ("failed", sentence), ("unfit", what this machine lacks), or nothing where the prompt
        was cancelled.
        """
        name = self.info["name"]
        try:
            async for event, data in self.stream(graph, extra, prompt_id):
                if event == "execution_start":
                    yield "begins", name
                elif event == "progress":
                    yield "progress", (data["node"], data["value"], data["max"])
                elif event == PREVIEW_WITH_METADATA:
                    yield "preview", data[4 + int.from_bytes(data[:4], "big"):]
                elif event == "answer":
                    yield "images", data.images.cpu().float().contiguous().numpy()
        except GraphError as error:
            yield "failed", str(error)
        except MachineError as error:
            yield "unfit", f"{name}: {error}"
        except Cancelled:
            pass

    async def cancel(self, prompt_id: str):
        """Ends a prompt, whether it waits or runs, and no other; returns when it has ended."""
        while prompt_id in self.running:  # it may not have reached ComfyUI's queue yet
            self.host.cancel(prompt_id)
            await asyncio.sleep(CANCEL_SECONDS)
