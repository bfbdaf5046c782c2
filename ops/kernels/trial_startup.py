"""Tries a device's kernels when ComfyUI starts, and says in the log what came of it."""
import collections
import logging
import math
from collections.abc import Callable

import torch
from filelock import FileLock, Timeout

from ...child_process import is_ending
from .kernel import Case, device_name
from .private_files import cache_folder, private_folder
from .trial import run_trial
from .validation import ISSUES, report_wrong
from .verdicts import Notes, Verdicts

log = logging.getLogger(__name__)

MOST_USED = ("Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "NF4", "Q3_K")  # tried before any model came

_trying: set[torch.device] = set()


def is_trying(device: torch.device) -> bool:
    return device in _trying


def try_kernels(device: torch.device, backends: tuple[str, ...], is_in_use: Callable[[], bool]):
    """Tries what models on this machine have asked for, or what most do where none has, as far as
    that has no verdict yet. To be called in the background.

    Args:
        is_in_use: whether it was read already what kernels the device has.
    """
    _trying.add(device)
    try:
        cases = Notes().cases() or [
            Case(capability, name, dtype, None) for name in MOST_USED
            for dtype in (torch.bfloat16, torch.float16) for capability in ("dequantize", "linear")]
        verdicts = Verdicts.of_device(device, backends)
        before = verdicts.results()
        if untried := before.untried(cases):
            with FileLock(private_folder(cache_folder() / "trials") / "lock", timeout=0):
                log.info("[Featherweight] Kernels for packed weights are tried on %s in the "
                         "background.", device_name(device))
                why_not_all = run_trial(device, backends, verdicts, untried)
            after = verdicts.results().lines.items()
            new = [line for name, line in after if before.lines.get(name) != line]
            _log_results(device, new, why_not_all, is_in_use())
    except Timeout:
        log.info("[Featherweight] Another trial of kernels is under way; what it leaves is tried "
                 "on %s when ComfyUI starts next.", device_name(device))
    except Exception:  # a drive or driver may raise anything
        if not is_ending():  # when nothing is started any more
            log_failure(device)
    finally:
        _trying.discard(device)


def _log_results(device: torch.device, lines: list[dict], why_not_all: str, is_in_use: bool):
    for line in lines:
        if line["verdict"] == "wrong":
            report_wrong(line["name"], device, line.get("why", ""))
        elif "why" in line:
            log.debug("[Featherweight] %s: %s, %s", *map(line.get, ("name", "verdict", "why")))
    words = [summary(lines)]
    if why_not_all:
        words.append(f"{why_not_all}, so the rest is tried when ComfyUI starts next")
    if is_in_use:
        words.append("used when ComfyUI starts next")
    log.info("[Featherweight] %s: %s.", device_name(device), "; ".join(words))


def log_failure(device: torch.device):
    log.warning("[Featherweight] Kernels are not tried on %s: torch does their work.", device,
                exc_info=True)


def summary(lines: list[dict]) -> str:
    """What a trial has found out, in a few words."""
    counts = collections.Counter(line["verdict"] for line in lines)
    times = [line["seconds"] for line in lines
             if line["name"].startswith("dequantize") and line["verdict"] == "right"]
    proven = f"{counts['right']} kernels proven"
    words = [proven if counts["right"] else "no kernel is proven, torch does the work"]
    if times:
        speedup = math.prod(torchs / kernels for kernels, torchs in times) ** (1 / len(times))
        words.append(f"dequantize {speedup:.1f} times as fast as torch")
    words += [f"{counts[verdict]} {verdict}"
              for verdict in ("slower", "wrong", "crashed", "hung", "killed") if counts[verdict]]
    lost = [line["name"] for line in lines if line["verdict"] in ("crashed", "hung")]
    report = f" ({'; '.join(lost)}: please report this line at {ISSUES})" if lost else ""
    return ", ".join(words) + report
