"""A process that is killed while it writes leaves the old file or the whole new one, and the next
writer removes the rest."""
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pack_api import ROW_TYPES, SecondMoments, load_diffusion_model, source_of_file
from patched_models import tiny_flux
from safetensors.torch import save_file
from saving import save

from featherweight.loaders.files import packed_cache
from featherweight.loaders.packing.calibration.sensitivity import Sensitivity
from featherweight.ops.kernels.verdicts import Verdicts

pytestmark = [pytest.mark.usefixtures("small_models"),
              pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and processes of POSIX")]

CONTENTS = (0, 1)  # what is written before, and what the killed process writes


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Two models of the same shapes, in bf16."""
    paths = [
        tmp_path_factory.mktemp("sources") / f"dense {content}.safetensors" for content in CONTENTS
    ]
    for content, path in zip(CONTENTS, paths):
        save_file({name: tensor.bfloat16() for name, tensor in tiny_flux(content).items()}, path)
    return paths


def packed_as(kind: str, suffix: str):
    def write(folder: Path, source: Path, content: int):
        save(source_of_file(source), folder / f"packed{suffix}", kind, overwrite=True)
    return write


def kept_as(type_name: str):
    def write(folder: Path, source: Path, content: int):
        load_diffusion_model(str(source), pack_to=type_name)
    return write


def measured(folder: Path, source: Path, content: int):
    moments = SecondMoments.zeros(256)
    moments.add(torch.full((64, 256), 1.0 + content))
    Sensitivity({"a.weight": {"Q4_K": 1.0}}, {"a.weight": (256, 256)}, {"content": content},
                _moments=lambda name: moments).save(folder / "measured.sensitivity")


def judged(folder: Path, source: Path, content: int):
    for number in range(1 + 200 * content):
        Verdicts(folder / "verdicts.jsonl").add(f"kernel {number}", "wrong", why="so")


def digests(folder: Path) -> frozenset:
    """What is in the files of a folder; of parts of files nothing, and nothing of the file whose
    time is that of a cached file's last use."""
    return frozenset(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
        if is_whole(path) and path.suffix != ".used")


def known(folder: Path) -> bool:
    """Whether the file of the verdicts can be read and has the first of them."""
    return "kernel 0" in Verdicts(folder / "verdicts.jsonl").read()


def is_whole(path: Path) -> bool:
    return path.suffix != ".part"


class Writer(NamedTuple):
    """write(folder, source, content). read: what a folder's files hold, as far as it is the same
    whenever they are written."""

    write: Callable
    read: Callable = digests


WRITERS = {
    "GGUF": Writer(packed_as("Q8_0", ".gguf")), "NF4": Writer(packed_as("NF4", ".safetensors")),
    **{kind: Writer(packed_as(kind, ".safetensors")) for kind in ("int8_convrot", "nvfp4")},
    **{f"packed cache of {name}": Writer(kept_as(name)) for name in ("Q8_0", "NF4", *ROW_TYPES)},
    "sensitivity": Writer(measured),
    "verdicts": Writer(judged, known)
}
# one of each way to write; the others write as one of these
USUAL = ("GGUF", "NF4", "packed cache of Q8_0", "sensitivity", "verdicts")


def in_a_child(write) -> int:
    """The number of a process that does that and ends."""
    child = os.fork()
    if child:
        return child
    try:
        with torch.inference_mode():
            write()
    finally:
        os._exit(0)


def kill_in_the_midst(writer: Writer, folder: Path, sources: list[Path], seconds: float) -> bool:
    """Write the first content, kill a process that writes the other, look, and write that. Returns
    whether it was killed."""
    with torch.inference_mode():
        writer.write(folder, sources[0], 0)
        old = writer.read(folder)
        child = in_a_child(lambda: writer.write(folder, sources[1], 1))
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found = writer.read(folder)
        writer.write(folder, sources[1], 1)
    assert found in (old, writer.read(folder))
    assert all(map(is_whole, folder.iterdir()))
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.heavy) for name in WRITERS])
def test_a_kill_leaves_the_old_file_or_the_whole_new_one(
    name, kills, sources, tmp_path, monkeypatch
):
    writer, dice, killed = WRITERS[name], random.Random(f"{name} {kills}"), 0

    def folder_of(attempt: int) -> Path:
        folder = tmp_path / str(attempt)
        folder.mkdir(mode=0o700)
        monkeypatch.setenv(packed_cache.FOLDER, str(folder))
        return folder

    first = folder_of(0)
    with torch.inference_mode():
        writer.write(first, sources[0], 0)
        started = time.monotonic()
        writer.write(first, sources[1], 1)
        took = time.monotonic() - started
    for attempt in range(1, 10 * kills + 1):
        killed += kill_in_the_midst(writer, folder_of(attempt), sources, dice.uniform(0, took))
        if killed == kills:
            return
    raise AssertionError(
        f"of {10 * kills} processes only {killed} had not ended before they were killed")
