"""Which tests know a source file, by names and imports; nearest first."""
import ast
import re
from collections import defaultdict
from pathlib import Path

FARTHEST = 3  # imports from a test to a source
MENTIONED = re.compile(r"featherweight\.([\w.]+)(?: import ([\w, ]+))?")


class TestMap:
    """The imports of a tree, from its tests on."""

    __test__ = False  # it is no test, whatever pytest makes of its name

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

    def tests_of(self, source: str) -> list[str]:
        """List the test files that know a source file: those named after it, then by the number of imports between."""
        ranked = []
        for test in self.tests:
            distance = 0 if _is_named_after(test, source) else self._distances[test].get(source)
            if distance is None and test.split("/")[1] in (source.split("/")[0], "server"):
                distance = FARTHEST + 1
            if distance is not None:
                ranked.append((distance, (self.tree / test).stat().st_size, test))
        return [test for _, _, test in sorted(ranked)]

    def _walk(self, test: str) -> dict[str, int]:
        """Number of imports to each source; helpers of tests are of the test, a package's files of the package."""
        distances, waiting = {test: 0}, [test]
        for file in waiting:
            inside = file.startswith("tests/") or file.endswith("/__init__.py")
            for other in self._imports(file):
                step = 0 if other.startswith("tests/") or (inside and not file.startswith("tests/")) else 1
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
                base = ".".join([*package[:len(package) + 1 - node.level], *filter(None, [node.module])])
                imported |= self._module(base if node.level else node.module, [alias.name for alias in node.names])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # of a child process
                for module, names in MENTIONED.findall(node.value):
                    imported |= self._module(module, re.split(r", *", names))
        return imported - {file}

    def _module(self, module: str, names: list[str]) -> set[str]:
        """The files of those of `names` that are modules themselves, and of `module` where another name is not."""
        module = module.removeprefix("featherweight").removeprefix(".")
        inner = {f"{module}.{name}".strip(".") for name in names}
        inner = {name for name in inner if self._file(name)}
        modules = inner if inner and len(inner) == len(names) else inner | {module}
        return {file for name in modules for file in [self._file(name), *self._helpers.get(name, ())] if file}

    def _file(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in self.files), None)


def _is_named_after(test: str, source: str) -> bool:
    """tests/ops/test_bits.py and tests/ops/test_bits_of_rows.py are named after ops/bits.py."""
    path = Path(source)
    name = path.parent.name if path.stem == "__init__" else path.stem
    return re.match(rf"test_({re.escape(path.parent.name)}_)?{re.escape(name)}(_|$)", Path(test).stem) is not None
