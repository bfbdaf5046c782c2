"""Weight files: GGUF, whole and split, safetensors, what bitsandbytes keeps in them, folders of
diffusers."""
import json
import os
import random

import numpy as np

from ..gguf_fields import gguf_damaged
from ..mutations import files_damaged, join_files, json_damaged, safetensors_damaged, split_files
from . import Target


class WeightTarget(Target):
    def prepare(self):
        from featherweight.loaders.files.container import WeightFileError
        from featherweight.loaders.files.open_weights import open_weights
        self.open_weights, self.own = open_weights, (WeightFileError,)
        return self.honest()

    def honest(self) -> list[bytes]:
        raise NotImplementedError

    def written(self, write, name: str = "honest") -> bytes:
        """The content of a file that `write` writes to the path it is given."""
        path = self.folder / name
        write(path)
        content = path.read_bytes()
        path.unlink()
        return content

    def read_all(self, path):
        file = self.open_weights(path)
        tensors = file.state_dict()
        for entry in file.entries.values():
            assert file.tensor(entry.name).nbytes == entry.nbytes
        assert isinstance(file.declared_type, str)
        for value in dict(file.metadata).values():
            assert value is not None
        return tensors


class GGUF(WeightTarget):
    name, reads = "gguf", "GGUF header, metadata and tensors"
    damaged = staticmethod(gguf_damaged)

    def honest(self):
        from devtools.files.gguf_files import write_gguf
        rows = {"a.weight": np.ones((2, 64), np.float32), "b": np.ones(3, np.float32),
                "conv": np.ones((2, 2, 1, 2, 32), np.float32)}
        some = {
            "general.alignment": 32, "split.count": 1, "tokenizer.ggml.tokens": ["a", "b"],
            "numbers": [1.5, 2.5], "note": "é"
        }
        return [
            self.written(
                lambda path: write_gguf(path, rows, lambda name, values: kind, metadata=some)
            )
            for kind in ("Q8_0", "F16")
        ] + [
            self.written(
                lambda path: write_gguf(
                    path, {"w": np.ones((1, 256), np.float32)}, lambda name, values: kind
                )
            )
            for kind in ("Q4_K", "IQ4_XS", "TQ1_0")
        ]

    def read(self, data):
        path = self.folder / "model.gguf"
        path.write_bytes(data)
        self.read_all(path)


class FilesTarget(WeightTarget):
    """Several files in one input. place: the folder that they are laid out in. links: whether there
    are links among them."""

    place: str = "files"
    links = False  # a link to a file outside of any folder of a model is its user's

    def lay_out(self, data):
        folder, self.made = self.folder / self.place, []
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in split_files(data).items():
            path = folder / os.path.basename(name)
            try:
                if self.links and content.startswith(b"-> "):
                    os.symlink(content[3:].decode(), path)
                elif not path.is_symlink():
                    path.write_bytes(content)
                self.made.append(path)
            except (OSError, ValueError):  # no name for a file, or twice
                continue

    def clear(self):
        for path in self.made:
            path.unlink(missing_ok=True)


class SplitGGUF(FilesTarget):
    name, reads = "gguf_split", "the files of a split GGUF"

    def honest(self):
        from devtools.files.gguf_files import write_gguf
        parts = {}
        for number in range(3):
            name = f"m-{number + 1:05d}-of-00003.gguf"
            known = {"split.no": number, "split.count": 3, "split.tensors.count": 3}
            parts[name] = self.written(
                lambda path, number=number, known=known: write_gguf(
                    path, {f"t{number}": np.ones(
                        (1, 32), np.float32)}, lambda name, values: "Q8_0", metadata=known), name)
        return [join_files(parts)]

    def damaged(self, data, chance):
        return files_damaged(data, chance, lambda name: gguf_damaged)

    def read(self, data):
        for path in self.made[:1]:
            self.read_all(path)


class Safetensors(WeightTarget):
    name, reads = "safetensors", "safetensors header and tensors"
    damaged = staticmethod(safetensors_damaged)

    def honest(self):
        import torch
        from safetensors.torch import save

        kinds = (
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.uint8,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
        )
        tensors = {f"t.{kind}".replace("torch.", ""): torch.ones(2, 3).to(kind) for kind in kinds}
        return [
            save(tensors, {"format": "pt"}),
            save({"a": torch.ones(()), "b": torch.ones(0, 3)}),
            save({"x": torch.ones(4)})
        ]

    def read(self, data):
        path = self.folder / "model.safetensors"
        path.write_bytes(data)
        self.read_all(path)


class Bitsandbytes(Safetensors):
    name, reads = (
        "bitsandbytes",
        "what bitsandbytes keeps in a safetensors file: quant_state, absmax, SCB",
    )

    def honest(self):
        import torch
        from safetensors.torch import save

        from featherweight.ops.formats.base import FORMATS

        def four_bit(kind: str, nested: bool, rows: int, columns: int) -> dict[str, torch.Tensor]:
            blocks = rows * columns // 64
            state = {
                "quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]
            }
            parts = {
                "": torch.zeros(rows * columns // 2, 1,
                                dtype=torch.uint8), ".absmax": torch.ones(blocks),
                ".quant_map": torch.tensor(FORMATS[kind.upper()].codebook)
            }
            if nested:
                state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
                parts |= {
                    ".absmax": torch.zeros(blocks, dtype=torch.uint8),
                    ".nested_absmax": torch.ones(-(-blocks // 256)),
                    ".nested_quant_map": torch.ones(256)
                }
            state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
            return {f"a.weight{part}": value for part,
                    value in parts.items()} | {f"a.weight.quant_state.bitsandbytes__{kind}": state}

        int8 = {"b.weight": torch.zeros(2, 8, dtype=torch.int8), "b.SCB": torch.ones(2),
                "b.weight_format": torch.tensor(0, dtype=torch.uint8)}
        return [save(four_bit("nf4", False, 2, 64)), save(four_bit("fp4", True, 2, 64)), save(int8),
                save(int8 | four_bit("nf4", True, 4, 32))]


class Folder(FilesTarget):
    name, reads = "folder", "a folder of diffusers: config.json, index, shards, links"
    place = os.path.join("package", "text_encoder")
    links = True

    def prepare(self):
        from featherweight.loaders.encoders.saved_tokenizer import saved_tokenizer
        from featherweight.loaders.paths.folders import _class_in
        self.saved_tokenizer, self.class_in = saved_tokenizer, _class_in
        return super().prepare()

    def honest(self):
        import torch
        from safetensors.torch import save
        config = json.dumps({
            "_class_name": "FluxTransformer2DModel", "num_layers": 1,
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
        }).encode()
        shards = {
            f"m-0000{number}-of-00002.safetensors": save({f"t{number}": torch.ones(2)})
            for number in (1, 2)
        }
        index = {
            "metadata": {}, "weight_map": {
                "t1": "m-00001-of-00002.safetensors", "t2": "m-00002-of-00002.safetensors"
            }
        }
        return [
            join_files({
                "config.json": config, "m.safetensors.index.json": json.dumps(index).encode(),
                **shards
            }),
            join_files({
                "config.json": b'{"architectures": ["T5EncoderModel"]}',
                "model.safetensors": save({"x": torch.ones(1)})
            })
        ]

    def damaged(self, data, chance: random.Random):
        return files_damaged(
            data, chance, lambda name: json_damaged
            if name.endswith(".json") else safetensors_damaged)

    def read(self, data):
        assert isinstance(self.class_in(str(self.folder / self.place)), str)
        self.read_all(self.folder / self.place)
        self.saved_tokenizer(self.folder / self.place)


def as_text(data: bytes) -> str:
    """What a workflow may hold: any JSON text, halves of pairs and zeros too."""
    return data.decode("utf-8", "surrogatepass") if _is_utf8(data) else data.decode("latin-1")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True
