"""Workflows with the node ids of other packs on one and on two fake GPUs: every picture is the
CPU's."""
import json

import pytest
from fake_gpu_server import FakeGpuServer, Size
from legacy_files import OTHER_ON_A_GPU, WORKFLOWS, write_files

from devtools import fakegpu
from devtools.files import demo_files
from devtools.workflows.api_format import to_api

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.not_on_fake_gpus(reason="these servers choose their devices themselves")
]


@pytest.fixture
def base(tmp_path):
    if fakegpu.why_not():
        pytest.skip(fakegpu.why_not())
    demo_files.make_models(tmp_path)
    write_files(tmp_path / "models")
    return tmp_path


@pytest.mark.parametrize("size", ["1x4-late", "2x4-late", "1x4-late-dynamic", "2x4-late-dynamic"])
def test_workflows_of_other_packs_run_on_the_devices_there_are(size, base):
    class Server(FakeGpuServer):
        pass

    Server.size = Size.read(size)
    told = set()
    with Server(base) as server:
        info = server.object_info()
        for path in (path for path in WORKFLOWS if path.stem != OTHER_ON_A_GPU):
            workflow = json.loads(path.read_text(encoding="utf-8"))
            if "definitions" in workflow:  # of subgraphs, which the editor resolves
                continue
            # compares with the CPU's pictures
            run = server.queue(to_api(workflow, info) if "nodes" in workflow else workflow)
            assert any("images" in output for output in run.outputs.values())
            told |= {
                line for texts in run.texts.values() for text in texts
                for line in text.splitlines()
            }
    assert any("There is no device cuda:3 here" in line for line in told)
    assert any("There is no device cuda:1 here" in line for line in told) == (
        Server.size.devices == 1
    )
    assert any("expert_mode_allocations cannot be read at 'cpu'" in line for line in told)
