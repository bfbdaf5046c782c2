"""`dev.py serve`: one command, and the editor has models and workflows."""
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from process_tree import start_interruptible

from devtools import ROOT
from devtools.files import demo_files
from devtools.workflows import FOLDER


def get(url: str):
    with urllib.request.urlopen(url, timeout=60) as reply:
        return json.loads(reply.read())


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signal")
def test_it_says_its_address_has_what_the_demo_has_and_ends_with_ctrl_c(tmp_path):
    mix = tmp_path / "models" / "diffusion_models" / demo_files.MODELS[demo_files.MIX]
    mix.parent.mkdir(parents=True)
    mix.touch()  # which takes a run of the server to make
    process = start_interruptible([sys.executable, "-m", "devtools.serve", "--base", str(tmp_path)],
                                  cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = next(found[0] for line in process.stdout
                       if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        loader = get(f"{address}/object_info/FeatherweightLoadDiffusionModel")
        files = {demo_files.MODELS[name] for name in demo_files.recipes()}
        assert files <= set(re.findall(r'"([^"]+)"', json.dumps(loader)))
        listed = get(f"{address}/userdata?dir=workflows")
        assert set(listed) == {path.name for path in FOLDER.glob("Featherweight demo*.json")}
        assert len(listed) > 4
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        with pytest.raises(urllib.error.URLError):
            get(f"{address}/system_stats")
    finally:
        process.kill()
        process.wait()
