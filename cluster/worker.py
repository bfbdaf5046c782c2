"""The Ray actors that each run one ComfyUI: for *Run on Ray* and for a batch."""
import asyncio
import concurrent.futures
import json
import os
import platform
import time

from .comfyui_install import (
    MachineError,
    find_comfyui,
    installed_versions,
    launch_arguments,
    version_difference,
)
from .embedded_comfyui import EmbeddedComfyUI, PromptCancelled
from .picture_store import RemoteStore, Store
from .prompt_events import PREVIEW_WITH_METADATA
from .workflow_graph import GraphError, apply_changes, one_line

CANCEL_SECONDS = 0.2  # between two attempts to cancel a prompt


def node_info() -> dict[str, str]:
    """Returns {"name": this machine's, "node": Ray's id}.

    Several of Ray's nodes may be on one machine.
    """
    import ray

    return {"name": os.environ.get("FEATHERWEIGHT_MACHINE") or platform.node(),
            "node": ray.get_runtime_context().get_node_id()}


class Worker:
    """A ComfyUI in this process. Its attribute `problem` says why it cannot render, or is "".

    Args:
        comfyui: the fallback of `find_comfyui`.
        expected: `installed_versions` that this machine must have, if any.
    """
    def __init__(self, comfyui: str = "", expected: dict[str, str] | None = None):
        self.info = node_info()
        self.host: EmbeddedComfyUI | None = None
        self.problem = ""
        try:
            folder = find_comfyui(comfyui)
            versions = installed_versions(folder, launch_arguments(True))
            self.problem = version_difference(versions, expected or {})
            if not self.problem:
                self.host = self.boot(folder)
        except MachineError as error:
            self.problem = str(error)
        except Exception as error:  # raised here, it would end the actor without its message
            message = one_line(f"{type(error).__name__}: {error}")
            self.problem = f"its ComfyUI did not start: {message}"

    def boot(self, comfyui: str) -> EmbeddedComfyUI:
        """Starts the ComfyUI of a folder in this process. Raises MachineError."""
        import ray

        return EmbeddedComfyUI(comfyui, launch_arguments(bool(ray.get_gpu_ids())))

    def running_host(self) -> EmbeddedComfyUI:
        """Returns the ComfyUI, or ends this process if that runs no prompts any more: its pool
        then starts another worker."""
        assert self.host is not None  # else `problem` is set
        if not self.host.runs_prompts():
            os._exit(1)
        return self.host

    def ready(self) -> tuple[dict, str]:
        """Returns ({"name", "node", "pid"}, `problem`)."""
        return {**self.info, "pid": os.getpid()}, self.problem


class PromptWorker(Worker):
    """Renders prompts of one editor. One runs at a time, further ones wait."""

    def __init__(self, comfyui: str = ""):
        super().__init__(comfyui)
        self.running = set()
        # for prompts that wait in ComfyUI's queue
        self.threads = concurrent.futures.ThreadPoolExecutor(64)

    async def render(self, graph: dict, extra: dict, prompt_id: str):
        """Renders a prompt and yields its events.

        Args:
            graph: with a node of `with_result`.
            extra, prompt_id: see `EmbeddedComfyUI.run`.

        Yields:
            (event, data), whose values need no class of this pack: ("begins", machine's name),
            ("progress", (node, value, maximum)), ("preview", JPEG or PNG), and at last one of
            ("images", float32 array (N, H, W, C)), ("failed", message), ("unusable", what this
            machine lacks), or nothing if the prompt was cancelled.
        """
        name = self.info["name"]
        events = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_event(*event):
            loop.call_soon_threadsafe(events.put_nowait, event)

        self.running.add(prompt_id)
        try:
            result = loop.run_in_executor(
                self.threads, self.running_host().run, graph, on_event, prompt_id, extra)
            result.add_done_callback(lambda _: on_event("end", None))
            event = ""
            while event != "end":
                event, data = await events.get()
                if event == "execution_start":
                    yield "begins", name
                elif event == "progress":
                    yield "progress", (data["node"], data["value"], data["max"])
                elif event == PREVIEW_WITH_METADATA:
                    yield "preview", data[4 + int.from_bytes(data[:4], "big"):]
            yield "images", (await result).images.cpu().float().contiguous().numpy()
        except GraphError as error:
            yield "failed", str(error)
        except MachineError as error:
            yield "unusable", f"{name}: {error}"
        except PromptCancelled:
            pass
        except Exception as error:
            yield "failed", one_line(f"{type(error).__name__}: {error}")
        finally:
            self.running.discard(prompt_id)

    async def cancel(self, prompt_id: str):
        """Cancels one prompt, whether it waits or runs. Returns when it has ended."""
        while prompt_id in self.running:  # it may not have reached ComfyUI's queue yet
            if self.host is not None:
                self.host.cancel(prompt_id)
            await asyncio.sleep(CANCEL_SECONDS)


class RowRenderer(Worker):
    """Renders rows and saves their pictures.

    Args:
        graph: the workflow.
        out: where pictures go, see `Store`.
        home: Ray's id of the node whose folder `out` is, "" if every node sees it.
        writer: the actor that writes there for other nodes.
        comfyui, expected: see `Worker`.
    """

    def __init__(self, graph: dict, out: str, home: str, writer, comfyui: str, expected: dict):
        super().__init__(comfyui, expected)
        self.graph = graph
        self.name = f"{self.info['name']}:{os.getpid()}"
        try:
            self.store = Store(out) if home in ("", self.info["node"]) else RemoteStore(writer)
        except (OSError, ValueError) as error:
            self.problem = f"cannot write to {out}: {error}"

    def render(self, row: dict) -> dict:
        """Renders and saves a row.

        Args:
            row: {"id", "changes", "stamp"}.

        Returns:
            {"id", "status", "message", "worker", "seconds"}. The status is "drawn" (now or by an
            earlier attempt), "failed" (the row is wrong), or "refused" (another machine may render
            it).
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
            if self.store.is_done(row["id"], row["stamp"]):
                return
            changes = json.loads(row["changes"])
            result = self.running_host().run(apply_changes(self.graph, changes))
            if not result.files:
                raise GraphError("the workflow saved no file: it needs a node such as Save Image.")
            self.store.save(row["id"], result.files, {
                "stamp": row["stamp"], "changes": changes, "worker": self.name,
                "seconds": round(time.monotonic() - started, 3)})
        except OSError as error:
            raise MachineError(
                f"could not write the images: {getattr(error, 'cause', error)}") from error
