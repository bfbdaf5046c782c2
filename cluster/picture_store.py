"""Stores the pictures of a batch in a folder, or through fsspec in a bucket.

| name | content |
|---|---|
| `<id>_<node>_<n>.<ext>` | a file that the row's workflow saved; JSON ends in `..json` |
| `<id>.json` | the row's record, {"stamp", "files", "changes", "seconds", "worker"} |
| `.<name>.<8 hex digits>.part` | a file in a folder while it is written |

The record is written last: a row is done when the record has its stamp. No id ends in a dot, so no
record ends in `..json`. A `.part` file stays only if its process is killed.

A plain path is a folder of the machine that runs the batch, which writes the pictures of the other
machines too. Each machine writes by itself to a URI: s3://, gs://, abfs://, or file:// for a folder
that all machines share.
"""
import json
import os
import re
import secrets
import sys
from collections.abc import Container
from urllib.request import url2pathname

PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")
PICTURE = re.compile(r"(.+)_[A-Za-z0-9-]+_\d+(\.?\.[^.]*)?")
ATTEMPTS = 5  # to write a file


def folder_path(out: str) -> str:
    """Returns the path of a file:/// URI, and anything else unchanged. Raises ValueError."""
    if not out.startswith("file://"):
        return out
    if not out.startswith("file:///"):
        raise ValueError(
            f"{out} does not name a folder: write file:/// and the full path, such as"
            " file:///mnt/images."
        )
    return url2pathname(out.removeprefix("file://"))


class Store:
    """The files of a batch in one folder or bucket. Every method may raise OSError.

    Args:
        out: an absolute path or a URI.

    Raises:
        ValueError: `out` is a URI that cannot be opened.
    """

    def __init__(self, out: str):
        self.bucket = None  # fsspec's file system, None for a folder
        self.root = folder_path(out)
        if "://" in self.root:
            try:
                from fsspec.core import url_to_fs

                self.bucket, self.root = url_to_fs(out)
            except ImportError as error:
                raise ValueError(
                    f"{out} needs a package that is missing ({error}). Install it:"
                    f" {sys.executable} -m pip install s3fs for s3://, gcsfs for gs://, adlfs for"
                    " abfs://."
                ) from error
        else:
            os.makedirs(self.root, exist_ok=True)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        """Returns the file's bytes, or None if there is no such file."""
        try:
            if self.bucket:
                return self.bucket.cat_file(self.path(name))
            with open(self.path(name), "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes):
        """Writes a whole file atomically; in a folder it is on the disk when this returns."""
        if self.bucket:
            self.bucket.pipe_file(self.path(name), data)
            return
        for attempt in range(1, ATTEMPTS + 1):
            part = self.path(f".{name}.{secrets.token_hex(4)}.part")
            try:
                with open(part, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, self.path(name))
                return
            except FileNotFoundError:  # another command for the same rows removed the part
                if attempt == ATTEMPTS:
                    raise
            except BaseException:
                _remove(part)
                raise

    def remove(self, name: str):
        """Removes a file, which may be gone already."""
        try:
            if self.bucket:
                self.bucket.rm_file(self.path(name))
            else:
                os.unlink(self.path(name))
        except FileNotFoundError:
            pass

    def has(self, names: list[str]) -> bool:
        """Returns whether all files exist. Not checked for buckets: the JSON is written last."""
        return bool(self.bucket) or all(os.path.exists(self.path(name)) for name in names)

    def is_done(self, row: str, stamp: str) -> bool:
        """Returns whether all pictures of a row with this stamp are there."""
        record = self.record(row)
        return record.get("stamp") == stamp and self.has(record.get("files", []))

    def record(self, row: str) -> dict:
        """Returns what `<id>.json` holds, {} if there is no such file or it is not a record."""
        try:
            record = json.loads(self.read(f"{row}.json") or b"{}")
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def save(self, row: str, files: dict[str, bytes], record: dict):
        """Writes a row's files and then its record, and removes files of its earlier version.

        Args:
            row: its id.
            files: `<node>_<n>.<ext>` -> content.
            record: see the table above, without "files".
        """
        names = {saved_name(row, name): data for name, data in files.items()}
        old = [
            name for name in self.record(row).get("files", [])
            if isinstance(name, str) and is_saved_name(row, name)
        ]
        if old:  # if this is interrupted, the row is not done and the next save removes these files
            self.write(f"{row}.json",
                       json.dumps({"stamp": "", "files": [*{*old, *names}]}).encode())
        for name, data in names.items():
            self.write(name, data)
        for name in {*old} - {*names}:
            self.remove(name)
        self.write(f"{row}.json", json.dumps({**record, "files": [*names]}).encode())

    def remove_parts(self, rows: Container[str]) -> int:
        """Removes half-written files of rows, given their ids. Returns how many there were."""
        if self.bucket:
            return 0
        with os.scandir(self.root) as entries:
            parts = [
                match for entry in entries
                if entry.name.endswith(".part") and (match := PART.fullmatch(entry.name))
            ]
        own = [part[0] for part in parts if part[1].removesuffix(".json") in rows
               or ((picture := PICTURE.fullmatch(part[1])) and picture[1] in rows)]
        for name in own:
            _remove(self.path(name))
        return len(own)


def saved_name(row: str, name: str) -> str:
    """Returns the name in the store of a row's file `<node>_<n>.<ext>`."""
    stem, suffix = os.path.splitext(name)
    return f"{row}_{stem}{'.' if suffix.casefold() == '.json' else ''}{suffix}"


def is_saved_name(row: str, name: str) -> bool:
    """Returns whether only a file of this row can have a name, and no other row's record."""
    is_record = name.casefold().endswith(".json") and not name.casefold().endswith("..json")
    return name.startswith(f"{row}_") and not is_record and not re.search(r"[/\\]", name)


class RemoteStore:
    """The store of another machine, as a worker uses it. writer: an actor of `Store` there."""

    def __init__(self, writer):
        self.writer = writer

    def is_done(self, row: str, stamp: str) -> bool:
        import ray

        return ray.get(self.writer.is_done.remote(row, stamp))

    def save(self, row: str, files: dict[str, bytes], record: dict):
        import ray

        ray.get(self.writer.save.remote(row, files, record))


def _remove(path: str):
    try:
        os.unlink(path)
    except OSError:
        pass
