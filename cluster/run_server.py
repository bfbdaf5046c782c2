"""Renders the runs of *Run on Ray*: what `batch.py serve` does, in a process that ComfyUI keeps.

It reads a line of JSON for each run from standard input (see `RunServer.run`), and writes lines of
JSON to standard output: {"job", "file"} for each job that is done, {"text"} for what a batch would
print, and at last {"end": why the run failed, or ""}. What is printed goes to standard error. The
process ends with its input, and so do a Ray that it started and the workers.
"""
import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable

from .actor_pool import ActorPool, Share, machine_resources, share_out
from .batch_progress import BatchProgress
from .batch_row_rendering import RowRun
from .batch_run import Batch, join
from .comfyui_install import MachineError
from .embedded_comfyui import sweep_dead
from .picture_store import saved_name
from .ray_connection import is_joined, named_cluster
from .workflow_graph import GraphError, canonical, one_line, with_result

END_SECONDS = 5  # for Ray to end after the input
POLL_SECONDS = 0.2  # between two looks whether the input has ended


def plan_workers(machines: list[dict[str, float]], workers: int = 0,
                 on_cpu: bool = False) -> tuple[int, Share]:
    """Returns how many workers to start and what each of them gets.

    Args:
        machines: resources of each, {"CPU": 8.0, "GPU": 1.0}.
        workers: 0 for one on each GPU, or on each machine if none has a GPU.
        on_cpu: whether GPUs are left unused.
    """
    share = share_out(machines, gpus=0.0 if on_cpu else None, workers=workers)
    counts = [count for count in map(share.worker_count, machines) if count]
    if not workers:
        workers = sum(counts) if share.gpus else len(counts)
    return min(workers, sum(counts)), share


class JobProgress(BatchProgress):
    """Sends ComfyUI each job that is done, and ends the run at the first that fails.

    Args:
        total: jobs of the run.
        send: sends a message.
        path: returns the path of a job's images.
    """

    def __init__(self, total: int, send: Callable[[dict], None], path: Callable[[str], str]):
        super().__init__(total)
        self.send = send
        self.path = path

    def add(self, answer: dict):
        name, path = answer["id"], self.path(answer["id"])
        if answer["status"] == "failed" or not os.path.exists(path):
            message = answer["message"] or "it gave no image."
            raise GraphError(f"{name} of {self.total} failed: {message}")
        self.send({"job": int(name.split()[1]) - 1, "file": path})

    def log(self, text: str):
        self.send({"text": text})


class JobRun(RowRun):
    """Renders jobs until `has_ended`, which the caller sets, is set."""
    LOSSES = FAILED_STARTS = 3
    WAIT_SECONDS = POLL_SECONDS
    has_ended: threading.Event

    def check(self):
        if self.has_ended.is_set():
            raise KeyboardInterrupt


class RunServer:
    """Answers requests in turn, on workers that stay for the next one.

    Args:
        comfyui: the folder of the ComfyUI that sends them.
        send: sends it a message.
    """

    def __init__(self, comfyui: str, send: Callable[[dict], None]):
        self.comfyui = comfyui
        self.send = send
        self.pool: ActorPool | None = None
        self.inbox = queue.SimpleQueue()  # None for the end of the input
        self.has_ended = threading.Event()  # the input
        self.count = 0  # of runs
        self.out = ""

    def listen(self):
        """Reads the input in a thread, and ends this process if Ray keeps it from ending."""
        for line in sys.stdin.buffer:
            self.inbox.put(json.loads(line))
        self.has_ended.set()
        self.inbox.put(None)
        time.sleep(END_SECONDS)  # cut short if all ends by itself, as this is a daemon thread
        shutil.rmtree(self.out, ignore_errors=True)
        if hasattr(os, "killpg"):
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os._exit(1)

    def serve(self):
        """Answers requests, and ends workers that were idle for the last request's time."""
        idle_seconds = None
        while True:
            try:
                request = self.inbox.get(timeout=idle_seconds)
            except queue.Empty:
                if self.pool is not None:
                    self.pool.end_all()
                idle_seconds = None
                continue
            if request is None:
                return
            idle_seconds = request.pop("idle_seconds")
            self.send({"end": self.answer(request)})
            self.wait_for_jobs()

    def answer(self, request: dict) -> str:
        """Renders a run and returns why it failed, or ""."""
        try:
            self.run(**request)
        except (MachineError, GraphError) as error:
            return str(error)
        except Exception as error:
            logging.exception("Run on Ray")
            return f"Ray failed: {type(error).__name__}: {one_line(error, 600)}"
        return ""

    def run(self, graph: dict, images: list, changes: list[dict], workers: int, on_cpu: bool,
            out: str):
        """Renders the jobs of a run.

        Args:
            graph: the workflow.
            images: the link whose images are wanted.
            changes: for each job, its changes to the workflow.
            workers: how many to start, see `plan_workers`.
            on_cpu: whether GPUs are left unused.
            out: the folder for the images, which is the same in each run.

        Raises:
            GraphError, MachineError
        """
        self.out = out
        if not is_joined():
            join(named_cluster() or "local")
        batch = Batch(graph, "", out, comfyui=self.comfyui)
        batch.connect()
        import ray

        count, batch.share = plan_workers(list(machine_resources().values()), workers, on_cpu)
        if not count:
            raise MachineError("The Ray cluster has no machine with a GPU or a CPU to run on.")
        if self.pool and self.pool.share != batch.share:
            self.pool.end_all()
            self.pool = None
        self.pool = self.pool or batch.make_pool()
        graph, node = with_result(graph, images)
        self.count += 1
        # the stamp tells a job from one of an earlier run
        jobs = [{"id": f"Job {index}", "changes": canonical(change), "stamp": str(self.count)}
                for index, change in enumerate(changes, 1)]
        progress = JobProgress(
            len(jobs), self.send, lambda name: os.path.join(out, saved_name(name, f"{node}_0.npy")))
        run = JobRun(self.pool, ray.put(graph), jobs, (1, min(count, len(jobs))), progress)
        run.has_ended = self.has_ended
        run.render()

    def wait_for_jobs(self):
        """Waits for jobs that a failed run has begun, so that their workers keep their models."""
        import ray

        for member in self.pool.members if self.pool else ():
            jobs = [call for call, job in member.calls.items() if job]
            member.calls = {call: None for call, job in member.calls.items() if not job}
            while jobs and not self.has_ended.is_set():
                _, jobs = ray.wait(jobs, num_returns=len(jobs), timeout=POLL_SECONDS)


def serve_runs(comfyui: str):
    """Serves the runs that come from standard input until it ends. comfyui: see `RunServer`."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict):
        print(json.dumps(message), file=output, flush=True)

    server = RunServer(comfyui, send)
    threading.Thread(target=server.listen, daemon=True).start()
    with contextlib.suppress(OSError, KeyboardInterrupt):  # ComfyUI has ended the run or itself
        server.serve()
    if is_joined():
        sys.modules["ray"].shutdown()
    shutil.rmtree(server.out, ignore_errors=True)
    sweep_dead()
