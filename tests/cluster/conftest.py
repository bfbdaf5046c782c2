"""Ray clusters of several nodes on this machine: see `devtools/cluster.py`."""
import shutil
import tempfile
from pathlib import Path

from devtools.cluster import (
    QUIET,
    make_base,
    model_paths,
    running,
)

import pytest

from devtools.host import server


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Two machines' folders, by name: in the second the pack has another name."""
    folder = tmp_path_factory.mktemp("machines")
    first = make_base(folder / "desk")
    return {
        "desk": first, "attic": make_base(folder / "attic", first / "models", "a-copy-elsewhere")
    }


@pytest.fixture(scope="session")
def ray_folder(tmp_path_factory):
    """Where Ray keeps its sockets, whose paths may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="fwr"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def cluster(bases, ray_folder):
    """Two nodes, "desk" and "attic", with one CPU each; this process is the driver."""
    pytest.importorskip("ray")
    with running(bases, ray_folder) as found:
        yield found


@pytest.fixture(scope="session")
def plain(bases):
    """Draws as a plain ComfyUI on one thread does: graph -> bytes of what node 9 saved."""
    with server.Server(bases["desk"].parent / "plain", env={**QUIET, "OMP_NUM_THREADS": "1"},
                       arguments=["--extra-model-paths-config",
                                  str(model_paths(bases["desk"]))]) as running_server:
        yield lambda graph: running_server.image(
            running_server.queue(graph).outputs["9"]["images"][0])
