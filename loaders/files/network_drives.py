"""Which files are mapped and which are read. Others write to those on a network share, and a mapped
one that is cut short ends the process."""
import os
from pathlib import Path

import psutil

FILES_ENV = "FEATHERWEIGHT_FILES"
MAP, COPY = "map", "copy"
# Of Linux and macOS, beside what begins with "fuse": Windows says by itself which drives are
# remote.
SHARES = {
    "nfs", "nfs4", "cifs", "smb", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "beegfs",
    "gpfs", "afs", "afpfs", "webdav", "davfs", "drvfs", "virtiofs", "vboxsf", "prl_fs", "vmhgfs",
    "ncpfs", "coda", "orangefs"
}
LOCAL_FUSE = {"fuseblk", "fuse.ext2", "fuse.ntfs", "fuse.ntfs-3g", "fusectl"}


def should_read_into_memory(path: Path) -> bool:
    """Whether the weights of a file are to be read into memory; they are mapped otherwise, which
    takes no memory of its own.

    By default those on a network share are. The environment's FEATHERWEIGHT_FILES is `map` or
    `copy` for all of them.
    """
    switch = os.environ.get(FILES_ENV)
    return switch == COPY if switch in (MAP, COPY) else is_on_a_share(path)


def is_on_a_share(path: Path) -> bool:
    """Whether a file lies where other machines can write to it."""
    path = os.path.realpath(path)
    if path.startswith("\\\\"):
        return True
    # of two at one place, the later covers
    mounts = {mount.mountpoint: mount for mount in psutil.disk_partitions(all=True)}
    over = [mount for place, mount in mounts.items() if os.path.normcase(path).startswith(
        os.path.join(os.path.normcase(place), ""))]
    if not over:
        return False
    mount = max(over, key=lambda mount: len(mount.mountpoint))
    kind = mount.fstype.lower()
    return (
        kind in SHARES
        or (kind.startswith("fuse") and kind not in LOCAL_FUSE)
        or "remote" in mount.opts.split(",")
    )
