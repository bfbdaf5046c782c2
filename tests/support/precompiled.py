"""Headers parsed once for all sources that include them: of a small kernel's time a compiler takes
most for its headers."""
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

from pack_api import cpp_backend

from featherweight.ops import cpu_features as cpu_features

# What lanes.h and parallel.h of source/cpu include, which are in every kernel of a CPU.
CPU_HEADERS = ("#include <string.h>\n#ifdef __AVX2__\n#include <immintrin.h>\n#endif\n"
               "#include <stdlib.h>\n")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="featherweight")


def precompile(text: str, flags: tuple[str, ...]) -> str:
    """Returns the path of a header, which GCC reads in its parsed form where it compiles with these
    flags. Other flags read the text, and so do other compilers, which would end with an error where
    the parsed form is of other flags."""
    name = hashlib.sha256(f"{flags} {text}".encode()).hexdigest()[:32]
    header = Path(_folder().name, f"{name}.h")
    if not header.is_file():
        header.write_text(text, encoding="utf-8")
        compiler = cpp_backend.cpp_compiler()
        if compiler and _is_gcc(compiler):
            subprocess.run([*compiler, *flags, "-x", "c++-header", str(header), "-o",
                            f"{header}.gch"], capture_output=True)
    return str(header)


@functools.cache
def _is_gcc(compiler: tuple[str, ...]) -> bool:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in version


def cpu_flags(*options: str) -> tuple[str, ...]:
    """Returns the flags for kernels of a CPU, their headers precompiled."""
    flags = (*cpp_backend.FLAGS, *options)
    x86_flags = cpp_backend.X86_FLAGS if cpu_features.is_x86() else ()
    header = precompile(CPU_HEADERS, (*flags, *x86_flags, cpp_backend.OPENMP))
    return *flags, "-include", header
