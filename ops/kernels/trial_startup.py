"""Tries a device's kernels when ComfyUI starts, and logs the results."""
import collections
import logging
import math
from collections.abc import Callable

import torch
from filelock import FileLock, Timeout

from ...child_process import is_ending
from .kernel import Case, device_name
from .private_files import cache_folder, private_folder
from .trial_process import run_trial
from .validation import ISSUES, report_wrong
from .verdicts import Notes, Verdicts

log = logging.getLogger(__name__)

# Formats tried before any model was loaded.
MOST_USED = ("Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "NF4", "Q3_K")

_devices_on_trial: set[torch.device] = set()


def is_on_trial(device: torch.device) -> bool:
    """Returns whether a device's kernels are being tried now."""
    return device in _devices_on_trial


def try_kernels(device: torch.device, backends: tuple[str, ...], is_in_use: Callable[[], bool]):
    """Tries the kernels that have no verdict yet: those that models on this machine have needed,
    or those of the most used formats where no model was loaded yet. Call it in the background.

    Args:
        device: Whose kernels are tried.
        backends: Names, the preferred one first.
        is_in_use: Returns whether a selector has already read the device's verdicts.
    """
    _devices_on_trial.add(device)
    try:
        cases = Notes().cases() or [
            Case(capability, name, dtype) for name in MOST_USED
            for dtype in (torch.bfloat16, torch.float16) for capability in ("dequantize", "linear")]
        verdicts = Verdicts.of_device(device, backends)
        before = verdicts.results()
        if untried := before.untried(cases):
            with FileLock(private_folder(cache_folder() / "trials") / "lock", timeout=0):
                log.info("[Featherweight] Kernels for packed weights are tried on %s in the "
                         "background.", device_name(device))
                incomplete_reason = run_trial(device, backends, verdicts, untried)
            after = verdicts.results().lines.items()
            new = [line for name, line in after if before.lines.get(name) != line]
            _log_results(device, new, incomplete_reason, is_in_use())
    except Timeout:
        log.info("[Featherweight] Another trial of kernels is under way; what it leaves is tried "
                 "on %s when ComfyUI starts next.", device_name(device))
    except Exception:  # a drive or driver may raise anything
        if not is_ending():  # no process can be started any more then
            log_failure(device)
    finally:
        _devices_on_trial.discard(device)


def _log_results(device: torch.device, lines: list[dict], incomplete_reason: str, is_in_use: bool):
    for line in lines:
        if line["verdict"] == "wrong":
            report_wrong(line["name"], device, line.get("why", ""))
        elif "why" in line:
            log.debug("[Featherweight] %s: %s, %s", line["name"], line["verdict"], line["why"])
    parts = [summary(lines)]
    if incomplete_reason:
        parts.append(f"{incomplete_reason}, so the rest is tried when ComfyUI starts next")
    if is_in_use:
        parts.append("used when ComfyUI starts next")
    log.info("[Featherweight] %s: %s.", device_name(device), "; ".join(parts))


def log_failure(device: torch.device):
    """Logs the current exception, because of which a device's kernels are not tried or used."""
    log.warning("[Featherweight] Kernels are not tried on %s: torch does their work.", device,
                exc_info=True)


def summary(lines: list[dict]) -> str:
    """Returns a trial's results in a few words: counts, the speedup and what to report."""
    counts = collections.Counter(line["verdict"] for line in lines)
    times = [line["seconds"] for line in lines
             if line["name"].startswith("dequantize") and line["verdict"] == "right"]
    proven = f"{counts['right']} kernels proven"
    parts = [proven if counts["right"] else "no kernel is proven, torch does the work"]
    if times:
        speedup = math.prod(torch_seconds / kernel_seconds
                            for kernel_seconds, torch_seconds in times) ** (1 / len(times))
        parts.append(f"dequantize {speedup:.1f} times as fast as torch")
    parts += [f"{counts[verdict]} {verdict}"
              for verdict in ("slower", "wrong", "crashed", "hung", "killed") if counts[verdict]]
    failed = [line["name"] for line in lines if line["verdict"] in ("crashed", "hung")]
    report = f" ({'; '.join(failed)}: please report this line at {ISSUES})" if failed else ""
    return ", ".join(parts) + report
