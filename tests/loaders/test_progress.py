"""Loading shows how far it is, ends when the user cancels it, and then leaves nothing behind."""
import gc
import random
import re
import sys
from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest
import torch
import tqdm.std
from pack_api import load_checkpoint, load_diffusion_model, load_text_encoder
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf, write_random_gguf
from featherweight.loaders import progress
from featherweight.nodes import node_text

SIZES = {"hidden": 128, "double_blocks": 1, "single_blocks": 1}


def model_file(path):
    write_gguf(path, tiny_models.flux(**SIZES), lambda name, values: "Q8_0"
               if values.ndim == 2 else "F32")


def nf4_file(path):
    pytest.importorskip("bitsandbytes", reason="it writes the files")
    from devtools.files.bnb_files import write_bnb

    tensors = {name: torch.from_numpy(value) for name, value in tiny_models.flux(**SIZES).items()}
    write_bnb(path, tensors, prefix="model.diffusion_model.", nested=True)


def plain_file(path):
    save_file(
        {
            name: torch.from_numpy(value).bfloat16()
            for name, value in tiny_models.flux(**SIZES).items()
        }, path)


def encoder_file(path):
    write_random_gguf(path, tiny_models.clip_l_shapes(), "Q8_0", architecture=None)


CASES = {
    "model.gguf": (model_file, load_diffusion_model),
    "checkpoint.safetensors": (nf4_file, load_checkpoint),
    "plain.safetensors": (plain_file, lambda path: load_diffusion_model(path, pack_to="Q8_0")),
    "plain checkpoint.safetensors": (plain_file,
                                     lambda path: load_checkpoint(path, pack_to="Q8_0")[0]),
    "encoder.gguf": (encoder_file, lambda path: load_text_encoder([path]))
}


@pytest.fixture(params=CASES)
def load(request, tmp_path):
    """A function that loads a file of one kind; `load.path` is the file."""
    write, loader = CASES[request.param]
    path = tmp_path / request.param
    write(path)

    def load():
        return loader(str(path))

    load.path = path
    return load


@pytest.fixture
def shown(monkeypatch):
    """What the bar shows, as (value, maximum); the hook is the host's own but for the server."""
    def hook(value, total, preview, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        seen.append((value, total))
        if len(seen) == seen.cancel_after:
            comfy.model_management.interrupt_current_processing()

    class Seen(list):
        cancel_after = None

    seen = Seen()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    yield seen
    comfy.model_management.interrupt_current_processing(False)


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_a_load_shows_its_way_from_nothing_to_all(load, shown):
    load()
    values, totals = zip(*shown)
    assert len(set(totals)) == 1 and values[0] == 0 and values[-1] == totals[0]
    assert list(values) == sorted(values) and len(set(values)) > 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is mapped where Linux shows it")
def test_a_cancelled_load_leaves_nothing_behind(load, shown):
    load()
    steps = len(shown)
    shown.clear()
    shown.cancel_after = random.choice([1, steps // 2, steps - 1])
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        load()
    gc.collect()
    assert len(shown) == shown.cancel_after and not is_mapped(load.path)
    shown.cancel_after = None
    loaded = load()
    assert is_mapped(load.path) and loaded


@pytest.fixture
def texts(monkeypatch):
    """What the node that runs shows, one after the other, with numbers from the first step on."""
    # below 0, because Windows' clock stands still for 15 ms
    monkeypatch.setattr(progress, "DELAY_SECONDS", -1)
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", -1)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    texts = []
    monkeypatch.setattr(progress, "_text_sender", lambda: texts.append)
    return texts


def test_a_load_says_what_it_is_at_with_the_time_left(load, texts, capsys):
    load()
    packing = ["packing"] if "plain" in load.path.name else []
    converting = ["converting"] if "encoder" in load.path.name else []
    stages = ["reading", *converting, *packing, "building the model"]
    assert [text for text in texts if text in stages] == stages
    texts = [text.rpartition("\n")[2] for text in texts]  # without what is packed into what
    assert list(dict.fromkeys(text.partition(":")[0] for text in texts)) == stages
    numbers = [text for text in texts if text not in stages]
    assert len(numbers) > 10
    assert all(re.fullmatch(r"[a-z]+: \d+%, \d\d:\d\d left", text) for text in numbers)
    assert "[Featherweight] reading" in capsys.readouterr().err


def test_a_short_load_shows_stages_without_numbers_and_nothing_in_the_terminal(
        load, texts, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY_SECONDS", 1000)
    load()
    assert texts and not any(":" in text for text in texts)
    assert "[Featherweight]" not in capsys.readouterr().err


def test_the_time_left_is_that_of_the_work_not_of_the_steps(texts, monkeypatch):
    now = 0.0
    monkeypatch.setattr(tqdm.std, "time", lambda: now)
    task = progress.Progress("packing")
    task.set_heading("a plan")
    for seconds in task.track([10, 1000], sizes=[25, 75]):
        now += seconds
    assert texts[:2] == ["packing", "a plan\npacking"]
    assert texts[2] == "a plan\npacking: 25%, 00:30 left"


def test_what_runs_a_node_sends_its_texts_there():
    sender = progress._text_sender
    assert sender.func is node_text.text_sender and sender.keywords == {"is_kept": False}
