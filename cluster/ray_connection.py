"""Which Ray a program draws on, and its way there: the cluster that the machine's owner named, or
one of its own.

A workflow may be a stranger's, and whoever owns a Ray cluster runs programs on all machines that
join it. So no address is ever taken from a workflow. A Ray of its own is on this machine and for
the program alone.
"""
import concurrent.futures
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping

import psutil

from .comfyui_install import MachineError
from .graph import one_line

VARIABLE = "FEATHERWEIGHT_RAY_ADDRESS"
RAYS_OWN = "RAY_ADDRESS"  # what Ray's own commands read
THIS_COMPUTER, THE_CLUSTER = "this computer", "the cluster"
QUOTED = 100  # characters of an address in a message
CONNECT_SECONDS = 3  # in which something must listen at a cluster's address
ANSWER_SECONDS = 4  # in which it must answer as Ray does
# "0", on every system: Ray listens on 127.0.0.1. Read when ray is imported
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# "0": who asks Ray after its end starts no other one. Read when ray is imported
ALONE = "RAY_ENABLE_AUTO_CONNECT"
# without one Ray 2.60 writes ~/.ray/auth_token, which this user's next cluster asks of everybody
TOKEN = "RAY_AUTH_TOKEN"


def named_cluster(environment: Mapping[str, str] | None = None) -> str:
    """The address that the machine's owner gave where ComfyUI is started, "" where none is
    named."""
    environment = os.environ if environment is None else environment
    address = environment.get(VARIABLE, "").strip() or environment.get(RAYS_OWN, "").strip()
    return "" if address == "local" else address


def check_form(address: str):
    """Raises MachineError for what is neither HOST:PORT nor "auto"."""
    host_and_port = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})", address)
    if address != "auto" and not (host_and_port and 1 <= int(host_and_port[1]) < 65536):
        raise MachineError(
            f"{address[:QUOTED]} is not the address of a Ray cluster: write HOST:6379, as `ray"
            " start --head` prints it there, or auto for the cluster that this machine belongs to.")


def choices(cluster: str) -> list[str]:
    """What the node offers, on a machine whose owner named this cluster or none ("")."""
    return [THIS_COMPUTER, THE_CLUSTER] if cluster else [THIS_COMPUTER]


def is_cluster(choice: object, cluster: str) -> bool:
    """Whether a workflow draws on the owner's cluster, and not on this computer.

    Args:
        choice: any value of the node's input `address`. Older workflows have an address there, or
        "" for this computer.
        cluster: the address that the owner named, or "".

    Raises:
        MachineError: the value is an address that the owner did not name, or asks for a cluster
        where none is named.
    """
    text = choice.strip() if isinstance(choice, str) else repr(choice)
    if text in ("", THIS_COMPUTER):
        return False
    if text == THE_CLUSTER:
        if not cluster:
            raise MachineError(
                "No Ray cluster is named on this machine: set FEATHERWEIGHT_RAY_ADDRESS to its"
                f" address where ComfyUI is started, or choose \"{THIS_COMPUTER}\".")
        return True
    if cluster and _normalized(text) == _normalized(cluster):
        return True
    raise MachineError(
        f"A workflow may not name a Ray cluster, and this one names {text[:QUOTED]!r}: if that"
        " cluster is yours, set FEATHERWEIGHT_RAY_ADDRESS to its address where ComfyUI is started"
        f" and choose \"{THE_CLUSTER}\", else choose \"{THIS_COMPUTER}\".")


def _normalized(address: str) -> tuple[str, str]:
    host, _, port = address.strip().casefold().rpartition(":")
    return host.strip("[]").rstrip("."), port.lstrip("0")


def is_joined() -> bool:
    """Whether this process is a driver already. Imports no ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def resolve_address(address: str) -> str:
    """`auto` made definite: RAY_ADDRESS, else "auto" where this machine is in a cluster, else
    "local"."""
    if address != "auto":
        return address
    return os.environ.get(RAYS_OWN) or (
        "auto" if any(map(is_cluster_raylet, psutil.process_iter())) else "local"
    )


def is_cluster_raylet(process: psutil.Process) -> bool:
    """Whether it is the raylet of a machine that `ray start` put into a cluster, and not of a Ray
    that a program has alone."""
    try:
        return process.name().startswith("raylet") and process.environ().get(CLUSTER) != "0"
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


def local_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of a program with a Ray of its own, which no other machine and no other user can
    reach.

    Ray reads them when it is imported. environment: the program's variables otherwise.
    """
    return {CLUSTER: "0", TOKEN: environment.get(TOKEN) or secrets.token_hex(32)}


def connect(address: str):
    """Be a driver of a cluster (HOST:PORT, or "auto" for this machine's), or of a Ray of one's own:
    "local".

    For the latter the environment must be that of `local_environment`. Raises MachineError.
    """
    try:
        import ray
    except ImportError as error:
        raise MachineError(
            f"Ray is missing ({error}). Install it for this Python: {sys.executable} -m"
            " pip install ray") from error
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options["include_dashboard"] = False
    else:
        check_form(address)
        _check_answers(address)
    on_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise MachineError(_refused(address, error)) from error
    if callable(on_end) and threading.current_thread() is threading.main_thread():
        # Ray puts its own in its place, which ends the process without a word
        signal.signal(signal.SIGTERM, on_end)


def _refused(address: str, error: Exception) -> str:
    reason = one_line(error, 600).rstrip(".") or type(error).__name__
    if address == "local":
        return f"Ray did not start on this machine: {reason}"
    return (
        f"The Ray cluster at {address} cannot be used from here: {reason}. If its first machine"
        " has a ~/.ray/auth_token, the cluster may ask for it: copy that file here and set"
        " RAY_AUTH_MODE=token.")


def _check_answers(address: str):
    """Raises MachineError within `CONNECT_SECONDS` + `ANSWER_SECONDS` where no Ray is: `ray.init`
    would try for minutes."""
    # the address is then one that Ray noted on this machine, where nothing may be any more
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            address = canonicalize_bootstrap_address("auto")
        except ConnectionError as error:
            raise MachineError(_unanswered("auto", one_line(error, 300))) from error
    host, _, port = address.rpartition(":")
    try:
        _within(
            CONNECT_SECONDS, lambda: socket.create_connection(
                (host.strip("[]"), int(port)), CONNECT_SECONDS).close())
    except OSError as error:
        raise MachineError(_unanswered(address, error)) from error
    import ray
    from ray._raylet import GcsClient

    try:
        _within(ANSWER_SECONDS, lambda: GcsClient(address=address))
    except TimeoutError as error:
        raise MachineError(
            _unanswered(
                address,
                f"what listens there is not Ray, or took over {ANSWER_SECONDS} s")) from error
    except ray.exceptions.AuthenticationError as error:
        raise MachineError(_refused(address, error)) from error
    except ray.exceptions.RayError as error:
        raise MachineError(_unanswered(address, one_line(error, 300))) from error


def _unanswered(address: str, reason) -> str:
    return (
        f"No Ray cluster answers at {address} ({reason}): is `ray start --head` running there, and"
        f" `ray start --address={address}` here?")


def _within(seconds: float, call: Callable):
    """What a call returns or raises; TimeoutError after so many seconds, while a thread goes on
    waiting for it."""
    outcome = concurrent.futures.Future()

    def run():
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except (
        concurrent.futures.TimeoutError
    ) as error:  # another class than the built-in one before Python 3.11
        raise TimeoutError(str(error) or f"no answer within {seconds} s") from error


def on_node(node: str) -> dict:
    """Options of a task or an actor that runs on that node or not at all, however busy it is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
