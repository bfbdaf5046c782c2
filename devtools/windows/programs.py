"""Compiles programs for Windows with Zig, and reads which functions a DLL has."""
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TARGET = ("-target", "x86_64-windows-gnu")
START_BYTES = 32  # of a function's code


class Export(NamedTuple):
    """A function that a DLL gives others; `code` is how it begins, "" where another DLL has it."""
    name: str
    code: bytes


def compile_program(source: Path, program: Path, *flags: str):
    """Compiles C for Windows. Raises subprocess.CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder, program.name)
        command = [sys.executable, "-m", "ziglang", "cc", *TARGET, "-O2", "-s", str(source),
                   *flags, "-o", str(partial)]
        subprocess.run(command, check=True, env={**os.environ, "ZIG_LOCAL_CACHE_DIR": folder})
        program.write_bytes(partial.read_bytes())


def exports(dll: bytes) -> Iterator[Export]:
    """Yields what a 64-bit DLL exports, by Microsoft's description of the PE format."""
    header, = struct.unpack_from("<I", dll, 0x3C)
    sections, = struct.unpack_from("<H", dll, header + 6)
    size, = struct.unpack_from("<H", dll, header + 20)
    table = [struct.unpack_from("<IIII", dll, header + 24 + size + 40 * index + 8)
             for index in range(sections)]

    def offset(address: int) -> int:
        return next(address - start + place for length, start, stored, place in table
                    if start <= address < start + max(length, stored))

    first, length = struct.unpack_from("<II", dll, header + 24 + 112)
    count, functions, names, ordinals = struct.unpack_from("<IIII", dll, offset(first) + 24)
    for index in range(count):
        at = offset(struct.unpack_from("<I", dll, offset(names) + 4 * index)[0])
        ordinal, = struct.unpack_from("<H", dll, offset(ordinals) + 2 * index)
        address, = struct.unpack_from("<I", dll, offset(functions) + 4 * ordinal)
        is_elsewhere = first <= address < first + length
        code = b"" if is_elsewhere else dll[offset(address):offset(address) + START_BYTES]
        yield Export(dll[at:dll.index(b"\0", at)].decode(), code)
