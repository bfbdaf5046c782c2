"""Files and folders as somebody else may have left them."""
import os
from pathlib import Path

import pytest

SOMEBODY = 12345  # the number of another user


def belongs_to_somebody_else(path: Path):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, SOMEBODY, -1, follow_symlinks=False)


def can_be_written_by_all(path: Path):
    path.chmod(0o777)


def can_be_written_by_its_group(path: Path):
    path.chmod(0o770)


def is_a_link(path: Path):
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


each_reason = pytest.mark.parametrize("spoil", [belongs_to_somebody_else, can_be_written_by_all,
                                                can_be_written_by_its_group, is_a_link])
