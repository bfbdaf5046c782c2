"""Runs ComfyUI in this process, without its web server.

It is started by ComfyUI's own code, so every node pack works, and models stay loaded.
"""
import asyncio
import contextlib
import errno
import itertools
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import filelock

from .comfyui_install import MachineError, is_pack
from .workflow_graph import RESULT_NODE, GraphError, classes, is_link, one_line, texts

SCRATCH = "featherweight-worker-"
# a file in a scratch folder, locked while its process lives; a process id would not do, as it is
# another one in another container
LOCK = ".lock"
DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
OUT_OF_MEMORY = (
    "MemoryError",
    "OutOfMemoryError",
    "torch.OutOfMemoryError",
    "torch.cuda.OutOfMemoryError",
)
MEDIA_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".mp4", ".webm", ".mov", ".wav", ".mp3",
    ".flac",
}
END_POLL_SECONDS = 0.002  # between two looks whether a prompt has ended
FILE_NAME = re.compile(r"[^\n]*\.[A-Za-z][A-Za-z0-9_]{1,11}")


class EmbeddedComfyUI:
    """ComfyUI, started once per process.

    It writes to a folder of its own, whose files are emptied after each prompt.

    Args:
        comfyui: its folder.
        arguments: those of main.py.

    Raises:
        MachineError: it did not start.
    """

    def __init__(self, comfyui: str, arguments: Sequence[str] = ()):
        sweep_dead()
        self.scratch, self.scratch_lock = make_scratch()
        self._last: dict[str, bytes] = {}  # path -> what the last prompt had there
        # ComfyUI wraps their buffers, which close when the streams are freed
        self.streams = sys.stdout, sys.stderr
        errors = []

        def boot():  # in a thread: its event loop must not be the caller's
            try:
                self._boot(comfyui, arguments)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=boot, name="ComfyUI starts")
        thread.start()
        thread.join()
        if errors:
            self.close()
            message = one_line(f"{type(errors[0]).__name__}: {errors[0]}")
            raise MachineError(f"ComfyUI in {comfyui} did not start: {message}") from errors[0]

    def _boot(self, comfyui: str, arguments: Sequence[str]):
        output = os.path.join(self.scratch, "output")
        os.makedirs(output)
        # without this pack, whose nodes/ would hide ComfyUI's nodes.py
        sys.path[:] = [comfyui, *(path for path in sys.path if not is_pack(path))]
        os.chdir(comfyui)
        sys.argv = [
            os.path.join(comfyui, "main.py"),
            "--output-directory", output,
            "--temp-directory", self.scratch,
            "--database-url", "sqlite:///:memory:",
            "--disable-api-nodes",
            "--disable-auto-launch",
            *arguments,
        ]
        import comfy.options

        comfy.options.enable_args_parsing()
        # before torch, as it sets up paths, devices and dynamic VRAM
        import main

        self.server: Any
        self.loop, self.server, _ = main.start_comfyui()
        # Python names a thread after its function
        self.prompt_thread = next((thread for thread in threading.enumerate()
                                   if thread.name.endswith("(prompt_worker)")), None)
        # the progress hook reads them outside of a prompt too
        self.server.last_prompt_id = self.server.last_node_id = None
        import execution
        import folder_paths

        import nodes

        nodes.NODE_CLASS_MAPPINGS[RESULT_NODE] = result_node(output)
        self.validate_prompt = execution.validate_prompt
        self.folders = folder_paths
        self.node_classes = nodes.NODE_CLASS_MAPPINGS
        threading.Thread(target=self._publish, daemon=True, name="ComfyUI's events").start()

    def _publish(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self.server.publish_loop())

    def run(self, graph: dict) -> dict[str, bytes]:
        """Runs a graph to its end.

        Returns:
            `<node>_<n>.<ext>` -> bytes of the files it saved, or else previewed.

        Raises:
            GraphError: the workflow fails on any machine.
            MachineError: this machine cannot run it.
        """
        try:
            files = self._read_files(self._execute(graph))
            # ComfyUI used the saving node's cached output of an earlier prompt, not of the last
            if files is None:
                self._clear_cache()
                self._last = {}
                files = self._read_files(self._execute(graph), all_ran=True)
            return files or {}
        finally:
            self._empty_outputs()

    def validate(self, graph: dict, prompt_id: str = "check") -> tuple[dict, list[str]]:
        """Validates a graph by ComfyUI's own code.

        Returns:
            The request with what packs make of it, and the ids of its output nodes.

        Raises:
            GraphError: the workflow fails on any machine.
            MachineError: this machine cannot run it, or not all that another one could.
        """
        request = self.server.trigger_on_prompt({"prompt": graph, "extra_data": {}})
        graph = request["prompt"]
        valid, error, outputs, node_errors = asyncio.run_coroutine_threadsafe(
            self.validate_prompt(prompt_id, graph, None), self.loop).result()
        if not valid:
            assert error is not None
            self._raise_invalid(graph, error, node_errors)
        # one output is enough for ComfyUI
        self._check_files(_part(graph, node_errors or ()))
        return request, outputs

    def _execute(self, graph: dict) -> dict:
        """Queues a prompt, waits for its end and returns its outputs by node."""
        prompt_id = str(uuid.uuid4())
        queue = self.server.prompt_queue
        request, outputs = self.validate(graph, prompt_id)
        graph = request["prompt"]
        queue.put((0, prompt_id, graph, request.get("extra_data", {}), outputs, {}))
        while not (entry := queue.get_history(prompt_id).get(prompt_id)):
            self._check_runs_prompts()
            time.sleep(END_POLL_SECONDS)
        queue.delete_history_item(prompt_id)
        if entry["status"]["status_str"] != "success":
            self._raise_failed(graph, entry["status"]["messages"])
        return entry["outputs"]

    def _clear_cache(self):
        """Makes ComfyUI drop its cached outputs, so that the next prompt runs every node."""
        queue = self.server.prompt_queue
        with queue.mutex:
            queue.set_flag("unload_models", False)
            queue.set_flag("free_memory", True)
        while queue.get_flags(reset=False):
            self._check_runs_prompts()
            time.sleep(0.01)

    def runs_prompts(self) -> bool:
        """Returns whether ComfyUI's thread that runs prompts is alive."""
        return self.prompt_thread is None or self.prompt_thread.is_alive()

    def _check_runs_prompts(self):
        if not self.runs_prompts():
            raise MachineError(
                "cannot finish it: ComfyUI's thread that runs prompts has ended, as when a node"
                " calls sys.exit(). Another worker takes the next prompt.")

    # --- errors ---

    def _raise_invalid(self, graph: dict, error: dict, node_errors: dict):
        """Raises what ComfyUI's validation says: MachineError or GraphError."""
        if error["type"] == "missing_node_type":
            missing = sorted(classes(graph) - self.node_classes.keys())
            raise MachineError(
                f"has no node {' and no '.join(map(repr, missing))}: the pack it comes from is not"
                " installed or did not load.")
        self._check_files(_part(graph, node_errors or graph))
        reasons = [f"node {name} ({node['class_type']}): {reason['message']}: {reason['details']}"
                   for name, node in (node_errors or {}).items() for reason in node["errors"]]
        raise GraphError(one_line("; ".join(reasons) or f"{error['message']}: {error['details']}"))

    def _raise_failed(self, graph: dict, messages: Sequence):
        """Raises what ended a prompt: MachineError or GraphError. messages: of its history."""
        events = ("execution_error", "execution_interrupted")
        data = next((data for event, data in messages if event in events), {})
        reason = str(data.get("exception_message", "it was interrupted"))
        node = f"node {data.get('node_id')} ({data.get('node_type')})"
        if data.get("exception_type") in OUT_OF_MEMORY:
            raise MachineError(f"has not enough memory for {node}: {one_line(reason)}")
        if any(f"[Errno {number}]" in reason or os.strerror(number) in reason
               for number in DISK_FULL):
            raise MachineError(f"has no space left on its disk for {node}: {one_line(reason)}")
        text = f"{node}: {one_line(reason)}"
        self._check_files(_with_sources(graph, data.get("node_id")), f": {text}")
        raise GraphError(text)

    def _check_files(self, graph: dict, reason: str = "."):
        """Raises MachineError if the graph names files that are missing from ComfyUI's folders.
        reason: the end of its sentence."""
        suffixes = self._suffixes()
        missing = [
            f"{value!r} ({path})" for path, value in texts(graph).items()
            if FILE_NAME.fullmatch(value)
            and os.path.splitext(value)[1].lower() in suffixes and not self._has_file(value)
        ]
        if missing:
            raise MachineError(
                f"has no file {' and no '.join(missing)} in the folders of its ComfyUI{reason}")

    def _suffixes(self) -> set[str]:
        """Returns the suffixes of models and media."""
        folders = self.folders.folder_names_and_paths.values()
        return MEDIA_SUFFIXES.union(*(suffixes for _, suffixes in folders if suffixes)) - {""}

    def _has_file(self, name: str) -> bool:
        name = name.removesuffix(" [input]")
        model_folders = itertools.chain.from_iterable(
            paths for paths, _ in self.folders.folder_names_and_paths.values())
        return any(
            os.path.exists(os.path.join(folder, name))
            for folder in [self.folders.get_input_directory(), *model_folders])

    # --- the files it writes ---

    def _read_files(self, outputs: dict, all_ran: bool = False) -> dict[str, bytes] | None:
        """Returns name -> bytes of what nodes saved, or else previewed; None if a file is gone.
        all_ran: whether every node ran for this prompt."""
        items = [(re.sub("[^A-Za-z0-9-]", "-", node), item)
                 for node, output in sorted(outputs.items()) for values in output.values()
                 if isinstance(values, list) for item in values
                 if isinstance(item, dict) and item.get("filename") and item.get("type") != "input"]
        saved = [(node, item) for node, item in items if item.get("type", "output") == "output"]
        files: dict[str, bytes] = {}
        read: dict[str, bytes] = {}  # by path
        counts: dict[str, int] = {}  # by node as the name has it, so of 9:1 and 9-1 together
        for node, item in saved or items:
            folder = os.path.join(self.scratch, "output" if saved else "temp")
            path = os.path.join(folder, item.get("subfolder") or "", item["filename"])
            data = self._read(path)
            if not (data or all_ran):  # a node that ComfyUI does not run again names its own file
                data = self._last.get(path)
            if data is None:
                return None
            read[path] = data
            count = counts[node] = counts.get(node, -1) + 1
            # the store's names have underscores only before the node and before the number
            suffix = os.path.splitext(path)[1].replace("_", "-")
            files[f"{node}_{count}{suffix}"] = data
        self._last = read
        return files

    @staticmethod
    def _read(path: str) -> bytes | None:
        """Returns what a file holds, None where it is gone."""
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _empty_outputs(self):
        """Puts an empty file in the place of each that was written. The names stay, for ComfyUI
        gives a new file the number after the last, and nodes that do not run again name theirs."""
        for name in ("output", "temp"):
            for folder, _, files in os.walk(os.path.join(self.scratch, name)):
                for path in (os.path.join(folder, file) for file in files):
                    with contextlib.suppress(OSError):
                        if os.path.islink(path) or os.stat(path).st_size:
                            os.unlink(path)  # which may be a link
                            open(path, "wb").close()

    def close(self):
        """Removes the scratch folder. The ComfyUI itself ends with its process."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch_lock.release()


def _part(graph: dict, nodes: Iterable[str]) -> dict:
    """Returns those of some nodes that are in a graph."""
    return {node: graph[node] for node in nodes if node in graph}


def _with_sources(graph: dict, node: str | None) -> dict:
    """Returns a node of a graph and those that its inputs come from; all where it is none."""
    if node not in graph:
        return graph
    values = graph[node]["inputs"].values()
    return {node: graph[node], **_part(graph, (value[0] for value in values if is_link(value)))}


def make_scratch() -> tuple[str, filelock.BaseFileLock]:
    """Makes a folder that a ComfyUI writes to. Returns it and its lock, which is held."""
    while True:
        folder = tempfile.mkdtemp(prefix=SCRATCH)
        lock = filelock.FileLock(os.path.join(folder, LOCK), thread_local=False)
        with contextlib.suppress(FileNotFoundError):
            lock.acquire()
            # otherwise another process removed it before it was locked
            if os.path.exists(os.path.join(folder, LOCK)):
                return folder, lock
            lock.release()


def sweep_dead():
    """Removes the scratch folders of processes that were killed."""
    with os.scandir(tempfile.gettempdir()) as entries:
        folders = [entry.path for entry in entries if entry.name.startswith(SCRATCH)]
    for folder in folders:
        path = os.path.join(folder, LOCK)
        if os.path.exists(path):
            with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(path, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def result_node(folder: str):
    """Returns the class of the node that saves images in a folder, as float32 and with any
    channels."""

    class Result:
        RETURN_TYPES = ()
        FUNCTION = "save"
        OUTPUT_NODE = True
        CATEGORY = "Featherweight"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"images": ("IMAGE",)}}

        @classmethod
        def IS_CHANGED(cls, **_):
            return float("nan")  # differs from itself, so the node always runs

        def save(self, images):
            import numpy

            name = "images.npy"
            numpy.save(os.path.join(folder, name), images.cpu().float().numpy())
            return {"ui": {"images": [{"filename": name}]}}

    return Result
