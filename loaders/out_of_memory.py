"""Errors that say that memory is short, among those that say something of a file."""
import re

import torch

# What torch says where the machine has none left, for which it has no class.
MESSAGES = re.compile(r"(can't|cannot) allocate memory|not enough memory|out of memory",
                      re.IGNORECASE)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is a lack of memory, of the machine or of a GPU."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(MESSAGES.search(str(error)))
