"""One real server with this pack and two small ones beside it, for all tests of this folder.

It runs as a user's: with the kernels of this machine.
"""
import contextlib

import pytest
from fake_gpu_server import FakeGpuServer, Size
from user_kernels import kernels_of_this_machine

from devtools import ROOT, fakegpu
from devtools.files import demo_files
from devtools.host import server as servers
from devtools.host.browser import Browser, find_chromium

PLANTED = ROOT / "tests" / "support" / "planted_packs"  # other people's packs, beside this one


def pytest_configure(config):
    """Where fake GPUs are asked for, every server has them."""
    if text := config.getoption("--fake-gpus"):
        try:
            FakeGpuServer.size = Size.read(text)
        except ValueError as error:
            raise pytest.UsageError(
                f"--fake-gpus {text}: expected something like 2x4-late-dynamic. {error}") from None
        if fakegpu.why_not():
            raise pytest.UsageError(fakegpu.why_not())
        servers.Server = FakeGpuServer


def pytest_collection_modifyitems(config, items):
    for item in items if config.getoption("--fake-gpus") else ():
        marker = item.get_closest_marker("not_on_fake_gpus")
        # one with `dynamic` is of dynamic VRAM alone
        if marker and (FakeGpuServer.size.dynamic or not marker.kwargs.get("dynamic")):
            item.add_marker(pytest.mark.skip(reason=marker.kwargs["reason"]))


@pytest.fixture(scope="module", autouse=True)
def as_a_user():
    """Tests of other folders, which may follow in the same process, go without."""
    with kernels_of_this_machine():
        yield


@pytest.fixture(scope="package")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    packs = {path.stem: path.read_text(encoding="utf-8") for path in PLANTED.glob("*.py")}
    with contextlib.ExitStack() as stack:
        with kernels_of_this_machine():
            demo_files.make_models(base)
            running = stack.enter_context(servers.Server(base, extra_custom_nodes=packs))
        yield running


@pytest.fixture(scope="package")
def browser():
    if find_chromium() is None:
        pytest.skip("there is no Chromium: install it, or let `python3 dev.py test` fetch one")
    with Browser() as browser:
        yield browser
