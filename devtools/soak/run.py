"""Two clients that work through their prompts side by side, with a reading of the server after each
round."""
import re
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from devtools.host.server import Server, ServerError
from devtools.soak.metrics import read
from devtools.soak.requests import CANCEL, FREE, REFUSAL, Ask, Asks

MOST_PICTURES = 3  # of the same prompt, before its model's kernels are all proven
LOST = 300  # seconds after which a prompt is taken for lost
INTERRUPTED = re.compile(r"\w+ was interrupted\.")
SENTENCE = re.compile(r"[^\n]+[.)]")  # of a refusal: on one line


@dataclass
class RunLog:
    """What a run has found.

    outcomes: how many prompts of each kind ended how. mistakes: what should not have been, each in
    a line.
    pictures: key -> digests of its pictures, in order, each once. repeated: how many pictures were
    compared.
    seconds: of each prompt.
    """

    outcomes: Counter = field(default_factory=Counter)
    mistakes: list[str] = field(default_factory=list)
    pictures: dict[str, list[str]] = field(default_factory=dict)
    repeated: int = 0
    seconds: list[float] = field(default_factory=list)
    readings: list[dict] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> int:
        return self.outcomes.total()

    def note(self, ask: Ask, outcome: str, seconds: float):
        with self.lock:
            self.outcomes[f"{ask.kind}: {outcome}"] += 1
            self.seconds.append(seconds)

    def mistake(self, ask: Ask, what: str):
        with self.lock:
            self.mistakes.append(f"prompt {self.prompts}, {ask.kind} {ask.key!r}: {what}")

    def picture(self, ask: Ask, digest: str):
        with self.lock:
            self.repeated += ask.key in self.pictures
            known = self.pictures.setdefault(ask.key, [digest])
            # a model that is loaded again may multiply by kernels that are proven meanwhile
            is_settled = digest == known[-1] or (digest not in known and len(known) < MOST_PICTURES)
            if digest != known[-1]:
                known.append(digest)
        if not is_settled:
            self.mistake(ask, "another picture than the times before")


class Client:
    def __init__(self, server: Server, asks: Asks, run_log: RunLog):
        self.server, self.asks, self.run_log, self.index = server, asks, run_log, 0

    def work(self, count: int, end: float):
        """Ask `count` times, or until the time is up."""
        for _ in range(count):
            if time.monotonic() > end:
                return
            ask = self.asks.number(self.index)
            self.index += 1
            started = time.monotonic()
            try:
                self.run_log.note(ask, self.ask(ask), time.monotonic() - started)
            except Exception as error:  # the server is gone, or did not answer: the prompt is lost
                self.run_log.note(ask, "lost", time.monotonic() - started)
                self.run_log.mistake(ask, f"lost: {error}")
                if self.server.has_ended():
                    return

    def ask(self, ask: Ask) -> str:
        """How a prompt ended."""
        prompt_id = []
        ask.before()
        if ask.kind == FREE:
            self.server.post("/free", {"unload_models": True, "free_memory": self.index % 2 == 0})

        def cancel(node, value, maximum):
            at, progress = ask.cancel or ("", 0)
            if ask.graph[node]["class_type"] == at and maximum and value >= progress:
                self.server.post("/interrupt", {"prompt_id": prompt_id[0]})

        try:
            run = self.server.queue(ask.graph, cancel, LOST, prompt_id.append)
        except ServerError as error:
            return self.ended(ask, str(error))
        self.server.post("/history", {"delete": [run.prompt_id]})
        digest, = (text for output in run.outputs.values() for text in output.get("text", ())[:1]
                   if len(text) == 64)
        if ask.kind == REFUSAL:
            self.run_log.mistake(ask, "it was not refused")
        self.run_log.picture(ask, digest)
        return "drawn"

    def ended(self, ask: Ask, message: str) -> str:
        if ask.kind == CANCEL and INTERRUPTED.fullmatch(message):
            return "cancelled"
        if ask.kind != REFUSAL:
            self.run_log.mistake(ask, message)
        elif not (
            SENTENCE.fullmatch(message) and ask.says in message and "Traceback" not in message
        ):
            self.run_log.mistake(ask,
                              f"a refusal that is not one sentence about {ask.says}: {message!r}")
        return "refused"


def run(server: Server, clients: list[Client], run_log: RunLog, prompts: int, minutes: float,
        every: int, show) -> RunLog:
    """Rounds of `every` prompts until there are `prompts` of them or the minutes are over. show:
    called with each reading."""
    started, before = time.monotonic(), 0
    end = started + 60 * minutes
    while run_log.prompts < prompts and time.monotonic() < end and not server.has_ended():
        count = min(every, prompts - run_log.prompts)
        with ThreadPoolExecutor(len(clients)) as pool:
            for done in [
                    pool.submit(client.work, -(-count // len(clients)), end) for client in clients
            ]:
                done.result()
        if server.has_ended():
            run_log.mistakes.append(f"The server ended by itself after {run_log.prompts} prompts.")
            break
        reading = {
            "prompts": run_log.prompts, "minutes": (time.monotonic() - started) / 60,
            **read(server, len(run_log.readings))
        }
        reading["seconds"] = statistics.median(run_log.seconds[before:] or [0])
        before = len(run_log.seconds)
        run_log.readings.append(reading)
        show(reading)
    return run_log
