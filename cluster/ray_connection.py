"""Connects to the Ray cluster that the machine's owner named, or starts a private local Ray.

A workflow may be a stranger's, and whoever owns a Ray cluster runs programs on all machines that
join it. So no address is ever taken from a workflow. A private Ray runs on this machine and serves
this program alone.
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
from typing import Any

import psutil

from .comfyui_install import MachineError
from .workflow_graph import one_line

ADDRESS_ENV = "FEATHERWEIGHT_RAY_ADDRESS"
RAY_ADDRESS_ENV = "RAY_ADDRESS"  # which Ray's own commands read
THIS_COMPUTER, THE_CLUSTER = "this computer", "the cluster"
QUOTED = 100  # characters of an address in a message
CONNECT_SECONDS = 3  # for something to accept a connection at a cluster's address
ANSWER_SECONDS = 4  # for it to answer as Ray does
# Ray reads the next two when it is imported. "0", on every system: Ray listens on 127.0.0.1 alone
MULTI_NODE_ENV = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# "0": a call of Ray after its end does not start another one
AUTO_CONNECT_ENV = "RAY_ENABLE_AUTO_CONNECT"
# without one Ray 2.60 writes ~/.ray/auth_token, and this user's next cluster asks others for it
TOKEN_ENV = "RAY_AUTH_TOKEN"


def named_cluster(environment: Mapping[str, str] | None = None) -> str:
    """Returns the address of the cluster that the machine's owner named, or "".

    Args:
        environment: that ComfyUI was started in; None for this process's.
    """
    environment = os.environ if environment is None else environment
    address = environment.get(ADDRESS_ENV, "").strip()
    address = address or environment.get(RAY_ADDRESS_ENV, "").strip()
    return "" if address == "local" else address


def check_address(address: str):
    """Raises MachineError unless an address is HOST:PORT or "auto"."""
    host_and_port = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})", address)
    if address != "auto" and not (host_and_port and 1 <= int(host_and_port[1]) < 65536):
        raise MachineError(
            f"{address[:QUOTED]} is not the address of a Ray cluster: write HOST:6379, as `ray"
            " start --head` prints it there, or auto for the cluster that this machine belongs to.")


def address_options(cluster: str) -> list[str]:
    """Returns the options of the node's input `address`.

    Args:
        cluster: the address that the owner named, or "".
    """
    return [THIS_COMPUTER, THE_CLUSTER] if cluster else [THIS_COMPUTER]


def is_cluster(choice: object, cluster: str) -> bool:
    """Returns whether a workflow runs on the owner's cluster, and not on this computer.

    Args:
        choice: any value of the node's input `address`. Older workflows have an address there, or
            "" for this computer.
        cluster: the address that the owner named, or "".

    Raises:
        MachineError: the value is an address that the owner did not name, or "the cluster" though
            the owner named none.
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
    """Returns whether this process is connected to Ray. Does not import ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def resolve_address(address: str) -> str:
    """Returns the address that a batch connects to.

    Args:
        address: "auto" for RAY_ADDRESS, else "auto" if a cluster runs on this machine, else
            "local"; any other address is returned as it is.
    """
    if address != "auto":
        return address
    if named := os.environ.get(RAY_ADDRESS_ENV):
        return named
    return "auto" if any(map(is_cluster_raylet, psutil.process_iter())) else "local"


def is_cluster_raylet(process: psutil.Process) -> bool:
    """Returns whether a process is the raylet of a cluster, not of a program's private Ray."""
    try:
        return process.name().startswith("raylet") and process.environ().get(MULTI_NODE_ENV) != "0"
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


def local_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns variables with which a private Ray is out of reach of other machines and users.

    They must be set before ray is imported.

    Args:
        environment: the program's other variables.
    """
    return {MULTI_NODE_ENV: "0", TOKEN_ENV: environment.get(TOKEN_ENV) or secrets.token_hex(32)}


def connect(address: str):
    """Makes this process a driver of Ray.

    Args:
        address: of a cluster (HOST:PORT, or "auto" for this machine's), or "local" for a private
            Ray, for which the environment must have the variables of `local_environment`.

    Raises:
        MachineError
    """
    try:
        import ray.exceptions
    except ImportError as error:
        raise MachineError(
            f"Ray is missing ({error}). Install it for this Python: {sys.executable} -m"
            " pip install ray") from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options["include_dashboard"] = False
    else:
        check_address(address)
        _check_answers(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise MachineError(_refusal_message(address, error)) from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        # Ray has replaced the handler by one that ends the process without a message
        signal.signal(signal.SIGTERM, on_sigterm)


def _refusal_message(address: str, error: Exception) -> str:
    reason = one_line(error, 600).rstrip(".") or type(error).__name__
    if address == "local":
        return f"Ray did not start on this machine: {reason}"
    return (
        f"The Ray cluster at {address} cannot be used from here: {reason}. If its first machine"
        " has a ~/.ray/auth_token, the cluster may ask for it: copy that file here and set"
        " RAY_AUTH_MODE=token.")


def _check_answers(address: str):
    """Raises MachineError if no Ray answers at an address.

    It does so within `CONNECT_SECONDS` + `ANSWER_SECONDS`; `ray.init` would try for minutes. Ray
    has no public functions for it: where it has other own ones, less is checked.
    """
    if address == "auto":  # Ray's note of the address, which may be out of date
        try:
            from ray._private.services import canonicalize_bootstrap_address
        except ImportError:
            return
        try:
            address = canonicalize_bootstrap_address("auto") or address
        except ConnectionError as error:
            raise MachineError(_no_answer_message("auto", one_line(error, 300))) from error
    host, _, port = address.rpartition(":")
    try:
        _within(CONNECT_SECONDS, lambda: socket.create_connection(
            (host.strip("[]"), int(port)), CONNECT_SECONDS).close())
    except OSError as error:
        raise MachineError(_no_answer_message(address, error)) from error
    import ray.exceptions
    try:
        from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return
    try:
        _within(ANSWER_SECONDS, lambda: GcsClient(address=address))
    except TimeoutError as error:
        reason = f"what listens there is not Ray, or took over {ANSWER_SECONDS} s"
        raise MachineError(_no_answer_message(address, reason)) from error
    except ray.exceptions.AuthenticationError as error:
        raise MachineError(_refusal_message(address, error)) from error
    except ray.exceptions.RayError as error:
        raise MachineError(_no_answer_message(address, one_line(error, 300))) from error


def _no_answer_message(address: str, reason: object) -> str:
    return (
        f"No Ray cluster answers at {address} ({reason}): is `ray start --head` running there, and"
        f" `ray start --address={address}` here?")


def _within(seconds: float, call: Callable[[], object]) -> object:
    """Returns or raises what a call does. Raises TimeoutError when it takes longer.

    The call then goes on in its thread.
    """
    outcome = concurrent.futures.Future()

    def run():
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except concurrent.futures.TimeoutError as error:  # not the built-in one before Python 3.11
        raise TimeoutError(str(error) or f"no answer within {seconds} s") from error


def on_node(node: str) -> dict:
    """Returns options of a task or actor that runs on a node only, however busy that is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
