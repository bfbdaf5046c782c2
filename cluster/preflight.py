"""Before a batch: each machine's own ComfyUI is asked whether it can run the workflow."""
import collections
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .comfyui_install import MachineError, launch_arguments
from .embedded_comfyui import FILE_NAME, EmbeddedComfyUI
from .graph import GraphError, apply_changes, one_line
from .ray_connection import on_node
from .worker import Worker

CHECK_SECONDS = 600  # that a machine has to start its ComfyUI
MAX_PROBLEMS = 10  # of a machine, that are said
MAX_FILES = 10_000  # of an input, that rows name
# where none is taken
VISIBLE_GPUS = {"runtime_env": {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}}
COLUMNS = ("machine", "ComfyUI", "torch", "Featherweight", "GPU", "free memory", "can run it")


@dataclass
class MachineReport:
    """A machine of the cluster.

    Args:
        versions: see `place.versions`.
        excluded: why it takes no part, or "".
        memory: see `memory`.
        problems: what keeps it from running the workflow, as ends of sentences that begin with its
        name.
    """
    name: str
    versions: dict[str, str]
    excluded: str = ""
    memory: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def can_run(self) -> bool:
        return not self.excluded and not self.problems

    def row(self) -> tuple[str, ...]:
        """Its cells of the table."""
        gpus, ram = self.memory.get("gpus", []), self.memory.get("ram")
        free = [f"{left / 1e9:.1f} of {total / 1e9:.1f} GB" for _, left, total in gpus]
        free.append(f"{ram / 1e9:.1f} GB RAM" if ram else "?")
        versions = [self.versions.get(name) or "?" for name in COLUMNS[1:4]]
        return (
            self.name,
            *versions,
            ", ".join(name for name, *_ in gpus) or "none",
            " + ".join(free),
            "yes" if self.can_run() else "no",
        )

    def sentences(self) -> list[str]:
        if self.excluded:
            return [f"{self.name} {self.excluded.rstrip('.')}: it takes no part."]
        more = len(self.problems) - MAX_PROBLEMS
        return [
            f"{self.name} {problem.rstrip('.')}." for problem in self.problems[:MAX_PROBLEMS]
        ] + ([f"{self.name} has {more} more problems."] if more > 0 else [])


class Checker(Worker):
    """A ComfyUI that is asked and draws nothing."""

    def __init__(self, comfyui: str, has_gpu: bool):
        self.has_gpu = has_gpu
        super().__init__(comfyui)

    def boot(self, comfyui: str) -> EmbeddedComfyUI:
        return EmbeddedComfyUI(comfyui, launch_arguments(self.has_gpu))

    def check(self, graph: dict, changes: list[dict]) -> tuple[dict, list[str]]:
        """Returns (`memory`, the machine's problems with a workflow, with each of these changes to
        it)."""
        if self.unfit:
            return {}, [self.unfit]
        problems = {}
        for each in changes:
            try:
                self.host.validate(apply_changes(graph, each))
            except MachineError as error:
                problems[str(error)] = None
            except GraphError as error:
                problems[f"refuses the workflow: {error}"] = None
        return memory(), list(problems)


def memory() -> dict:
    """Memory of this machine, where a ComfyUI was started: {"ram": free bytes, "gpus": [(name, free
    bytes, all bytes)]}."""
    import comfy.model_management
    import psutil
    import torch

    gpus = []
    for device in comfy.model_management.get_all_torch_devices():
        if device.type != "cpu":
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            gpus.append((name, int(comfy.model_management.get_free_memory(device)),
                         int(comfy.model_management.get_total_memory(device))))
    return {"ram": psutil.virtual_memory().available, "gpus": gpus}


def file_changes(graph: Mapping[str, dict], rows: Iterable[dict]) -> list[dict[str, str]]:
    """Changes to a workflow that together have each file in it that rows name, of an input the
    first `MAX_FILES`.

    Args:
        rows: changes to it, {"1.model_name": "flux.gguf"}. What is no file's name is not looked at.

    Returns:
        {} among them where the workflow is drawn with its own files too.
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
    found = [{path: column[index % len(column)] for path, column in columns.items()}
             for index in range(length)]
    has_own = any(counts.total() < count for counts in names.values())
    return [{}, *found] if has_own or not found else found


def check_machines(machines: dict[str, MachineReport], graph: dict, changes: list[dict],
                   comfyui: str, has_gpus: bool):
    """Asks each machine that takes part, by Ray's id, and notes what it answers.

    Args:
        changes: see `file_changes`.
        comfyui: see `Worker`.
        has_gpus: whether their GPUs take part.
    """
    import ray

    actor = ray.remote(Checker)
    options = VISIBLE_GPUS if has_gpus else {}
    actors = {node: actor.options(**on_node(node), **options).remote(comfyui, has_gpus)
              for node, machine in machines.items() if not machine.excluded}
    try:
        answers = {node: each.check.remote(graph, changes) for node, each in actors.items()}
        if answers:
            ray.wait(list(answers.values()), num_returns=len(answers), timeout=CHECK_SECONDS)
        for node, answer in answers.items():
            machine = machines[node]
            try:
                machine.memory, machine.problems = ray.get(answer, timeout=1)
            except ray.exceptions.GetTimeoutError:
                machine.problems = [f"did not answer within {CHECK_SECONDS} s"]
            except ray.exceptions.RayError as error:
                machine.problems = [f"could not be asked: {one_line(error, 300)}"]
    finally:
        for each in actors.values():
            ray.kill(each)


def report(machines: Iterable[MachineReport]) -> str:
    """A table of the machines, sentences for each that cannot run the workflow, and one that
    closes."""
    machines = list(machines)
    rows = [COLUMNS, *(machine.row() for machine in machines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    able = sum(machine.can_run() for machine in machines)
    end = f"{able} of {len(machines)} machines can run it."
    if able == len(machines):
        end = f"All {able} machines can run it." if able > 1 else "The machine can run it."
    return "\n".join(
        [*table, "", *(text for machine in machines for text in machine.sentences()), end])
