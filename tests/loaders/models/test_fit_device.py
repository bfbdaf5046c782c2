"""*fit this GPU*: what is chosen for a device's whole memory, said, and the same when fixed."""
import pytest

from featherweight.loaders.packing.planning.fit import Memory

pytestmark = pytest.mark.usefixtures("small_models")


class Room(Memory):
    """Memory with so many bytes for weights, packed or not."""

    def __new__(cls, nbytes: int, **attributes):
        made = Memory(gib=12, **attributes)
        object.__setattr__(made, "for_model", lambda step_bytes, workspace=0: nbytes)
        object.__setattr__(made, "for_encoder", lambda workspace=0: nbytes)
        return made
