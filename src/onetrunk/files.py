"""Files written whole or not at all, even across a power loss, and read only when they are whole.

A write goes to a temporary file in the same folder, is flushed to the device (fsync), takes the
final name in one step (rename), and the folder is flushed too: a crash at any moment leaves the
old file or the new one. A read accepts regular files only (a symbolic link, a FIFO or a device is
refused, without waiting on it), checks the size before it reads, and checks the hash of the very
buffer that it returns, so that nothing is parsed that was not verified.

Banks and training checkpoints are written this way. A write costs two fsyncs (milliseconds), a
read one pass of SHA-256 (about 1 GB/s).
"""

import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from onetrunk.errors import DamagedError

MAX_BYTES = 1 << 36  # 64 GiB: several times the largest published vision backbone
PathLike = str | os.PathLike[str]

# Absent on some systems: there, looking at the name before opening it is all that can be done.
_SAFE_OPEN = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_NO_SUCH_SERVICE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_TEMPORARY = re.compile(r"\.onetrunk-[0-9a-f]{16}\.tmp")


class Facts(NamedTuple):
    """What the file system says about a name; `stamp` changes when the file is replaced."""

    kind: Literal["file", "folder", "link", "special"]
    size: int
    stamp: tuple[int, int, int]


class Disk:
    """The file operations that onetrunk uses, one method each: tests pass a disk that fails."""

    def create(self, path: Path) -> int:
        """Opens a new file for writing; its mode is 0644, less what the umask takes away."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE_OPEN, 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        """Writes some of `data`; returns how many bytes were taken."""
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        """Returns when the file's bytes are on the device."""
        os.fsync(fd)

    def open(self, path: Path) -> int:
        """Opens for reading; never follows a link in the last place, never waits for a writer."""
        return os.open(path, os.O_RDONLY | _SAFE_OPEN)

    def read(self, fd: int, n_bytes: int) -> bytes:
        """Returns up to `n_bytes`; none at the end of the file."""
        return os.read(fd, n_bytes)

    def close(self, fd: int) -> None:
        os.close(fd)

    def facts(self, where: Path | int) -> Facts:
        """Looks at an open file, or at a name without following a link."""
        found = os.fstat(where) if isinstance(where, int) else os.lstat(where)
        return Facts(_kind(found.st_mode), found.st_size, _stamp(found))

    def names(self, folder: Path) -> list[str]:
        return sorted(os.listdir(folder))

    def replace(self, source: Path, target: Path) -> None:
        """Gives `source` the name `target` in one step; a link at `target` is not followed."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, folder: Path) -> None:
        os.mkdir(folder)

    def remove_folder(self, folder: Path) -> None:
        """Removes an empty folder."""
        os.rmdir(folder)

    def sync_folder(self, folder: Path) -> None:
        """Returns when the folder's names are on the device, where the system can promise it."""
        if os.name == "nt":
            return
        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NO_SUCH_SERVICE:
                raise
        finally:
            os.close(fd)

    @contextmanager
    def lock(self, path: Path, wait_s: float) -> Iterator[None]:
        """Holds the lock file `path`; TimeoutError after `wait_s`. The system frees it at death."""
        import filelock  # 40 ms, and readers never need it

        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=wait_s, poll_interval=0.01)
        except filelock.Timeout:
            raise TimeoutError(errno.ETIMEDOUT, "the lock is held", str(path)) from None
        try:
            yield
        finally:
            lock.release()


DISK = Disk()


def write_atomically(path: PathLike, data: bytes, *, disk: Disk = DISK) -> None:
    """Writes `data` to `path` so that a crash leaves the old file or the new one, never a mixture.

    An error (OSError) leaves the old file and no temporary one.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "notes.txt")
    >>> write_atomically(file, b"kept")
    >>> read_checked(file, size=4)
    b'kept'
    """
    place(path, data, disk=disk)
    disk.sync_folder(Path(path).parent)


def write_parts_atomically(path: PathLike, parts: Iterable[bytes], *, disk: Disk = DISK) -> None:
    """`write_atomically` for what is too large to be held at once: the parts, one after another."""
    _place(path, parts, disk)
    disk.sync_folder(Path(path).parent)


def place(path: PathLike, data: bytes, *, disk: Disk = DISK) -> None:
    """`write_atomically` but for its last step: the caller still owes the folder an fsync."""
    _place(path, (data,), disk)


def _place(path: PathLike, parts: Iterable[bytes], disk: Disk) -> None:
    path = Path(path)
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".onetrunk-{os.urandom(8).hex()}.tmp")
    try:
        _write_new(temporary, parts, disk)
        disk.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            disk.unlink(temporary)
        raise


def is_temporary(name: str) -> bool:
    """Whether a file of this name is an unfinished write, worthless once its writer is dead."""
    return _TEMPORARY.fullmatch(name) is not None


def read_checked(
    path: PathLike,
    *,
    size: int | None = None,
    sha256: str | None = None,
    limit: int = MAX_BYTES,
    disk: Disk = DISK,
) -> bytes:
    """Returns the bytes of the regular file `path`, of `size` bytes and hash `sha256` where given.

    DamagedError: a link, folder or special file, more than `limit` bytes, another size, another
    hash, or a file that changed while it was read. OSError: as the system says it.
    """
    path = Path(path)
    _refuse_irregular(path, disk.facts(path))
    fd = _open_regular(path, disk)
    try:
        facts = disk.facts(fd)
        _refuse_irregular(path, facts)
        _refuse_size(path, facts.size, size, limit)
        data = _read_all(fd, facts.size, disk)
    finally:
        disk.close(fd)
    if len(data) != facts.size:
        raise DamagedError(f"{path} changed while it was read. Ask again when it is at rest.")
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DamagedError(
            f"{path} has SHA-256 {found[:12]}... where {sha256[:12]}... was written: its bytes "
            "were altered. Restore it from a copy."
        )
    return data


def check_writable(folder: Path) -> None:
    """Makes a file in `folder` that is gone at once: for long work that writes at its end.

    Raises:
        OSError: where no file can be made there.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_place(file: Path) -> None:
    """Whether a file can be written at `file`: for long work that writes it at its end.

    Raises:
        OSError: where it is a folder, or none can be made beside it.
    """
    if not file.name or file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    check_writable(file.parent)


def reason(error: OSError) -> str:
    """Says in a sentence what an OSError means and what to do.

    >>> reason(OSError(errno.ENOSPC, "No space left on device"))
    'no space left on the device. Free some and ask again.'
    """
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "no space left on the device. Free some and ask again."
        case errno.EACCES | errno.EPERM:
            return f"permission denied{_at(error)}. Ask its owner for access, or work on a copy."
        case errno.EROFS:
            return f"the file system is read-only{_at(error)}. Work on a copy elsewhere."
        case errno.EIO:
            return f"the device reported an input/output error{_at(error)}. Check the device."
        case _:
            return f"{error.strerror or error}{_at(error)}."


def _at(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""


def _write_new(path: Path, parts: Iterable[bytes], disk: Disk) -> None:
    fd = disk.create(path)
    try:
        for part in parts:
            _write_all(path, fd, part, disk)
        disk.sync(fd)
    finally:
        disk.close(fd)


def _write_all(path: Path, fd: int, data: bytes, disk: Disk) -> None:
    rest = memoryview(data)
    while rest:
        n_taken = disk.write(fd, rest)
        if n_taken == 0:
            raise OSError(errno.EIO, "the device takes no more bytes", str(path))
        rest = rest[n_taken:]


def _open_regular(path: Path, disk: Disk) -> int:
    try:
        return disk.open(path)
    except OSError as error:
        # What O_NOFOLLOW and O_NONBLOCK answer when a link or a socket took the name just now.
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            _refuse_irregular(path, disk.facts(path))
        raise


def _read_all(fd: int, size: int, disk: Disk) -> bytes:
    """Reads to the end of the file, or to one byte beyond `size`: enough to see that it grew."""
    chunks = []
    n_left = size + 1
    while n_left > 0 and (chunk := disk.read(fd, n_left)):
        chunks.append(chunk)
        n_left -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _refuse_irregular(path: Path, facts: Facts) -> None:
    if facts.kind == "file":
        return
    found = {"link": "a symbolic link", "folder": "a folder"}.get(facts.kind, "a special file")
    raise DamagedError(
        f"{path} is {found}, and only a regular file is read here. Put the file itself there."
    )


def _refuse_size(path: Path, found: int, size: int | None, limit: int) -> None:
    if size is not None and found != size:
        raise DamagedError(
            f"{path} has {found:,} bytes where {size:,} were written: it was cut short, extended "
            "or replaced. Restore it from a copy."
        )
    if found > limit:
        raise DamagedError(
            f"{path} has {found:,} bytes, more than the {limit:,} that such a file may have. "
            "It is not what its name says."
        )


def _kind(mode: int) -> Literal["file", "folder", "link", "special"]:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "link" if stat.S_ISLNK(mode) else "special"


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_mtime_ns
