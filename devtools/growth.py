"""What has grown since the last tag. Standard library only."""
import collections
import subprocess
from pathlib import Path, PurePosixPath

CODE = (".py", ".js", ".c", ".cpp", ".h", ".cu", ".metal")
FOLDERS = ("loaders", "ops")  # whose own folders are told apart
PAGES = ("README.md", "docs/*.md", ":(glob)nodes/web/docs/*.md")  # in English


def growth_text(root: Path) -> str:
    """Returns a line: by folder the change of lines of code, then that of the pages' words.

    Args:
        root: of the checkout. What git does not track is not counted.
    """
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True,
                              encoding="utf-8").stdout

    try:
        tag = (root / ".git").exists() and git("describe", "--tags", "--abbrev=0").strip()
    except OSError:
        return "No git, so the change of lines is not known."
    if not tag:
        return "No git tag, so the change of lines is not known."
    lines = collections.Counter()
    for line in git("diff", "--numstat", "--no-renames", tag).splitlines():
        added, removed, name = line.split("\t")
        if name.endswith(CODE):
            folder, *inner = PurePosixPath(name).parts[:-1] or ["the root"]
            lines["/".join([folder, *inner[:folder in FOLDERS]])] += int(added) - int(removed)
    after, before = (len(git("grep", "-hI", "", *version, "--", *PAGES).split())
                     for version in ([], [tag]))
    return (f"Lines since {tag}: {', '.join(f'{name} {lines[name]:+}' for name in sorted(lines))};"
            f" words of pages {after - before:+}")
