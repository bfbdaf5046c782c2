"""How the processes of a run share its tests out, and which tests are run a second time where they
fail."""
import pytest

# Folders of tests of real servers, browsers and Ray clusters: what they wait for may be late on a
# machine that has much else to do. They share what they start, so all of a folder run in one
# process, and begin first, for they take longest.
REAL = ("server", "cluster")
# Of those, files of which each runs by itself: it takes long, or shares its server with none.
ALONE = ("server/test_browser.py", "server/test_hostile_workflows.py", "server/test_placing.py",
         "server/test_soak.py")
# Files that begin early, for each takes longer than the others that are left for the end.
LONG = ("node/test_training.py", "node/test_host_nodes.py", "devtools/test_gpu_run.py",
        "devtools/test_bench.py", *ALONE)
# Files whose tests compile the same kernels, which a process keeps.
COMPILING = tuple(f"ops/{name}.py" for name in (
    "kernels/test_backends", "kernels/test_cpp_backend", "kernels/test_rows",
    "packing/test_packing_feedback", "packing/test_packing_magnitudes", "packing/test_pack_rows",
    "layers/test_one_pass_attention", "layers/test_lora_on_host_products",
    "layers/test_cpu_convolution"))
# Files whose tests read the same models, which a process writes once.
WRITING = tuple(f"loaders/{name}.py" for name in (
    "quantizers/test_registry", "quantizers/test_no_silent_faults", "quantizers/test_bombs",
    "models/test_diffusion_quantizers"))
# Files of tests that start nothing.
COMPUTING = tuple(f"cluster/test_{name}.py" for name in (
    "address", "batch_rows", "workflow_variants", "page", "batch_row_rendering"))
LONG_TURN = 2  # of `_turn`, of what takes long without waiting for others
GROUP = " @ "  # before the name of a group, behind a test's id


def in_group(name: str, group: str) -> str:
    """Return the name of a test that one process runs together with others. name: its own."""
    return f"{name}{GROUP}{group}"


def file_of(name: str) -> str:
    """Return the file of a test, relative to the folder of the tests. name: its id."""
    return name.partition("::")[0]


def group_of(name: str) -> str:
    """Return what the tests share that one process runs together: a group, a folder or a file.
    name: a test's id."""
    _, sign, group = name.rpartition(GROUP)
    if sign:
        return group
    file = file_of(name)
    if file in COMPILING:
        return "compiled kernels"
    if file in WRITING:
        return "written models"
    folder = file.partition("/")[0]
    return folder if folder in REAL and file not in ALONE else file


def scheduler(config, log):
    """Return the xdist scheduler that gives whole groups to processes."""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def _assign_work_unit(self, node):
            """Every other process begins with tests that wait for others, the rest with those that
            compute, so that no core is idle meanwhile."""
            waits = self.nodes.index(node) % 2 == 0
            for scope, unit in self.workqueue.items():
                if (_turn(next(iter(unit))) < LONG_TURN) == waits:
                    self.workqueue.move_to_end(scope, last=False)
                    break
            super()._assign_work_unit(node)

    return Groups(config, log)


def _turn(name: str) -> int:
    """Return when a test is due, from 0 on. name: its id."""
    group = group_of(name)
    turns = (group in (*REAL, *ALONE), GROUP in name, group in (*LONG, "compiled kernels"))
    return (*turns, True).index(True)


def arrange(items: list[pytest.Item]):
    """Put the groups that take longest first, and have each test of a real server run once more
    where it fails."""
    items.sort(key=lambda item: _turn(item.nodeid))
    for item in items:
        file = file_of(item.nodeid)
        if file.partition("/")[0] in REAL and file not in COMPUTING:
            item.add_marker(pytest.mark.flaky(reruns=1))


class FailureNames:
    """A plugin of the process that shares out: names each test that fails when it does, as the end
    of a long run may be lost."""

    def __init__(self, config: pytest.Config):
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport):
        if report.failed:
            reporter = self._config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line(f" FAILED {report.nodeid}")
