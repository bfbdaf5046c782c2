"""docs/machines.md works on two machines with their own ComfyUI and different paths of the pack."""
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
# folders of each installation that start empty
OWN = ("models", "output", "temp", "input", "user", "custom_nodes")
NOT_INSTALLED = shutil.ignore_patterns(".*", "__pycache__", "tests", "demo_model", "media",
                                       "example_workflows")


def install(folder, pack: str):
    """Copies ComfyUI without models, with this pack under a name."""
    shutil.copytree(
        server.HOST, folder,
        ignore=lambda path, names: {"__pycache__", ".git", "tests", "tests-unit"} |
        ({*OWN} if os.path.samefile(path, server.HOST) else set()))
    for name in OWN:
        (folder / name).mkdir()
    shutil.copytree(ROOT, folder / "custom_nodes" / pack, ignore=NOT_INSTALLED)


@pytest.fixture(scope="module")
def followed(tmp_path_factory, ray_folder):
    """Returns (folder of the first ComfyUI, (exit code, output) of each command of the page).

    Models are copied to the second machine after the first command.
    """
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    desk, attic = (tmp_path_factory.mktemp(name) / "ComfyUI" for name in ("desk", "attic"))
    install(desk, "ComfyUI-Featherweight")
    install(attic, "featherweight-2")
    demo_files.make_models(desk, types=("Q4_K",))
    for name in ("workflow_api.json", "rows.jsonl"):
        shutil.copy(ROOT / "docs" / "batch" / name, desk)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUIET, "RAY_TMPDIR": str(ray_folder)}.items():
            patch.setenv(name, value)
        patch.delenv("COMFYUI_PATH", raising=False)
        cluster = Cluster()
        try:
            # as `cd ComfyUI; ray start`, which does not accept 127.0.0.1
            for name, folder in (("desk", desk), ("attic", attic)):
                cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1",
                                 object_store_memory=150 << 20, include_dashboard=False,
                                 env_vars={"PWD": str(folder), "FEATHERWEIGHT_MACHINE": name})
            for command in (LOOK, LOOK, DRAW, DRAW):
                result = subprocess.run([sys.executable, *command.split()], cwd=desk,
                                        capture_output=True, text=True, timeout=900,
                                        env={**os.environ, "RAY_ADDRESS": cluster.address})
                results.append((result.returncode, result.stdout))
                assert not result.returncode or len(results) == 1, result.stdout + result.stderr
                shutil.copytree(desk / "models", attic / "models", dirs_exist_ok=True)
        finally:
            cluster.shutdown()
    return desk, results


@pytest.mark.heavy
def test_the_look_names_what_the_second_lacks_until_it_has_it(followed):
    _, [(code, text), (second_code, second_text), *_] = followed
    assert (code, second_code) == (1, 0)
    assert re.search(r"^desk .* yes$", text, re.M) and re.search(r"^attic .* no$", text, re.M)
    assert re.search(r"^attic has no file 'featherweight_demo\S*' \(\d+\.\w+\)", text, re.M)
    assert text.endswith("1 of 2 machines can run it.\n")
    assert second_text.endswith("All 2 machines can run it.\n")


@pytest.mark.heavy
def test_both_draw_every_row_once_and_again_draws_nothing(followed):
    desk, [*_, (_, drawn), (_, again)] = followed
    rows = [
        json.loads(line)["id"]
        for line in (desk / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    records = {
        path.stem: json.loads(path.read_text()) for path in (desk / "images").glob("*.json")
    }
    assert sorted(records) == sorted(rows)
    assert {record["worker"].split(":")[0] for record in records.values()} == {"desk", "attic"}
    assert f"{len(rows)} generated" in drawn and f"0 generated, {len(rows)} already done" in again
