"""Fixtures with Ray clusters of several nodes on this machine, see `devtools/cluster.py`."""
import shutil
import tempfile
from pathlib import Path

from devtools.cluster import QUIET, make_base, model_paths, running

import pytest

from devtools.host import server


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Returns the folders of two machines by name; the second has the pack under another name."""
    folder = tmp_path_factory.mktemp("machines")
    desk = make_base(folder / "desk")
    attic = make_base(folder / "attic", desk / "models", "a-copy-elsewhere")
    return {"desk": desk, "attic": attic}


@pytest.fixture(scope="session")
def ray_folder(tmp_path_factory):
    """Yields a folder for Ray's sockets, with a short path as those must have one."""
    folder = Path(tempfile.mkdtemp(prefix="fwr"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package", autouse=True)
def temporary_folder(ray_folder):
    """Lets the processes that the tests start write their temporary files where Ray has its.

    A killed worker cannot remove its scratch folder.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(ray_folder))
        yield


@pytest.fixture(scope="package")
def cluster(bases, ray_folder):
    """Yields two nodes, "desk" and "attic", with one CPU each; this process is the driver."""
    pytest.importorskip("ray")
    with running(bases, ray_folder) as machines:
        yield machines


@pytest.fixture(scope="session")
def plain(bases):
    """Yields a function that runs a graph on a plain ComfyUI with one thread.

    It returns the bytes of the picture that node 9 saved.
    """
    with server.Server(bases["desk"].parent / "plain", env={**QUIET, "OMP_NUM_THREADS": "1"},
                       arguments=["--extra-model-paths-config",
                                  str(model_paths(bases["desk"]))]) as running_server:
        yield lambda graph: running_server.image(
            running_server.queue(graph).outputs["9"]["images"][0])
