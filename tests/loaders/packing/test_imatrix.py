"""An imatrix packs like a measurement with the same columns, whichever tool wrote it, damaged ones
are refused in one sentence, and none is written."""
import struct
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from imatrices import entry, write_dat
from pack_api import SecondMoments, WeightFileError, open_weights, source_of_model
from patched_models import dense_flux, packed_flux, relative
from saving import save

from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, read_marked
from featherweight.loaders.packing.calibration import imatrix as reading
from featherweight.loaders.packing.calibration.imatrix import load_measurement, read_imatrix
from featherweight.loaders.packing.calibration.sensitivity import Sensitivity, SensitivityError
from featherweight.loaders.paths import folders
from featherweight.nodes.measure_sensitivity import NO_IMATRIX, MeasureSensitivity
from featherweight.ops.packing import relative_error
from featherweight.ops.packing.pack_types import pack_type

pytestmark = pytest.mark.usefixtures("small_models")
QKV = "double_blocks.0.img_attn.qkv.weight"
LONG = f"blocks.0.{'a' * 36}.weight"  # 52 bytes; ggml cuts it after a prefix
PREFIX = "model.diffusion_model."


def write_gguf(path, sums: dict, counts: dict, general_type: str = "imatrix", cut: int = 127):
    """As llama-imatrix writes it. sums: name -> float32 (nmat, K). counts: name -> (nmat, 1)."""
    writer = GGUFWriter(path, "", use_temp_file=False)
    writer.add_string("general.type", general_type)
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2"[:cut], values)
    for name, values in counts.items():
        writer.add_tensor(f"{name}.counts"[:cut], values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_sums(columns: int, seed: int = 0, nmat: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((nmat, columns), dtype=np.float32) * 100


def test_both_forms_give_the_importance_that_llama_cpp_computes_to_the_bit(tmp_path):
    sums = {"a.weight": random_sums(64), "b.weight": random_sums(96, 1, nmat=2),
            "c.weight": random_sums(32, 2)}
    counts = {"a.weight": np.float32([[1021]]), "b.weight": np.float32([[7], [2049]]),
              "c.weight": np.float32([[0]])}
    write_gguf(tmp_path / "i.gguf", sums, counts)
    read = read_imatrix(tmp_path / "i.gguf")
    assert np.array_equal(read.importance("a.weight"), (sums["a.weight"] / np.float32(1021))[0])
    assert np.array_equal(read.importance("b.weight"),
                          (sums["b.weight"] / counts["b.weight"]).reshape(-1))
    assert np.array_equal(read.importance("c.weight"), np.ones(32))
    values = {"a.weight": (3, random_sums(64)[0]), "b.weight": (0, random_sums(96)[0])}
    tails = {"i.dat": None, "llama.dat": struct.pack("<ii", 4, 3) + b"set", "old.dat": b"",
             "legacy.gguf": None}
    for name, tail in tails.items():
        write_dat(tmp_path / name, [entry(key, *value) for key, value in values.items()], tail)
        read = load_measurement(tmp_path / name)
        assert np.array_equal(read.importance("a.weight"), values["a.weight"][1] / np.float32(3))
        assert np.array_equal(read.importance("b.weight"), values["b.weight"][1])
        assert read.costs == {} and read.file == name


SHAPES = {QKV: (768, 256), LONG: (8, 256), f"{LONG}.2": (8, 128), "norm.weight": (256,)}


@pytest.mark.parametrize(
    ("name", "columns", "matrix"),
    [
        (QKV, 256, QKV),
        (f"{PREFIX}{QKV}", 256, QKV),
        (f"diffusion_model.{QKV}", 256, QKV),
        (f"{PREFIX}{LONG}", 256, LONG),
        (f"{PREFIX}{LONG}.2"[:63], 128, None),  # both long ones begin like this
        (QKV[:-1], 256, None),  # not cut by ggml
        ("norm.weight", 256, None),
        ("blk.0.attn_q.weight", 256, None),
    ],
)
def test_a_name_is_matched_to_the_matrix_of_the_model(name, columns, matrix, tmp_path):
    entries = [entry("double_blocks.0.img_attn.qkv.weight", 1, np.ones(256))] * (name != QKV)
    write_dat(tmp_path / "i.dat", [*entries, entry(name, 1, random_sums(columns)[0])])
    matched = read_imatrix(tmp_path / "i.dat").match(SHAPES)
    if matrix is None or (matrix == QKV and name != QKV):
        assert matched.unknown == [name] and [*matched.values] == [QKV]
    else:
        assert np.array_equal(matched.importance(matrix), random_sums(columns)[0])
        assert not matched.unknown


@pytest.mark.parametrize("length", [55, 56, 57, 60, 61, 63, 70])
def test_names_that_ggml_has_cut_are_found(length, tmp_path):
    name = ("blocks.0." + "x" * length)[:length - 7] + ".weight"
    others = {name: (8, 64), "blocks.1.weight": (8, 64)}
    write_dat(tmp_path / "i.dat", [entry(name[:63], 2, np.full(64, 6))])
    assert (read_imatrix(tmp_path / "i.dat").match(others).importance(name) == 3).all()
    if length < 62:  # both tensors of a longer one would have one name
        write_gguf(tmp_path / "i.gguf", {name: random_sums(64)}, {name: np.float32([[4]])}, cut=63)
        matched = read_imatrix(tmp_path / "i.gguf").match(others)
        assert np.array_equal(matched.importance(name), random_sums(64)[0] / 4)


def importance_of(shapes: dict) -> dict[str, np.ndarray]:
    """Squares of integers, which the sensitivity file's square roots keep to the bit."""
    return {
        name: np.random.default_rng(7).integers(1, 30, shape[1]).astype(np.float32)**2
        for name, shape in shapes.items() if len(shape) == 2
    }


def measured_by(importance: dict, shapes: dict) -> Sensitivity:
    moments = {}
    for name, values in importance.items():
        moments[name] = SecondMoments.zeros(shapes[name][1], 256)
        diagonal = moments[name].blocks.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.from_numpy(values * (1 << 16)).view(diagonal.shape))
        moments[name].count = 1 << 16
    return Sensitivity({}, {name: shapes[name] for name in importance}, _moments=moments.get)


@pytest.mark.parametrize("target", ["Q4_K", 2_000_000])
def test_a_model_is_packed_as_by_a_measurement_of_the_same_columns(target, tmp_path):
    source = source_of_model(dense_flux("F16"))
    importance = importance_of(source.shapes)
    measured_by(importance, source.shapes).save(tmp_path / "m.sensitivity")
    write_gguf(tmp_path / "i.gguf", {name: value[None] * 4 for name, value in importance.items()},
               dict.fromkeys(importance, np.float32([[4]])))
    write_dat(tmp_path / "i.dat",
              [entry(f"{PREFIX}{name}", 1, value) for name, value in importance.items()])
    files = []
    for name in ("m.sensitivity", "i.gguf", "i.dat", None):
        path = tmp_path / f"{len(files)}" / "a.gguf"
        path.parent.mkdir()
        measured = load_measurement(tmp_path / name) if name else None
        saved = save(source_of_model(dense_flux("F16")), path, target, sensitivity=measured)
        files.append(path.read_bytes())
        text = "\n".join(saved.notes)
        is_imatrix = name and name.startswith("i.")
        packed = sum(not pack_type(type_name).is_plain for type_name in saved.types.values())
        assert (f"{name} covers {packed} of {packed} packed matrices." in text) == bool(is_imatrix)
        assert ("holds no costs of layers" in text) == bool(is_imatrix and target == 2_000_000)
    assert files[0] == files[1] == files[2] != files[3]


def test_what_is_not_covered_is_said_in_one_sentence(tmp_path):
    source = source_of_model(dense_flux("F16"))
    importance = importance_of(source.shapes)
    names = [name for name in importance if name.startswith("double_blocks")]
    write_dat(tmp_path / "i.dat",
              [entry(name, 1, importance[name]) for name in names[:2]] + [entry("x.y", 1, [1.0])])
    saved = save(source, tmp_path / "a.gguf", "Q4_K",
                 sensitivity=load_measurement(tmp_path / "i.dat"))
    packed = [name for name, kind in saved.types.items() if not pack_type(kind).is_plain]
    rest = [name for name in packed if name not in names[:2]]
    covered = len(packed) - len(rest)
    assert 0 < covered < 3
    assert (f"i.dat covers {covered} of {len(packed)} packed matrices, not {rest[0]}, {rest[1]},"
            f" {rest[2]} and {len(rest) - 3} more; of its own names, no matrix has 'x.y'."
            ) in saved.notes


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        (QKV, 128, r"its '.*qkv.weight' has 128 columns, expected 256 for the matrix of \(768,"),
        ("blk.0.attn_q.weight", 256, "none of its 1 names, such as 'blk.0.attn_q.weight', is a"),
    ],
)
def test_an_imatrix_of_another_model_is_refused_in_one_sentence(name, columns, message, tmp_path):
    write_dat(tmp_path / "i.dat", [entry(name, 1, np.ones(columns))])
    with pytest.raises(SensitivityError,
                       match=f"^i.dat was made with another model: {message}.*Make one with"):
        read_imatrix(tmp_path / "i.dat").match(SHAPES)


ONE, COUNT = {"a.weight": random_sums(64)}, {"a.weight": np.float32([[4]])}
DAMAGED = {
    "sums without counts": (lambda path: write_gguf(path, ONE, {}), "'a.weight' has no counts"),
    "counts without sums": (lambda path: write_gguf(path, {}, COUNT), "'a.weight' has no in_sum2"),
    "a model": (lambda path: write_gguf(path, ONE, COUNT, "model"),
                "its general.type is 'model', not 'imatrix'"),
    "NaN": (lambda path: write_gguf(path, {"a.weight": np.float32([[1, np.nan]])}, COUNT),
            "'a.weight.in_sum2' holds negative, NaN or infinite values"),
    "negative": (lambda path: write_gguf(path, {"a.weight": np.float32([[1, -1]])}, COUNT),
                 "'a.weight.in_sum2' holds negative, NaN"),
    "negative count": (lambda path: write_gguf(path, ONE, {"a.weight": np.float32([[-1]])}),
                       "'a.weight.counts' holds negative, NaN"),
    "overflow": (lambda path: write_gguf(path, {"a.weight": np.float32([[1e38]])},
                                         {"a.weight": np.float32([[1e-9]])}),
                 "'a.weight' holds negative, NaN or infinite"),
    "other counts": (lambda path: write_gguf(path, ONE, {"a.weight": np.ones((7, 1), np.float32)}),
                     "'a.weight' has 64 sums for 7 counts"),
    "no counts": (lambda path: write_gguf(path, ONE, {"a.weight": np.ones((0, 1), np.float32)}),
                  "'a.weight' has 64 sums for 0 counts"),
    "half floats": (lambda path: write_gguf(path, {"a.weight": np.float16([[1]])}, COUNT),
                    "'a.weight.in_sum2' has the ggml type 1, not F32"),
    "nothing": (lambda path: write_gguf(path, {}, {}), "it holds no weight"),
    "tensors without end": (lambda path: path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0)), f"it announces {1 << 40} tensors"),
    "a header alone": (lambda path: path.write_bytes(b"GGUF"), None),
    "empty": (lambda path: path.write_bytes(b""), None),
    "no entries": (lambda path: write_dat(path, []), "the number of its entries is 0, expected 1"),
    "entries below zero": (lambda path: path.write_bytes(struct.pack("<i", -5)),
                           "the number of its entries is -5, expected 1 to 32768"),
    "entries without end": (lambda path: path.write_bytes(struct.pack("<i", 1 << 30)),
                            f"the number of its entries is {1 << 30}, expected 1 to"),
    "two bytes": (lambda path: path.write_bytes(b"\0\0"), "it ends at byte 2, inside the number"),
    "a length below zero": (lambda path: path.write_bytes(struct.pack("<ii", 1, -1)),
                            "the length of the name of entry 0 is -1, expected 1 to 1024"),
    "a name beyond the end": (lambda path: path.write_bytes(struct.pack("<ii", 1, 1000) + b"ab"),
                              "it ends at byte 10, inside the name of entry 0"),
    "a name of bytes": (lambda path: path.write_bytes(struct.pack("<ii", 1, 1) + b"\xff" * 99),
                        "the name of entry 0 is not UTF-8 text"),
    "calls below zero": (lambda path: write_dat(path, [entry("a", -1, [1.0])]),
                         "the number of calls of 'a' is -1, expected 0"),
    "no values": (lambda path: write_dat(path, [entry("a", 1, [])]),
                  "the number of values of 'a' is 0, expected 1"),
    "values without end": (lambda path: path.write_bytes(
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, (1 << 31) - 1)),
        "the number of values of 'a' is 2147483647, expected 1 to 4"),
    "NaN in it": (lambda path: write_dat(path, [entry("a", 1, [np.nan])]),
                  "'a' holds negative, NaN or infinite values"),
    "a name twice": (lambda path: write_dat(path, [entry("a", 1, [1.0])] * 2),
                     "it holds 'a' twice"),
    "more bytes": (lambda path: write_dat(path, [entry("a", 1, [1.0])],
                                          struct.pack("<ii", 1, 0) + b"xy"),
                   "2 bytes follow its end"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_one_sentence(damage, tmp_path):
    path = tmp_path / "i.gguf"
    write, problem = DAMAGED[damage]
    write(path)
    with pytest.raises((SensitivityError, WeightFileError)) as error:
        load_measurement(path)
    text = str(error.value)
    assert text.startswith("i.gguf") and "\n" not in text and len(text) < 500
    if problem is not None:
        assert text.startswith(f"i.gguf cannot be used as an imatrix: {problem}")
        assert text.endswith("copy it again, make it again, or pick another file.")


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_a_file_that_is_cut_anywhere_is_refused(form, tmp_path):
    path = tmp_path / f"i.{form}"
    if form == "gguf":
        write_gguf(path, ONE, COUNT)
    else:
        write_dat(path, [entry("a.weight", 2, random_sums(64)[0])],
                  struct.pack("<ii", 4, 3) + b"set")
    whole = path.read_bytes()
    allowed = {len(whole) - 11, len(whole) - 7}
    if form == "gguf":
        allowed = {*range(len(whole) - 28, len(whole))}
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        if length in allowed:  # with a shorter end, as of other tools; without the padding
            assert len(read_imatrix(path).values) == 1
        else:
            with pytest.raises((SensitivityError, WeightFileError)):
                read_imatrix(path)


def test_tensors_that_overlap_take_no_more_memory_than_the_file(tmp_path):
    path = tmp_path / "i.gguf"
    names = [f"{index}.weight" for index in range(200)]
    write_gguf(path, dict.fromkeys(names, np.ones((1, 64), np.float32)),
               dict.fromkeys(names, np.float32([[1]])))
    data, reader = bytearray(path.read_bytes()), GGUFReader(path)
    for tensor in reader.tensors:  # all begin where the first one does
        offset = tensor.field.parts[-1]
        start = offset.__array_interface__["data"][0] - reader.data.__array_interface__["data"][0]
        data[start:start + 8] = bytes(8)
    last = max(tensor.data_offset for tensor in reader.tensors)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[:last - (last - reader.data_offset) // 2])
    with pytest.raises(SensitivityError, match="ends outside of the file"):
        read_imatrix(cut)


def test_a_file_larger_than_any_imatrix_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 100)
    write_gguf(tmp_path / "i.gguf", ONE, COUNT)
    with pytest.raises(SensitivityError, match="it takes .* more than the 100 bytes"):
        read_imatrix(tmp_path / "i.gguf")


def test_numbers_at_the_ends_of_float32_pack_as_any(tmp_path):
    values = {name: torch.tensor([1.0, 4.0, 0.0] * 100) * factor
              for name, factor in (("a", 1.0), ("b", 2.0**120), ("c", 2.0**-120), ("d", 0.0))}
    moments = {name: reading.Imatrix({}, {}, values=values).moments(name) for name in values}
    assert torch.equal(moments["a"].blocks, moments["b"].blocks)
    assert torch.equal(moments["a"].blocks, moments["c"].blocks)
    assert (moments["d"].importance == moments["d"].importance[0]).all()
    assert moments["d"].importance[0] > 0


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "output" / "sensitivity").mkdir(parents=True)
    return tmp_path / "output"


def test_the_node_writes_no_imatrix_and_says_so(output):
    arguments = ([packed_flux("Q8_0")], [1], [4], [1.0], [0], ["fast"], ["measured"])
    for asked in ({}, {"imatrix": [False]}, {"imatrix": [True]}):  # workflows of before
        text = MeasureSensitivity.execute(*arguments, **asked).result[1]
        assert (NO_IMATRIX in text) == (asked == {"imatrix": [True]})
    assert {file.suffix for file in (output / "sensitivity").iterdir()} == {".sensitivity"}


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_an_imatrix_is_found_in_the_folders_of_measurements_only(suffix, output):
    (output / "sensitivity" / f"i{suffix}").write_bytes(b"x")
    (output.parent / f"outside{suffix}").write_bytes(b"x")
    inside = output / "sensitivity" / f"i{suffix}"
    for name in (f"i{suffix}", str(inside)):
        assert Path(folders.find_sensitivity(name)) == inside
    (output / "sensitivity" / "i.txt").write_bytes(b"x")
    for name in (str(output.parent / f"outside{suffix}"), f"../../outside{suffix}", "i.txt"):
        with pytest.raises(WeightFileError, match="is in none of the folders of measurements"):
            folders.find_sensitivity(name)


@pytest.mark.parametrize("target", ["Q2_K", 1_900_000])
def test_a_layer_whose_inputs_are_alike_keeps_its_type_by_what_it_computes(
        target, tmp_path, monkeypatch):
    """Its values are further off than without a measurement: a size leaves no room for others."""
    source = source_of_model(dense_flux("F16"))
    moments = SecondMoments.zeros(source.shapes[QKV][1], 256)
    few = torch.randn(1, 60, 256)
    moments.blocks.copy_(few.mT @ few + 1e-4 * torch.eye(256))
    moments.count = 1
    measured = Sensitivity({}, {QKV: source.shapes[QKV]}, _moments={QKV: moments}.get)
    monkeypatch.setattr(relative_error, "LOST", 0.1)  # Q2_K itself loses 0.08 of normal values
    saved = save(source, tmp_path / "a.gguf", target, sensitivity=measured)
    assert saved.types[QKV] == "Q2_K"
    file = open_weights(saved.path)
    stored = as_tensors(file, read_marked(file))[QKV].dequantize()
    assert relative(stored.float(), source.weights[QKV].read(0, None).float()) ** 2 > 0.1
