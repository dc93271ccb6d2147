"""The bank on disk: bytes, JSON and names. It knows nothing of networks and imports no torch.

    garden.bank/
      bank.json                     the manifest: one generation of the bank, whole
      blobs/<sha256>.safetensors    immutable files, called by the SHA-256 of their bytes
      bank.lock                     held by the one writer; empty
      unfinished/                   checkpoints of trainings under way; no part of the bank

`bank.json` is a JSON object of at most 64 MiB with exactly these keys, in this order:

    "sha256"      of the file's bytes with these 64 digits replaced by zeros: the file begins with
                  `{`, a line break, two spaces, `"sha256": "`, in this and every later format
    "format"      1
    "generation"  1, 2.. one more at each change
    "backbone"    {"spec": str, "fingerprint": str, "blob": digest or null, "size": bytes or null..}
    "shared"      {digest: bytes..}: the blobs that several domains may need, each stored once
    "domains"     {name: {"digest": str, "size": bytes, "card": {..}, "shared": [digest..]}..}

What holds: a change writes its blobs, each flushed, and then replaces `bank.json` in one step, so
that a crash or power loss at any moment leaves the old generation or the new one. Readers take no
lock and see one generation whole. Every blob has its size and hash checked before anything parses
it. No name and no path from a file is ever followed. An error raised before `bank.json` is replaced
changes nothing; the one that can follow (the flush of the folder) says that the change stands.

Files that no domain needs go at once: `remove` frees the space when it returns, and a bank holds
exactly what its manifest lists. None is kept for slow readers, since `read` tries again with the
new manifest. What a killed writer left is removed by the next writer, before it writes: a disk
filled by a crash is usable again. A hash detects accidents, not an attacker who rewrites both.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from onetrunk.bank import manifest as manifests
from onetrunk.bank.folder import (
    BLOBS,
    MANIFEST,
    Folder,
    Glance,
    MissingBlobError,
    Problem,
    unchanged,
)
from onetrunk.bank.manifest import Entry, Manifest, digest_of, plain_card
from onetrunk.bank.names import check_name, unknown_name
from onetrunk.errors import BankError, DamagedError
from onetrunk.files import DISK, Disk, PathLike, reason

__all__ = ["Contents", "Entry", "Manifest", "Problem", "Store"]

WAIT_S = 5.0
_MAX_TRIES = 100


class Contents(NamedTuple):
    """What one domain consists of: its entry, its own blob, and the shared blobs by digest."""

    entry: Entry
    blob: bytes
    shared: dict[str, bytes]


class Store:
    """A bank that is open: `create` or `open` one.

    >>> import tempfile
    >>> backbone = {"spec": "resnet26(width=0.5)", "fingerprint": "3f9c"}
    >>> store = Store.create(Path(tempfile.mkdtemp(), "garden.bank"), backbone)
    >>> store.add("flowers", {"classes": ["daisy", "rose"]}, b"numbers").generation
    2
    >>> store.read("flowers").blob
    b'numbers'
    """

    def __init__(self, path: PathLike, *, wait_s: float = WAIT_S, disk: Disk = DISK) -> None:
        """`wait_s`: how long a change waits while another process changes the bank."""
        if "\0" in str(path):
            raise BankError(f"the path {str(path)!r} has a NUL in it. Use another path.")
        self.path = Path(path)
        self.wait_s = wait_s
        self._folder = Folder(self.path, disk)
        self._seen: tuple[Manifest, Glance | None] | None = None

    @classmethod
    def open(cls, path: PathLike, *, wait_s: float = WAIT_S, disk: Disk = DISK) -> "Store":
        """Reads the manifest, and nothing else."""
        store = cls(path, wait_s=wait_s, disk=disk)
        store._load()
        return store

    @classmethod
    def create(
        cls,
        path: PathLike,
        backbone: dict[str, Any],
        blob: bytes | None = None,
        *,
        wait_s: float = WAIT_S,
        disk: Disk = DISK,
    ) -> "Store":
        """Makes a bank without domains in a new or empty folder.

        `backbone` has "spec" and "fingerprint" and what else describes it; `blob` is its weights
        where the bank is to hold them, or None where the spec alone brings them back.
        """
        store = cls(path, wait_s=wait_s, disk=disk)
        first = Manifest(1, _described(backbone, blob))
        store._folder.create(first, [] if blob is None else [blob], wait_s)
        return store

    @property
    def manifest(self) -> Manifest:
        """The current generation; read again only when another one has taken its place."""
        if self._seen is not None:
            manifest, glance = self._seen
            if glance is not None and glance == self._folder.glance():
                return manifest
        return self._load()

    def read(self, name: str, *, have: Collection[str] = ()) -> Contents:
        """One domain, of one generation, hashes checked; its shared blobs less those in `have`."""
        check_name(name)
        manifest = self.manifest
        for _ in range(_MAX_TRIES):
            entry = self._entry(manifest, name)
            try:
                return self._contents(manifest, entry, have)
            except MissingBlobError as error:
                # A writer that has moved on has replaced the manifest before it removed the blob.
                latest = self._load()
                if latest == manifest:
                    raise _unreadable(name, error) from None
                manifest = latest
            except DamagedError as error:
                raise _unreadable(name, error) from None
        raise self._restless(f"domain {name!r} was read")

    def read_blob(self, digest: str, size: int) -> bytes:
        """The bytes of one blob, size and hash checked."""
        if not manifests.is_digest(digest):
            raise BankError(f"{digest[:80]!r} is no digest: digests are 64 of 0-9 a-f.")
        return self._folder.read_blob(digest, size)

    def read_backbone(self) -> bytes | None:
        """The backbone's blob; None where the bank holds a reference only."""
        backbone = self.manifest.backbone
        if backbone["blob"] is None:
            return None
        return self.read_blob(backbone["blob"], backbone["size"])

    def add(
        self, name: str, card: dict[str, Any], blob: bytes, shared: Sequence[bytes] = ()
    ) -> Manifest:
        """Adds a domain. A shared blob that the bank holds already is not written again."""
        check_name(name)
        entry, sizes = _entry_of(name, card, blob, shared)

        def edit(manifest: Manifest) -> Manifest:
            self._refuse_taken(manifest, name)
            return _with_domains(manifest, {**manifest.domains, name: entry}, sizes)

        return self._change(f"add domain {name!r} to", edit, (*shared, blob))

    def replace(
        self, name: str, card: dict[str, Any], blob: bytes, shared: Sequence[bytes] = ()
    ) -> Manifest:
        """Puts another domain in the place of the one called `name`."""
        check_name(name)
        entry, sizes = _entry_of(name, card, blob, shared)

        def edit(manifest: Manifest) -> Manifest:
            self._entry(manifest, name)
            return _with_domains(manifest, {**manifest.domains, name: entry}, sizes)

        return self._change(f"replace domain {name!r} of", edit, (*shared, blob))

    def rename(self, old: str, new: str) -> Manifest:
        """Calls the domain `old` by the name `new`; its place in the order stays."""
        check_name(old)
        check_name(new)

        def edit(manifest: Manifest) -> Manifest:
            self._entry(manifest, old)
            self._refuse_taken(manifest, new)
            domains = {new if x == old else x: entry for x, entry in manifest.domains.items()}
            return _with_domains(manifest, domains)

        return self._change(f"rename domain {old!r} of", edit)

    def remove(self, name: str) -> Manifest:
        """Removes a domain and every file that it alone needed."""
        check_name(name)

        def edit(manifest: Manifest) -> Manifest:
            self._entry(manifest, name)
            domains = {x: entry for x, entry in manifest.domains.items() if x != name}
            return _with_domains(manifest, domains)

        return self._change(f"remove domain {name!r} of", edit)

    def verify(self) -> list[Problem]:
        """Reads and hashes every file of the bank; an empty list is a whole and tidy bank.

        Leftovers can be told from a writer's work in progress only under the lock: while another
        process writes, or where the bank is read-only, they are not listed.
        """
        for _ in range(_MAX_TRIES):
            try:
                manifest = self._load()
                damaged = self._damaged(manifest)
                if self._load() == manifest:
                    return damaged + self._strays()
            except BankError as error:
                return [Problem(MANIFEST, "damaged", str(error))]
        raise self._restless("it was verified")

    def _load(self) -> Manifest:
        self._seen = self._folder.load()
        return self._seen[0]

    def _contents(self, manifest: Manifest, entry: Entry, have: Collection[str]) -> Contents:
        read, wanted = self._folder.read_blob, (x for x in entry.shared if x not in have)
        blob = read(entry.digest, entry.size)
        return Contents(entry, blob, {x: read(x, manifest.shared[x]) for x in wanted})

    def _damaged(self, manifest: Manifest) -> list[Problem]:
        problems = []
        for digest, size in manifest.blobs().items():
            try:
                self._folder.read_blob(digest, size)
            except BankError as error:
                file = f"{BLOBS}/{digest}.safetensors"
                problems.append(Problem(file, "damaged", str(error)))
        return problems

    def _strays(self) -> list[Problem]:
        folder = self._folder
        try:
            folder.refuse_odd_blobs()
            try:
                with folder.lock("verify", self.wait_s):
                    return folder.strays(self._load())
            except BankError:
                return [x for x in folder.strays(self._load()) if x.kind == "unknown"]
        except BankError as error:
            return [Problem(BLOBS, "damaged", str(error))]
        except OSError as error:
            return [Problem(BLOBS, "damaged", f"it cannot be listed: {reason(error)}")]

    def _change(
        self, doing: str, edit: Callable[[Manifest], Manifest], blobs: Sequence[bytes] = ()
    ) -> Manifest:
        """Makes one more generation of what `edit` makes of the current one."""
        folder = self._folder
        edit(self.manifest)  # a wrong request is refused at once, not after waiting for the lock
        with folder.lock(doing, self.wait_s):
            old = self._load()
            new = replace(edit(old), generation=old.generation + 1)
            data = manifests.encode(new)
            try:
                folder.commit(old, data, blobs)
            except OSError as error:
                raise unchanged(doing, self.path, error) from error
            folder.settle(new)
            self._seen = new, folder.glance()
        return new

    def _entry(self, manifest: Manifest, name: str) -> Entry:
        if name not in manifest.domains:
            raise BankError(f"bank {self.path} has {unknown_name(name, manifest.domains)}")
        return manifest.domains[name]

    def _refuse_taken(self, manifest: Manifest, name: str) -> None:
        if name in manifest.domains:
            raise BankError(
                f"bank {self.path} has a domain {name!r} already. Use `replace` to put another in "
                "its place, or another name."
            )

    def _restless(self, when: str) -> BankError:
        return BankError(
            f"bank {self.path} was changed {_MAX_TRIES} times while {when}. "
            "Ask again when its writers are at rest."
        )


def _unreadable(name: str, error: DamagedError) -> DamagedError:
    return DamagedError(f"domain {name!r} cannot be read: {error} Or replace the domain.")


def _described(backbone: dict[str, Any], blob: bytes | None) -> dict[str, Any]:
    held = (None, None) if blob is None else (digest_of(blob), len(blob))
    described = {**plain_card(backbone, "the backbone"), "blob": held[0], "size": held[1]}
    try:
        manifests.check_backbone(described)
    except ValueError as error:
        raise BankError(f"{error}. A bank needs to know it.") from None
    return described


def _entry_of(
    name: str, card: dict[str, Any], blob: bytes, shared: Sequence[bytes]
) -> tuple[Entry, dict[str, int]]:
    """The entry of a new domain, and the sizes of the shared blobs that it brings."""
    sizes = {digest_of(x): len(x) for x in shared}
    copy = plain_card(card, f"the card of domain {name!r}")
    return Entry(digest_of(blob), len(blob), copy, tuple(sizes)), sizes


def _with_domains(
    manifest: Manifest, domains: dict[str, Entry], sizes: dict[str, int] | None = None
) -> Manifest:
    """The manifest with other domains, and of the shared blobs those that one of them needs."""
    known = {**manifest.shared, **(sizes or {})}
    needed = {digest for entry in domains.values() for digest in entry.shared}
    shared = {digest: size for digest, size in known.items() if digest in needed}
    return replace(manifest, domains=domains, shared=shared)
