"""python3 dev.py test --changed: the tests that are nearest to what has changed since the last
commit, by imports.

Standard library only: dev.py imports it before anything is installed.
"""
import ast
import collections
import subprocess
from collections.abc import Iterator
from pathlib import Path

from devtools import ROOT

NEAREST = 5  # files of tests for each changed file; more where they are as near
MOST = 12  # of those: what all import has its own tests among the nearest
PACK = "featherweight"  # as which tests import the root


def changed_tests(root: Path = ROOT) -> list[str]:
    """Return the files of tests to run: those that have changed, and for each other changed module
    those to which the fewest imports lead, the ones of a folder of the same name first."""
    users = users_by_file(root)
    found: dict[str, None] = {}
    for name in changed_files(root):
        if is_test(name) and (root / name).is_file():
            found[name] = None
        elif name.endswith(".py"):
            found |= dict.fromkeys(nearest(name, users))
    return list(found)


def changed_files(root: Path = ROOT) -> list[str]:
    """Return paths relative to the root: what differs from the last commit, and what git does not
    know yet."""
    lists = (["diff", "--name-only", "HEAD"], ["ls-files", "--others", "--exclude-standard"])
    return sorted({name for arguments in lists for name in subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True,
        check=True).stdout.splitlines()})


def is_test(name: str) -> bool:
    """Return whether a path is a file of tests."""
    return name.startswith("tests/") and Path(name).name.startswith("test_")


def nearest(name: str, users: dict[str, set[str]]) -> list[str]:
    """Return the files of tests that are nearest to a file. users: path -> what imports it."""
    distances, queue = {name: 0}, collections.deque([name])
    tests = []
    while queue:
        current = queue.popleft()
        if len(tests) >= NEAREST and distances[current] >= distances[tests[-1]]:
            break  # all that follow are farther
        for user in sorted(users.get(current, ())):
            if user not in distances:
                distances[user] = distances[current] + 1
                queue.append(user)
                if is_test(user):
                    tests.append(user)
    shared = set(Path(name).with_suffix("").parts)

    def order(test: str) -> tuple[int, int]:
        words = set(Path(test.replace("test_", "")).with_suffix("").parts)
        return distances[test], -len(words & shared)
    return sorted(tests, key=order)[:MOST]


def users_by_file(root: Path) -> dict[str, set[str]]:
    """Return the path of each file of Python that is imported -> those of what imports it."""
    files = [path for folder in ("cluster", "devtools", "loaders", "nodes", "ops", "tests")
             for path in (root / folder).rglob("*.py")]
    files += root.glob("*.py")
    users = collections.defaultdict(set)
    for file in files:
        for path in _imported(file, root):
            users[path.relative_to(root).as_posix()].add(file.relative_to(root).as_posix())
    return users


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """Yield the files of the repository that a file imports by a statement."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from _file_of([(alias.name, ()) for alias in node.names], root)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                folder = file.parents[node.level - 1]
                module = ".".join(folder.relative_to(root).parts)
                module = ".".join(filter(None, (PACK, module, node.module)))
            else:
                module = str(node.module)
            yield from _file_of([(module, names)], root)


def _file_of(modules, root: Path) -> Iterator[Path]:
    for module, names in modules:
        first, *parts = module.split(".")
        base = root if first == PACK else root / first
        if first != PACK and not (root / f"{first}.py").is_file() and not base.is_dir():
            base = root / "tests" / "support" / first
        base = base.joinpath(*parts)
        for path in (base, *(base / name for name in names)):
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file():
                    yield file
