"""Tells errors about short memory from errors about a file."""
import re

import torch

# torch's messages for short memory of the machine, for which it has no class of its own
MESSAGES = re.compile(r"(can't|cannot) allocate memory|not enough memory|out of memory",
                      re.IGNORECASE)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that the machine or a GPU is out of memory."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(MESSAGES.search(str(error)))
