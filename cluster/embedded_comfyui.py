"""A ComfyUI in this process, by the host's own start and without its web server: every node pack
works, models stay loaded."""
import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import filelock

from .comfyui_install import MachineError, is_pack
from .graph import RESULT_NODE, GraphError, classes, one_line, texts

PREVIEW_WITH_METADATA = 4  # the host's `protocol.BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA`
SCRATCH = "featherweight-worker-"
# in a scratch folder, held as long as its process lives, which has another number in another
# container
LOCK = ".lock"
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
OUT_OF_MEMORY = (
    "MemoryError",
    "OutOfMemoryError",
    "torch.OutOfMemoryError",
    "torch.cuda.OutOfMemoryError",
)
FILE_NAME = re.compile(r"[^\n]*\.[A-Za-z][A-Za-z0-9_]{1,11}")


class Cancelled(Exception):
    """The prompt was cancelled by `EmbeddedComfyUI.cancel`."""


@dataclass
class PromptResult:
    """What a prompt gave. files: `<node>_<n>.<ext>` -> bytes, of what it saved, else of what it
    previewed.

    images: what `graph.with_result` asked for, float32 (N, H, W, C), or None.
    """
    files: dict[str, bytes] = field(default_factory=dict)
    images: object = None


class PromptListener:
    """Receives one prompt's events in the place of a browser's websocket, whose methods
    `PromptServer` awaits.

    Args:
        on_event: is called with (event, data) of this prompt and no other, in ComfyUI's loop, so it
            must return at once. event: a name, with a dict, or a number, with bytes.
        started: is called with this listener when ComfyUI begins the prompt.
    """

    def __init__(self, prompt_id: str, on_event: Callable | None, started: Callable):
        self.prompt_id, self.on_event, self.started = prompt_id, on_event, started
        self.ended, self.cancelled, self.running = threading.Event(), False, False

    async def send_json(self, message: dict):
        event, data = message["type"], message["data"]
        if data.get("prompt_id") != self.prompt_id:
            return
        if event == "execution_start":
            self.running = True
            self.started(self)
        if self.on_event:
            self.on_event(event, data)
        if event == "executing" and data.get("node") is None:  # after the history has it
            self.running = False
            self.ended.set()

    async def send_bytes(self, message: bytes):
        if self.on_event and self.running:
            event, data = struct.unpack(">I", message[:4])[0], bytes(message[4:])
            if event != PREVIEW_WITH_METADATA or self._is_mine(data):
                self.on_event(event, data)

    def _is_mine(self, data: bytes) -> bool:
        length = struct.unpack(">I", data[:4])[0]
        return json.loads(data[4:4 + length]).get("prompt_id", self.prompt_id) == self.prompt_id


class EmbeddedComfyUI:
    """ComfyUI, started once per process. comfyui: its folder. arguments: what stands behind
    main.py.

    What it writes goes to a folder of its own, which is empty again after each prompt. Raises
    MachineError.
    """

    def __init__(self, comfyui: str, arguments: Sequence[str] = ()):
        sweep_dead()
        self.scratch, self.scratch_lock = make_scratch()
        # the host wraps their buffers; freed, those would close under it
        self.streams = sys.stdout, sys.stderr
        self.results, self.listeners, self.lock = {}, {}, threading.Lock()
        failed = []

        def boot():  # its event loop must not be that of the thread that asks
            try:
                self._boot(comfyui, arguments)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=boot, name="ComfyUI starts")
        thread.start()
        thread.join()
        if failed:
            self.close()
            said = one_line(f"{type(failed[0]).__name__}: {failed[0]}")
            raise MachineError(f"ComfyUI in {comfyui} did not start: {said}") from failed[0]

    def _boot(self, comfyui: str, arguments: Sequence[str]):
        os.makedirs(os.path.join(self.scratch, "output"))
        # whose nodes/ is none of the host
        sys.path[:] = [comfyui, *(path for path in sys.path if not is_pack(path))]
        os.chdir(comfyui)
        sys.argv = [
            os.path.join(comfyui, "main.py"), "--output-directory",
            os.path.join(self.scratch,
                         "output"), "--temp-directory", self.scratch, "--database-url",
            "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch", *arguments
        ]
        import comfy.options

        comfy.options.enable_args_parsing()
        # before torch: it sets up paths, devices and dynamic VRAM as `python main.py` does
        import main

        self.loop, self.server, _ = main.start_comfyui()
        # its progress hook asks for them outside of a prompt too
        self.server.last_prompt_id = self.server.last_node_id = None
        import execution
        import folder_paths

        import nodes

        nodes.NODE_CLASS_MAPPINGS[RESULT_NODE] = result_node(self.results)
        self.validate_prompt, self.folders = execution.validate_prompt, folder_paths
        self.interrupt, self.node_classes = nodes.interrupt_processing, nodes.NODE_CLASS_MAPPINGS
        threading.Thread(target=self._publish, daemon=True, name="ComfyUI tells").start()

    def _publish(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self.server.publish_loop())

    def run(self, graph: dict, on_event: Callable | None = None, prompt_id: str | None = None,
            extra: dict | None = None) -> PromptResult:
        """Runs a graph to its end. Prompts of several threads wait for each other.

        Args:
            on_event: see `PromptListener`.
            prompt_id: a name for `cancel`, new each time.
            extra: ComfyUI's extra data, such as {"preview_method": "auto"}.

        Raises:
            GraphError: the workflow is at fault, on any machine.
            MachineError: this machine is.
            Cancelled: by `cancel`.
        """
        prompt_id = prompt_id or str(uuid.uuid4())
        if any(node["class_type"] == RESULT_NODE for node in graph.values()):
            graph = {
                name: {**node, "inputs": {**node["inputs"], "key": prompt_id}}
                if node["class_type"] == RESULT_NODE else node for name, node in graph.items()
            }
        listener = PromptListener(prompt_id, on_event, self._started)
        with self.lock:
            self.listeners[prompt_id] = listener
        self.server.sockets[prompt_id] = listener
        self.server.sockets_metadata[prompt_id] = {
            "feature_flags": {"supports_preview_metadata": True}
        }
        try:
            entry = self._entry(graph, listener, dict(extra or {}))
            files = self._files(entry["outputs"])
            # the host took the saving node's answer of an alike prompt, whose files are gone
            if files is None:
                self._forget()
                listener.ended.clear()
                files = self._files(self._entry(graph, listener, dict(extra or {}))["outputs"])
            return PromptResult(files or {}, self.results.pop(prompt_id, None))
        finally:
            self.results.pop(prompt_id, None)
            for kept in (self.listeners, self.server.sockets, self.server.sockets_metadata):
                kept.pop(prompt_id, None)
            if not self.listeners:
                self._sweep()

    def validate(self, graph: dict, prompt_id: str = "check") -> list[str]:
        """Has ComfyUI validate a graph. Returns its output nodes. Raises GraphError,
        MachineError."""
        valid, error, outputs, node_errors = asyncio.run_coroutine_threadsafe(
            self.validate_prompt(prompt_id, graph, None), self.loop).result()
        if not valid:
            self._refuse(graph, error, node_errors)
        return outputs

    def _entry(self, graph: dict, listener: PromptListener, extra: dict) -> dict:
        """The host's history of a prompt that went well."""
        prompt_id, queue = listener.prompt_id, self.server.prompt_queue
        asked = self.server.trigger_on_prompt(
            {"prompt": graph, "client_id": prompt_id, "extra_data": extra})
        graph, extra = asked["prompt"], {**asked.get("extra_data", {}), "client_id": prompt_id}
        outputs = self.validate(graph, prompt_id)
        with self.lock:
            if listener.cancelled:
                raise Cancelled
            # first come, first served
            number, self.server.number = self.server.number, self.server.number + 1
            queue.put((number, prompt_id, graph, extra, outputs, {}))
        while not (listener.ended.wait(1) or queue.get_history(prompt_id)):
            pass
        entry = queue.get_history(prompt_id).get(prompt_id)
        queue.delete_history_item(prompt_id)
        if listener.cancelled:
            raise Cancelled
        if entry["status"]["status_str"] != "success":
            self._fail(graph, entry["status"]["messages"])
        return entry

    def _forget(self):
        """Have the host drop the answers of its nodes that it keeps, so that the next prompt runs
        whole."""
        queue = self.server.prompt_queue
        with queue.mutex:
            queue.set_flag("unload_models", False)
            queue.set_flag("free_memory", True)
        while queue.get_flags(reset=False):
            time.sleep(0.01)

    def cancel(self, prompt_id: str):
        """End a prompt whether it waits or runs, and no other; `run` raises Cancelled."""
        queue = self.server.prompt_queue
        with self.lock:
            listener = self.listeners.get(prompt_id)
            if listener is None:
                return
            listener.cancelled = True
            if queue.delete_queue_item(lambda item: item[1] == prompt_id):
                listener.ended.set()
        self._started(listener)

    def _started(self, listener: PromptListener):
        """Interrupt a prompt that was cancelled: the host forgets an interruption when a prompt
        starts, so here once more."""
        queue = self.server.prompt_queue
        with queue.mutex:
            if listener.cancelled and any(
                item[1] == listener.prompt_id for item in queue.currently_running.values()
            ):
                self.interrupt()

    # --- what went wrong ---

    def _refuse(self, graph: dict, error: dict, node_errors: dict):
        if error["type"] == "missing_node_type":
            missing = sorted(classes(graph) - self.node_classes.keys())
            raise MachineError(
                f"has no node {' and none '.join(map(repr, missing))}: the pack it comes from is"
                " not installed or did not load.")
        self._lacks_files(graph)
        said = [f"node {name} ({found['class_type']}): {reason['message']}: {reason['details']}"
                for name, found in (node_errors or {}).items() for reason in found["errors"]]
        raise GraphError(one_line("; ".join(said) or f"{error['message']}: {error['details']}"))

    def _fail(self, graph: dict, messages: Sequence):
        data = next(
            (data
             for event, data in messages if event in ("execution_error", "execution_interrupted")),
            {})
        said, kind = (
            str(data.get("exception_message", "it was interrupted")),
            data.get("exception_type", ""),
        )
        where = f"node {data.get('node_id')} ({data.get('node_type')})"
        if kind in OUT_OF_MEMORY:
            raise MachineError(f"has not enough memory for {where}: {one_line(said)}")
        if any(f"[Errno {number}]" in said or os.strerror(number) in said for number in FULL):
            raise MachineError(f"has no space left on its disk for {where}: {one_line(said)}")
        self._lacks_files(graph)
        raise GraphError(f"{where}: {one_line(said)}")

    def _lacks_files(self, graph: dict):
        """Raises MachineError where the graph names a file that is in none of this ComfyUI's
        folders."""
        missing = [
            f"{value!r} ({place})" for place, value in texts(graph).items()
            if FILE_NAME.fullmatch(value)
            and os.path.splitext(value)[1].lower() in self._suffixes() and not self._is_here(value)
        ]
        if missing:
            raise MachineError(
                f"has no file {' and none '.join(missing)} in the folders of its ComfyUI.")

    def _suffixes(self) -> set[str]:
        pictures = {
            ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".mp4", ".webm", ".mov", ".wav",
            ".mp3", ".flac"
        }
        return pictures.union(
            *(suffixes for _, suffixes in self.folders.folder_names_and_paths.values() if suffixes)
        ) - {""}

    def _is_here(self, name: str) -> bool:
        name = name.removesuffix(" [input]")
        folders = [
            folder for found, _ in self.folders.folder_names_and_paths.values() for folder in found
        ]
        return any(
            os.path.exists(os.path.join(folder, name))
            for folder in [self.folders.get_input_directory(), *folders])

    # --- what it wrote ---

    def _files(self, outputs: dict) -> dict[str, bytes] | None:
        """Name -> bytes of what nodes saved, or else previewed. None where one of them is gone."""
        items = [(re.sub("[^A-Za-z0-9-]", "-", node), item)
                 for node, found in sorted(outputs.items()) for listed in found.values()
                 if isinstance(listed, list) for item in listed
                 if isinstance(item, dict) and item.get("filename") and item.get("type") != "input"]
        saved = [(node, item) for node, item in items if item.get("type", "output") == "output"]
        files, counts = {}, {}
        for node, item in saved or items:
            folder = os.path.join(self.scratch, "output" if saved else "temp")
            path = os.path.join(folder, item.get("subfolder") or "", item["filename"])
            try:
                with open(path, "rb") as file:
                    data = file.read()
            except FileNotFoundError:
                return None
            count = counts[node] = counts.get(node, -1) + 1  # of 9:1 and 9-1 together
            # names of other rows have one before node and number
            ending = os.path.splitext(path)[1].replace("_", "-")
            files[f"{node}_{count}{ending}"] = data
        return files

    def _sweep(self):
        for name in ("output", "temp"):
            for entry in os.scandir(os.path.join(self.scratch, name)):
                with contextlib.suppress(OSError):
                    shutil.rmtree(entry.path) if entry.is_dir(
                        follow_symlinks=False) else os.unlink(entry.path)

    def close(self):
        """Remove the folder of what it wrote. The ComfyUI goes with its process."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch_lock.release()


def make_scratch() -> tuple[str, filelock.BaseFileLock]:
    """(a new folder for what a ComfyUI writes, its lock, held)."""
    while True:
        folder = tempfile.mkdtemp(prefix=SCRATCH)
        lock = filelock.FileLock(os.path.join(folder, LOCK), thread_local=False)
        with contextlib.suppress(FileNotFoundError):
            lock.acquire()
            # else another process has swept it before it was locked
            if os.path.exists(os.path.join(folder, LOCK)):
                return folder, lock
            lock.release()


def sweep_dead():
    """Remove what processes that were killed left of their folders for what ComfyUI writes."""
    with os.scandir(tempfile.gettempdir()) as entries:
        folders = [entry.path for entry in entries if entry.name.startswith(SCRATCH)]
    for folder in folders:
        if os.path.exists(os.path.join(folder, LOCK)):
            with contextlib.suppress(filelock.Timeout,
                                     OSError), filelock.FileLock(os.path.join(folder, LOCK),
                                                                 timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def result_node(results: dict):
    """The class of the node that hands pictures to `EmbeddedComfyUI.run`, by the prompt's name."""

    class Result:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "keep", True, "Featherweight"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"images": ("IMAGE",), "key": ("STRING", {"default": ""})}}

        @classmethod
        def IS_CHANGED(cls, **_):
            return float("nan")  # always anew

        def keep(self, images, key):
            results[key] = images
            return ()

    return Result
