"""Which Ray a workflow may draw on: one of this computer alone, or the cluster that the machine's owner named.

A workflow may be a stranger's, and whoever owns a Ray cluster runs programs on all machines that join it. So no address is
ever taken from a workflow. Imports no ray.
"""
import os
import re
from collections.abc import Mapping

from .place import MachineError

VARIABLE = "FEATHERWEIGHT_RAY_ADDRESS"
RAYS_OWN = "RAY_ADDRESS"  # what Ray's own commands read
THIS_COMPUTER, THE_CLUSTER = "this computer", "the cluster"
QUOTED = 100  # characters of an address in a message


def named_cluster(environment: Mapping[str, str] | None = None) -> str:
    """The address that the machine's owner gave where ComfyUI is started, "" where none is named."""
    environment = os.environ if environment is None else environment
    address = environment.get(VARIABLE, "").strip() or environment.get(RAYS_OWN, "").strip()
    return "" if address == "local" else address


def check_form(address: str):
    """Raises MachineError for what is neither HOST:PORT nor "auto"."""
    host_and_port = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})", address)
    if address != "auto" and not (host_and_port and 1 <= int(host_and_port[1]) < 65536):
        raise MachineError(f"{address[:QUOTED]} is not the address of a Ray cluster: write HOST:6379, as `ray start --head`"
                           " prints it there, or auto for the cluster that this machine belongs to.")


def choices(cluster: str) -> list[str]:
    """What the node offers, on a machine whose owner named this cluster or none ("")."""
    return [THIS_COMPUTER, THE_CLUSTER] if cluster else [THIS_COMPUTER]


def is_cluster(choice: object, cluster: str) -> bool:
    """Whether a workflow draws on the owner's cluster, and not on this computer.

    Args:
        choice: any value of the node's input `address`. Older workflows have an address there, or "" for this computer.
        cluster: the address that the owner named, or "".

    Raises:
        MachineError: the value is an address that the owner did not name, or asks for a cluster where none is named.
    """
    text = choice.strip() if isinstance(choice, str) else repr(choice)
    if text in ("", THIS_COMPUTER):
        return False
    if text == THE_CLUSTER:
        if not cluster:
            raise MachineError("No Ray cluster is named on this machine: set FEATHERWEIGHT_RAY_ADDRESS to its address where"
                               f" ComfyUI is started, or choose \"{THIS_COMPUTER}\".")
        return True
    if cluster and _normalized(text) == _normalized(cluster):
        return True
    raise MachineError(f"A workflow may not name a Ray cluster, and this one names {text[:QUOTED]!r}: if that cluster is yours,"
                       " set FEATHERWEIGHT_RAY_ADDRESS to its address where ComfyUI is started and choose"
                       f" \"{THE_CLUSTER}\", else choose \"{THIS_COMPUTER}\".")


def _normalized(address: str) -> tuple[str, str]:
    host, _, port = address.strip().casefold().rpartition(":")
    return host.strip("[]").rstrip("."), port.lstrip("0")
