"""Files of models: GGUF, safetensors, folders of diffusers, each quantiser's, and tokenizers."""
import ast
import contextlib
import json
import os
import pkgutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from devtools import ROOT

from ..strategies import join_files
from . import TARGETS, Maker, Target, target

QUANTIZERS = ROOT / "tests" / "support" / "conformance"
SAMPLES = 24  # of a quantiser at most, well-formed and damaged ones likewise
LARGEST = 1 << 15  # bytes of a sample
WORDS = ["<unk>", "<s>", "</s>", "<pad>", "▁a", "b", "▁", "<0x41>"]
MODEL = "model.safetensors"


def written(write: Callable[[Path], object], *names: str) -> bytes:
    """Returns the input that `write` writes into a folder: the file of a name, or all of them."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return files[names[0]] if names else join_files(files)


def written_gguf(*arguments, **options) -> bytes:
    """Returns what `write_gguf` writes."""
    from devtools.files.gguf_files import write_gguf
    return written(lambda folder: write_gguf(folder / "file", *arguments, **options), "file")


def model_target(folder: Path, samples: Iterable[bytes], file: str,
                 opened: Callable[[Path], Path] = lambda path: path, **options) -> Target:
    """Returns a target that opens a file or folder, and computes all of its weights as a loader
    does.

    Args:
        opened: returns what is opened of the file or folder of an input.
    """
    import torch

    from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, with_marks
    from featherweight.loaders.container.weight_file import WeightFileError
    from featherweight.loaders.files.open_weights import open_weights
    from featherweight.loaders.models.loader_choice import needs_own_reader
    from featherweight.loaders.quantizers.registry import quantizer_of
    from featherweight.ops.tensor.packed_layout import is_packed

    def read(path: Path):
        path = opened(path)
        file = open_weights(path)
        assert isinstance(file.declared_type, str)
        assert None not in dict(file.metadata).values()
        quantizer_of(file)
        needs_own_reader(str(path))
        tensors = file.state_dict()
        contents = [Path(part).read_bytes() for part in file.paths]
        ends = [0] * len(contents)
        for entry in sorted(file.entries.values(), key=lambda entry: entry.offset):
            tensor, end = file.tensor(entry.name), entry.offset + entry.nbytes
            assert tensor.nbytes == entry.nbytes
            if entry.nbytes:  # an empty one lies nowhere
                assert ends[entry.part] <= entry.offset
                stored = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                assert stored == contents[entry.part][entry.offset:end]
                ends[entry.part] = end
        for tensor in as_tensors(file, with_marks(file, tensors)).values():
            if is_packed(tensor):
                tensor.dequantize()

    return Target(folder, list(samples), read, (WeightFileError,), file, **options)


@target
def gguf(folder: Path) -> Target:
    """GGUF header, metadata and tensors of every type."""
    from devtools.files.gguf_files import (
        GGML_QUANT_SIZES,
        GGMLQuantizationType,
        gguf_writer,
        write_all,
    )
    from featherweight.ops.formats.base import GGML_FORMATS

    def write_every_type(folder: Path):
        writer = gguf_writer(folder / "file", "flux")
        for packed in GGML_FORMATS.values():
            ggml_type = GGMLQuantizationType[packed.name]
            blocks = np.full((2, GGML_QUANT_SIZES[ggml_type][1]), 17, np.uint8)
            writer.add_tensor(f"blocks.0.{packed.name}.weight", blocks, raw_dtype=ggml_type)
        write_all(writer)

    rows = {"a.weight": np.ones((2, 64)), "b": np.ones(3), "conv": np.ones((2, 2, 1, 2, 32))}
    some = {"general.alignment": 32, "split.count": 1, "tokenizer.ggml.tokens": ["a", "b"],
            "numbers": [1.5, 2.5], "note": "é"}
    samples = [written_gguf(rows, lambda name, values, kind=kind: kind, metadata=some)
               for kind in ("Q8_0", "F16")]
    return model_target(folder, [*samples, written(write_every_type, "file")], "model.gguf")


@target
def gguf_split(folder: Path) -> Target:
    """the files of a split GGUF"""
    from devtools.files.gguf_files import write_gguf

    def write(folder: Path):
        for number in range(3):
            known = {"split.no": number, "split.count": 3, "split.tensors.count": 3}
            write_gguf(folder / f"m-{number + 1:05d}-of-00003.gguf", {
                f"t{number}": np.ones((1, 32))}, lambda name, values: "Q8_0", metadata=known)

    return model_target(folder, [written(write)], "model-files/",
                        lambda path: min(path.iterdir(), default=path))


@target
def safetensors(folder: Path) -> Target:
    """safetensors header and tensors"""
    import torch
    from safetensors.torch import save

    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool,
             torch.float8_e4m3fn)
    every = {f"t.{kind}".replace("torch.", ""): torch.ones(2, 3).to(kind) for kind in kinds}
    return model_target(folder, [
        save(every, {"format": "pt"}), save({"a": torch.ones(()), "b": torch.ones(0, 3)}),
        save({"x": torch.ones(4)})], MODEL)


@target
def folder(folder: Path) -> Target:
    """a folder of diffusers: config.json, index, shards, links"""
    import torch
    from safetensors.torch import save

    from featherweight.loaders.encoders.saved_tokenizer import saved_tokenizer
    from featherweight.loaders.paths.folders import _class_in

    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 1,
              "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    shards = {f"m-0000{number}-of-00002.safetensors": save({f"t{number}": torch.ones(2)})
              for number in (1, 2)}
    index = {"metadata": {}, "weight_map": {
        f"t{number}": name for number, name in enumerate(shards, 1)}}

    def opened(path: Path) -> Path:
        assert isinstance(_class_in(str(path)), str)
        saved_tokenizer(path)
        return path

    return model_target(folder, [
        join_files({"config.json": json.dumps(config).encode(),
                    "m.safetensors.index.json": json.dumps(index).encode(), **shards}),
        join_files({"config.json": b'{"architectures": ["T5EncoderModel"]}',
                    MODEL: save({"x": torch.ones(1)})})], "package/text_encoder/", opened)


def quantizer_samples(name: str) -> list[bytes]:
    """Returns weights that a quantiser writes, and damaged ones, as its module of the conformance
    tests has them."""
    from conformance import CASES
    from conformance.base import changed, save

    cases = next(cases for _, cases in CASES if cases.__name__.endswith(f".{name}"))
    bad = (partial(_damaged, write, change, changed) for write, change, _ in cases.BAD.values())
    samples = []
    for writers in (list(cases.WRITERS.values()), list(bad)):
        made = (written(lambda folder, write=write: save(folder, write()))
                for write in writers[::len(writers) // SAMPLES + 1])
        samples += islice((sample for sample in made if len(sample) <= LARGEST), SAMPLES)
    return samples


def _damaged(write: Callable, change, changed: Callable):
    good = write()
    return replace(good, parts=changed(good.parts, change))


def quantizer_target(name: str, folder: Path) -> Target:
    """Returns the target of a quantiser, whose weights are in a file or in a folder."""
    return model_target(
        folder, quantizer_samples(name), "model-files/",
        lambda path: path / MODEL if os.listdir(path) == [MODEL] else path, longest=2 * LARGEST)


NAMES = [module.name for module in pkgutil.iter_modules([str(QUANTIZERS)])
         if module.name != "base"]
for _name in NAMES:
    _text = ast.parse((QUANTIZERS / f"{_name}.py").read_text(encoding="utf-8"))
    TARGETS[_name] = Maker((ast.get_docstring(_text) or "").partition("\n")[0].rstrip("."),
                           partial(quantizer_target, _name))


@target
def comfy_quant(folder: Path) -> Target:
    """Weights in ComfyUI's own quantised formats"""
    import torch
    from host_formats import ASYMMETRIC, HOST_VARIANTS, in_host_format
    from safetensors.torch import save

    weight = torch.linspace(-1, 1, 32 * 256).view(32, 256)
    return model_target(folder, [
        save({key: part.contiguous() for key, part in in_host_format(
            "L.weight", weight, name, **settings)[0].items()})
        for name, settings in (*HOST_VARIANTS, (ASYMMETRIC, {}))], MODEL)


@target
def inspect(folder: Path) -> Target:
    """what Inspect says of files of every quantiser"""
    from featherweight.loaders.container.weight_file import WeightFileError
    from featherweight.loaders.inspect import inspect
    from featherweight.loaders.inspect.inspection_text import inspection_text

    samples = [sample for name in NAMES for sample in quantizer_samples(name)[:2]]

    def read(path: Path):
        for inspection in inspect(path):
            inspection_text(inspection)

    return Target(folder, samples, read, (WeightFileError,), "model-files/", 2 * LARGEST)


@target
def tokenizer(folder: Path) -> Target:
    """tokenizer metadata of GGUF text encoders: SentencePiece, tekken, tokenizer.json"""
    from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer

    from featherweight.loaders.container.weight_file import WeightFileError
    from featherweight.loaders.models.encoder_file import TOKENIZERS, EncoderFile
    from featherweight.loaders.progress import Progress

    plain = {"model": "t5", "tokens": WORDS, "scores": [-0.5 * index for index in range(8)],
             "token_type": [2, 3, 3, 3, 1, 4, 1, 6], "unknown_token_id": 0, "eos_token_id": 2,
             "padding_token_id": 3}
    merges = plain | {"model": "gpt2", "merges": ["a b", "b c"],
                      "token_type": [3, 3, 3, 3, 1, 1, 1, 4]}
    one = np.ones((1, 32))
    umt5 = {f"{name}.weight": one for name in ("enc.blk.0.attn_q", "enc.blk.0.ffn_gate")} | {
        "token_embd.weight": np.ones((1 << 17, 0))}  # detected by its rows
    gpt_oss = {"blk.0.attn_sinks.weight": one, "token_embd.weight": one}
    mistral = {"blk.0.attn_k.weight": np.ones((0, 3072))}  # detected by its width

    def read(path: Path):
        TOKENIZERS.clear()
        weights = EncoderFile(str(path), Progress("reading", "converting"), None,
                           frozenset()).convert()
        if (model := weights.get("spiece_model")) is not None:
            # SentencePiece's own, as with a model that ComfyUI reads from a file
            with contextlib.suppress(RuntimeError):
                SPieceTokenizer(model)("a b <pad> ab A")

    return Target(folder, [
        written_gguf(tensors, lambda name, values: "F16", "any",
                     {f"tokenizer.ggml.{key}": value for key, value in known.items()})
        for tensors, known in ((umt5, plain), (gpt_oss, merges), (mistral, merges))
    ], read, (WeightFileError,), "encoder.gguf")
