"""A ucrtbase.dll with C's functions of complex numbers, whose place in Wine's ends the program.

All other functions are Wine's, in a copy of its DLL under another name. A complex number is passed
and returned as a structure of two numbers. Names and signatures: Microsoft's complex.h.
"""
import tempfile
from pathlib import Path

from devtools.host.environment import SetupError
from devtools.windows.programs import exports
from devtools.windows.python import forward_all

COPY = "ucrtwine"
BUILTIN = b"Wine builtin DLL"  # with this in its header Wine takes its own file in place of a copy
HEAD = """
#include <complex.h>
#include <math.h>
typedef struct { double real, imaginary; } Double;
typedef struct { float real, imaginary; } Float;
#define MAKE(TYPE, NUMBER) \\
    static double _Complex from##TYPE(TYPE a) { \\
        return __builtin_complex((double)a.real, (double)a.imaginary); } \\
    static TYPE to##TYPE(double _Complex z) { \\
        TYPE a = {(NUMBER)creal(z), (NUMBER)cimag(z)}; return a; }
MAKE(Double, double)
MAKE(Float, float)
static double norm(double _Complex z) { return creal(z) * creal(z) + cimag(z) * cimag(z); }
static double _Complex clog10(double _Complex z) { return clog(z) / log(10.0); }
"""
TO_NUMBER = {"cabs": "cabs", "carg": "carg", "cimag": "cimag", "creal": "creal", "norm": "norm"}
TO_COMPLEX = ("cacos", "cacosh", "casin", "casinh", "catan", "catanh", "ccos", "ccosh", "cexp",
              "clog", "clog10", "conj", "cproj", "csin", "csinh", "csqrt", "ctan", "ctanh")
# suffix of a function's name -> its type (long double is double on Windows)
SUFFIXES = {"": ("Double", "double"), "l": ("Double", "double"), "f": ("Float", "float")}
# prefix of the functions that make a number
PREFIXES = {"_": ("Double", "double"), "_L": ("Double", "double"), "_F": ("Float", "float")}


def functions() -> dict[str, str]:
    """Returns exported name -> C source of a function `own_NAME` that does its work."""
    sources = {}
    for suffix, (kind, number) in SUFFIXES.items():
        for name, call in TO_NUMBER.items():
            sources[name + suffix] = (f"{number} own_{name}{suffix}({kind} a)"
                                      f" {{ return ({number}){call}(from{kind}(a)); }}")
        for name in TO_COMPLEX:
            sources[name + suffix] = (f"{kind} own_{name}{suffix}({kind} a)"
                                      f" {{ return to{kind}({name}(from{kind}(a))); }}")
        sources[f"cpow{suffix}"] = (
            f"{kind} own_cpow{suffix}({kind} a, {kind} b)"
            f" {{ return to{kind}(cpow(from{kind}(a), from{kind}(b))); }}")
    for prefix, (kind, number) in PREFIXES.items():
        for name, arguments, value in (
            ("build", f"{number} a, {number} b", "__builtin_complex((double)a, (double)b)"),
            ("mulcc", f"{kind} a, {kind} b", f"from{kind}(a) * from{kind}(b)"),
            ("mulcr", f"{kind} a, {number} b", f"from{kind}(a) * b"),
        ):
            sources[f"{prefix}C{name}"] = (f"{kind} own_{prefix}C{name}({arguments})"
                                           f" {{ return to{kind}({value}); }}")
    return sources


def is_stub(code: bytes) -> bool:
    """Returns whether a function only reports its name, by how it begins: it makes room on the
    stack, loads two addresses, and calls."""
    return (code[:7] == bytes.fromhex("4883ec28488d0d") and code[11:14] == bytes.fromhex("488d15")
            and code[18] == 0xE8)


def make_libraries(system: Path):
    """Writes ucrtbase.dll and the copy of Wine's to Wine's folder system32."""
    found = list(Path("/usr/lib").rglob("wine/x86_64-windows/ucrtbase.dll"))
    if not found:
        raise SetupError("Wine has no x86_64-windows/ucrtbase.dll under /usr/lib. Install Wine from"
                         " the system's packages, then run this again.")
    dll = found[0].read_bytes()
    own = functions()
    sources, names = [], []
    for name, code in exports(dll):
        if not is_stub(code):
            names.append(name)
        elif name in own:
            names.append(f"{name}=own_{name}")
            sources.append(own[name])
    with tempfile.TemporaryDirectory() as folder:
        forward_all(names, COPY, system / "ucrtbase.dll", Path(folder), HEAD, *sources)
    at = dll.find(BUILTIN, 0, 0x100)
    if at >= 0:
        dll = dll[:at] + bytes(len(BUILTIN)) + dll[at + len(BUILTIN):]
    (system / f"{COPY}.dll").write_bytes(dll)
