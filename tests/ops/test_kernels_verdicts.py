"""Verdicts on kernels: what is kept, for whom, and that nothing else than what this user wrote is believed."""
import json
import os
import threading
import time
import types
from importlib import metadata

import pytest
import torch
from featherweight.ops import formats  # noqa: F401
from featherweight.ops.kernels import identity
from featherweight.ops.kernels.verdicts import FORGOTTEN, Case, Proven, Verdicts, kernel_text

KEY = {"device": "a card", "capability": "(8, 6)", "driver": "570.1", "torch": "2.9", "backend": "triton", "version": "3.6",
       "text": "abc"}
RIGHT = {"verdict": "right", "case": "unpack of Q4_0 to float32", "rows": [1, None], "times": {"": [0.001, 0.002]}}
SOMEBODY = 12345  # the number of another user
posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows has other owners")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "featherweight" / "verdicts"


def found(folder, key=KEY) -> dict:
    verdicts = Verdicts(folder, key)
    verdicts.read()
    return verdicts.known


def kept(folder, **more):
    Verdicts(folder, KEY).add("kernel", RIGHT | more)
    (path,) = folder.iterdir()
    return path


def test_a_verdict_is_known_to_the_next_process(folder):
    kept(folder)
    assert found(folder)["kernel"].items() >= RIGHT.items()


@pytest.mark.parametrize("part", KEY)
def test_verdicts_are_of_one_device_driver_torch_backend_and_text(part, folder):
    kept(folder)
    assert found(folder, KEY | {part: "another"}) == {}


def days_later(folder, days=8):
    (path,) = folder.iterdir()
    content = json.loads(path.read_text())
    for verdict in content["verdicts"].values():
        verdict["at"] -= days * 86400
    path.write_text(json.dumps(content))


def test_a_crash_is_remembered_for_good_and_what_may_mend_itself_for_days(folder):
    verdicts = Verdicts(folder, KEY)
    for name in ("crashed", "wrong", *FORGOTTEN):
        verdicts.add(name, {"verdict": name, "why": "said"})
    assert found(folder).keys() == {"crashed", "wrong", *FORGOTTEN} - {"memory"}
    days_later(folder)
    assert found(folder).keys() == {"crashed", "wrong"}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_case_is_tried_again_when_a_verdict_on_one_of_its_kernels_is_forgotten(forgotten, folder):
    verdicts = Verdicts(folder, KEY)
    cases = [Case("linear", name, torch.float32, None) for name in ("Q4_0", "Q4_K")]
    for case, second in zip(cases, ("crashed", forgotten)):
        verdicts.add(kernel_text(case, [1, 1]), {**RIGHT, "case": str(case)})
        verdicts.add(kernel_text(case, [2, None]), {"verdict": second, "why": "said"})
        verdicts.add(str(case), {"verdict": "tried"})
    days_later(folder)
    assert found(folder).keys() == {str(cases[0]), *(kernel_text(case, [1, 1]) for case in cases),
                                    kernel_text(cases[0], [2, None])}


def test_two_processes_that_write_lose_nothing_of_each_other(folder):
    first, second = Verdicts(folder, KEY), Verdicts(folder, KEY)
    first.add("a", RIGHT)
    second.add("b", RIGHT)
    first.add("c", RIGHT)
    assert found(folder).keys() == {"a", "b", "c"}


def test_who_reads_while_another_writes_finds_a_whole_file(folder):
    verdicts, found_counts, done = Verdicts(folder, KEY), [0], threading.Event()

    def write():
        for index in range(60):
            verdicts.add(str(index), RIGHT)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        found_counts.append(len(found(folder)))
    thread.join()
    assert found_counts == sorted(found_counts) and len(found(folder)) == 60
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("content", [
    b"", b"\0" * 300, b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000,
    json.dumps({"key": KEY}).encode(), json.dumps({"key": KEY, "verdicts": [RIGHT]}).encode(),
    json.dumps({"key": KEY | {"driver": "571.0"}, "verdicts": {"kernel": RIGHT | {"at": 1}}}).encode(), b" " * (5 << 20)],
    ids=range(11))
def test_a_damaged_file_counts_as_none_and_is_written_anew(content, folder):
    kept(folder).write_bytes(content)
    assert found(folder) == {}
    kept(folder)
    assert found(folder).keys() == {"kernel"}


@pytest.mark.parametrize("change", [
    {"verdict": "splendid"}, {"verdict": None}, {"times": {"": [0, 1]}}, {"times": {"": [1]}}, {"times": {"x": [1, 2]}},
    {"times": []}, {"times": {"": ["1", 2]}}, {"rows": [1]}, {"rows": ["1", None]}, {"rows": None}, {"at": "today"},
    {"case": 5}], ids=str)
def test_a_damaged_verdict_counts_as_none(change, folder):
    path = kept(folder)
    content = json.loads(path.read_text())
    content["verdicts"] |= {"damaged": RIGHT | {"at": time.time()} | change}
    path.write_text(json.dumps(content))
    assert found(folder).keys() == {"kernel"}


def belongs_to_somebody_else(path):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, SOMEBODY, -1, follow_symlinks=False)


def can_be_written_by_all(path):
    path.chmod(0o777)


def is_a_link(path):
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


@posix_only
@pytest.mark.parametrize("spoil", [belongs_to_somebody_else, can_be_written_by_all, is_a_link])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_somebody_else_may_have_written_is_not_believed(spoil, what, folder):
    path = kept(folder)
    spoil(path if what == "file" else folder)
    assert found(folder) == {}


@posix_only
@pytest.mark.parametrize("spoil", [belongs_to_somebody_else, can_be_written_by_all])
def test_nothing_is_written_where_others_can_write_and_it_is_known_here(spoil, folder):
    path = kept(folder)
    before = path.read_bytes()
    spoil(folder)
    verdicts = Verdicts(folder, KEY)
    verdicts.add("more", RIGHT)
    assert verdicts.known.keys() == {"more"} and path.read_bytes() == before


def test_a_cache_that_cannot_be_written_loses_nothing_in_this_process(folder):
    folder.parent.mkdir()
    folder.write_text("in the way")
    verdicts = Verdicts(folder, KEY)
    verdicts.add("kernel", RIGHT)
    verdicts.read()
    assert verdicts.known.keys() == {"kernel"}


def test_a_case_is_the_same_after_a_journey_as_json():
    for case in (Case("unpack", "Q4_K", torch.bfloat16, None), Case("linear", "NF4_128", torch.float16, torch.float32),
                 Case("int8_tokens", None, torch.bfloat16, None)):
        assert Case.of_json(json.loads(json.dumps(case.as_json()))) == case
    assert str(Case("linear", "Q4_K", torch.bfloat16, torch.float16)) == "linear of Q4_K to bfloat16 by way of float16"


@pytest.mark.parametrize("rows, times, faster", [
    ((1, None), {"": [1, 2]}, {None, 1, 2, 5, 16, 100, 256, 4096, 9000}), ((1, None), {"": [2, 1]}, set()),
    ((1, None), {}, {None, 1, 2, 5, 16, 100, 256, 4096, 9000}), ((2, 16), {"2": [1, 2], "16": [1, 2]}, {None, 2, 5, 16}),
    ((2, 16), {"2": [1, 9], "16": [2, 1]}, {None, 2}),
    ((1, None), {"1": [1, 2], "16": [1, 2], "256": [2, 1], "4096": [1, 9]}, {None, 1, 2, 5, 16, 4096, 9000}),
    ((1, 1), {"1": [1, 2]}, {None, 1})], ids=str)
def test_a_kernel_is_used_where_it_was_faster_above_and_below(rows, times, faster):
    asked = None, 1, 2, 5, 16, 100, 256, 4096, 9000
    assert {tokens for tokens in asked if Proven("triton", rows, times).is_faster(tokens)} == faster


class Card:
    """In the place of `torch.cuda`, a device of AMD."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_device_name(self, device):
        return "AMD Radeon Graphics"

    def get_device_capability(self, device):
        return 11, 0

    def get_device_properties(self, device):
        return types.SimpleNamespace(gcnArchName=self.architecture)


def test_devices_of_amd_with_one_name_have_the_verdicts_of_their_architecture(monkeypatch):
    def key(architecture, pretended=None):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cuda", Card(architecture))
            patch.setattr(torch.version, "hip", "7.0")
            if pretended:
                patch.setenv("HSA_OVERRIDE_GFX_VERSION", pretended)
            return str(identity.key_of(torch.device("cuda", 0), "triton"))

    assert key("gfx1100") == key("gfx1100")
    assert len({key("gfx1100"), key("gfx1103"), key("gfx1103", "11.0.0"), key("gfx1103", "11.0.1")}) == 4


def test_the_key_of_nvrtc_changes_with_its_version(monkeypatch):
    installed = {"nvidia-cuda-nvrtc-cu12": "12.8.93"}

    def version(name):
        if name in installed:
            return installed[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(identity, "nvrtc_libraries", lambda: ["/somewhere/libnvrtc.so.12"])
    monkeypatch.setattr(identity.metadata, "version", version)
    before = identity.backend_version("nvrtc")
    installed["nvidia-cuda-nvrtc-cu12"] = "12.9.86"
    assert before != identity.backend_version("nvrtc")


def test_the_key_of_a_device_changes_with_the_text_of_the_kernel(tmp_path, monkeypatch):
    here = identity.HERE
    keys = {name: identity.key_of(torch.device("cpu"), name) for name in identity.TEXTS}
    assert all(len(list(here.glob(pattern))) for patterns in identity.TEXTS.values() for pattern in patterns)
    assert len({key["text"] for key in keys.values()}) == len(keys)
    copy = tmp_path / "kernels"
    for path in here.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            (copy / path.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(here)).write_bytes(path.read_bytes())
    monkeypatch.setattr(identity, "HERE", copy)
    assert {name: identity.key_of(torch.device("cpu"), name) for name in keys} == keys
    with open(copy / "triton_decode.py", "a") as file:
        file.write("\n")
    changed = {name for name in keys if identity.key_of(torch.device("cpu"), name) != keys[name]}
    assert changed == {"triton"}
