"""Two clients that work through their prompts side by side, readings of the server, and what they
come to."""
import os
import re
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from devtools.host.server import Server, ServerError
from devtools.soak import probe_nodes
from devtools.soak.requests import CANCEL, FREE, REFUSAL, Ask, Asks

CLIENTS = 2
# of what is packed while loading: less than all of it, so that entries come and go
CACHE = {"FEATHERWEIGHT_PACKED_CACHE_GB": "0.02"}
MOST_PICTURES = 3  # of the same prompt, before its model's kernels are all proven
LOST = 300  # seconds after which a prompt is taken for lost
TRIALS = 300  # seconds that kernels may take which are tried beside the prompts, with their files
GROWTH = 0.01  # of the resident memory after the warm-up
ENOUGH = 16  # readings of which a growth can be told
INTERRUPTED = re.compile(r"\w+ was interrupted\.")
SENTENCE = re.compile(r"[^\n]+[.)]")  # of a refusal: on one line
LEFT = {"mapped": "model files mapped", "open": "open files", "temporary": "temporary files"}


@dataclass
class RunLog:
    """What a run has found.

    mistakes: what should not have been, each in a line. pictures: key -> digests of its pictures,
    in order, each once. repeated: how many pictures were compared. readings: as `read` makes them.
    """

    prompts: int = 0
    mistakes: list[str] = field(default_factory=list)
    pictures: dict[str, list[str]] = field(default_factory=dict)
    repeated: int = 0
    readings: list[dict] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, ask: Ask, mistake: str):
        with self.lock:
            self.prompts += 1
            if mistake:
                self.mistakes.append(f"prompt {self.prompts}, {ask.kind} {ask.key!r}: {mistake}")

    def picture(self, ask: Ask, digest: str) -> str:
        """Notes a picture. Returns what is wrong with it, or ""."""
        with self.lock:
            self.repeated += ask.key in self.pictures
            known = self.pictures.setdefault(ask.key, [digest])
            # a model that is loaded again may multiply by kernels that are proven meanwhile
            is_settled = digest == known[-1] or (digest not in known and len(known) < MOST_PICTURES)
            if digest != known[-1]:
                known.append(digest)
        return "" if is_settled else "another picture than the times before"

    def growth(self) -> float | None:
        """What the resident memory has grown by after the first quarter of the readings, relative,
        along the line that fits them best; None of too few readings."""
        if len(self.readings) < ENOUGH:
            return None
        late = self.readings[len(self.readings) // 4:]
        prompts, rss = ([each[name] for each in late] for name in ("prompts", "rss"))
        slope, start = statistics.linear_regression(prompts, rss)
        return (start + slope * prompts[-1]) / (start + slope * prompts[0]) - 1

    def broken(self) -> list[str]:
        """The bounds that do not hold, each in a sentence."""
        found, grown = list(self.mistakes), self.growth()
        if grown is not None and grown >= GROWTH:
            found.append(f"Resident memory has grown by {grown:.1%} after the warm-up, of"
                         f" {GROWTH:.0%} that it may.")
        late = self.readings[len(self.readings) // 4:]
        return found + [
            f"{text}: {late[0][name]} after the warm-up, {late[-1][name]} at the end."
            for name, text in LEFT.items() if late and late[-1][name] > late[0][name]]

    def closing_line(self) -> str:
        grown = self.growth()
        memory = "too few readings to tell a growth" if grown is None else (
            f"resident memory {grown:+.2%} after the warm-up")
        return (f"{'Failed' if self.broken() else 'Done'}: {self.prompts} prompts, {self.repeated}"
                f" repeated pictures compared, {len(self.mistakes)} mistakes, {memory}")


def soak(base: Path, prompts: int, minutes: float, every: int, seed: int = 1,
         run_log: RunLog | None = None, show: Callable[[dict], None] = lambda reading: None
         ) -> RunLog:
    """Rounds of `every` prompts until there are `prompts` of them or the minutes are over, with the
    files that `fixtures.write` has written into `base`, where all temporary files lie too.

    show: called with each reading of `run_log`, which grows.
    """
    run_log, end = run_log or RunLog(), time.monotonic() + 60 * minutes
    folders = {"TMPDIR": "tmp", "XDG_CACHE_HOME": "cache", "FEATHERWEIGHT_PACKED_CACHE": "packed"}
    for name in folders.values():
        (base / name).mkdir(parents=True, exist_ok=True)
    env = CACHE | {name: str(base / folder) for name, folder in folders.items()}
    nodes = {"soak": Path(probe_nodes.__file__).read_text(encoding="utf-8")}
    # products this small only wait for other threads
    with Server(base, extra_custom_nodes=nodes, env=env | {"OMP_NUM_THREADS": "1"}) as server:
        clients = [(server.another_client(), Asks(base, seed, number)) for number in range(CLIENTS)]
        while run_log.prompts < prompts and time.monotonic() < end:
            count = -(-min(every, prompts - run_log.prompts) // CLIENTS)
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(lambda each: work(each[0], each[1], run_log, count, end), clients))
            if server.has_ended():
                run_log.mistakes.append(f"The server ended after {run_log.prompts} prompts.")
                break
            run_log.readings.append({"prompts": run_log.prompts} | read(server))
            show(run_log.readings[-1])
    return run_log


def work(server: Server, asks: Asks, run_log: RunLog, count: int, end: float):
    """Ask `count` times, or until the time is up."""
    for _ in range(count):
        if time.monotonic() > end or server.has_ended():
            return
        ask = next(asks)
        try:
            mistake = answer(server, ask, run_log)
        except Exception as error:  # the server is gone, or did not answer: the prompt is lost
            mistake = f"lost: {error}"
        run_log.note(ask, mistake)


def answer(server: Server, ask: Ask, run_log: RunLog) -> str:
    """Sends a prompt. Returns what is wrong with how it ended, or ""."""
    prompt_id = []
    ask.before()
    if ask.kind == FREE:
        server.post("/free", {"unload_models": True, "free_memory": True})

    def cancel(node, value, maximum):
        at, progress = ask.cancel or ("", 0)
        if ask.graph[node]["class_type"] == at and maximum and value >= progress:
            server.post("/interrupt", {"prompt_id": prompt_id[0]})

    try:
        run = server.queue(ask.graph, cancel, LOST, prompt_id.append)
    except ServerError as error:
        message = str(error)
        if ask.kind == CANCEL and INTERRUPTED.fullmatch(message):
            return ""
        is_sentence = SENTENCE.fullmatch(message) and "Traceback" not in message
        is_refusal = ask.kind == REFUSAL and is_sentence and ask.says in message
        return "" if is_refusal else message
    server.post("/history", {"delete": [run.prompt_id]})
    digest, = (text for output in run.outputs.values() for text in output.get("text", ())[:1]
               if len(text) == 64)
    wrong = run_log.picture(ask, digest)
    return "it was not refused" if ask.kind == REFUSAL else wrong


def read(server: Server) -> dict[str, float]:
    """Ask the server to let go of all it holds, and count what is left.

    rss: MB of the process. mapped: files of the soak that are mapped. open: files that are open,
    its log among them. temporary: files in its temporary folders, and parts of files.
    """
    end = time.monotonic() + TRIALS
    while temporary_files(server) and time.monotonic() < end:
        time.sleep(0.2)
    for _ in range(2):
        server.post("/free", {"unload_models": True, "free_memory": True})
        server.queue({"1": {"class_type": "SoakQuiet", "inputs": {"turn": time.time_ns()}}})
    server.post("/history", {"clear": True})
    assert server.process is not None
    process, models = psutil.Process(server.process.pid), str(server.base / "models")
    return {"rss": process.memory_info().rss / 1e6,
            "mapped": sum(entry.path.startswith(models) for entry in process.memory_maps()),
            "open": len(process.open_files()), "temporary": temporary_files(server)}


def temporary_files(server: Server) -> int:
    return sum(name.endswith(".part") or Path(folder).relative_to(server.base).parts[:1] in (
        ("temp",), ("tmp",)) for folder, _, names in os.walk(server.base) for name in names)
