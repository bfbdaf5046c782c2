"""Before a batch: what each machine of a cluster is, what it lacks of a workflow, and missing model files sent to it."""
import collections
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .fetch import Place, different, fetch, in_words, pinned, said
from .host import Host
from .machine import FILE, choices, folders, memory, packs
from .place import MachineError, arguments, difference, find, versions
from .place import majority as most
from .worker import node_info as this_machine

STARTED = 600  # seconds that a machine has to start its ComfyUI
IN_SIGHT = {"runtime_env": {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}}  # GPUs, of a process that takes none


@dataclass
class Machine:
    node: str  # Ray's id
    name: str  # as people know it
    versions: dict[str, str]
    memory: dict = field(default_factory=dict)
    packs: dict[str, str] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    choices: dict[tuple[str, str, str], dict] = field(default_factory=dict)
    trouble: str = ""  # why it could not be asked


class Asked:
    """On a machine: its name, its versions, and its ComfyUI, which is started when it is asked for more."""

    def __init__(self, elsewhere: str, has_gpu: bool):
        self.elsewhere, self.has_gpu, self.host = elsewhere, has_gpu, None

    def name(self) -> str:
        return this_machine()["name"]

    def versions(self) -> dict[str, str]:
        """Raises MachineError where it has no ComfyUI."""
        return versions(find(self.elsewhere), arguments(self.has_gpu))

    def look(self, classes: list[str], asked: list[tuple[str, str, str]]) -> dict:
        self.host = self.host or Host(find(self.elsewhere), arguments(self.has_gpu))
        return {"memory": memory(), "packs": packs(classes), "folders": folders(), "choices": choices(asked)}


def questions(graph: dict, rows: Iterable[dict] = ()) -> tuple[list[str], list[tuple[str, str, str]]]:
    """The classes of a graph in API format, and (class, input, value) of what may name a file or another choice.

    rows: changes to the graph, {"1.model_name": "flux.gguf"}; of them only what may be the name of a file.
    """
    values, changed, count = collections.defaultdict(set), collections.Counter(), 0
    for changes in rows:
        count += 1
        for at, value in changes.items():
            if isinstance(value, str):
                changed[at] += 1
                if FILE.fullmatch(value):
                    values[at].add(value)
    for node, spec in graph.items():
        for name, value in spec["inputs"].items():
            if isinstance(value, str) and len(value) < 256 and not 0 < count == changed[f"{node}.{name}"]:
                values[f"{node}.{name}"].add(value)
    asked = {(graph[node]["class_type"], name, value) for at, found in values.items()
             for node, _, name in [at.partition(".")] if node in graph for value in found}
    return sorted({spec["class_type"] for spec in graph.values()}), sorted(asked)


@dataclass
class Lack:
    """What one machine lacks. files: (kind, folder's name, file's name) -> bytes; nodes: class -> pack or ""."""
    files: dict[tuple[str, str, str], int] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    nowhere: list[str] = field(default_factory=list)  # files that no machine has
    choices: list[tuple[str, str, str]] = field(default_factory=list)
    versions: str = ""
    trouble: str = ""

    def __bool__(self):
        return any(vars(self).values())

    def briefly(self) -> str:
        if self.trouble or self.versions:
            return "did not answer" if self.trouble else "other version"
        files = len(self.files) + len(self.nowhere)
        what = [f"{files} file{'s' * (files > 1)}" if files else "",
                f"{len(self.nodes)} node{'s' * (len(self.nodes) > 1)}" if self.nodes else "",
                f"{len(self.choices)} choice{'s' * (len(self.choices) > 1)}" if self.choices else ""]
        return f"lacks {', '.join(filter(None, what))}" if any(what) else "yes"

    def sentence(self, name: str) -> str:
        """One, that begins with the machine's name; "" for a machine that lacks nothing."""
        if self.trouble:
            return f"{name}: {self.trouble}."
        if self.versions:
            return f"{name} {self.versions}: it takes no part."
        bags = collections.defaultdict(list)
        for kind, pack in self.nodes.items():
            bags[pack].append(kind)
        what = [f"{file} ({in_words(size)}) in {folder}" for (_, folder, file), size in self.files.items()]
        what += [f"{file}, which no machine has" for file in self.nowhere]
        what += [f"the node{'s' * (len(kinds) > 1)} {_and(kinds)} of {pack}" if pack else
                 f"the node{'s' * (len(kinds) > 1)} {_and(kinds)}, which no machine has" for pack, kinds in bags.items()]
        what += [f"the choice {value!r} of {kind}'s {place}" for kind, place, value in self.choices]
        return f"{name} lacks {_and(what)}." if what else ""


def lack(machine: Machine, machines: list[Machine], classes: list[str], expected: dict[str, str]) -> Lack:
    """What one of the machines lacks, by what the others have."""
    found = Lack(trouble=machine.trouble)
    if machine.trouble:
        return found
    found.versions = difference(machine.versions, expected)
    for kind in classes:
        if kind not in machine.packs:
            found.nodes[kind] = next((other.packs[kind] for other in machines if kind in other.packs), "")
    for question, answer in machine.choices.items():
        here = {name for _, _, name, _ in answer["files"]}
        holder = max((other.choices[question]["files"] for other in machines if question in other.choices), key=len)
        gone = [file for file in holder if file[2] not in here]
        for kind, folder, name, size in gone:
            found.files[kind, _last(folder), name] = size
        if not answer["taken"] and not gone:
            if FILE.fullmatch(question[2]) and not here:
                found.nowhere.append(question[2])
            else:
                found.choices.append(question)
    return found


def unlike(machines: list[Machine]) -> list[str]:
    """One sentence for each file that has other sizes on other machines."""
    sizes = collections.defaultdict(dict)
    for machine in machines:
        for answer in machine.choices.values():
            for _, folder, name, size in answer["files"]:
                sizes[f"{_last(folder)}/{name}"].setdefault(size, machine.name)
    return [f"{name} is {_and([f'{size:,} bytes on {where}' for size, where in found.items()])}: their pictures will differ."
            for name, found in sizes.items() if len(found) > 1]


def table(machines: list[Machine], lacks: dict[str, Lack]) -> str:
    """One line for each machine below a head, in columns."""
    rows = [("machine", "ComfyUI", "torch", "Featherweight", "GPU", "free memory", "can run it")]
    for machine in machines:
        gpus, free = machine.memory.get("gpus", []), machine.memory.get("free")
        found = [machine.versions.get(name) or "?" for name in ("ComfyUI", "torch", "Featherweight")]
        rows.append((machine.name, *found, ", ".join(name for name, *_ in gpus) or "none",
                     " + ".join([*(f"{in_words(left)} of {in_words(size)}" for _, left, size in gpus),
                                 f"{in_words(free)} RAM"]) if free else "?", lacks[machine.node].briefly()))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def conclusion(lacks: list[Lack]) -> str:
    able = sum(not each for each in lacks)
    if able == len(lacks):
        return "The machine can run it." if able == 1 else f"All {able} machines can run it."
    files = {file: size for each in lacks if not each.versions for file, size in each.files.items()}
    hint = f" --fetch-models copies {len(files)} missing file{'s' * (len(files) > 1)}, {in_words(sum(files.values()))}."
    return f"{able} of {len(lacks)} machines can run it.{hint if files else ''}"


class Look:
    """At machines of a cluster: a context in which each has a process that is asked, and a ComfyUI once it is looked at.

    nodes: Ray's id of each that is to take part -> whether its GPUs do. elsewhere: see `place.find`.
    """

    def __init__(self, nodes: dict[str, bool], elsewhere: str = ""):
        import ray

        self.asked = {}
        for node, has_gpu in nodes.items():
            options = {**pinned(node), **(IN_SIGHT if has_gpu else {})}
            self.asked[node] = ray.remote(Asked).options(**options).remote(elsewhere, has_gpu)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        import ray

        for actor in self.asked.values():
            ray.kill(actor)

    def machines(self, classes: list[str], asked: list[tuple[str, str, str]]) -> list[Machine]:
        """What each answers, in the order of the nodes; `trouble` of one that does not."""
        import ray

        answers = {node: (actor.name.remote(), actor.versions.remote(), actor.look.remote(classes, asked))
                   for node, actor in self.asked.items()}
        ray.wait([looked for *_, looked in answers.values()], num_returns=len(answers), timeout=STARTED)
        found = []
        for node, (name, its_versions, looked) in answers.items():
            each = Machine(node, f"The machine of Ray's node {node[:8]}", {})
            try:
                each.name = ray.get(name, timeout=1)
                each.versions = ray.get(its_versions, timeout=1)
                for known, value in ray.get(looked, timeout=1).items():
                    setattr(each, known, value)
            except ray.exceptions.GetTimeoutError:
                each.trouble = f"did not answer within {STARTED} s"
            except MachineError as error:
                each.trouble = said(error)
            except ray.exceptions.RayError as error:
                each.trouble = f"could not be asked: {said(error)}"
            found.append(each)
        return found


def survey(look: Look, classes: list[str], asked: list[tuple[str, str, str]], own: dict[str, str] | None = None
           ) -> tuple[list[Machine], dict[str, Lack]]:
    """The machines, and what each lacks, by Ray's id. classes, asked: see `questions`. own: see `most`."""
    found = look.machines(classes, asked)
    expected = most((machine.versions for machine in found if machine.versions), own)
    return found, {machine.node: lack(machine, found, classes, expected) for machine in found}


def report(machines: list[Machine], lacks: dict[str, Lack]) -> str:
    """The table, a sentence for each machine that lacks something, and one that closes."""
    sentences = [lacks[machine.node].sentence(machine.name) for machine in machines]
    return "\n".join([table(machines, lacks), "", *filter(None, sentences), *unlike(machines), conclusion([*lacks.values()])])


def checked(nodes: dict[str, bool], elsewhere: str, graph: dict, rows: Iterable[dict], send: bool,
            tell: Callable[[str], None]) -> bool:
    """Tell of each machine what it is and lacks, after it was sent missing model files if `send`. Whether all can run it.

    nodes, elsewhere: see `Look`. rows: see `questions`.
    """
    asked, own = questions(graph, rows), versions(elsewhere) if elsewhere else None
    with Look(nodes, elsewhere) as look:
        machines, lacks = survey(look, *asked, own)
        if send and any(each.files for each in lacks.values()):
            for sentence in fetch_missing(machines, lacks, tell):
                tell(sentence)
            machines, lacks = survey(look, *asked, own)
    tell(report(machines, lacks))
    return not any(lacks.values())


def fetch_missing(machines: list[Machine], lacks: dict[str, Lack], tell: Callable[[str], None]) -> list[str]:
    """Send each missing model file to the machines that lack it. Returns one sentence for each that did not arrive."""
    failed, wanted = [], collections.defaultdict(list)
    for machine in machines:
        for file in ({} if lacks[machine.node].versions else lacks[machine.node].files):
            wanted[file].append(machine)
    for (kind, folder, name), without in wanted.items():
        holders = {Place(machine.node, machine.name, where, name): size for machine in machines
                   for answer in machine.choices.values() for _, where, held, size in answer["files"]
                   if (_last(where), held) == (folder, name)}
        targets = []
        for machine in without:
            there = sorted(machine.folders.get(kind, ()), key=lambda path: _last(path) != folder)
            if there:
                targets.append(Place(machine.node, machine.name, there[0], name))
            else:
                failed.append(f"{machine.name} has no folder of the kind {kind}, where {name} belongs.")
        if len(holders) > 1 and (sentence := different(list(holders))):
            failed.append(sentence)
        elif targets:
            source, size = next(iter(holders.items()))
            tell(f"{name}, {in_words(size)}: from {source.machine} to {_and([target.machine for target in targets])}")
            failed += fetch(source, targets, size).values()
    return failed


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _last(folder: str) -> str:
    """The last part of a path, which may be one of another system."""
    return re.split(r"[\\/]", folder.rstrip("\\/"))[-1]
