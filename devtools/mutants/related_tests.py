"""Which tests know a source file, by names and imports; those that know most of it first."""
import ast
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

FARTHEST = 3  # imports from a test to a source
COMMON = 20  # tests that say a name, from which on it says nothing of what they are for
WORD = re.compile(r"\w{4,}")
MENTIONED = re.compile(r"featherweight\.([\w.]+)(?: import ([\w, ]+))?")


class TestMap:
    """The imports of a tree, from its tests on."""

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(self, tree: Path):
        self.tree = tree
        paths = [path for path in tree.rglob("*.py")
                 if not any(part.startswith(".") for part in path.relative_to(tree).parts)]
        self.files = {path.relative_to(tree).as_posix() for path in paths}
        self.tests = sorted(file for file in self.files
                            if file.startswith("tests/") and Path(file).name.startswith("test_"))
        self._helpers = defaultdict(set)  # by the end of their dotted name
        for file in self.files:
            parts = Path(file).with_suffix("").parts
            if parts[0] == "tests":
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                for start in range(1, len(parts)):
                    self._helpers[".".join(parts[start:])].add(file)
        self._imported = {}
        self._distances = {test: self._walk(test) for test in self.tests}
        self._words = {
            test: set(WORD.findall((tree / test).read_text(encoding="utf-8")))
            for test in self.tests
        }
        self._frequency = Counter(word for words in self._words.values() for word in words)

    def tests_of(self, source: str) -> list[str]:
        """List the test files that know a source file.

        Returns:
            First those that are named after it or that say most of its names, of which one that few
            tests say counts more; then by the imports and folders between.
        """
        names, ranked = {name for name in self._names(source) if self._frequency[name] < COMMON}, []
        for test in self.tests:
            score = sum(
                1 / self._frequency[name] for name in names & self._words[test]
            ) + _named_after(test, source)
            distance = self._distances[test].get(source, FARTHEST + 1)
            near = distance <= FARTHEST or test.split("/")[1] in (source.split("/")[0], "server")
            if near or score > 0:
                folders = [test.split("/")[1:-1], source.split("/")[:-1]]
                shared = len(os.path.commonprefix(folders))  # noqa: RUF071  of lists
                apart = distance - shared
                ranked.append((-round(score, 1), apart, (self.tree / test).stat().st_size, test))
        return [test for *_, test in sorted(ranked)]

    def _names(self, source: str) -> set[str]:
        """What a file defines, and its texts that are names, such as ids of nodes."""
        names = set()
        for node in ast.walk(ast.parse((self.tree / source).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.isidentifier()
            ):
                names.add(node.value)
        return names

    def _walk(self, test: str) -> dict[str, int]:
        """Number of imports to each source; helpers of tests are of the test, a package's files of
        the package."""
        distances, waiting = {test: 0}, [test]
        for file in waiting:
            inside = file.startswith("tests/") or file.endswith("/__init__.py")
            for other in self._imports(file):
                step = (
                    0
                    if other.startswith("tests/") or (inside and not file.startswith("tests/"))
                    else 1
                )
                distance = distances[file] + step
                if distance <= FARTHEST and distance < distances.get(other, FARTHEST + 1):
                    distances[other] = distance
                    waiting.append(other)
        return distances

    def _imports(self, file: str) -> set[str]:
        if file not in self._imported:
            self._imported[file] = self._read_imports(file)
        return self._imported[file]

    def _read_imports(self, file: str) -> set[str]:
        package, imported = file.split("/")[:-1], set()
        for node in ast.walk(ast.parse((self.tree / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    imported |= self._module(alias.name, [])
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(
                    [*package[:len(package) + 1 - node.level], *filter(None, [node.module])])
                imported |= self._module(base if node.level else node.module,
                                         [alias.name for alias in node.names])
            elif isinstance(node, ast.Constant) and isinstance(
                node.value, str
            ):  # of a child process
                for module, names in MENTIONED.findall(node.value):
                    imported |= self._module(module, re.split(r", *", names))
        return imported - {file}

    def _module(self, module: str, names: list[str]) -> set[str]:
        """The files of those of `names` that are modules themselves, and of `module` where another
        name is not."""
        module = module.removeprefix("featherweight").removeprefix(".")
        inner = {f"{module}.{name}".strip(".") for name in names}
        inner = {name for name in inner if self._file(name)}
        modules = inner if inner and len(inner) == len(names) else inner | {module}
        return {
            file for name in modules for file in [self._file(name), *self._helpers.get(name, ())]
            if file
        }

    def _file(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in self.files),
                    None)


def _named_after(test: str, source: str) -> float:
    """Return how much a test's name says of a source.

    tests/ops/formats/test_bits_of_rows.py is named after ops/formats/bits.py, tests/test_bits.py
    perhaps, and tests/ops/formats/test_formats.py after the folder of ops/formats/iq1.py.
    """
    path, folder, name = Path(source), Path(test).parent.relative_to("tests"), Path(test).stem
    room, *parents = path.parent.parts
    inner = parents[-1] if parents else ""
    if path.stem != "__init__" and re.match(rf"test_({inner or room}_)?{path.stem}(_|$)", name):
        return 0.3 if folder == Path() else 1.0 if folder in path.parents else 0.0
    return (
        0.5 if inner and folder in path.parents and re.match(rf"test_{inner}(_|$)", name) else 0.0
    )
