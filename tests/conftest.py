"""The host, the pack and what every test may ask for."""
import ctypes
import functools
import gc
import os
import sys
from unittest import mock

# tests compare with float32; those of a CPU's bfloat16 take the flag away
os.environ.setdefault("HOST_ARGUMENTS", "--cpu --fp32-unet --fp32-vae")
import comfyui_and_pack  # noqa: F401  first: puts both where they can be imported

import comfy.model_management
import comfyui_version
import drawn_cases
import fake_gpus
import folder_paths
import known_skips
import linear_calls
import processes
import pytest
import torch
import windows_rules
from pack_api import packed_layers

from devtools import ROOT
from devtools.host.environment import HOST_VERSION

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 1 << 30  # bytes
MANY_MODULES = 200
left_alone: set[str] = set()  # names of modules


def pytest_configure(config):
    gc.disable()  # until the tests are collected: what is imported stays
    keep_freed_memory()
    # the reference; the tests of kernels ask for them
    os.environ.setdefault("FEATHERWEIGHT_KERNELS", "torch")
    calls = linear_calls.linear_calls(config.getoption("--linear-calls"))
    calls.__enter__()
    config.add_cleanup(lambda: calls.__exit__(None, None, None))
    if config.getoption("dist", "no") != "no":
        config.pluginmanager.register(processes.FailureNames(config))


def keep_freed_memory():
    """Have glibc keep what large tensors were in: the system clears the pages of each new one."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)


def pytest_addoption(parser, pluginmanager):
    pluginmanager.register(drawn_cases)
    parser.addoption("--linear-calls", choices=linear_calls.SHAPES, default="stock",
                     help="give ComfyUI's linear layers the calls of a later version")
    parser.addoption("--fuzz", type=int, default=30, metavar="INPUTS",
                     help="that are drawn for each target of tests/fuzz")
    parser.addoption(
        "--fake-gpus", metavar="2x4-late-dynamic",
        help="the servers of tests/server run on fake GPUs and draw what the CPU draws")


@pytest.hookimpl(trylast=True)  # of what was chosen
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--heavy"):
        config.hook.pytest_deselected(items=[item for item in items if "heavy" in item.keywords])
        items[:] = [item for item in items if "heavy" not in item.keywords]
    fake_gpus.forward(items)
    processes.arrange(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return processes.scheduler(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_finish():
    leave_modules_alone()
    gc.enable()


def leave_modules_alone():
    """Collects once more, and takes what is there, which stays, out of later collections: each of
    the tests' many collections would look at all modules again."""
    gc.collect()
    gc.freeze()
    left_alone.clear()
    left_alone.update(sys.modules)


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_runtest_logreport(report):
    fake_gpus.report(report)


def pytest_terminal_summary(terminalreporter):
    for line in known_skips.summary(terminalreporter.getreports("skipped")):
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What an older ComfyUI lacks is skipped on it; the one these tests were written with lacks
    nothing they name."""
    report = yield
    if (
        report.skipped
        and "this ComfyUI has no" in str(report.longrepr)
        and comfyui_version.__version__ == HOST_VERSION
    ):
        report.outcome = "failed"
    return report


@pytest.fixture(autouse=True)
def as_on_windows(request):
    """For tests that write files: what Windows refuses is refused on Linux too."""
    path = request.path.relative_to(ROOT).as_posix()
    if sys.platform == "linux" and path.startswith(windows_rules.FOLDERS) and (
            not request.node.get_closest_marker("not_as_on_windows")):
        with windows_rules.enforced():
            yield
    else:
        yield


@pytest.fixture
def one_thread():
    """For tests whose operations are many and small: threads would only wait for each other, most
    of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_models():
    """For tests that run small models: on one thread, and nothing stays loaded in the host."""
    threads = torch.get_num_threads()
    # products this small only wait for other threads, most of all on a busy machine
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    # a model that dies while the host unloads others makes the host lose count of them
    gc.disable()
    try:
        comfy.model_management.unload_all_models()
    finally:
        gc.enable()


@pytest.fixture
def fixed_seed():
    """For tests that draw their numbers without a generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def no_model_outlives_its_tests():
    """For modules that keep models of `patched_models` from test to test."""
    yield
    from patched_models import forget_models

    forget_models()


@pytest.fixture(scope="session", autouse=True)
def small_tables():
    """Tables of these tests are as much smaller than those of models, and packed as those are."""
    with mock.patch.object(packed_layers, "PLAIN_TABLE_BYTES", 16 << 10):
        yield


@pytest.fixture(scope="module", autouse=True)
def later_modules():
    """What the files before have imported, such as diffusers, stays too."""
    if len(sys.modules) > len(left_alone) + MANY_MODULES:
        leave_modules_alone()


@pytest.fixture(autouse=True)
def forgotten_folders():
    """The host remembers what it listed, and looks again at folders that tests have removed
    since."""
    yield
    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="session", autouse=True)
def shared_tokenizers():
    """The host reads a tokenizer from its folder for every encoder, which takes longer than a small
    encoder."""
    from transformers import PreTrainedTokenizerBase

    read = PreTrainedTokenizerBase.from_pretrained.__func__

    @functools.lru_cache
    def read_once(tokenizer_class, path, **options):
        tokenizer = read(tokenizer_class, path, **options)
        tokenizer.get_vocab = functools.cache(tokenizer.get_vocab)
        return tokenizer

    with mock.patch.object(PreTrainedTokenizerBase, "from_pretrained", classmethod(read_once)):
        yield
