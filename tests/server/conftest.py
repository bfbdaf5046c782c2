"""One real server with this pack for all tests of this folder. It runs as a user's: with the kernels of this machine."""
import pytest

from devtools.files import demo_files
from devtools.host.browser import Browser, find_chromium
from devtools.host.server import Server


@pytest.fixture(scope="package", autouse=True)
def kernels_of_this_machine():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEATHERWEIGHT_KERNELS", raising=False)
        yield


@pytest.fixture(scope="package")
def server(tmp_path_factory, kernels_of_this_machine):
    base = tmp_path_factory.mktemp("server")
    demo_files.make_models(base)
    with Server(base) as running:
        yield running


@pytest.fixture(scope="package")
def browser():
    if find_chromium() is None:
        pytest.skip("there is no Chromium: install it, or let `python3 dev.py test` fetch one")
    with Browser() as browser:
        yield browser
