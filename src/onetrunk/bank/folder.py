"""The files of one bank: where they lie, how each is read, written, listed and removed.

The format stands in store.py. This file keeps its promises about files: blobs before the manifest,
flushes in between, nothing removed that a generation on the device may still need, no link
followed. It decides nothing about domains.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onetrunk.bank import manifest as manifests
from onetrunk.bank.manifest import Manifest, digest_of
from onetrunk.errors import BankError, DamagedError
from onetrunk.files import (
    Disk,
    Facts,
    PathLike,
    is_temporary,
    place,
    read_checked,
    reason,
    write_atomically,
)

MANIFEST, BLOBS, LOCK = "bank.json", "blobs", "bank.lock"
UNFINISHED = "unfinished"  # checkpoints of trainings under way: no part of the bank
Glance = tuple[Facts, bytes]
_BLOB = re.compile(r"[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class Problem:
    """One finding of `verify`. Only `damaged` means that something cannot be read."""

    file: str
    kind: Literal["damaged", "leftover", "unknown"]
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.what}"


class MissingBlobError(DamagedError):
    """A blob that the manifest at hand lists and that is not there."""


@dataclass(frozen=True)
class Folder:
    """A bank's folder, on a disk."""

    path: Path
    disk: Disk

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def blobs(self) -> Path:
        return self.path / BLOBS

    def blob(self, digest: str) -> Path:
        return self.blobs / f"{digest}.safetensors"

    # Reading

    def load(self) -> tuple[Manifest, Glance | None]:
        """The current manifest, and the glance that recognises it."""
        glance = self.glance()  # first: if the file changes in between, it merely is read again
        try:
            data = read_checked(self.manifest, limit=manifests.MAX_BYTES, disk=self.disk)
        except (FileNotFoundError, NotADirectoryError):
            raise BankError(
                f"there is no bank at {self.path} (no {MANIFEST}). Create one, or check the path."
            ) from None
        except OSError as error:
            raise BankError(f"cannot open bank {self.path}: {reason(error)}") from error
        return manifests.decode(data, str(self.manifest)), glance

    def glance(self) -> Glance | None:
        """What tells in 10 us whether `bank.json` is still the one that was read.

        The stamp alone could lie, as an inode may be used again within a tick of the clock: the
        seal at the head of the file does not.
        """
        try:
            fd = self.disk.open(self.manifest)
            try:
                facts = self.disk.facts(fd)
                is_file = facts.kind == "file"
                head = self.disk.read(fd, manifests.SEALED_HEAD_BYTES) if is_file else b""
                return facts, head
            finally:
                self.disk.close(fd)
        except OSError:
            return None

    def read_blob(self, digest: str, size: int) -> bytes:
        """The bytes of one blob, size and hash checked."""
        self.refuse_odd_blobs()
        file = self.blob(digest)
        try:
            return read_checked(file, size=size, sha256=digest, disk=self.disk)
        except FileNotFoundError:
            raise MissingBlobError(f"{file} is not there. Restore it from a copy.") from None
        except OSError as error:
            raise BankError(f"cannot read bank {self.path}: {reason(error)}") from error

    def strays(self, manifest: Manifest) -> list[Problem]:
        """Every file that `manifest` does not account for (OSError where they cannot be listed)."""
        found = [(name, name) for name in self.disk.names(self.path)]
        found += [(f"{BLOBS}/{name}", name) for name in self.disk.names(self.blobs)]
        known = {
            MANIFEST,
            BLOBS,
            LOCK,
            UNFINISHED,
            *(f"{BLOBS}/{x}.safetensors" for x in manifest.blobs()),
        }
        return [_stray(file, name) for file, name in found if file not in known]

    def refuse_odd_blobs(self) -> None:
        try:
            kind = self.disk.facts(self.blobs).kind
        except FileNotFoundError:
            raise DamagedError(f"{self.blobs} is not there. Restore it from a copy.") from None
        except OSError as error:
            raise BankError(f"cannot read bank {self.path}: {reason(error)}") from error
        if kind != "folder":
            raise DamagedError(
                f"{self.blobs} is not a folder, and a link to one is not followed. "
                "Put the folder itself there."
            )

    # Writing: all but `lock` itself ask for the lock to be held

    @contextmanager
    def lock(self, doing: str, wait_s: float) -> Iterator[None]:
        """Holds the bank's lock; `doing` says in the messages what for."""
        file = self.path / LOCK
        with ExitStack() as stack:
            try:
                self._refuse_odd_lock(file)
                stack.enter_context(self.disk.lock(file, wait_s))
            except TimeoutError:
                raise BankError(
                    f"cannot {doing} bank {self.path}: another process is changing it "
                    f"(waited {wait_s:g} s). Ask again when it is done; the lock of a process "
                    "that died is free at once."
                ) from None
            except OSError as error:
                raise unchanged(doing, self.path, error) from error
            yield

    def commit(self, old: Manifest, new: bytes, blobs: Sequence[bytes]) -> None:
        """Replaces generation `old` by the encoded one, blobs first; the folder's fsync is owed."""
        try:
            self.collect(old)
            for blob in blobs:
                self._keep(blob, old)
            place(self.manifest, new, disk=self.disk)
        except BaseException:
            # An interrupt may come just after the replacement: what is there by now decides.
            with suppress(OSError, BankError):
                self.collect(self.load()[0])
            raise

    def settle(self, new: Manifest) -> None:
        """Makes the replacement last, and only then removes what it made superfluous."""
        try:
            self.disk.sync_folder(self.path)
        except OSError as error:
            raise BankError(
                f"bank {self.path} has its new generation {new.generation}, but a power loss may "
                f"undo it: {reason(error)} The change stands; do not repeat it."
            ) from error
        with suppress(OSError, BankError):  # the change is made: the next one tidies up
            self.collect(new)

    def collect(self, manifest: Manifest) -> None:
        """Removes the blobs that `manifest` does not need and the temporary files of the dead."""
        self.refuse_odd_blobs()
        idle = [stray.file for stray in self.strays(manifest) if stray.kind == "leftover"]
        if idle:
            # Else a power loss could bring back the manifest that needed them.
            self.disk.sync_folder(self.path)
        for file in idle:
            with suppress(OSError):  # what cannot be removed today stays a leftover
                self.disk.unlink(self.path / file)

    def _keep(self, blob: bytes, old: Manifest) -> None:
        """Writes a blob unless the generation before has it whole: a damaged one is healed."""
        digest = digest_of(blob)
        if digest in old.blobs():
            with suppress(OSError, DamagedError):
                read_checked(self.blob(digest), size=len(blob), sha256=digest, disk=self.disk)
                return
        write_atomically(self.blob(digest), blob, disk=self.disk)

    def _refuse_odd_lock(self, file: Path) -> None:
        with suppress(FileNotFoundError):
            if self.disk.facts(file).kind != "file":
                raise DamagedError(f"{file} is not a regular file. Remove it and ask again.")

    # Creating

    def create(self, first: Manifest, blobs: Sequence[bytes], wait_s: float) -> None:
        """Makes the folder, if need be, and its first generation; on an error neither stays.

        What the creation of this very bank left when it was killed is in nobody's way.
        """
        data = manifests.encode(first)
        own = {self.blob(digest_of(blob)).name for blob in blobs}
        made: list[Path] = []
        try:
            self._refuse_occupied(own)
            try:
                for folder in _lacking(self.path, self.disk):
                    self.disk.make_folder(folder)
                    made.append(folder)
                    self.disk.sync_folder(folder.parent)
                with self.lock("create", wait_s):
                    self._refuse_occupied(own)  # another process may have been faster
                    self._fill(data, blobs)
                    self.settle(first)
            except BaseException:
                self._withdraw(made)
                raise
        except OSError as error:
            raise unchanged("create", self.path, error) from error

    def _refuse_occupied(self, own: Collection[str]) -> None:
        try:
            present = [name for name in self.disk.names(self.path) if name != LOCK]
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise BankError(
                f"cannot create bank {self.path}: a file has that name. Use another path."
            ) from None
        names = [name for name in present if not is_temporary(name)]
        if MANIFEST in names:
            raise BankError(
                f"cannot create bank {self.path}: there is one already. Open it, or use another "
                "path."
            )
        if names and not (names == [BLOBS] and self._has_only(own)):
            raise BankError(
                f"cannot create bank {self.path}: the folder is not empty (it has "
                f"{', '.join(names[:5])}). Use a new path, or remove what is there."
            )

    def _has_only(self, own: Collection[str]) -> bool:
        """Whether the blobs are `own` and unfinished ones, none of a bank without manifest."""
        if self.disk.facts(self.blobs).kind != "folder":
            return False
        return all(is_temporary(name) or name in own for name in self.disk.names(self.blobs))

    def _fill(self, first: bytes, blobs: Sequence[bytes]) -> None:
        try:
            if not _is_there(self.blobs, self.disk):
                self.disk.make_folder(self.blobs)
            self.disk.sync_folder(self.path)
            for blob in blobs:
                write_atomically(self.blob(digest_of(blob)), blob, disk=self.disk)
            place(self.manifest, first, disk=self.disk)
        except BaseException:
            with suppress(OSError):
                self._empty()
            raise

    def _empty(self) -> None:
        """Undoes `_fill`: the manifest first, so that what is left is never a bank."""
        for file in (self.manifest, *(self.blobs / name for name in self.disk.names(self.blobs))):
            with suppress(FileNotFoundError):
                self.disk.unlink(file)
        self.disk.remove_folder(self.blobs)

    def _withdraw(self, made: Sequence[Path]) -> None:
        """Removes the folders that this `create` made, unless something stands in them by now."""
        with suppress(OSError):
            if self.path in made and self.disk.names(self.path) == [LOCK]:
                self.disk.unlink(self.path / LOCK)
            for folder in reversed(made):
                self.disk.remove_folder(folder)


def unchanged(doing: str, path: Path, error: OSError) -> BankError:
    """The error of a request that left everything as it was."""
    return BankError(f"cannot {doing} bank {path}: {reason(error)} Nothing was changed.")


def _stray(file: str, name: str) -> Problem:
    if is_temporary(name) or (file != name and _BLOB.fullmatch(name)):
        return Problem(file, "leftover", "no domain needs it; the next change removes it")
    return Problem(file, "unknown", "it is no part of a bank; nothing reads or removes it")


def _lacking(path: Path, disk: Disk) -> list[Path]:
    """`path` and the folders above it, as far as they are not there; outermost first."""
    lacking: list[Path] = []
    while not _is_there(path, disk):
        lacking.insert(0, path)
        path = path.parent
    return lacking


def _is_there(path: Path, disk: Disk) -> bool:
    try:
        disk.facts(path)
    except FileNotFoundError:
        return False
    return True


def plain_path(path: PathLike) -> Path:
    """`path`; BankError where no file system could hold it."""
    if "\0" in str(path):
        raise BankError(f"the path {str(path)!r} has a NUL in it. Use another path.")
    return Path(path)
