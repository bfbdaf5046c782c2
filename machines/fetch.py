"""Model files from a machine that has them to those that lack them, in pieces through Ray's object store.

One actor reads the file where it lies, once; one on each machine that lacks it writes what it is given. At most AHEAD pieces
are on their way, so a store of 200 MB is enough for a file of any size. Ray takes each piece from whichever machine has it
already. Nothing is overwritten, and a file is there whole or not at all.
"""
import collections
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

PIECE = 16 << 20  # bytes
AHEAD = 4
FORSAKEN = 600  # seconds after which a .part that nobody writes to is what a machine left when it was switched off
ANSWER = 60  # seconds that a machine has to say that it is there, where something went wrong


@dataclass(frozen=True)
class Place:
    """A file on one machine, there or to be."""
    node: str  # Ray's id
    machine: str  # as people know it
    folder: str  # one of the model folders of the ComfyUI there
    name: str  # below it


def path_of(folder: str, name: str) -> str:
    """Where a file of this name lies below a folder. Raises ValueError for a name that leads out of it."""
    path = os.path.join(folder, *name.replace("\\", "/").split("/"))
    drive, _ = os.path.splitdrive(name)
    if not name or drive or name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"{name!r} is no name of a file inside {folder}; nothing was written.")
    return path


class Reader:
    """On the machine that has the file: gives it piece by piece."""

    def __init__(self, folder: str, name: str, size: int):
        self.file, self.size = open(path_of(folder, name), "rb"), size
        self.sha256 = hashlib.sha256()

    def piece(self) -> bytes:
        data = self.file.read(PIECE)
        self.sha256.update(data)
        return data

    def digest(self) -> str:
        """Of what was sent; "" where the file's size is another than it was told to be."""
        return self.sha256.hexdigest() if os.fstat(self.file.fileno()).st_size == self.size else ""


class Writer:
    """On a machine that lacks the file: writes `<name>.part` beside it, and gives it its name when it is whole.

    What can go wrong is returned as the end of a sentence that begins with the machine's name.
    """

    def __init__(self, folder: str, name: str, size: int):
        self.path, self.size, self.file, self.sha256 = path_of(folder, name), size, None, hashlib.sha256()
        self.part = f"{self.path}.part"

    def begin(self) -> str:
        if os.path.exists(self.path):
            return f"has {self.path} already; it was left as it is"
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            free = shutil.disk_usage(os.path.dirname(self.path)).free
            if free < self.size:
                return (f"has {in_words(free)} free where {self.path} belongs, which takes {in_words(self.size)}; make room"
                        " there and run this again")
            if os.path.exists(self.part) and time.time() - os.path.getmtime(self.part) > FORSAKEN:
                os.unlink(self.part)
            self.file = open(self.part, "xb")
        except FileExistsError:
            return f"is being sent {self.path} by somebody else; run this again when that is done"
        except OSError as error:
            return f"could not write {self.part}: {error.strerror}"
        return ""

    def write(self, piece: bytes) -> str:
        try:
            self.file.write(piece)
        except OSError as error:
            self.abandon()
            return f"could not write {self.part}: {error.strerror}"
        self.sha256.update(piece)
        return ""

    def finish(self, digest: str) -> str:
        """digest: of `Reader`."""
        if not digest or self.file.tell() != self.size:  # a piece at the end may have been short for a moment
            self.abandon()
            return f"was sent {self.path} while that changed where it came from; run this again when it is whole there"
        if self.sha256.hexdigest() != digest:
            self.abandon()
            return f"received {self.path} otherwise than it was sent; run this again"
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            if os.path.exists(self.path):
                self.abandon()
                return f"was given {self.path} by somebody else meanwhile; that was left as it is"
            os.rename(self.part, self.path)
        except OSError as error:
            self.abandon()
            return f"could not write {self.path}: {error.strerror}"
        self.file = None
        return ""

    def abandon(self):
        if self.file:
            self.file.close()
            try:
                os.unlink(self.part)
            except FileNotFoundError:
                pass
            self.file = None


def in_words(size: float) -> str:
    """Bytes as people say them: 6.8 GB (10^9 bytes each), 620 MB, 3 KB."""
    for unit, name in ((10 ** 9, "GB"), (10 ** 6, "MB"), (10 ** 3, "KB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:.0f} {name}"
    return f"{size:.0f} bytes"


def sha256_of(folder: str, name: str) -> str:
    """Of a whole file."""
    with open(path_of(folder, name), "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(PIECE):
            digest.update(data)
    return digest.hexdigest()


def pinned(node: str) -> dict:
    """Options of a task or an actor that runs on that machine or not at all, however busy it is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def answers(actor) -> bool:
    """Whether an actor is alive."""
    import ray

    try:
        ray.get(actor.__ray_ready__.remote(), timeout=ANSWER)
    except ray.exceptions.RayError:
        return False
    return True


def different(places: list[Place]) -> str:
    """A sentence where a file of one name is not the same on all the machines that have it, else ""."""
    import ray

    digests = [ray.remote(sha256_of).options(**pinned(place.node)).remote(place.folder, place.name) for place in places]
    found = {}
    for place, digest in zip(places, digests):
        try:
            found.setdefault(ray.get(digest), place)
        except (ray.exceptions.RayError, OSError) as error:
            return f"{place.name} could not be read on {place.machine}: {said(error)}."
    if len(found) < 2:
        return ""
    first, second, *_ = found.values()
    return (f"{first.name} on {first.machine} is another file than on {second.machine}. Nothing was copied or overwritten:"
            " remove one of them, or give it another name.")


def fetch(source: Place, targets: list[Place], size: int, tell: Callable[[int], None] = lambda done: None) -> dict[Place, str]:
    """Copy a file of `size` bytes from one machine to others. Returns for each that did not get it one sentence that says why.

    tell: is given the number of bytes that are on all of them.
    """
    import ray

    reader = ray.remote(Reader).options(**pinned(source.node)).remote(source.folder, source.name, size)
    writers = {target: ray.remote(Writer).options(**pinned(target.node)).remote(target.folder, target.name, size)
               for target in targets}
    failed, done = {}, 0

    def settle(answers_of: dict):
        for target, answer in answers_of.items():
            try:
                if target not in failed and (said := ray.get(answer)):
                    failed[target] = f"{target.machine} {said}."
            except (ray.exceptions.RayError, OSError) as error:
                failed[target] = _why(error, source, reader, target, writers[target])

    try:
        settle({target: writer.begin.remote() for target, writer in writers.items()})
        waiting = collections.deque()
        for _ in range(0, size, PIECE):
            if len(failed) == len(targets):
                break
            piece = reader.piece.remote()
            waiting.append({target: writer.write.remote(piece) for target, writer in writers.items() if target not in failed})
            if len(waiting) == AHEAD:
                settle(waiting.popleft())
                done += PIECE
                tell(done)
        while waiting:
            settle(waiting.popleft())
        left = {target: writer for target, writer in writers.items() if target not in failed}
        digest = reader.digest.remote() if left else None
        settle({target: writer.finish.remote(digest) for target, writer in left.items()})
        tell(size)
        return failed
    finally:  # of those that have finished, abandon leaves what they wrote
        for writer in writers.values():
            try:
                ray.get(writer.abandon.remote(), timeout=ANSWER)
            except ray.exceptions.RayError:
                pass  # its machine is gone
            ray.kill(writer)
        ray.kill(reader)


def _why(error: Exception, source: Place, reader, target: Place, writer) -> str:
    if not answers(writer):
        return f"{target.machine} went away while it was sent {target.name}."
    if not answers(reader):
        return f"{source.machine}, which sent {source.name}, went away or cannot read it; {target.machine} is without it."
    return f"{source.name} could not be copied from {source.machine} to {target.machine}: {said(error)}."


def said(error: Exception) -> str:
    """The cause in one line, without the traceback that Ray puts before it."""
    return str(getattr(error, "cause", None) or error).strip().splitlines()[-1].rstrip(".")
