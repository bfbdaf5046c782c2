"""Where the pictures of a batch go: a folder, or a bucket by fsspec.

| name | what |
|---|---|
| `<id>_<node>_<n>.<ext>` | what a row's workflow saved; JSON ends in `..json`, as no record does: no id ends in a dot |
| `<id>.json` | {"stamp", "files", "changes", "seconds", "worker"}, written last: with the row's stamp in it the row is done |
| `.<name>.<8 hex digits>.part` | a file of a folder while it is written; left by a process that was killed |

A plain path is a folder of the machine that the batch is called on, and other machines' pictures
come to it. What a URI names (s3://, gs://, abfs://, or file:// for a folder that all machines
share) each machine writes by itself.
"""
import json
import os
import re
import secrets
import sys
from urllib.request import url2pathname

PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")
PICTURE = re.compile(r"(.+)_[A-Za-z0-9-]+_\d+(\.?\.[^.]*)?")
ATTEMPTS = 5  # at writing a file


def folder_of(out: str) -> str:
    """The path that file:/// stands for; what is no such URI as it is. Raises ValueError."""
    if not out.startswith("file://"):
        return out
    if not out.startswith("file:///"):
        raise ValueError(
            f"{out} does not name a folder: write file:/// and its whole path, such as"
            " file:///mnt/pictures."
        )
    return url2pathname(out.removeprefix("file://"))


class Store:
    """Files in one folder or bucket. out: an absolute path or a URI. OSError is raised as it comes,
    ValueError for no URI."""

    def __init__(self, out: str):
        self.files, self.root = None, folder_of(out)
        if "://" in self.root:
            try:
                from fsspec.core import url_to_fs

                self.files, self.root = url_to_fs(out)
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
        """The file's bytes, or None where there is none."""
        try:
            if self.files:
                return self.files.cat_file(self.path(name))
            with open(self.path(name), "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes):
        """The whole file or nothing, on the disk when this returns; buckets keep that by
        themselves."""
        if self.files:
            self.files.pipe_file(self.path(name), data)
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
            except FileNotFoundError:  # another command for the same rows has tidied
                if attempt == ATTEMPTS:
                    raise
            except BaseException:
                _remove(part)
                raise

    def remove(self, name: str):
        """Remove a file that may be gone."""
        try:
            self.files.rm_file(self.path(name)) if self.files else os.unlink(self.path(name))
        except FileNotFoundError:
            pass

    def has(self, names: list[str]) -> bool:
        """Whether all of these are there. Of a bucket that is believed: a row's JSON is written
        after its files."""
        return bool(self.files) or all(os.path.exists(self.path(name)) for name in names)

    def done(self, row: str, stamp: str) -> bool:
        """Whether a row with this stamp is complete."""
        record = self.record(row)
        return record.get("stamp") == stamp and self.has(record.get("files", []))

    def record(self, row: str) -> dict:
        """What `<id>.json` holds; {} where there is none, or none of ours."""
        try:
            found = json.loads(self.read(f"{row}.json") or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def save(self, row: str, files: dict[str, bytes], record: dict):
        """Put a row's files and then its record there, in the place of what an earlier version of
        the row had."""
        names = {saved_name(row, name): data for name, data in files.items()}
        old = [
            name for name in self.record(row).get("files", [])
            if isinstance(name, str) and is_saved_name(row, name)
        ]
        if old:  # until all is there the row is not done, and what may go is remembered
            self.write(f"{row}.json",
                       json.dumps({"stamp": "", "files": [*{*old, *names}]}).encode())
        for name, data in names.items():
            self.write(name, data)
        for name in {*old} - {*names}:
            self.remove(name)
        self.write(f"{row}.json", json.dumps({**record, "files": [*names]}).encode())

    def tidy(self, rows) -> int:
        """Remove what was left half-written of these rows (a set of ids); how many files that
        were."""
        if self.files:
            return 0
        with os.scandir(self.root) as entries:
            parts = [
                found for entry in entries
                if entry.name.endswith(".part") and (found := PART.fullmatch(entry.name))
            ]
        own = [part[0] for part in parts if part[1].removesuffix(".json") in rows
               or ((picture := PICTURE.fullmatch(part[1])) and picture[1] in rows)]
        for name in own:
            _remove(self.path(name))
        return len(own)


def saved_name(row: str, name: str) -> str:
    """What a row's file `<node>_<n>.<ext>` is called in the store."""
    stem, ending = os.path.splitext(name)
    return f"{row}_{stem}{'.' if ending.casefold() == '.json' else ''}{ending}"


def is_saved_name(row: str, name: str) -> bool:
    """Whether it is a name that only a file of this row has. One that ends in .json may be the
    record of another row."""
    is_record = name.casefold().endswith(".json") and not name.casefold().endswith("..json")
    return name.startswith(f"{row}_") and not is_record and not re.search(r"[/\\]", name)


class RemoteStore:
    """What a worker uses of a store that lies on another machine. writer: an actor of `Store`
    there."""

    def __init__(self, writer):
        self.writer = writer

    def done(self, *given) -> bool:
        import ray

        return ray.get(self.writer.done.remote(*given))

    def save(self, *given):
        import ray

        ray.get(self.writer.save.remote(*given))


def _remove(path: str):
    try:
        os.unlink(path)
    except OSError:
        pass
