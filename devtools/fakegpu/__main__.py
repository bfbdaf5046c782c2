"""Runs a command with fake GPUs: python -m devtools.fakegpu 2x4 [--late] COMMAND, for two of 4
GiB."""
import os
import subprocess
import sys

from . import NoFakeGpus, environment

if __name__ == "__main__":
    try:
        size, *command = sys.argv[1:]
        late = command[:1] == ["--late"]
        devices, gib = size.split("x")
        variables = environment(int(devices), float(gib), late)
    except ValueError:
        sys.exit(__doc__)
    except NoFakeGpus as error:
        sys.exit(f"Failed: {error}")
    sys.exit(subprocess.call(command[late:], env={**os.environ, **variables}))
