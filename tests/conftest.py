"""Puts the real host on the path and this pack under the package name `featherweight`.

The pack's own `__init__.py` is not executed: it is what the host runs, and the server tests cover it.
"""
import functools
import gc
import os
import sys
import types
from pathlib import Path
from unittest import mock

import fake_gpus
import pytest
from devtools.files import gguf_types  # noqa: F401  gguf takes the types that are newer than it
from devtools.host.environment import HOST_VERSION

PACK = Path(__file__).resolve().parent.parent
HOST = Path(os.environ.get("COMFYUI_PATH", PACK / ".dev" / "host"))

if not (HOST / "comfy").is_dir():
    raise pytest.UsageError(f"No ComfyUI at {HOST}. Run `python3 dev.py test`, or set COMFYUI_PATH.")

sys.path.insert(0, str(HOST))
_arguments, sys.argv = sys.argv, ["main.py", *os.environ.get("HOST_ARGUMENTS", "--cpu").split()]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402, F401  parses sys.argv once

sys.argv = _arguments
if fake_gpus.ON_FAKE_GPUS:
    fake_gpus.start()

import comfy.model_management  # noqa: E402
import comfyui_version  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402

_pack = types.ModuleType("featherweight")
_pack.__path__ = [str(PACK)]
sys.modules.setdefault("featherweight", _pack)  # tests of child processes import this file once more


def pytest_configure():
    os.environ.setdefault("FEATHERWEIGHT_KERNELS", "torch")  # the reference; the tests of kernels ask for them


def pytest_addoption(parser):
    parser.addoption("--heavy", action="store_true", help="also run tests that need minutes or gigabytes")
    parser.addoption("--fake-gpus", metavar="2x4-late-dynamic",
                     help="the servers of tests/server run on fake GPUs and draw what the CPU draws")


@pytest.hookimpl(trylast=True)  # of what was chosen
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--heavy"):
        skip = pytest.mark.skip(reason="heavy: run `python3 dev.py test --heavy`")
        for item in items:
            if "heavy" in item.keywords:
                item.add_marker(skip)
    fake_gpus.forward(items)


def pytest_runtest_logreport(report):
    fake_gpus.report(report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What an older ComfyUI lacks is skipped on it; the one these tests were written with lacks nothing they name."""
    report = yield
    if report.skipped and "this ComfyUI has no" in str(report.longrepr) and comfyui_version.__version__ == HOST_VERSION:
        report.outcome = "failed"
    return report


@pytest.fixture
def one_thread():
    """For tests whose operations are many and small: threads would only wait for each other, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_models():
    """For tests that run small models: on one thread, and nothing stays loaded in the host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for other threads, most of all on a busy machine
    yield
    torch.set_num_threads(threads)
    gc.disable()  # a model that dies while the host unloads others makes the host lose count of them
    comfy.model_management.unload_all_models()
    gc.enable()


@pytest.fixture(autouse=True)
def forgotten_folders():
    """The host remembers what it listed, and looks again at folders that tests have removed since."""
    yield
    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="session")
def shared_tokenizers():
    """The host reads the tokenizer of Qwen from its folder for every encoder, which takes longer than the small encoder."""
    from transformers import Qwen2Tokenizer

    read = functools.lru_cache(Qwen2Tokenizer.from_pretrained)
    with mock.patch.object(Qwen2Tokenizer, "from_pretrained", read):
        yield
