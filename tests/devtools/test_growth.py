"""What `dev.py lint` says of the change since the last tag."""
import shutil
import subprocess

import pytest

from devtools.growth import growth_text


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_lines_by_folder_and_words_of_pages_are_counted_against_the_last_tag(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                       cwd=tmp_path, check=True, capture_output=True)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}"
            path = path.with_suffix(".md" if path.parent.name == "docs" else ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        git("add", "-A")

    assert "git" in growth_text(tmp_path)
    git("init", "-q")
    write(ops__kernels__deep__a="1\n2\n3\n", tests__b="1\n", nodes__web__c="1\n", docs__page="a b")
    git("commit", "-qm", "a")
    assert growth_text(tmp_path) == "No git tag, so the change of lines is not known."
    git("tag", "v1")
    git("mv", "ops/kernels/deep/a.py", "ops/moved.py")
    write(tests__b="1\n2\n3\n", docs__page="a b c d e", dev="1\n")
    assert growth_text(tmp_path) == (
        "Lines since v1: ops +3, ops/kernels -3, tests +2, the root +1; words of pages +3")
