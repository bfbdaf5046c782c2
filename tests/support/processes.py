"""How the processes of a run share its tests out, and which tests are run a second time where they fail."""
import pytest

# Folders of tests of real servers, browsers and Ray clusters: what they wait for may be late on a machine that has much else
# to do. They share what they start, so all of a folder run in one process, and begin first, for they take longest.
REAL = ("server", "machines")
# Of those, files of which each runs by itself: none shares its server with others.
ALONE = ("server/test_hostile_workflows.py", "server/test_placing.py", "server/test_soak.py")
# Files of tests that start nothing.
COMPUTING = tuple(f"machines/test_{name}.py" for name in ("address", "batch_rows", "items", "page", "row_pool"))


def file_of(name: str) -> str:
    """Return the file of a test, relative to the folder of the tests. name: its id."""
    return name.partition("::")[0]


def group_of(name: str) -> str:
    """Return what the tests share that one process runs together: a folder or a file. name: a test's id."""
    file = file_of(name)
    folder = file.partition("/")[0]
    return folder if folder in REAL and file not in ALONE else file


def scheduler(config, log):
    """Return the xdist scheduler that gives whole groups to processes."""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def arrange(items: list[pytest.Item]):
    """Put the groups of tests of real servers first, and have each of these tests run once more where it fails."""
    items.sort(key=lambda item: group_of(item.nodeid) not in REAL)
    for item in items:
        file = file_of(item.nodeid)
        if file.partition("/")[0] in REAL and file not in COMPUTING:
            item.add_marker(pytest.mark.flaky(reruns=1))
