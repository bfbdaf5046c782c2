"""Checks before a batch whether each machine's ComfyUI can run the workflow."""
import collections
import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from .comfyui_install import MachineError, launch_arguments
from .embedded_comfyui import FILE_NAME, EmbeddedComfyUI
from .ray_connection import on_node
from .worker import Worker
from .workflow_graph import GraphError, apply_changes, one_line

CHECK_SECONDS = 600  # for a machine to start its ComfyUI and answer
MAX_PROBLEMS = 10  # that are printed for a machine
MAX_FILES = 10_000  # that are checked for an input
# shows an actor the GPUs of its node though it reserves none
VISIBLE_GPUS = {"runtime_env": {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}}
COLUMNS = ("machine", "ComfyUI", "torch", "Featherweight", "GPU", "free memory", "can run it")


@dataclass
class MachineReport:
    """A machine of the cluster.

    Args:
        name: of the machine.
        versions: see `installed_versions`.
        excluded: why it takes no part, or "".
        memory: see `memory`.
        problems: why it cannot run the workflow, as sentences without their first word, its name.
    """
    name: str
    versions: dict[str, str]
    excluded: str = ""
    memory: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def can_run(self) -> bool:
        return not self.excluded and not self.problems

    def row(self) -> tuple[str, ...]:
        """Returns the machine's cells of the table."""
        gpus = self.memory.get("gpus", [])
        ram = self.memory.get("ram")
        sizes = [f"{free / 1e9:.1f} of {total / 1e9:.1f} GB" for _, free, total in gpus]
        sizes.append(f"{ram / 1e9:.1f} GB RAM" if ram else "?")
        versions = [self.versions.get(name) or "?" for name in COLUMNS[1:4]]
        return (
            self.name,
            *versions,
            ", ".join(name for name, *_ in gpus) or "none",
            " + ".join(sizes),
            "yes" if self.can_run() else "no",
        )

    def sentences(self) -> list[str]:
        """Returns why the machine cannot run the workflow, [] if it can."""
        if self.excluded:
            return [f"{self.name} {self.excluded.rstrip('.')}: it takes no part."]
        sentences = [
            f"{self.name} {problem.rstrip('.')}." for problem in self.problems[:MAX_PROBLEMS]
        ]
        more = len(self.problems) - MAX_PROBLEMS
        if more > 0:
            sentences.append(f"{self.name} has {more} more problems.")
        return sentences


class Checker(Worker):
    """A ComfyUI that validates workflows and renders nothing."""

    def __init__(self, comfyui: str, has_gpu: bool):
        self.has_gpu = has_gpu
        super().__init__(comfyui)

    def boot(self, comfyui: str) -> EmbeddedComfyUI:
        return EmbeddedComfyUI(comfyui, launch_arguments(self.has_gpu))

    def check(self, graph: dict, changes: list[dict]) -> tuple[dict, list[str]]:
        """Validates a workflow with each of some changes.

        Args:
            graph: the workflow.
            changes: one or more changes to it, see `file_changes`.

        Returns:
            (`memory`, why this machine cannot run it).
        """
        if self.problem:
            return {}, [self.problem]
        assert self.host is not None  # else there is a problem
        problems = {}  # a set that keeps its order
        for change in changes:
            try:
                self.host.validate(apply_changes(graph, change))
            except MachineError as error:
                problems[str(error)] = None
            except GraphError as error:
                problems[f"refuses the workflow: {error}"] = None
        return memory(), list(problems)


def memory() -> dict:
    """Returns the memory of this machine, in whose process a ComfyUI runs.

    That is {"ram": free bytes, "gpus": [(name, free bytes, bytes in all)]}.
    """
    import comfy.model_management
    import psutil
    import torch

    gpus = []
    for device in comfy.model_management.get_all_torch_devices():
        if device.type != "cpu":
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            free: Any = comfy.model_management.get_free_memory(device)
            total: Any = comfy.model_management.get_total_memory(device)
            gpus.append((name, int(free), int(total)))
    return {"ram": psutil.virtual_memory().available, "gpus": gpus}


def file_changes(graph: Mapping[str, dict], rows: Iterable[dict]) -> list[dict[str, str]]:
    """Returns a few changes to a workflow that together name every file that rows name.

    Args:
        graph: the workflow.
        rows: changes to it, {"1.model_name": "flux.gguf"}. Values that are not names of files are
            ignored, and so are the files of an input after the first `MAX_FILES`.

    Returns:
        The changes; {} is the first of them if a row has the workflow's own files.
    """
    names, count = collections.defaultdict(collections.Counter), 0
    for changes in rows:
        count += 1
        for path, value in changes.items():
            if isinstance(value, str) and FILE_NAME.fullmatch(value):
                with contextlib.suppress(GraphError):
                    apply_changes(graph, {path: value})
                    names[path][value] += 1
    columns = {path: list(counts)[:MAX_FILES] for path, counts in names.items()}
    length = max(map(len, columns.values()), default=0)
    combined = [{path: column[index % len(column)] for path, column in columns.items()}
                for index in range(length)]
    has_own = any(counts.total() < count for counts in names.values())
    return [{}, *combined] if has_own or not combined else combined


def check_machines(machines: dict[str, MachineReport], graph: dict, changes: list[dict],
                   comfyui: str, has_gpus: bool):
    """Sets `memory` and `problems` of each machine that takes part.

    Args:
        machines: Ray's node id -> machine.
        graph: the workflow.
        changes: see `file_changes`.
        comfyui: see `Worker`.
        has_gpus: whether workers use GPUs.
    """
    import ray.exceptions

    checker: Any = ray.remote(Checker)
    options = VISIBLE_GPUS if has_gpus else {}
    actors = {node: checker.options(**on_node(node), **options).remote(comfyui, has_gpus)
              for node, machine in machines.items() if not machine.excluded}
    try:
        answers = {node: actor.check.remote(graph, changes) for node, actor in actors.items()}
        _wait_for(list(answers.values()))
        for node, answer in answers.items():
            machine = machines[node]
            try:
                machine.memory, machine.problems = ray.get(answer, timeout=1)
            except ray.exceptions.GetTimeoutError:
                machine.problems = [f"did not answer within {CHECK_SECONDS} s"]
            except ray.exceptions.RayError as error:
                machine.problems = [f"could not be asked: {one_line(error, 300)}"]
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _wait_for(answers: list):
    """Waits for references of Ray, at most CHECK_SECONDS, and shows how many have come."""
    import ray

    deadline = time.monotonic() + CHECK_SECONDS
    with tqdm(total=len(answers), desc="Machines checked", leave=False) as bar:
        while answers and (seconds := deadline - time.monotonic()) > 0:
            done, answers = ray.wait(answers, timeout=seconds)
            bar.update(len(done))


def report(machines: Iterable[MachineReport]) -> str:
    """Returns a table of the machines, what each of them lacks, and a closing line."""
    machines = list(machines)
    rows = [COLUMNS, *(machine.row() for machine in machines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    able = sum(machine.can_run() for machine in machines)
    summary = f"{able} of {len(machines)} machines can run it."
    if able == len(machines):
        summary = f"All {able} machines can run it." if able > 1 else "The machine can run it."
    sentences = [sentence for machine in machines for sentence in machine.sentences()]
    return "\n".join([*table, "", *sentences, summary])
