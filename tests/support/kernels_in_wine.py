"""Kernels that Zig compiles for Windows, run in wine on the tensors of this process."""
import ctypes
import functools
import gc
import hashlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from featherweight.ops import cpu_features as cpu_features
from featherweight.ops.kernels import cpp_backend

RUNNER = Path(__file__).parents[1] / "ops" / "kernels" / "windows_in_wine" / "runner.cpp"
IN_REGISTERS = 4  # arguments of a call on Windows
TARGET = ("-target", "x86_64-windows-gnu", "-march=native")


class Wine:
    """Replaces `CppCompiler`: compiles for Windows, with the instructions of this CPU."""

    def __init__(self, wine: str, folder: Path):
        self.folder = folder
        runner = self._compiled(RUNNER.read_text(encoding="utf-8"), ".exe", "-O1")
        environment = {**os.environ, "WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
        self.process = subprocess.Popen([wine, runner], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=environment)

    def _compiled(self, text: str, suffix: str, *flags: str) -> str:
        source = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.cpp"
        source.write_text(text, encoding="utf-8")
        built = source.with_suffix(suffix)
        caches = {"ZIG_GLOBAL_CACHE_DIR": str(self.folder / "zig"),
                  "ZIG_LOCAL_CACHE_DIR": str(self.folder / "zig")}
        subprocess.run([*cpp_backend.zig(), *TARGET, *flags, str(source), "-o", str(built)],
                       check=True, env={**os.environ, **caches})
        return str(built)

    def library(self, source: str) -> "Library":
        flags = (*cpp_backend.FLAGS, *(cpp_backend.X86_FLAGS if cpu_features.is_x86() else ()))
        return Library(self, self._compiled(source, ".dll", *flags))

    def end(self):
        self.process.stdin.close()
        self.process.wait()


class Library:
    """A DLL: its functions take what those of a `ctypes.CDLL` do, with the addresses of tensors."""

    def __init__(self, wine: Wine, path: str):
        self._wine, self._path = wine, f"Z:{path}"

    def __getattr__(self, name: str):
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments):
        buffers, passed, pointers = _Buffers(), [], []
        for argument in arguments:
            if isinstance(argument, ctypes.c_void_p):
                passed.append(buffers.place(argument.value) or (-1, 0))
            elif hasattr(argument, "_obj") or isinstance(argument, ctypes.Array):
                place = buffers.add(getattr(argument, "_obj", argument))
                passed.append(place)
                for offset, address in _pointers_in(getattr(argument, "_obj", argument)):
                    if pointed := buffers.place(address):
                        pointers.append((place[0], offset, *pointed))
            elif isinstance(argument, ctypes.c_float):
                # after four others a number lies on the stack, of whatever type it is
                assert len(passed) >= IN_REGISTERS
                passed.append((-1, *struct.unpack("<i", struct.pack("<f", argument.value))))
            else:
                passed.append((-1, argument.value))
        parts = [_text(self._path), _text(name), _numbers(len(buffers.sizes))]
        for address, size in zip(buffers.numbers, buffers.sizes):
            parts += [_numbers(size), ctypes.string_at(address, size)]
        parts += [_numbers(len(pointers), *sum(pointers, ())),
                  _numbers(len(passed), *sum(passed, ()))]
        self._wine.process.stdin.write(b"".join(parts))
        self._wine.process.stdin.flush()
        for address, size in zip(buffers.numbers, buffers.sizes):
            data = self._wine.process.stdout.read(size)
            assert len(data) == size, "the kernel ended its process"
            if address in buffers.written:
                ctypes.memmove(address, data, size)


def _pointers_in(structure: ctypes.Structure, start: int = 0) -> Iterator[tuple[int, int | None]]:
    """Yields the place of each pointer in a structure, and the address that it holds."""
    for field, kind in getattr(structure, "_fields_", ()):
        offset, value = start + getattr(type(structure), field).offset, getattr(structure, field)
        if kind is ctypes.c_void_p:
            yield offset, value
        elif issubclass(kind, ctypes.Structure):
            yield from _pointers_in(value, offset)


class _Buffers:
    """What a call's addresses lie in: whole storages of tensors, structures, arrays and numbers.

    written: addresses of those that a kernel may write to.
    """

    def __init__(self):
        self.storages = {}
        for tensor in gc.get_objects():
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage.nbytes()
        self.numbers: dict[int, int] = {}
        self.sizes: list[int] = []
        self.written = set(self.storages)

    def add(self, data) -> tuple[int, int]:
        """Returns the buffer of a structure, array or number of ctypes, and 0."""
        if not isinstance(data, (ctypes.Structure, ctypes.Array)):
            self.written.add(ctypes.addressof(data))
        self.numbers[ctypes.addressof(data)] = len(self.sizes)
        self.sizes.append(ctypes.sizeof(data))
        return len(self.sizes) - 1, 0

    def place(self, address: int | None) -> tuple[int, int] | None:
        """Returns the buffer in which an address lies, and how far behind its start."""
        if address is None:
            return None
        start, size = next((start, size) for start, size in self.storages.items()
                           if start <= address < start + size)
        if start not in self.numbers:
            self.numbers[start] = len(self.sizes)
            self.sizes.append(size)
        return self.numbers[start], address - start


def _numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _text(text: str) -> bytes:
    return _numbers(len(text)) + text.encode()
