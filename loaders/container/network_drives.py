"""Decides which files are memory-mapped and which are read into memory.

Other machines can write to a file on a network share, and a mapped file that becomes shorter ends
the process.
"""
import os
import sys
from pathlib import Path

import psutil

FILES_ENV = "FEATHERWEIGHT_FILES"
MAP, COPY = "map", "copy"
# Network file systems on Linux and macOS, besides those that begin with "fuse". On Windows, psutil
# reports the option "remote".
NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smb", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "beegfs",
    "gpfs", "afs", "afpfs", "webdav", "davfs", "drvfs", "virtiofs", "vboxsf", "prl_fs", "vmhgfs",
    "ncpfs", "coda", "orangefs"
}
LOCAL_FUSE = {"fuseblk", "fuse.ext2", "fuse.ntfs", "fuse.ntfs-3g", "fusectl"}


def should_read_into_memory(path: Path) -> bool:
    """Returns whether the weights of a file are read into memory; otherwise they are mapped.

    The environment variable FEATHERWEIGHT_FILES, `map` or `copy`, decides for all files, and next
    ComfyUI's `--disable-mmap`. By default those on a network share are read.
    """
    mode = os.environ.get(FILES_ENV)
    if mode in (MAP, COPY):
        return mode == COPY
    return host_maps_no_files() or is_on_network_share(path)


def host_maps_no_files() -> bool:
    """Returns whether ComfyUI was started with `--disable-mmap`."""
    flags = sys.modules.get("comfy.cli_args")  # files are read without the host too
    return getattr(getattr(flags, "args", None), "disable_mmap", False)


def is_on_network_share(path: Path) -> bool:
    """Returns whether a file is on a drive that other machines can write to."""
    real_path = os.path.realpath(path).removeprefix("\\\\?\\")  # of long paths on Windows
    if real_path.startswith(("\\\\", "UNC\\")):
        return True
    # Of several mounts at one point, the last one is visible.
    mounts = {mount.mountpoint: mount for mount in psutil.disk_partitions(all=True)}
    containing = [
        mount for point, mount in mounts.items()
        if os.path.normcase(real_path).startswith(os.path.join(os.path.normcase(point), ""))
    ]
    if not containing:
        return False
    mount = max(containing, key=lambda mount: len(mount.mountpoint))
    file_system = mount.fstype.lower()
    return (
        file_system in NETWORK_FILE_SYSTEMS
        or (file_system.startswith("fuse") and file_system not in LOCAL_FUSE)
        or "remote" in mount.opts.split(",")
    )
