"""A program's way into Ray: to a cluster that runs already, or to a Ray of its own, on this machine and for itself alone."""
import logging
import os
import secrets
import signal
import socket
import sys
import threading

import psutil

from .graph import one_line
from .place import MachineError

TIMEOUT = 5.0  # seconds in which a cluster's address must answer
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0", on every system: Ray listens on 127.0.0.1. Read when ray is imported
ALONE = "RAY_ENABLE_AUTO_CONNECT"  # "0": who asks Ray after its end starts no other one. Read when ray is imported
TOKEN = "RAY_AUTH_TOKEN"  # without one Ray 2.60 writes ~/.ray/auth_token, which this user's next cluster asks of everybody


def is_joined() -> bool:
    """Whether this process is a driver already. Imports no ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def nearest(address: str) -> str:
    """`auto` made definite: RAY_ADDRESS, else "auto" where this machine is in a cluster, else "local"."""
    if address != "auto":
        return address
    return os.environ.get("RAY_ADDRESS") or ("auto" if any(map(is_of_a_cluster, psutil.process_iter())) else "local")


def is_of_a_cluster(process: psutil.Process) -> bool:
    """Whether it is the raylet of a machine that `ray start` put into a cluster, and not of a Ray that a program has alone."""
    try:
        return process.name().startswith("raylet") and process.environ().get(CLUSTER) != "0"
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


def join(address: str):
    """Be a driver of a cluster (HOST:PORT, or "auto" for this machine's), or of a Ray of one's own: "local".

    That one no other machine and no other user can reach. Raises MachineError, and ImportError where there is no Ray.
    """
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault(ALONE, "0")
    if address == "local":
        os.environ[CLUSTER] = "0"
        os.environ.setdefault(TOKEN, secrets.token_hex(32))
        options["include_dashboard"] = False
    else:
        _answers(address)
    import ray

    on_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise MachineError(_refused(address, one_line(error, 600).rstrip(".") or type(error).__name__)) from error
    if callable(on_end) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_end)  # Ray puts its own in its place, which ends the process without a word


def _refused(address: str, said: str) -> str:
    if address == "local":
        return f"Ray did not start on this machine: {said}"
    return (f"The Ray cluster at {address} cannot be used from here: {said}. If its first machine has a ~/.ray/auth_token, the"
            " cluster may ask for it: copy that file here and set RAY_AUTH_MODE=token.")


def _answers(address: str):
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not (colon and port.isdigit() and "/" not in address):
        raise MachineError(f"{address} is no address of a Ray cluster: write HOST:6379, as `ray start --head` says it there,"
                           " or auto for the cluster that this machine belongs to.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT).close()
    except OSError as error:
        raise MachineError(f"No Ray cluster answers at {address} ({error}): is `ray start --head` running there, and `ray start"
                           f" --address={address}` here?") from error
