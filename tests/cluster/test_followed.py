"""docs/machines.md followed on two machines, each with an installation of its own and the pack at
another path in it."""
import json
import os
import re
import shutil
import subprocess
import sys

from devtools.cluster import QUIET

import pytest

from devtools import ROOT
from devtools.files import demo_files
from devtools.host import server

PAGE = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
LOOK, DRAW, *_ = re.findall(r"^python (custom_nodes/ComfyUI-Featherweight/batch\.py [^\n]*)$", PAGE,
                            re.M)
# folders that each installation has for itself
OWN = ("models", "output", "temp", "input", "user", "custom_nodes")
NOT_INSTALLED = shutil.ignore_patterns(".*", "__pycache__", "tests", "demo_model", "media",
                                       "example_workflows")


def install(folder, pack: str):
    """A ComfyUI with this pack under a name, without models."""
    shutil.copytree(
        server.HOST, folder,
        ignore=lambda path, names: {"__pycache__", ".git", "tests", "tests-unit"} |
        ({*OWN} if os.path.samefile(path, server.HOST) else set()))
    for name in OWN:
        (folder / name).mkdir()
    shutil.copytree(ROOT, folder / "custom_nodes" / pack, ignore=NOT_INSTALLED)


@pytest.fixture(scope="module")
def followed(tmp_path_factory, ray_folder):
    """(folder of the first ComfyUI, what the commands ended with and said). Models are copied after
    the first."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    desk, attic = (tmp_path_factory.mktemp(name) / "ComfyUI" for name in ("desk", "attic"))
    install(desk, "ComfyUI-Featherweight")
    install(attic, "featherweight-2")
    demo_files.make_models(desk, types=("Q4_K",))
    for name in ("workflow_api.json", "rows.jsonl"):
        shutil.copy(ROOT / "docs" / "batch" / name, desk)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUIET, "RAY_TMPDIR": str(ray_folder)}.items():
            patch.setenv(name, value)
        patch.delenv("COMFYUI_PATH", raising=False)
        cluster = Cluster()
        try:
            # as `cd ComfyUI; ray start`, which refuses 127.0.0.1
            for name, folder in (("desk", desk), ("attic", attic)):
                cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1",
                                 object_store_memory=150 << 20, include_dashboard=False,
                                 env_vars={"PWD": str(folder), "FEATHERWEIGHT_MACHINE": name})
            for command in (LOOK, LOOK, DRAW, DRAW):
                ended = subprocess.run([sys.executable, *command.split()], cwd=desk,
                                       capture_output=True, text=True, timeout=900,
                                       env={**os.environ, "RAY_ADDRESS": cluster.address})
                said.append((ended.returncode, ended.stdout))
                assert not ended.returncode or len(said) == 1, ended.stdout + ended.stderr
                shutil.copytree(desk / "models", attic / "models", dirs_exist_ok=True)
        finally:
            cluster.shutdown()
    return desk, said


@pytest.mark.heavy
def test_the_look_names_what_the_second_lacks_until_it_has_it(followed):
    _, [(code, said), (again, then), *_] = followed
    assert (code, again) == (1, 0)
    assert re.search(r"^desk .* yes$", said, re.M) and re.search(r"^attic .* no$", said, re.M)
    assert re.search(r"^attic has no file 'featherweight_demo\S*' \(\d+\.\w+\)", said, re.M)
    assert said.endswith("1 of 2 machines can run it.\n") and then.endswith(
        "All 2 machines can run it.\n"
    )


@pytest.mark.heavy
def test_both_draw_every_row_once_and_again_draws_nothing(followed):
    desk, [*_, (_, drawn), (_, again)] = followed
    rows = [
        json.loads(line)["id"]
        for line in (desk / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    records = {
        path.stem: json.loads(path.read_text()) for path in (desk / "pictures").glob("*.json")
    }
    assert sorted(records) == sorted(rows)
    assert {record["worker"].split(":")[0] for record in records.values()} == {"desk", "attic"}
    assert f"{len(rows)} drawn" in drawn and f"0 drawn, {len(rows)} already done" in again
