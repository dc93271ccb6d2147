"""The store: what each request does, and what each refusal says."""

import errno
import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from onetrunk.bank.names import check_name, suggest, unknown_name
from onetrunk.bank.store import Problem, Store
from onetrunk.errors import BankError, DamagedError
from onetrunk.files import DISK, Disk

BACKBONE = {"spec": "resnet26(width=0.5)", "fingerprint": "3f9c", "size_px": 64}
CARD = {"family": "parallel()", "classes": ["daisy", "Rose", "Gänseblümchen", "菊"]}


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.create(tmp_path / "garden.bank", BACKBONE, b"weights")


def blobs_of(store: Store) -> set[str]:
    return {name.removesuffix(".safetensors") for name in os.listdir(store.path / "blobs")}


# What is written is read back


def test_a_new_bank_has_its_backbone_and_nothing_else(store):
    manifest = Store.open(store.path).manifest
    held = {"blob": digest(b"weights"), "size": 7}
    assert manifest.backbone == {**BACKBONE, **held}
    assert (manifest.format, manifest.generation, manifest.domains) == (1, 1, {})
    assert store.read_backbone() == b"weights"
    assert store.verify() == []
    assert sorted(os.listdir(store.path)) == ["bank.json", "bank.lock", "blobs"]


def test_a_backbone_may_be_a_reference_only(tmp_path):
    store = Store.create(tmp_path / "garden.bank", BACKBONE)
    assert store.manifest.backbone == {**BACKBONE, "blob": None, "size": None}
    assert store.read_backbone() is None
    assert blobs_of(store) == set()


def test_a_bank_may_be_made_in_an_empty_folder_and_below_new_ones(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c.bank"):
        assert Store.create(path, BACKBONE).verify() == []


def test_add_and_read(store):
    manifest = store.add("flowers", CARD, b"numbers")
    assert manifest == store.manifest == Store.open(store.path).manifest
    assert manifest.generation == 2
    entry, blob, shared = Store.open(store.path).read("flowers")
    assert (entry.card, entry.digest, entry.size) == (CARD, digest(b"numbers"), 7)
    assert (blob, shared) == (b"numbers", {})
    assert store.read_blob(entry.digest, entry.size) == b"numbers"


def test_every_change_is_one_more_generation_seen_by_stores_open_before(store):
    other = Store.open(store.path)
    assert store.add("a", CARD, b"1").generation == 2
    assert other.add("b", CARD, b"2").generation == 3
    assert store.replace("a", {"x": 1}, b"3").generation == 4
    assert other.rename("b", "c").generation == 5
    assert store.remove("a").generation == 6
    assert list(other.manifest.domains) == ["c"]
    assert other.read("c").blob == b"2"


def test_replace_and_rename_keep_the_order_of_the_domains(store):
    for name in ("c", "a", "b"):
        store.add(name, CARD, name.encode())
    store.replace("a", CARD, b"new")
    store.rename("c", "z")
    assert list(Store.open(store.path).manifest.domains) == ["z", "a", "b"]


def test_other_domains_keep_their_entries_and_bytes(store):
    store.add("a", CARD, b"1")
    before = store.read("a")
    store.add("b", CARD, b"2")
    store.replace("b", {}, b"3")
    store.rename("b", "c")
    store.remove("c")
    assert store.read("a") == before


def test_what_no_domain_needs_is_gone_when_the_call_returns(store):
    store.add("a", CARD, b"1")
    store.replace("a", CARD, b"2")
    assert blobs_of(store) == {digest(b"weights"), digest(b"2")}
    store.remove("a")
    assert blobs_of(store) == {digest(b"weights")}
    assert store.verify() == []


def test_equal_blobs_are_stored_once_and_live_as_long_as_one_domain_needs_them(store):
    store.add("a", CARD, b"same")
    store.add("b", CARD, b"same")
    assert blobs_of(store) == {digest(b"weights"), digest(b"same")}
    store.remove("a")
    assert store.read("b").blob == b"same"


def test_shared_blobs_are_stored_once_and_go_with_the_last_that_needs_them(store):
    store.add("a", CARD, b"1", [b"basis", b"more"])
    store.add("b", CARD, b"2", [b"basis"])
    assert store.manifest.shared == {digest(b"basis"): 5, digest(b"more"): 4}
    assert store.read("a").shared == {digest(b"basis"): b"basis", digest(b"more"): b"more"}
    assert store.read("a", have={digest(b"basis")}).shared == {digest(b"more"): b"more"}
    store.remove("a")
    assert store.manifest.shared == {digest(b"basis"): 5}
    store.replace("b", CARD, b"2")
    assert store.manifest.shared == {}
    assert store.verify() == []


def test_a_stored_shared_blob_is_not_written_again(tmp_path):
    written: list[bytes] = []

    class Counting(Disk):
        def write(self, fd: int, data: memoryview) -> int:
            written.append(bytes(data))
            return super().write(fd, data)

    store = Store.create(tmp_path / "garden.bank", BACKBONE, disk=Counting())
    store.add("a", CARD, b"1", [b"basis"])
    store.add("b", CARD, b"2", [b"basis"])
    assert written.count(b"basis") == 1


def test_writing_a_damaged_blob_again_heals_it(store):
    store.add("a", CARD, b"1234")
    (store.path / "blobs" / f"{digest(b'1234')}.safetensors").write_bytes(b"1235")
    store.replace("a", CARD, b"1234")
    assert store.verify() == []


def test_a_blob_may_be_empty(store):
    store.add("a", CARD, b"")
    assert Store.open(store.path).read("a").blob == b""


def test_tuples_become_lists_and_the_callers_card_stays_the_callers(store):
    card = {"classes": ("a", "b"), "nested": {"mean": (0.5, 1)}}
    store.add("a", card, b"1")
    card["nested"]["mean"] = ()
    plain = {"classes": ["a", "b"], "nested": {"mean": [0.5, 1]}}
    assert store.read("a").entry.card == Store.open(store.path).read("a").entry.card == plain


def test_changing_a_card_that_was_read_changes_nothing_stored(store):
    store.add("a", CARD, b"1")
    store.read("a").entry.card["family"] = "changed"
    store.add("b", CARD, b"2")
    assert Store.open(store.path).read("a").entry.card == CARD


# The manifest on disk


def test_the_manifest_is_json_with_a_line_for_each_domain(store):
    store.add("a", CARD, b"1", [b"basis"])
    store.add("b", CARD, b"2")
    data = (store.path / "bank.json").read_bytes()
    found = json.loads(data)
    keys = ["sha256", "format", "generation", "backbone", "shared", "domains"]
    assert list(found) == keys
    assert found["domains"]["a"]["card"] == CARD
    assert sum(line.startswith(b'    "') for line in data.splitlines()) == 3
    assert "Gänseblümchen" in data.decode()


def test_the_seal_is_the_hash_of_the_file_with_zeros_in_its_place(store):
    data = (store.path / "bank.json").read_bytes()
    seal = json.loads(data)["sha256"].encode()
    assert data.count(seal) == 1
    assert sha256(data.replace(seal, b"0" * 64)).hexdigest().encode() == seal


def test_the_manifest_is_read_again_only_when_it_was_replaced(store, monkeypatch):
    loads = []
    original = Store._load
    monkeypatch.setattr(Store, "_load", lambda self: (loads.append(1), original(self))[1])
    reader = Store.open(store.path)
    for _ in range(5):
        assert reader.manifest.generation == 1
    assert len(loads) == 1
    store.add("a", CARD, b"1")
    loads.clear()
    assert reader.manifest.generation == 2
    assert reader.manifest.generation == 2
    assert len(loads) == 1


def test_importing_the_store_loads_neither_torch_nor_the_lock():
    code = (
        "import sys, onetrunk.bank.store; "
        "assert not {'torch', 'numpy', 'filelock'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Requests that are refused


def test_create_refuses_what_is_there(store, tmp_path):
    with pytest.raises(BankError, match=r"cannot create bank .*garden.bank: there is one already"):
        Store.create(store.path, BACKBONE)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BankError, match=r"a file has that name. Use another path"):
        Store.create(tmp_path / "file", BACKBONE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_bytes(b"")
    with pytest.raises(BankError, match=r"not empty \(it has notes.txt\). Use a new path"):
        Store.create(tmp_path / "full", BACKBONE)
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


@pytest.mark.parametrize("leftovers", ["", "own", "another's"])
def test_a_creation_that_was_killed_can_be_repeated_but_takes_over_no_blob_of_another(
    tmp_path, leftovers
):
    path = tmp_path / "garden.bank"
    made = Store.create(path, BACKBONE, b"another" if leftovers == "another's" else b"weights")
    made_bytes = {file.name for file in (path / "blobs").iterdir()}
    (path / "bank.json").rename(path / ".onetrunk-0123456789abcdef.tmp")
    if not leftovers:
        (path / "blobs" / made_bytes.pop()).unlink()
    if leftovers == "another's":
        with pytest.raises(BankError, match=r"not empty \(it has blobs\)"):
            Store.create(path, BACKBONE, b"weights")
        assert {file.name for file in (path / "blobs").iterdir()} == made_bytes
        return
    again = Store.create(path, BACKBONE, b"weights")
    assert again.read_backbone() == b"weights" and again.verify() == []
    assert made.manifest == again.manifest


def test_create_refuses_a_bank_that_another_process_made_meanwhile(tmp_path):
    path = tmp_path / "garden.bank"

    class Overtaken(Disk):
        def lock(self, path: Path, wait_s: float):
            Store.create(path.parent, BACKBONE, b"faster")
            return super().lock(path, wait_s)

    with pytest.raises(BankError, match=r"there is one already. Open it, or use another path"):
        Store.create(path, BACKBONE, b"slower", disk=Overtaken())
    assert Store.open(path).read_backbone() == b"faster"
    assert Store.open(path).verify() == []


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ({"fingerprint": "3f9c"}, "the backbone's 'spec' is not a text. A bank needs to know it"),
        ({"spec": "x", "fingerprint": 7}, "the backbone's 'fingerprint' is not a text"),
        ({"spec": "x", "fingerprint": b""}, r"the backbone\['fingerprint'\] is b'' of type bytes"),
        ("resnet", "the backbone is a str, and a dict was expected"),
    ],
)
def test_create_refuses_a_backbone_that_is_not_described(tmp_path, backbone, said):
    with pytest.raises(BankError, match=said):
        Store.create(tmp_path / "garden.bank", backbone)
    assert os.listdir(tmp_path) == []


def test_open_says_that_there_is_no_bank(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(BankError, match=r"there is no bank at .* \(no bank.json\). Create one"):
            Store.open(path)
    with pytest.raises(BankError, match=r"has a NUL in it. Use another path"):
        Store.open("a\0b")


def test_a_bank_removed_under_an_open_store_is_said_so_and_not_made_again(store, tmp_path):
    store.path.rename(tmp_path / "away")
    for request in (lambda: store.manifest, lambda: store.add("a", CARD, b"1")):
        with pytest.raises(BankError, match=r"there is no bank at"):
            request()
    assert os.listdir(tmp_path) == ["away"]


def test_a_taken_name_is_refused(store):
    store.add("a", CARD, b"1")
    store.add("b", CARD, b"2")
    said = "has a domain 'a' already. Use `replace` to put another in its place, or another name"
    with pytest.raises(BankError, match=said):
        store.add("a", CARD, b"3")
    for old in ("a", "b"):
        with pytest.raises(BankError, match=said):
            store.rename(old, "a")
    assert store.manifest.generation == 3


def test_an_unknown_name_is_refused_with_the_nearest_one_first(store):
    said = r"garden.bank has no domain 'flwers'. Did you mean 'flowers'\? It holds flowers, signs."
    with pytest.raises(BankError, match=r"no domain 'flwers': it is empty. Add one first"):
        store.read("flwers")
    store.add("signs", CARD, b"1")
    store.add("flowers", CARD, b"2")
    for request in (
        lambda: store.read("flwers"),
        lambda: store.replace("flwers", CARD, b"3"),
        lambda: store.rename("flwers", "x"),
        lambda: store.remove("flwers"),
    ):
        with pytest.raises(BankError, match=said):
            request()
    assert store.manifest.generation == 3


def test_a_long_list_of_names_is_cut():
    said = unknown_name("x", [f"domain-{i:03d}" for i in range(100)])
    assert said.endswith("domain-018, domain-019 and 80 more.")
    assert "Did you mean" not in said


@pytest.mark.parametrize(
    ("name", "proposal"),
    [
        ("Flowers 102", "flowers-102"),
        ("vgg.flowers", "vgg-flowers"),
        ("--a", "a"),
        ("../../etc/passwd", "etc-passwd"),
        ("Été", "ete"),
        ("a" * 65, "a" * 64),
        ("_a_", "a"),
        ("菊", None),
        ("", None),
    ],
)
def test_a_bad_name_is_refused_with_the_rule_and_a_proposal(store, name, proposal):
    said = "is no name for a domain: names are 1-64 characters of a-z 0-9 _ -, the first a letter"
    with pytest.raises(BankError, match=said) as caught:
        store.add(name, CARD, b"1")
    assert repr(name) in str(caught.value)
    assert (f"Use {proposal!r}." in str(caught.value)) == (proposal is not None)
    check_name(suggest(name) or "a")


def test_a_name_that_is_no_text_or_a_novel_is_said_briefly():
    with pytest.raises(BankError, match=r"a value of type NoneType is no name for a domain"):
        check_name(None)
    with pytest.raises(BankError, match=r"\.\.\. \(100000 characters\) is no name") as caught:
        check_name("A" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (["x"], "the card of domain 'a' is a list, and a dict was expected"),
        (
            {"x": float("nan")},
            r"the card of domain 'a'\['x'\] is nan of type float. A card is plain",
        ),
        ({"x": [1, float("inf")]}, r"\['x'\]\[1\] is inf of type float"),
        ({"x": b"1"}, r"\['x'\] is b'1' of type bytes"),
        ({"x": {1: 2}}, r"\['x'\] has the key 1, and JSON's keys are str"),
        ({"x": 1 << 63}, "of type int"),
        ({"x": "\ud800"}, r"is '\\ud800' of type str"),
        ({"\ud800": 1}, r"is '\\ud800' of type str"),
        ({"x": object()}, "of type object"),
    ],
)
def test_a_card_that_json_would_not_give_back_is_refused(store, card, said):
    with pytest.raises(BankError, match=said):
        store.add("a", card, b"1")
    assert store.manifest.generation == 1


def test_a_card_nested_without_end_is_refused(store):
    card: dict[str, object] = {}
    card["self"] = card
    with pytest.raises(BankError, match=r"nested more than 32 deep. Flatten it"):
        store.add("a", card, b"1")


def test_a_manifest_beyond_its_limit_is_refused_before_anything_is_written(store, monkeypatch):
    monkeypatch.setattr("onetrunk.bank.manifest.MAX_BYTES", 2000)
    said = r"the manifest would have [\d,]+ bytes, and 2,000 is the limit. Put less into"
    with pytest.raises(BankError, match=said):
        store.add("a", {"classes": ["x" * 2000]}, b"1")
    assert blobs_of(store) == {digest(b"weights")}


def test_a_digest_is_checked_before_it_becomes_a_path(store):
    for text in ("../bank", "A" * 64, "0" * 63, "0" * 64 + "\n"):
        with pytest.raises(BankError, match=r"is no digest: digests are 64 of 0-9 a-f"):
            store.read_blob(text, 1)


# Disks that fail


class FailingDisk(Disk):
    """Fails at the operation called `at`, for paths that end in `suffix`."""

    def __init__(self, at: str, code: int, suffix: str = "") -> None:
        self.at, self.code, self.suffix = at, code, suffix

    def _step(self, at: str, path: Path) -> None:
        if at == self.at and str(path).endswith(self.suffix):
            raise OSError(self.code, os.strerror(self.code), str(path))

    def create(self, path: Path) -> int:
        self._step("create", path)
        return super().create(path)

    def open(self, path: Path) -> int:
        self._step("open", path)
        return super().open(path)

    def facts(self, where: Path | int):
        if isinstance(where, Path):
            self._step("facts", where)
        return super().facts(where)

    def sync_folder(self, folder: Path) -> None:
        self._step("sync_folder", folder)
        super().sync_folder(folder)

    def lock(self, path: Path, wait_s: float):
        self._step("lock", path)
        return super().lock(path, wait_s)


@pytest.mark.parametrize(
    ("at", "code", "said"),
    [
        ("create", errno.ENOSPC, "no space left on the device. Free some and ask again."),
        ("create", errno.EACCES, "permission denied at .*tmp. Ask its owner for access"),
        ("create", errno.EIO, "the device reported an input/output error"),
        ("lock", errno.EROFS, "the file system is read-only at .*bank.lock"),
    ],
)
def test_a_failing_disk_is_said_with_what_was_asked_and_how_things_stand(store, at, code, said):
    failing = Store.open(store.path, disk=FailingDisk(at, code))
    said = f"cannot add domain 'a' to bank .*garden.bank: {said}.* Nothing was changed."
    with pytest.raises(BankError, match=said):
        failing.add("a", CARD, b"1")
    assert store.manifest.generation == 1
    assert store.verify() == []


def test_a_failing_disk_makes_no_bank(tmp_path):
    with pytest.raises(BankError, match=r"cannot create bank .*no space left.*Nothing was changed"):
        Store.create(tmp_path / "a" / "b", BACKBONE, b"1", disk=FailingDisk("create", errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_a_change_that_stands_but_could_not_be_flushed_is_said_so(store):
    failing = Store.open(store.path, disk=FailingDisk("sync_folder", errno.EIO, "garden.bank"))
    with pytest.raises(BankError, match=r"has its new generation 2, but a power loss may undo it"):
        failing.add("a", CARD, b"1")
    assert store.read("a").blob == b"1"


def test_reading_from_a_failing_disk_is_said(store):
    store.add("a", CARD, b"1")
    with pytest.raises(BankError, match=r"cannot open bank .*: permission denied at .*bank.json"):
        Store.open(store.path, disk=FailingDisk("open", errno.EACCES, "bank.json"))
    failing = Store.open(store.path, disk=FailingDisk("open", errno.EIO, ".safetensors"))
    with pytest.raises(BankError, match=r"cannot read bank .*: the device reported"):
        failing.read("a")
    failing = Store.open(store.path, disk=FailingDisk("facts", errno.EACCES, "blobs"))
    with pytest.raises(BankError, match=r"cannot read bank .*: permission denied at .*blobs"):
        failing.read("a")


def test_a_missing_blob_is_said(store):
    store.add("a", CARD, b"1")
    file = store.path / "blobs" / f"{digest(b'1')}.safetensors"
    file.unlink()
    said = f"domain 'a' cannot be read: {file} is not there. Restore it from a copy. Or replace"
    with pytest.raises(DamagedError, match=said):
        store.read("a")
    file.parent.rename(store.path / "gone")
    with pytest.raises(DamagedError, match=r"blobs is not there. Restore it from a copy"):
        store.read("a")
    with pytest.raises(DamagedError, match=r"blobs is not there. Restore it from a copy"):
        store.add("b", CARD, b"2")


def test_a_blob_that_a_writer_took_away_is_looked_for_in_the_next_generation(store):
    store.add("a", CARD, b"1")

    class Overtaken(Disk):
        """A writer replaces the domain between the manifest and the blob: once, or every time."""

        def __init__(self, n_times: int) -> None:
            self.n_left = n_times

        def open(self, path: Path) -> int:
            if path.suffix == ".safetensors" and self.n_left:
                self.n_left -= 1
                store.replace("a", CARD, b"blob %d" % self.n_left)
            return super().open(path)

    assert Store.open(store.path, disk=Overtaken(3)).read("a").blob == b"blob 0"
    with pytest.raises(BankError, match=r"changed 100 times while domain 'a' was read. Ask again"):
        Store.open(store.path, disk=Overtaken(1000)).read("a")


def test_a_second_writer_waits_and_then_is_told(store):
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with DISK.lock(store.path / "bank.lock", 5.0):
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    try:
        said = r"cannot add domain 'a' to bank .*: another process is changing it \(waited 0.05 s\)"
        with pytest.raises(BankError, match=said):
            Store.open(store.path, wait_s=0.05).add("a", CARD, b"1")
        assert Store.open(store.path, wait_s=0.05).verify() == []
    finally:
        done.set()
        holder.join()
    store.add("a", CARD, b"1")


# Verify


def test_verify_lists_what_is_damaged_left_over_and_unknown(store):
    store.add("a", CARD, b"1234")
    store.add("b", CARD, b"5678")
    blobs = store.path / "blobs"
    (blobs / f"{digest(b'1234')}.safetensors").write_bytes(b"1235")
    (blobs / f"{digest(b'5678')}.safetensors").unlink()
    (blobs / f"{'0' * 64}.safetensors").write_bytes(b"orphan")
    (blobs / ".onetrunk-0123456789abcdef.tmp").write_bytes(b"half")
    (store.path / ".onetrunk-0123456789abcdef.tmp").write_bytes(b"half")
    (store.path / "notes.txt").write_bytes(b"")
    (blobs / "notes.txt").symlink_to("/etc/passwd")
    found = {(problem.kind, problem.file) for problem in store.verify()}
    assert found == {
        ("damaged", f"blobs/{digest(b'1234')}.safetensors"),
        ("damaged", f"blobs/{digest(b'5678')}.safetensors"),
        ("leftover", f"blobs/{'0' * 64}.safetensors"),
        ("leftover", "blobs/.onetrunk-0123456789abcdef.tmp"),
        ("leftover", ".onetrunk-0123456789abcdef.tmp"),
        ("unknown", "notes.txt"),
        ("unknown", "blobs/notes.txt"),
    }


def test_the_next_change_removes_leftovers_and_nothing_else(store):
    blobs = store.path / "blobs"
    (blobs / f"{'0' * 64}.safetensors").write_bytes(b"orphan")
    (blobs / ".onetrunk-0123456789abcdef.tmp").write_bytes(b"half")
    (store.path / ".onetrunk-0123456789abcdef.tmp").write_bytes(b"half")
    (store.path / "notes.txt").write_bytes(b"mine")
    store.add("a", CARD, b"1")
    assert [str(problem) for problem in store.verify()] == [
        "unknown: notes.txt: it is no part of a bank; nothing reads or removes it"
    ]


def test_leftovers_go_before_anything_is_written_so_that_a_full_disk_is_usable_again(store):
    orphan = store.path / "blobs" / f"{'0' * 64}.safetensors"
    orphan.write_bytes(b"orphan")

    class FullWhileTheOrphanIsThere(Disk):
        def create(self, path: Path) -> int:
            if orphan.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().create(path)

    Store.open(store.path, disk=FullWhileTheOrphanIsThere()).add("a", CARD, b"1")
    assert store.verify() == []


def test_verify_reports_a_damaged_manifest_and_a_read_only_bank(store):
    (store.path / "notes.txt").write_bytes(b"")
    read_only = Store.open(store.path, disk=FailingDisk("lock", errno.EROFS))
    assert [problem.kind for problem in read_only.verify()] == ["unknown"]
    (store.path / "bank.json").write_bytes(b"{}")
    [problem] = store.verify()
    assert isinstance(problem, Problem)
    assert (problem.file, problem.kind) == ("bank.json", "damaged")
