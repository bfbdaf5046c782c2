"""`dev.py test --changed` finds the tests that are near what has changed."""
import ast
import random
import re
import subprocess

import pytest

from devtools import ROOT, changed


@pytest.fixture(scope="module")
def users():
    return changed.users_by_file(ROOT)


def test_each_module_of_the_pack_has_tests_that_are_nearest_to_it(users):
    names = subprocess.run(["git", "ls-files", "ops", "loaders", "nodes", "cluster"], cwd=ROOT,
                           capture_output=True, text=True).stdout.splitlines()
    without = [name for name in names or pytest.skip("this is no clone")
               if name.endswith(".py") and not changed.nearest(name, users)
               and len(ast.parse((ROOT / name).read_text(encoding="utf-8")).body) > 1]
    assert not without


def test_a_test_of_the_same_name_that_imports_a_module_is_among_the_nearest(users):
    named = [(user, name) for name, imported in users.items() for user in imported
             if changed.is_test(user) and re.sub(r".*/(test_)?", "", user) == re.sub(
                 r".*/", "", name)]
    assert len(named) > 40
    for user, name in random.Random(0).sample(named, 30):
        assert user in changed.nearest(name, users), name


def git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@a", *arguments], cwd=folder,
                   check=True, capture_output=True)


def test_what_is_not_committed_chooses_the_tests(tmp_path):
    sources = {"ops/__init__.py": "", "ops/sums.py": "", "ops/layers.py": "from . import sums\n",
               "tests/test_layers.py": "from featherweight.ops import layers\n",
               "tests/support/cases.py": "from featherweight.ops.sums import add\n",
               "tests/test_sums.py": "import cases\n", "tests/test_other.py": ""}
    for name, text in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "all")
    assert changed.changed_tests(tmp_path) == []
    (tmp_path / "tests" / "test_new.py").touch()
    (tmp_path / "README.md").touch()
    assert changed.changed_tests(tmp_path) == ["tests/test_new.py"]
    (tmp_path / "ops" / "sums.py").write_text("def add(): pass\n")
    assert changed.changed_tests(tmp_path) == [
        "tests/test_sums.py", "tests/test_layers.py", "tests/test_new.py"]
