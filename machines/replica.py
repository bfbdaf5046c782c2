"""Workers that many editors share: replicas of Ray Serve, which come with the first prompt and go when nobody has one."""
import asyncio
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from .graph import GraphError
from .heard import PREVIEW_WITH_METADATA
from .place import MachineError
from .worker import Worker, machine

APP, NAME = "featherweight", "ComfyUI"
AHEAD = 2  # prompts that a worker holds: one runs and one waits, so that none idles between two
STARTS = 20  # attempts at starting Serve
RETRY = 0.5  # seconds between two
REST = 2.0  # seconds that an unfit worker takes for its answer, so that it does not eat what others could do


class Replica(Worker):
    """Says what happens to a prompt in words that need no class of this pack to be read: a driver may have another version."""

    def __init__(self, elsewhere: str = ""):
        self.unfit, self.told = "", False
        try:
            super().__init__(elsewhere)
        except Exception as error:  # Serve would try again for ever, and say nothing to who waits
            self.machine = machine()
            self.unfit = str(error) if isinstance(error, MachineError) else \
                f"its ComfyUI did not start: {type(error).__name__}: {error}"

    async def draw(self, graph: dict, extra: dict):
        """("begins", machine's name), ("progress", (node, value, maximum)) and ("preview", JPEG or PNG) as they come, and then
        one of ("images", array (N, H, W, C)), ("failed", sentence) or ("unfit", what this machine lacks)."""
        if self.unfit:
            await asyncio.sleep(REST)
            self.told = True
            yield "unfit", f"{self.machine['name']}: {self.unfit}"
            return
        try:
            async for event, data in self.stream(graph, extra):
                if event == "execution_start":
                    yield "begins", self.machine["name"]
                elif event == "progress":
                    yield "progress", (data["node"], data["value"], data["max"])
                elif event == PREVIEW_WITH_METADATA:
                    yield "preview", data[4 + int.from_bytes(data[:4], "big"):]
                elif event == "answer":
                    yield "images", data[1].cpu().float().numpy()
        except GraphError as error:
            yield "failed", str(error)
        except MachineError as error:
            await asyncio.sleep(REST)
            yield "unfit", f"{self.machine['name']}: {error}"

    def check_health(self):
        """Called by Ray Serve. One whose ComfyUI did not start is replaced when it has said so: it may be mended by then."""
        if self.told:
            raise RuntimeError(self.unfit)


def plan(machines: Sequence[dict[str, float]], workers: int = 0, on_cpu: bool = False) -> tuple[int, dict]:
    """(number of workers, options of the deployment) for machines with so many {"CPU": .., "GPU": ..}.

    workers: 0 for one on each GPU, or on each machine where none has a GPU. on_cpu: GPUs are not used. The CPUs of a machine
    are shared out among its workers, alike on all machines, so that all compute with the same number of threads.
    """
    gpus = [] if on_cpu else [machine for machine in machines if machine.get("GPU", 0) >= 1]
    if gpus:
        threads = min(machine.get("CPU", 0) / machine["GPU"] for machine in gpus)
        return workers or int(sum(machine["GPU"] for machine in gpus)), {
            "ray_actor_options": {"num_gpus": 1, "num_cpus": int(threads) if threads >= 1 else threads}}
    with_cpus = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    if not with_cpus:
        return 0, {}
    count = workers or len(with_cpus)
    each = -(-count // len(with_cpus))
    return count, {"max_replicas_per_node": each, "ray_actor_options": {"num_cpus": max(1, min(with_cpus) // each)}}


def _start(serve):
    """Serve on this cluster, if it is not there; another editor may be starting it at this moment."""
    import ray

    is_there = getattr(ray.exceptions, "ActorAlreadyExistsError", ValueError)  # its controller; older Rays have no class for it
    for attempt in range(STARTS):
        try:
            serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})  # no port for the web
            return
        except is_there:
            if attempt == STARTS - 1:
                raise
            time.sleep(RETRY)


def deploy(workers: int, options: dict, idle_seconds: float, elsewhere: str = ""):
    """The handle of the workers. Those that are there stay, where only their number or their patience is another.

    elsewhere: see `place.find`.
    """
    from ray import serve

    _start(serve)
    deployment = serve.deployment(
        Replica, name=NAME, max_ongoing_requests=AHEAD, health_check_period_s=5, graceful_shutdown_timeout_s=10,
        logging_config={"log_level": "ERROR", "enable_access_log": False}, **options,
        autoscaling_config={"min_replicas": 0, "max_replicas": workers, "target_ongoing_requests": 1, "upscale_delay_s": 0.5,
                            "downscale_delay_s": idle_seconds, "downscale_to_zero_delay_s": idle_seconds,
                            "metrics_interval_s": 1, "look_back_period_s": 2})
    # Without a version Serve takes each deployment for new code and starts every worker anew.
    deployment._version = hashlib.sha256(b"".join(
        path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
    return serve.run(deployment.bind(elsewhere), name=APP, route_prefix=None)
