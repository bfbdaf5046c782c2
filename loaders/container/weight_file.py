"""The base of all containers: names, logical shapes, formats, bytes and metadata of a weight file.

A container is one class in one file of `loaders/files`, in the list of `open_weights.py`. It is
chosen by the first bytes of a file, never by the file's name.
"""
import contextlib
import functools
import mmap
import os
import re
import stat
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch

from ...ops.formats.base import FORMATS
from ...ops.stable_names import short_error_name
from ...ops.tensor.packed_layout import packed_tensor
from ...ops.tensor.packed_tensor import SOURCE_PATH
from ...ops.tensor.read_only_memory import guards_of, mark_read_only
from .network_drives import should_read_into_memory

# Types of plain tensors, under the names that ggml and safetensors share.
PLAIN_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}

# torch and the dequantising code expect elements of up to 8 bytes at multiples of their size.
ALIGNED = 8
FILE_PART = "_featherweight_file_part"  # attribute of a mapped tensor's storage: its `FilePart`

DOWNLOAD_AGAIN = "Download the file again, or get another conversion."

CONFIG_KEY = "quantization_config"  # of a config, and of metadata: the settings of a quantiser
COUNTABLE = (1 << 60) - 1  # largest number of elements whose bytes torch can count

# Iterates over a collection and shows the progress.
ProgressIter = Callable[[Collection], Iterable]


@short_error_name
class WeightFileError(ValueError):
    """A file cannot be read. The message names the file, what is wrong with it and what to do."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Describes one tensor of a file.

    Attributes:
        name: name in the file.
        shape: logical shape, outermost dimension first.
        stored_shape: shape whose last dimension the blocks divide; `shape`, unless the blocks do
            not divide the logical rows.
        format: a packed format (key of `FORMATS`) or a plain dtype (key of the container's
            `dtypes`).
        offset: bytes from the start of the file.
        nbytes: size in the file.
        part: index of the file in `WeightFile.paths`.
    """

    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int
    part: int = 0


class WeightFile:
    """The weights of one model in one or several files, memory-mapped or read (`network_drives`).

    The files stay open as long as this object or one of its tensors lives.

    Attributes:
        dtypes: name -> plain dtype of the container.
        path: the file or folder requested.
        paths: all files of the model, in order.
        states: their states when they were opened.
        metadata: key -> value.
        entries: name -> TensorEntry, in the order of the file.
        notes: sentences about what of the file is not used, for the node.
        guard: raises WeightFileError if one of the mapped files was written to.
        judgement: `quantizers.judgement.Judgement` of the tensors, once they are read.
    """

    judgement: Any
    dtypes: ClassVar[Mapping[str, torch.dtype]] = PLAIN_DTYPES
    path: Path
    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    entries: dict[str, TensorEntry]

    def __init__(
        self, path: Path, paths: Sequence[Path], buffers: Sequence["MappedFile"],
        metadata: Mapping[str, Any], entries: dict[str, TensorEntry],
    ):
        self.path = path
        self.paths = tuple(paths)
        self.metadata = metadata
        self.entries = entries
        self._buffers = tuple(buffers)
        self._is_read = tuple(map(should_read_into_memory, self.paths))
        self._real_paths = tuple(map(os.path.realpath, self.paths))
        self.notes: list[str] = []
        self.states = tuple(buffer.state for buffer in self._buffers)
        self.guard = FileChangeGuard.over(
            buffer for buffer, is_read in zip(self._buffers, self._is_read) if not is_read)

    def note(self, sentence: str):
        """Adds a sentence to `notes`, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    @property
    def declared_type(self) -> str:
        """The type of model that the file declares, for messages only; "" if it declares none."""
        return ""

    @functools.cached_property
    def quantization(self) -> Mapping[str, Any]:
        """The settings of a quantiser in a file's metadata or a folder's config, {} where there are
        none."""
        return {}

    @property
    def text_metadata(self) -> dict[str, str]:
        """The metadata whose values are strings, which is what ComfyUI reads."""
        return {key: value for key, value in self.metadata.items() if isinstance(value, str)}

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors, without header and padding."""
        return sum(entry.nbytes for entry in self.entries.values())

    def alignment(self, dtype: torch.dtype | None) -> int:
        """Returns the alignment in bytes that a mapped tensor needs; dtype None is packed bytes."""
        return ALIGNED

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the bytes of one tensor, mapped or read; misaligned ones are copied.

        A mapped tensor is read-only: writing into its pages ends the process.

        Returns:
            Packed formats: uint8 of `packed_shape(entry.stored_shape)`. Plain dtypes: that dtype,
            of `entry.shape`.

        Raises:
            KeyError: there is no tensor of this name.
            WeightFileError: the file can no longer be read.
        """
        entry = self.entries[name]
        # Markers: ComfyUI identifies some models by an empty tensor.
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=self.dtypes.get(entry.format, torch.uint8))
        is_read = self._is_read[entry.part]
        tensor = self._read(entry) if is_read else self._mapped(entry)
        dtype = self.dtypes.get(entry.format)
        if entry.offset % self.alignment(dtype) and not is_read:
            tensor = tensor.clone()
        if dtype:
            return tensor.view(dtype).view(entry.shape)
        return tensor.view(FORMATS[entry.format].packed_shape(entry.stored_shape))

    def _mapped(self, entry: TensorEntry) -> torch.Tensor:
        data = memoryview(self._buffers[entry.part])[entry.offset:entry.offset + entry.nbytes]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            tensor = torch.frombuffer(data, dtype=torch.uint8)
        mark_read_only(tensor, self._buffers[entry.part].guard)
        storage = tensor.untyped_storage()
        setattr(storage, SOURCE_PATH, self._real_paths[entry.part])
        setattr(storage, FILE_PART, FilePart(self._buffers[entry.part], entry.offset, entry.nbytes))
        return tensor

    def _read(self, entry: TensorEntry) -> torch.Tensor:
        """Reads a tensor into memory, aligned to 64 bytes at any offset."""
        path, tensor = self.paths[entry.part], torch.empty(entry.nbytes, dtype=torch.uint8)
        with explain_oserror(path), open(path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            remaining = tensor.numpy().data
            while remaining:
                count = file.readinto(remaining)  # the system reads at most 2 GB at a time
                if not count:
                    raise WeightFileError(
                        f"{path.name} was cut short while it was read: {len(remaining)} bytes of"
                        f" the tensor {safe_repr(entry.name)} are missing. Load it again when the"
                        " file is complete.")
                remaining = remaining[count:]
        return tensor

    def state_dict(self, track: ProgressIter = iter) -> dict[str, torch.Tensor]:
        """Returns name -> tensor of all files: packed tensors for packed formats, else plain ones.

        Mapped tensors are not copied. Packed tensors have the dtype float32 until a layer gives
        them the model's dtype.

        Args:
            track: iterates over the entries and shows progress, such as `Progress.track`.

        Raises:
            WeightFileError: a file was written to or replaced while it was read.
        """
        tensors = {entry.name: self._as_tensor(entry) for entry in track(self.entries.values())}
        self.guard()
        for path, state, is_read in zip(self.paths, self.states, self._is_read):
            now = FileState.of(path) if is_read else None
            if now is not None and now.identity != state.identity:
                raise WeightFileError(
                    f"{path.name} was written to or replaced while it was read, so its weights mix"
                    " two versions. Load it again when the file is complete.")
        return tensors

    def drop_pages(self):
        """Releases the memory of the mapped pages, which are read from the disk when used again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # other systems release them when memory is short
            for buffer in self._buffers:
                buffer.madvise(mmap.MADV_DONTNEED)

    @property
    def name(self) -> str:
        """The name of the file or folder, for people."""
        return model_name(self.path)

    def error_at(self, name: str, problem: str, advice: str) -> WeightFileError:
        """Returns an error that names the file in which the tensor `name` is.

        Args:
            name: name of a tensor.
            problem: what is wrong with it, as a clause.
            advice: what to do, as a sentence.
        """
        path = self.paths[self.entries[name].part] if name in self.entries else self.path
        # files of folders have the same name in each
        folder = f"{self.name}/" if path.parent == self.path else ""
        return WeightFileError(f"{folder}{path.name}: {problem}. {advice}")

    def _as_tensor(self, entry: TensorEntry) -> torch.Tensor:
        data = self.tensor(entry.name)
        if entry.format in self.dtypes:
            return data
        return packed_tensor(FORMATS[entry.format], data, entry.shape)


class FileState(NamedTuple):
    """Identifies a version of a file: differs after the file was written to or replaced.

    Attributes:
        device: the drive.
        number: inode number on the drive.
        size: bytes.
        time: time of the last write in ns, which programs can set.
        change: time of the last change of content or attributes in ns, which programs cannot set;
            on Windows the time of creation.
    """

    device: int
    number: int
    size: int
    time: int
    change: int

    @classmethod
    def of(cls, path: str | os.PathLike) -> "FileState | None":
        """Returns the state of a file, None if it cannot be found."""
        try:
            return cls.from_status(os.stat(path))
        except OSError:
            return None

    @classmethod
    def from_status(cls, status: os.stat_result) -> "FileState":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
                   status.st_ctime_ns)

    @property
    def identity(self) -> tuple[int, ...]:
        """Identifies the content of a path in later sessions too.

        On POSIX without device and inode number, which some drives change at each mount: `change`
        distinguishes a file that replaced another of the same size and time.
        """
        return (self.size, self.time, self.change) if os.name == "posix" else self[1:]


@dataclass(frozen=True, slots=True)
class FileChangeGuard:
    """Raises WeightFileError when called after one of the mapped files was written to.

    Such a file's weights have changed, and reading past its new end ends the process. A file that
    was removed, or that another was renamed over, stays mapped as it was and does not count.

    Attributes:
        files: (path, state when it was opened) of each file.
    """

    files: tuple[tuple[Path, FileState], ...] = ()

    @classmethod
    def over(cls, mapped: Iterable["MappedFile"]) -> "FileChangeGuard":
        """Returns a guard of these files."""
        return cls(tuple((file.path, file.state) for file in mapped))

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> "FileChangeGuard":
        """Returns a guard of all files in which these tensors are mapped."""
        return sum(cast(list[FileChangeGuard], guards_of(tensors)), cls())

    def __add__(self, other: "FileChangeGuard") -> "FileChangeGuard":
        return FileChangeGuard(tuple(dict.fromkeys(self.files + other.files)))

    def __call__(self):
        """Checks the state of each file once. Raises WeightFileError."""
        for path, before in self.files:
            now = FileState.of(path)
            if now is not None and now[:2] == before[:2] and now != before:
                raise WeightFileError(
                    f"{path.name} was written to after it was loaded ({before.size} bytes then,"
                    f" {now.size} now), while its weights were used from the file. Run this again"
                    " (queue the prompt), which loads the file as it is now. Replacing a file by"
                    " renaming a complete new one avoids this.")


class FilePart(NamedTuple):
    """Where the bytes of a mapped tensor are: `nbytes` from `offset` on in a mapped file."""

    file: "MappedFile"
    offset: int
    nbytes: int


class MappedFile(mmap.mmap):
    """A whole file, mapped read-only.

    Attributes:
        path: the file.
        state: its state when it was opened.
        guard: raises WeightFileError if it was written to since.
    """

    path: Path
    state: FileState
    guard: FileChangeGuard


def map_file(path: str | os.PathLike) -> MappedFile:
    """Maps a whole file read-only.

    Raises:
        WeightFileError: it is empty, not a file, or cannot be opened.
    """
    path = Path(path)
    with explain_oserror(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise WeightFileError(
                f"{path} is a folder or a device, not a file. Pick a weight file.")
        if not status.st_size:
            raise WeightFileError(
                f"{path.name} is empty (0 bytes), so its download failed. Download it again.")
        with open(path, "rb") as file:
            mapped = MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.path, mapped.state = path, FileState.from_status(status)
    mapped.guard = FileChangeGuard.over([mapped])
    return mapped


@contextlib.contextmanager
def explain_oserror(path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a WeightFileError about `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise WeightFileError(
            f"{path} does not exist, or no longer. Refresh the list (R) and pick again.") from error
    except PermissionError as error:
        raise WeightFileError(
            f"{path} is not readable by this user. Change the file's permissions.") from error
    except OSError as error:
        raise WeightFileError(
            f"{path} cannot be read ({error.strerror}). Check the drive it is on.") from error


# of the models in a pipeline's folder
PIPELINE_PARTS = re.compile(r"(transformer|unet|text_encoder|vae)(_\d+)?")


def model_name(path: str | os.PathLike) -> str:
    """Returns the name of a file or folder, of a model in a pipeline's folder with that folder."""
    parts = Path(os.path.normpath(path)).parts
    return "/".join(parts[-2:] if PIPELINE_PARTS.fullmatch(parts[-1]) else parts[-1:])


def display_name(text: str) -> str:
    """Returns a name from a workflow for use in a message: escaped if long or not printable."""
    return text if len(text) <= 200 and text.isprintable() else safe_repr(text)


def describe(tensor: torch.Tensor) -> str:
    """Returns a tensor's dtype and shape for use in a message: 'float16 (4, 8)'."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def safe_repr(value) -> str:
    """Returns a name or value from a file for use in a message: escaped and shortened."""
    return _shortened(repr(value), 120)


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's text, printable, shortened, without a full stop."""
    line = str(error).strip().split("\n")[0]
    text = "".join(letter if letter.isprintable() else " " for letter in line)
    return _shortened(text, 300).rstrip(".") or type(error).__name__


def _shortened(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else text[:max_length - 3] + "..."
