"""One ComfyUI in one actor of Ray: what a batch and *Run on Ray* share, and the actor of each."""
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
from .embedded_comfyui import PREVIEW_WITH_METADATA, Cancelled, EmbeddedComfyUI
from .graph import GraphError, apply_changes, one_line
from .picture_store import RemoteStore, Store

CANCEL_SECONDS = 0.2  # between two attempts to cancel a prompt


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
    def __init__(self, comfyui: str = "", expected: dict[str, str] | None = None):
        self.info, self.host, self.unfit = node_info(), None, ""
        try:
            folder = find_comfyui(comfyui)
            self.unfit = version_difference(installed_versions(folder, launch_arguments(True)),
                                            expected or {})
            if not self.unfit:
                self.host = self.boot(folder)
        except MachineError as error:
            self.unfit = str(error)
        except Exception as error:  # one that is raised here would only end the actor
            self.unfit = (
                f"its ComfyUI did not start: {one_line(f'{type(error).__name__}: {error}')}"
            )

    def boot(self, comfyui: str) -> EmbeddedComfyUI:
        """Starts the ComfyUI of a folder in this process. Raises MachineError."""
        import ray

        return EmbeddedComfyUI(comfyui, launch_arguments(bool(ray.get_gpu_ids())))

    def ready(self) -> tuple[dict, str]:
        """Returns ({"name", "node", "pid"}, what keeps it from drawing or "")."""
        return {**self.info, "pid": os.getpid()}, self.unfit


class PromptWorker(Worker):
    """Draws prompts of one editor. One runs at a time, further ones wait."""

    def __init__(self, comfyui: str = ""):
        super().__init__(comfyui)
        self.running = set()
        # prompts that wait in ComfyUI's queue
        self.threads = concurrent.futures.ThreadPoolExecutor(64)

    async def draw(self, graph: dict, extra: dict, prompt_id: str):
        """Draws a prompt, as a stream of (event, data) in values that need no class of this pack.

        ("begins", machine's name), ("progress", (node, value, maximum)), ("preview", JPEG or PNG),
        and at last one of ("images", array (N, H, W, C)), ("failed", sentence), ("unfit", what this
        machine lacks), or nothing where the prompt was cancelled.

        Args:
            extra, prompt_id: see `EmbeddedComfyUI.run`.
        """
        name, events = self.info["name"], asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_event(*event):
            loop.call_soon_threadsafe(events.put_nowait, event)

        self.running.add(prompt_id)
        try:
            answer = loop.run_in_executor(
                self.threads, self.host.run, graph, on_event, prompt_id, extra)
            answer.add_done_callback(lambda _: on_event("end", None))
            event = ""
            while event != "end":
                event, data = await events.get()
                if event == "execution_start":
                    yield "begins", name
                elif event == "progress":
                    yield "progress", (data["node"], data["value"], data["max"])
                elif event == PREVIEW_WITH_METADATA:
                    yield "preview", data[4 + int.from_bytes(data[:4], "big"):]
            yield "images", (await answer).images.cpu().float().contiguous().numpy()
        except GraphError as error:
            yield "failed", str(error)
        except MachineError as error:
            yield "unfit", f"{name}: {error}"
        except Cancelled:
            pass
        except Exception as error:
            yield "failed", one_line(f"{type(error).__name__}: {error}")
        finally:
            self.running.discard(prompt_id)

    async def cancel(self, prompt_id: str):
        """Ends a prompt, whether it waits or runs, and no other; returns when it has ended."""
        while prompt_id in self.running:  # it may not have reached ComfyUI's queue yet
            self.host.cancel(prompt_id)
            await asyncio.sleep(CANCEL_SECONDS)


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
            answer = self.host.run(apply_changes(self.graph, changes))
            if not answer.files:
                raise GraphError("the workflow saved no file: it needs a node such as Save Image.")
            self.store.save(row["id"], answer.files, {
                "stamp": row["stamp"], "changes": changes, "worker": self.name,
                "seconds": round(time.monotonic() - started, 3)})
        except OSError as error:
            raise MachineError(
                f"could not write the pictures: {getattr(error, 'cause', error)}") from error
