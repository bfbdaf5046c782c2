"""One real server with this pack for all tests of this folder."""
import pytest

from devtools import demo
from devtools.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    demo.make_models(base)
    with Server(base) as running:
        yield running
