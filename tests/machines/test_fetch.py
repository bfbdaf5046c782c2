"""Model files sent from machine to machine: whole or not at all, never over another."""
import hashlib
import os
import resource
import shutil

import pytest
from featherweight.machines import fetch
from featherweight.machines.fetch import Place, Reader, Writer, different, in_words, path_of

ray = pytest.importorskip("ray")
SIZE = 40 * 1024 + 7  # with pieces of 4 KiB: eleven, the last a short one


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(fetch, "PIECE", 4096)


@pytest.fixture
def places(cluster, tmp_path):
    """A file on the first of two machines, and where it belongs on the second."""
    found = [Place(cluster.nodes[name].node_id, name, str(tmp_path / name), "flux/model.gguf") for name in ("desk", "attic")]
    file = tmp_path / "desk" / "flux" / "model.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(os.urandom(SIZE))
    return found


def below(place: Place) -> dict[str, str]:
    """Name -> sha256 of all files in the folder of a place."""
    found = {}
    for at, _, names in os.walk(place.folder):
        for name in names:
            with open(os.path.join(at, name), "rb") as file:
                found[os.path.relpath(os.path.join(at, name), place.folder)] = hashlib.sha256(file.read()).hexdigest()
    return found


def test_a_file_arrives_in_pieces_byte_for_byte(places, small_pieces):
    source, target = places
    told = []
    assert fetch.fetch(source, [target], SIZE, told.append) == {}
    assert below(target) == below(source) != {}
    assert told == sorted(told) and len(told) == 11 - fetch.AHEAD + 2 and told[-1] == SIZE
    assert different([source, target]) == ""


@pytest.mark.parametrize("size", [0, 4096])
def test_a_file_of_no_bytes_or_of_whole_pieces_arrives(places, small_pieces, size):
    source, target = places
    os.truncate(path_of(source.folder, source.name), size)
    assert fetch.fetch(source, [target], size) == {}
    assert below(target) == below(source)


def test_a_file_that_is_there_is_left_as_it_is_and_the_others_get_theirs(places, small_pieces, tmp_path):
    source, target = places
    other = Place(target.node, "cellar", str(tmp_path / "cellar"), target.name)
    os.makedirs(os.path.dirname(path_of(other.folder, other.name)))
    with open(path_of(other.folder, other.name), "wb") as file:
        file.write(b"another model")
    before = below(other)
    (failed, sentence), = fetch.fetch(source, [target, other], SIZE).items()
    assert failed == other and sentence == f"cellar has {path_of(other.folder, other.name)} already; it was left as it is."
    assert below(other) == before
    assert below(target) == below(source)
    assert different([source, other]) == ("flux/model.gguf on desk is another file than on cellar. Nothing was copied or"
                                          " overwritten: remove one of them, or give it another name.")


def test_a_machine_that_goes_away_while_it_sends_leaves_no_part_behind(places, small_pieces, cluster):
    third = cluster.cluster.add_node(num_cpus=0, node_ip_address="127.0.0.1", object_store_memory=80 << 20)
    source, target = Place(third.node_id, "laptop", places[0].folder, places[0].name), places[1]

    def switch_off(done):
        if third in cluster.cluster.list_all_nodes():
            cluster.cluster.remove_node(third, allow_graceful=False)

    os.truncate(path_of(source.folder, source.name), 200 << 20)  # in 51 200 pieces, so that there is an in between
    try:
        (failed, sentence), = fetch.fetch(source, [target], 200 << 20, switch_off).items()
    finally:
        switch_off(0)
    assert failed == target
    assert sentence == "laptop, which sent flux/model.gguf, went away or cannot read it; attic is without it."
    assert below(target) == {}
    os.truncate(path_of(source.folder, source.name), SIZE)
    assert fetch.fetch(places[0], [target], SIZE) == {}


@pytest.mark.parametrize("name", [
    "../model.gguf", "flux/../../model.gguf", "/etc/model.gguf", "..\\model.gguf", "\\model.gguf", ""])
def test_names_that_lead_out_of_a_model_folder_are_refused(name, tmp_path):
    for actor in (Reader, Writer):
        with pytest.raises(ValueError, match="is no name of a file inside"):
            actor(str(tmp_path), name, 1)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_nothing_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 12, 10 ** 12 - 10, 10))
    said = Writer(str(tmp_path), "model.gguf", 6_800_000_000).begin()
    assert said == (f"has 10 bytes free where {tmp_path}/model.gguf belongs, which takes 6.8 GB; make room there and run this"
                    " again")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path):
    writer = Writer(str(tmp_path), "model.gguf", 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert writer.begin() == ""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = writer.write(bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said == f"could not write {tmp_path}/model.gguf.part: File too large"
    assert not list(tmp_path.iterdir())


def test_bytes_that_changed_on_their_way_are_not_kept(tmp_path):
    writer = Writer(str(tmp_path), "model.gguf", 5)
    assert writer.begin() == "" and writer.write(b"other") == ""
    assert "otherwise than it was sent" in writer.finish(hashlib.sha256(b"bytes").hexdigest())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [True, False], ids=["since it was looked at", "while it is sent"])
@pytest.mark.parametrize("looked, now", [(5000, 0), (5000, 99), (5000, 9000), (8192, 9000)])
def test_a_file_that_grows_or_shrinks_is_not_kept(tmp_path, small_pieces, before, looked, now):
    """As one that is being downloaded: the pieces that were asked for are not all of it, or not those that were meant."""
    source, target = tmp_path / "source" / "model.gguf", tmp_path / "target"
    source.parent.mkdir()
    source.write_bytes(os.urandom(looked))
    if before:
        os.truncate(source, now)
    reader, writer = (kind(str(folder), source.name, looked) for kind, folder in ((Reader, source.parent), (Writer, target)))
    assert writer.begin() == ""
    assert writer.write(reader.piece()) == ""
    os.truncate(source, now)
    assert writer.write(reader.piece()) == ""
    assert "while that changed where it came from" in writer.finish(reader.digest())
    assert not list(target.iterdir())


def test_two_who_send_the_same_file_do_not_mix_it(tmp_path):
    first, second = (Writer(str(tmp_path), "model.gguf", 5) for _ in range(2))
    assert first.begin() == "" and "by somebody else" in second.begin()
    second.abandon()
    first.write(b"bytes")
    assert first.finish(hashlib.sha256(b"bytes").hexdigest()) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_what_a_machine_left_when_it_was_switched_off_is_in_nobodys_way(tmp_path):
    left = tmp_path / "model.gguf.part"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert Writer(str(tmp_path), "model.gguf", 5).begin() == ""


@pytest.mark.parametrize("size, words", [
    (6_800_000_000, "6.8 GB"), (620_000_000, "620 MB"), (3_000, "3.0 KB"), (12, "12 bytes")])
def test_sizes_are_said_as_people_say_them(size, words):
    assert in_words(size) == words
