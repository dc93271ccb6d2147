"""files.py: whole or not at all; every refusal and its message."""

import errno
import os
import stat
from hashlib import sha256
from pathlib import Path

import pytest

from onetrunk.errors import DamagedError
from onetrunk.files import (
    Disk,
    is_temporary,
    place,
    read_checked,
    reason,
    write_atomically,
    write_parts_atomically,
)


class OneByteDisk(Disk):
    """Takes and gives one byte at a time, as a disk may."""

    def write(self, fd: int, data: memoryview) -> int:
        return super().write(fd, data[:1])

    def read(self, fd: int, n_bytes: int) -> bytes:
        return super().read(fd, min(n_bytes, 1))


class FullDisk(Disk):
    def write(self, fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


class StuckDisk(Disk):
    def write(self, fd: int, data: memoryview) -> int:
        return 0


class GrowingDisk(Disk):
    """Another process appends to the file while it is read."""

    def read(self, fd: int, n_bytes: int) -> bytes:
        return super().read(fd, n_bytes) + b"x"


class NoFolderSyncDisk(Disk):
    def __init__(self, error: int) -> None:
        self.error = error

    def sync_folder(self, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self._fail)
            super().sync_folder(folder)

    def _fail(self, fd: int) -> None:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("data", [b"", b"a", os.urandom(100_000)], ids=["empty", "one", "many"])
def test_what_is_written_is_read_back(tmp_path, data):
    write_atomically(tmp_path / "file", data)
    digest = sha256(data).hexdigest()
    assert read_checked(tmp_path / "file", size=len(data), sha256=digest) == data
    assert os.listdir(tmp_path) == ["file"]


def test_short_writes_and_short_reads_are_completed(tmp_path):
    write_atomically(tmp_path / "file", b"one byte at a time", disk=OneByteDisk())
    assert read_checked(tmp_path / "file", disk=OneByteDisk()) == b"one byte at a time"


@pytest.mark.parametrize("parts", [[], [b"one"], [b"one", b"", b"two", bytes(100)]])
def test_parts_are_written_one_after_another(tmp_path, parts):
    write_parts_atomically(tmp_path / "file", iter(parts), disk=OneByteDisk())
    assert read_checked(tmp_path / "file") == b"".join(parts)


def test_parts_that_fail_leave_the_old_file_and_no_temporary_one(tmp_path):
    def parts():
        yield b"new"
        raise KeyboardInterrupt

    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt):
        write_parts_atomically(tmp_path / "file", parts())
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644)])
def test_mode_is_0644_less_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("disk", [FullDisk(), StuckDisk()], ids=["full", "stuck"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, disk):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", b"new", disk=disk)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "outside").write_bytes(b"canary")
    (tmp_path / "file").symlink_to(tmp_path / "outside")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "outside").read_bytes() == b"canary"
    assert not (tmp_path / "file").is_symlink()


def test_a_folder_in_the_way_is_an_error_that_leaves_it(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        place(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_flushed_is_an_error_but_not_where_the_system_has_no_such_thing(
    tmp_path,
):
    write_atomically(tmp_path / "file", b"x", disk=NoFolderSyncDisk(errno.EINVAL))
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", b"x", disk=NoFolderSyncDisk(errno.EIO))


def test_temporary_names_are_told_apart(tmp_path):
    class Interrupted(Disk):
        def replace(self, source: Path, target: Path) -> None:
            assert is_temporary(source.name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place(tmp_path / "file", b"x", disk=Interrupted())
    assert os.listdir(tmp_path) == []
    for name in ("file", ".onetrunk-.tmp", ".onetrunk-0123456789abcdef.tmp.bak", "bank.json"):
        assert not is_temporary(name)


def test_irregular_files_are_refused_without_opening_them(tmp_path):
    class Unopened(Disk):
        def open(self, path: Path) -> int:
            raise AssertionError("opened")

    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, found in [
        ("link", "a symbolic link"),
        ("folder", "a folder"),
        ("fifo", "a special file"),
    ]:
        with pytest.raises(DamagedError, match=f"{name} is {found}, and only a regular file"):
            read_checked(tmp_path / name, disk=Unopened())
    with pytest.raises(DamagedError, match=r"/dev/zero is a special file"):
        read_checked("/dev/zero", disk=Unopened())


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_file_swapped_after_the_first_look_is_refused_too(tmp_path, kind):
    class Racing(Disk):
        def open(self, path: Path) -> int:
            path.unlink()
            if kind == "link":
                path.symlink_to(tmp_path / "outside")
            else:
                os.mkfifo(path)
            return super().open(path)

    (tmp_path / "outside").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"only a regular file is read"):
        read_checked(tmp_path / "file", disk=Racing())


def test_another_size_is_refused_before_anything_is_read(tmp_path):
    class Unread(Disk):
        def read(self, fd: int, n_bytes: int) -> bytes:
            raise AssertionError("read")

    (tmp_path / "file").write_bytes(b"1234")
    assert read_checked(tmp_path / "file", size=4, limit=4) == b"1234"
    with pytest.raises(DamagedError, match=r"has 4 bytes where 5 were written: it was cut short"):
        read_checked(tmp_path / "file", size=5, disk=Unread())
    with pytest.raises(DamagedError, match=r"has 4 bytes, more than the 3 that such a file may"):
        read_checked(tmp_path / "file", limit=3, disk=Unread())


def test_another_hash_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    with pytest.raises(DamagedError, match=r"has SHA-256 03ac67421\w+... where 0000.*Restore it"):
        read_checked(tmp_path / "file", sha256="0" * 64)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    with pytest.raises(DamagedError, match=r"changed while it was read. Ask again"):
        read_checked(tmp_path / "file", disk=GrowingDisk())


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checked(tmp_path / "file")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "no space left on the device. Free some and ask again."),
        (errno.EDQUOT, "no space left on the device. Free some and ask again."),
        (errno.EACCES, "permission denied at /b. Ask its owner for access, or work on a copy."),
        (errno.EROFS, "the file system is read-only at /b. Work on a copy elsewhere."),
        (errno.EIO, "the device reported an input/output error at /b. Check the device."),
        (errno.EMFILE, "Too many open files at /b."),
    ],
)
def test_an_oserror_is_said_in_words(code, said):
    assert reason(OSError(code, os.strerror(code), "/b")) == said
