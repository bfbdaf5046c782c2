"""Weight files: the names, logical shapes, formats, bytes and metadata in a file, whatever its
container.

A container is one class in one file of this folder. It registers by being defined, is imported by
`__init__.py` (`open_weights`), and is chosen by the first bytes of a file, never by the file's
name.
"""
import contextlib
import math
import mmap
import os
import stat
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from ...ops.format import FORMATS
from ...ops.packed_layout import packed_tensor
from ...ops.read_only_memory import guards_of, mark_read_only
from .network_drives import should_read_into_memory

# Tensors of these types stay plain tensors. ggml and safetensors use the same names for them.
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

# torch and the dequantising code assume that elements of up to 8 bytes lie at multiples of their
# size.
ALIGNED = 8

COUNTABLE = (1 << 60) - 1  # elements of a tensor whose bytes torch can count

CONTAINERS: dict[bytes, type["WeightFile"]] = {}

# Gives the items one by one while it shows how far that is.
ProgressIter = Callable[[Collection], Iterable]


class WeightFileError(ValueError):
    """A file that cannot be read. The message names the file, what was found, what was expected and
    what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies and what it is.

    shape: logical shape, outermost dimension first. stored_shape: the shape along whose last
    dimension the blocks run; differs from `shape` only where the blocks do not divide the logical
    rows. format: name of a packed format (a key of `FORMATS`) or of a plain dtype (a key of
    `PLAIN_DTYPES`). offset, nbytes: from the start of the file `WeightFile.paths[part]`.
    """

    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int
    part: int = 0


class WeightFile:
    """One model's weights on disk, memory-mapped, or read from there (`drives`); its parts where a
    model is split over files.

    path: as asked for. paths: every file read, in order. states: of these, as they were opened.
    metadata: key -> value.
    entries: name -> Entry, in the order of the file. dtypes: the plain dtypes of the container by
    their names in it. guard: raises where one of the mapped files is written to. The files stay
    open while this object or a tensor of it lives, and no longer.
    """

    magic: ClassVar[bytes]
    dtypes: ClassVar[Mapping[str, torch.dtype]] = PLAIN_DTYPES
    path: Path
    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    entries: dict[str, Entry]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "magic" not in cls.__dict__:
            return  # another way of finding the files of a container
        if cls.magic in CONTAINERS:
            claimed = CONTAINERS[cls.magic].__name__
            raise TypeError(
                f"Files beginning with {cls.magic!r} are claimed by {claimed} and {cls.__name__}.")
        CONTAINERS[cls.magic] = cls

    def __init__(
        self, path: Path, paths: Sequence[Path], buffers: Sequence["MappedFile"],
        metadata: Mapping[str, Any], entries: dict[str, Entry],
    ):
        self.path = path
        self.paths = tuple(paths)
        self.metadata = metadata
        self.entries = entries
        self._buffers = tuple(buffers)
        self._copied = tuple(map(should_read_into_memory, self.paths))
        self.states = tuple(buffer.state for buffer in self._buffers)
        self.guard = FileChangeGuard.over(buffer
                                          for buffer, copied in zip(self._buffers, self._copied)
                                          if not copied)

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        """Whether a file with these first bytes (up to 512) is of this container."""
        return head.startswith(cls.magic)

    @property
    def declared_type(self) -> str:
        """What the file says it is, for error texts only; "" where it says nothing."""
        return ""

    @property
    def text_metadata(self) -> dict[str, str]:
        """What the host takes as the metadata of a file."""
        return {key: value for key, value in self.metadata.items() if isinstance(value, str)}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors together, without header and padding."""
        return sum(entry.nbytes for entry in self.entries.values())

    def alignment(self, dtype: torch.dtype | None) -> int:
        """What the offset of a tensor has to be a multiple of to be used where it is. dtype: None
        for packed bytes."""
        return ALIGNED

    def tensor(self, name: str) -> torch.Tensor:
        """The bytes of one tensor, not copied from the mapping (unless misaligned) and owning its
        own storage; or read.

        Packed formats: uint8, `packed_shape(entry.stored_shape)`. Plain dtypes: that dtype,
        `entry.shape`. Read-only: the pages belong to the file, writing into them ends the process.
        Raises KeyError for an unknown name, and WeightFileError where the file cannot be read any
        more.
        """
        entry = self.entries[name]
        # a marker: some models are told apart by the presence of an empty tensor
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=self.dtypes.get(entry.format, torch.uint8))
        tensor = self._read(entry) if self._copied[entry.part] else self._mapped(entry)
        dtype = self.dtypes.get(entry.format)
        if entry.offset % self.alignment(dtype) and not self._copied[entry.part]:
            tensor = tensor.clone()
        if dtype:
            return tensor.view(dtype).view(entry.shape)
        return tensor.view(FORMATS[entry.format].packed_shape(entry.stored_shape))

    def _mapped(self, entry: Entry) -> torch.Tensor:
        data = memoryview(self._buffers[entry.part])[entry.offset:entry.offset + entry.nbytes]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            tensor = torch.frombuffer(data, dtype=torch.uint8)
        mark_read_only(tensor, self._buffers[entry.part].guard)
        return tensor

    def _read(self, entry: Entry) -> torch.Tensor:
        """The bytes in memory of their own, aligned to 64 bytes whatever the offset is."""
        path, tensor = self.paths[entry.part], torch.empty(entry.nbytes, dtype=torch.uint8)
        with reading(path), open(path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            left = memoryview(tensor.numpy())
            while left:
                count = file.readinto(left)  # the system takes at most 2 GB at a time
                if not count:
                    raise WeightFileError(
                        f"{path.name} was cut short while it was read: {len(left)} bytes of the"
                        f" tensor {safe_repr(entry.name)} are missing. Load it again when it is"
                        " whole.")
                left = left[count:]
        return tensor

    def state_dict(self, track: ProgressIter = iter) -> dict[str, torch.Tensor]:
        """Name -> tensor of the whole file, not copied: packed tensors for packed formats, plain
        ones otherwise.

        Packed tensors show float32, the dtype their values have; a layer that takes one gives it
        the model's dtype.
        track: goes over the entries in place of a plain loop, such as `Progress.track`. Raises
        WeightFileError where a file was written to or replaced while it was read.
        """
        tensors = {entry.name: self._as_tensor(entry) for entry in track(self.entries.values())}
        self.guard()
        for path, state, copied in zip(self.paths, self.states, self._copied):
            if (
                copied
                and (now := FileState.of(path)) is not None
                and now.identity != state.identity
            ):
                raise WeightFileError(
                    f"{path.name} was written to or replaced while it was read, so its weights are"
                    " of two files. Load it again when it is whole.")
        return tensors

    def drop_pages(self):
        """Give back the memory of what was read of the files: it comes anew from the disk where it
        is read once more."""
        if hasattr(mmap, "MADV_DONTNEED"):  # other systems do it by themselves when memory is short
            for buffer in self._buffers:
                buffer.madvise(mmap.MADV_DONTNEED)

    def error_at(self, name: str, problem: str, advice: str) -> WeightFileError:
        """An error that names the one of several files which holds the tensor `name`."""
        path = self.paths[self.entries[name].part] if name in self.entries else self.path
        return WeightFileError(f"{path.name}: {problem}. {advice}")

    def _as_tensor(self, entry: Entry) -> torch.Tensor:
        data = self.tensor(entry.name)
        return (
            data
            if entry.format in self.dtypes
            else packed_tensor(FORMATS[entry.format], data, entry.shape)
        )


class FileState(NamedTuple):
    """What tells a file from others that have or had its name, and whether it was written to.

    number: of the file on its drive. time: of the last write, which programs set as they like.
    change: time of the last change to its bytes or to what the drive says of it, which none can
    set; on Windows the time it was made.
    """

    device: int
    number: int
    size: int
    time: int
    change: int

    @classmethod
    def of(cls, path: str | os.PathLike) -> "FileState | None":
        """Return the state of a file; None where it is gone."""
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
        """What says in other sessions too that a path leads to the same bytes.

        Without numbers that some drives give anew whenever they are mounted: there `change` tells a
        file that took the name of another of the same size and time.
        """
        return (self.size, self.time, self.change) if os.name == "posix" else self[1:]


@dataclass(frozen=True, slots=True)
class FileChangeGuard:
    """Says when mapped files are written to: their weights would be others, and one that is cut
    short ends the process.

    A file that another was renamed over, or that is gone, is mapped as it was and no change. files:
    path -> its state.
    """

    files: tuple[tuple[Path, FileState], ...] = ()

    @classmethod
    def over(cls, mapped: Iterable["MappedFile"]) -> "FileChangeGuard":
        return cls(tuple((file.path, file.state) for file in mapped))

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> "FileChangeGuard":
        """Return a guard of all mapped files that tensors lie in, whichever file they were loaded
        of."""
        return sum(guards_of(tensors), cls())

    def __add__(self, other: "FileChangeGuard") -> "FileChangeGuard":
        return FileChangeGuard(tuple(dict.fromkeys(self.files + other.files)))

    def __call__(self):
        """Ask the system once for each file. Raises WeightFileError."""
        for path, before in self.files:
            now = FileState.of(path)
            if now is not None and now[:2] == before[:2] and now != before:
                raise WeightFileError(
                    f"{path.name} was written to after it was loaded ({before.size} bytes then,"
                    f" {now.size} now), and its weights are used where they lie in it. Run this"
                    " again (queue the prompt), which loads the file as it is now; a new version"
                    " that is moved into its place whole disturbs nothing.")


class MappedFile(mmap.mmap):
    """A whole file, mapped read-only. path, state: of the file as it was opened. guard: raises
    where it is written to."""

    path: Path
    state: FileState
    guard: FileChangeGuard


def map_file(path: str | os.PathLike) -> MappedFile:
    """The whole file, mapped read-only, at least one byte. Raises WeightFileError."""
    path = Path(path)
    with reading(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise WeightFileError(
                f"{path} is a folder or a device, not a file; pick a weight file.")
        if not status.st_size:
            raise WeightFileError(
                f"{path.name} is empty (0 bytes), so its download failed; download it again.")
        with open(path, "rb") as file:
            mapped = MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.path, mapped.state = path, FileState.from_status(status)
    mapped.guard = FileChangeGuard.over([mapped])
    return mapped


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the system inside this block as a WeightFileError about `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise WeightFileError(
            f"{path} does not exist, or no longer; refresh the list (R) and pick again.") from error
    except PermissionError as error:
        raise WeightFileError(
            f"{path} may not be read by this user; change the file's permissions.") from error
    except OSError as error:
        raise WeightFileError(
            f"{path} cannot be read ({error.strerror}); check the drive it lies on.") from error


def nbytes_of(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in a packed format, its scales included, or in a plain type."""
    values = math.prod(shape)
    if type_name in PLAIN_DTYPES:
        return values * PLAIN_DTYPES[type_name].itemsize
    packed = FORMATS[type_name]
    scales = 4 * -(-values // packed.block_length) if packed.scales_apart else 0
    return -(-values * packed.block_bytes // packed.block_length) + scales


def display_name(text: str) -> str:
    """A name that a workflow gives, as it may stand in a message: as it is, unless it is long or
    cannot be printed."""
    return text if len(text) <= 200 and text.isprintable() else safe_repr(text)


def safe_repr(value) -> str:
    """A name or value from a file as it may stand in a message: escaped and of bounded length."""
    return _bounded(repr(value), 120)


def first_line(error: Exception) -> str:
    """What an exception says, as a part of a sentence: one line of bounded length, which may hold
    names from a file."""
    text = "".join(letter if letter.isprintable() else " "
                   for letter in str(error).strip().split("\n")[0])
    return _bounded(text, 300).rstrip(".") or type(error).__name__


def _bounded(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most - 3] + "..."
