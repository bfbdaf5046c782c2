"""The real ComfyUI server, headless, with this pack in it, and a small client for it."""
import contextlib
import copy
import io
import itertools
import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import websocket
from PIL import Image

from devtools import ROOT

PACK = "ComfyUI-Featherweight"
HOST = Path(os.environ.get("COMFYUI_PATH", ROOT / ".dev" / "host"))
# What the pack's nodes put beside what could be markup, and what they end a line with.
JOINER, LINE_BREAK = "\u2060", "  \n"
# of the repository, in a copy of the pack
NOT_COPIED = shutil.ignore_patterns(".dev", ".git", "demo_output", "__pycache__")
ATTEMPTS = 3  # to start, where another program takes the port that was free


class ServerError(Exception):
    """The server did not start, refused a workflow, or a node in it failed."""


@dataclass
class Run:
    """What one queued workflow gave.

    outputs: node id -> its entry in the history, such as {"images": [{"filename", "subfolder",
    "type"}]}.
    texts: node id -> progress texts the node sent, as people read them. steps: node id -> monotonic
    time of each progress step. previews: files of the pictures that nodes showed while they ran.
    """
    prompt_id: str
    outputs: dict = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)
    previews: list[bytes] = field(default_factory=list)

    @property
    def pictures(self) -> list[dict]:
        """Entries of the pictures and videos, those that were saved before those that were only
        shown."""
        entries = [entry for output in self.outputs.values() for entry in output.get("images", [])]
        return sorted(entries, key=lambda entry: entry["type"] != "output")

    def seconds_per_step(self, node_id: str) -> float | None:
        """Median time between the steps of a node; the first, which also loads the model, is not
        counted."""
        times = self.steps.get(node_id, [])
        return (
            statistics.median(after - before for before, after in itertools.pairwise(times))
            if len(times) > 1
            else None
        )


def link_or_copy(source: Path, path: Path):
    """Makes a link to a file or folder, or a copy where the system makes none."""
    with contextlib.suppress(OSError):  # Windows without the right to make links
        path.symlink_to(source, target_is_directory=source.is_dir())
    if path.exists():  # Wine says that it made one
        return
    if source.is_dir():
        shutil.copytree(source, path, ignore=NOT_COPIED)
    else:
        shutil.copy(source, path)


def end(process: subprocess.Popen, seconds: float = 10):
    """Asks a process to end, and ends it after some seconds."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Server:
    """A server on 127.0.0.1 and a free port, alive inside a `with` block.

    base: folder that gets models, custom_nodes, input, output, temp, user and server.log.
    extra_custom_nodes: name -> source text of a single-file pack to plant beside this one.
    cpu: False lets the host use a GPU. arguments: further command-line arguments of the host.
    with_pack: False leaves this pack out. env: further environment variables.
    """

    def __init__(self, base, host=HOST, cpu: bool = True, arguments=(), with_pack: bool = True,
                 extra_custom_nodes: dict[str, str] | None = None,
                 env: dict[str, str] | None = None):
        self.base, self.host = Path(base).resolve(), Path(host).resolve()
        self.log_path = self.base / "server.log"
        self.arguments = (["--cpu"] if cpu else []) + list(arguments)
        self.env = env or {}
        self.extra_custom_nodes = extra_custom_nodes or {}
        self.with_pack = with_pack
        self.client_id = uuid.uuid4().hex
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        self._plant_custom_nodes()
        for _ in range(ATTEMPTS - 1):
            try:
                return self._start()
            except ServerError:
                if "address already in use" not in self.log().lower():
                    raise
        return self._start()

    def _start(self) -> "Server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(Path(__file__).with_name("run_host.py")), str(os.getpid()),
                   str(self.host / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port),
                   "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
                   "--disable-api-nodes", "--disable-auto-launch", *self.arguments]
        return self._run(command, env={**os.environ, "PYTHONUNBUFFERED": "1", **self.env})

    def _run(self, command: list[str], **options) -> "Server":
        """Starts the process, and waits until it serves. options: of `subprocess.Popen`."""
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, **options)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        assert self.process is not None
        end(self.process)

    def has_ended(self) -> bool:
        """Whether the process, which was started, is gone."""
        assert self.process is not None
        return self.process.poll() is not None

    def _plant_custom_nodes(self):
        for name in ("models", "custom_nodes", "input", "output", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        custom_nodes = self.base / "custom_nodes"
        pack = custom_nodes / PACK
        if pack.is_symlink() or pack.is_file():
            pack.unlink()
        elif pack.is_dir():
            shutil.rmtree(pack)
        if self.with_pack:
            link_or_copy(ROOT, pack)
        for name, source in self.extra_custom_nodes.items():
            (custom_nodes / f"{name}.py").write_text(source, encoding="utf-8")

    def _wait_until_ready(self, timeout: float = 600):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.has_ended():
                raise ServerError(
                    f"ComfyUI stopped while starting. The end of"
                    f" {self.log_path}:\n{self._log_tail()}"
                )
            try:
                self.system_stats()
                return
            except OSError:
                time.sleep(0.1)
        raise ServerError(
            f"ComfyUI did not answer in {timeout:.0f} s. The end of"
            f" {self.log_path}:\n{self._log_tail()}"
        )

    def _log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def log(self) -> str:
        """Everything the server has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        """Body of GET `path`; urllib.error.HTTPError for a status other than 200."""
        with urllib.request.urlopen(self.url + urllib.parse.quote(path, safe="/?&=%"),
                                    timeout=60) as reply:
            return reply.read()

    def post(self, path: str, value) -> bytes:
        """Body of the answer to POST `path` with a value as JSON; urllib.error.HTTPError for a
        status other than 200."""
        request = urllib.request.Request(self.url + path,
                                         json.dumps(value).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read()

    def get_json(self, path: str):
        return json.loads(self.get(path))

    def system_stats(self) -> dict:
        return self.get_json("/system_stats")

    def object_info(self) -> dict:
        """Node id -> its inputs and outputs, as the frontend sees them."""
        return self.get_json("/object_info")

    def image(self, entry: dict) -> bytes:
        """The file behind one {"filename", "subfolder", "type"} entry of `Run.outputs`."""
        return self.get("/view?" + urllib.parse.urlencode(entry))

    def pixels(self, run: Run, node: str | None = None) -> np.ndarray:
        """The first of the run's pictures, or of a node's: (height, width, 3) float32 from 0 to
        255."""
        entry = run.pictures[0] if node is None else run.outputs[node]["images"][0]
        return np.asarray(Image.open(io.BytesIO(self.image(entry))), dtype=np.float32)

    def forget(self):
        """Have the host drop what it keeps of earlier prompts, so that each node of the next one
        runs."""
        self.post("/free", {"free_memory": True})
        self.queue({
            "1": {
                "class_type": "PreviewAny", "inputs": {"source": "freed, after this at the latest"}
            }
        })

    def another_client(self) -> "Server":
        """The same server as another browser has it."""
        other = copy.copy(self)
        other.client_id = uuid.uuid4().hex
        return other

    def queue(self, prompt: dict, on_progress=None, timeout: float = 600, on_queued=None) -> Run:
        """Run an API-format workflow to its end.

        on_progress(node_id, value, maximum) is called for each step a node reports, and with
        (node_id, 0, 0) when a node starts. on_queued(prompt_id) is called before the first of them.
        Raises ServerError with the node's own message when the workflow is refused or fails.
        """
        socket_url = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        connection = websocket.create_connection(socket_url, timeout=timeout)
        try:
            run = Run(self._post_prompt(prompt))
            if on_queued is not None:
                on_queued(run.prompt_id)
            self._follow(connection, run, prompt, on_progress or (lambda *_: None),
                         time.monotonic() + timeout)
        finally:
            connection.close()
        run.outputs = self._history(run.prompt_id)["outputs"]
        return run

    def _post_prompt(self, prompt: dict) -> str:
        try:
            return json.loads(self.post(
                "/prompt", {"prompt": prompt, "client_id": self.client_id}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ServerError(_refusal(error.read(), prompt)) from None

    def _follow(self, connection, run: Run, prompt: dict, on_progress, deadline: float):
        while True:
            try:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                raise ServerError(
                    f"The workflow did not finish in time; see {self.log_path}.") from None
            except (websocket.WebSocketException, OSError):
                raise ServerError(
                    f"ComfyUI went away. The end of {self.log_path}:\n{self._log_tail()}") from None
            if isinstance(message, bytes):
                kind, length = struct.unpack(">II", message[:8])
                if kind == 3:  # BinaryEventTypes.TEXT: length of the node id, node id, text
                    node = message[8:8 + length].decode()
                    text = message[8 + length:].decode().replace(JOINER, "")
                    run.texts.setdefault(node, []).append(text.replace(LINE_BREAK, "\n"))
                elif kind == 1:  # BinaryEventTypes.PREVIEW_IMAGE: the kind of file, the file
                    run.previews.append(message[8:])
                continue
            event = json.loads(message)
            data = event.get("data", {})
            if data.get("prompt_id") != run.prompt_id:
                continue
            if event["type"] == "progress":
                run.steps.setdefault(data["node"], []).append(time.monotonic())
                on_progress(data["node"], data["value"], data["max"])
            elif event["type"] == "executing" and data["node"]:
                on_progress(data["node"], 0, 0)
            elif event["type"] == "executed":  # also of a node that is cached
                texts = run.texts.setdefault(data["node"], [])
                for text, in (data["output"] or {}).get("featherweight_text", []):
                    texts += [text] if text and text not in texts[-1:] else []
            elif event["type"] == "execution_error":
                raise ServerError(f"{data['node_type']}: {data['exception_message'].strip()}")
            elif event["type"] == "execution_interrupted":
                raise ServerError(f"{data['node_type']} was interrupted.")
            elif event["type"] == "execution_success":
                return

    def _history(self, prompt_id: str) -> dict:
        for _ in range(200):  # the entry can come a moment after execution_success
            history = self.get_json(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.05)
        raise ServerError(
            f"ComfyUI finished the workflow but kept no history of it; see {self.log_path}.")


def _refusal(body: bytes, prompt: dict) -> str:
    """One line per reason why the host did not accept a workflow."""
    try:
        reply = json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
    reasons = []
    for node_id, node in (reply.get("node_errors") or {}).items():
        name = node.get("class_type") or prompt[node_id]["class_type"]
        reasons += [f"{name}: {error['message']}: {error['details']}" for error in node["errors"]]
    error = reply.get("error", {})
    return "\n".join(reasons) or f"{error.get('message', reply)} {error.get('details', '')}".strip()
