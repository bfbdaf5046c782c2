"""The Ray actors that each run one ComfyUI."""
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
from .embedded_comfyui import EmbeddedComfyUI
from .picture_store import RemoteStore, Store
from .workflow_graph import GraphError, apply_changes, one_line


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


class RowRenderer(Worker):
    """Renders rows and saves their pictures.

    Args:
        out: where pictures go, see `Store`.
        home: Ray's id of the node whose folder `out` is, "" if every node sees it.
        writer: the actor that writes there for other nodes.
        comfyui, expected: see `Worker`.
    """

    def __init__(self, out: str, home: str, writer, comfyui: str, expected: dict):
        super().__init__(comfyui, expected)
        self.name = f"{self.info['name']}:{os.getpid()}"
        try:
            self.store = Store(out) if home in ("", self.info["node"]) else RemoteStore(writer)
        except (OSError, ValueError) as error:
            self.problem = f"cannot write to {out}: {error}"

    def render(self, graph: dict, row: dict) -> dict:
        """Renders and saves a row.

        Args:
            graph: the workflow.
            row: {"id", "changes", "stamp"}.

        Returns:
            {"id", "status", "message", "worker", "seconds"}. The status is "drawn" (now or by an
            earlier attempt), "failed" (the row is wrong), or "refused" (another machine may render
            it).
        """
        started = time.monotonic()
        status, message = "drawn", ""
        try:
            self._render(graph, row, started)
        except MachineError as error:
            status, message = "refused", f"{self.info['name']} {error}"
        except GraphError as error:
            status, message = "failed", str(error)
        except Exception as error:
            status, message = "failed", one_line(f"{type(error).__name__}: {error}")
        return {"id": row["id"], "status": status, "message": message, "worker": self.name,
                "seconds": time.monotonic() - started}

    def _render(self, graph: dict, row: dict, started: float):
        try:
            if self.store.is_done(row["id"], row["stamp"]):
                return
            changes = json.loads(row["changes"])
            files = self.running_host().run(apply_changes(graph, changes))
            if not files:
                raise GraphError("no node saved a file: the workflow has none such as Save Image,"
                                 " or it got nothing to save.")
            self.store.save(row["id"], files, {
                "stamp": row["stamp"], "changes": changes, "worker": self.name,
                "seconds": round(time.monotonic() - started, 3)})
        except OSError as error:
            raise MachineError(
                f"could not write the images: {getattr(error, 'cause', error)}") from error
