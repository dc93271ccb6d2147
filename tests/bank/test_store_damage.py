"""Damaged, foreign and hostile banks: each is refused with a message that names the file.

Every single-bit flip, every length, every file of another kind, a table of hostile names against
every entry point, and a table of hostile manifests. Nothing outside the bank is ever touched.
"""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from onetrunk.bank.manifest import decode
from onetrunk.bank.store import Store
from onetrunk.errors import BankError, DamagedError

BACKBONE = {"spec": "resnet26(width=0.5)", "fingerprint": "3f9c"}
A, B, BASIS = b"numbers of a" * 4, b"numbers of b" * 4, b"basis" * 8


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def blob_file(store: Store, data: bytes) -> Path:
    return store.path / "blobs" / f"{digest(data)}.safetensors"


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store.create(tmp_path / "garden.bank", BACKBONE, b"weights")
    store.add("a", {"classes": ["daisy", "rose"]}, A, [BASIS])
    store.add("b", {"classes": ["stop"]}, B)
    return store


def tree(folder: Path) -> dict[str, tuple[int, int, bytes | None]]:
    """Every file below `folder`: when it was changed, its kind, and its bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path)] = (facts.st_mtime_ns, facts.st_mode, data)
    return found


# Bits and lengths


def test_every_flipped_bit_of_the_manifest_is_seen(store):
    file = store.path / "bank.json"
    data = file.read_bytes()
    assert len(data) > 700
    for i in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(DamagedError, match=r"bank.json is damaged"):
            decode(bytes(flipped), "bank.json")
        if i % 17 == 0:  # the same through the file, which takes a hundred times as long
            file.write_bytes(flipped)
            with pytest.raises(DamagedError, match=r"bank.json is damaged"):
                store.read("a")
    file.write_bytes(data)
    assert store.verify() == []


@pytest.mark.parametrize("blob", [A, BASIS], ids=["own", "shared"])
def test_every_flipped_bit_of_a_blob_is_seen(store, blob):
    file = blob_file(store, blob)
    for i in range(len(blob) * 8):
        flipped = bytearray(blob)
        flipped[i // 8] ^= 1 << i % 8
        file.write_bytes(flipped)
        with pytest.raises(DamagedError, match=f"domain 'a' cannot be read: {file} has SHA-256"):
            store.read("a")
    assert [problem.kind for problem in store.verify()] == ["damaged"]
    assert store.read("b").blob == B


def test_every_flipped_bit_of_the_backbone_is_seen(store):
    for i in range(len(b"weights") * 8):
        flipped = bytearray(b"weights")
        flipped[i // 8] ^= 1 << i % 8
        blob_file(store, b"weights").write_bytes(flipped)
        with pytest.raises(DamagedError, match=r"its bytes were altered. Restore it from a copy"):
            store.read_backbone()


def test_every_other_length_of_the_manifest_is_seen(store):
    file = store.path / "bank.json"
    data = file.read_bytes()
    lengths = [data[:n] for n in range(len(data))]
    longer = [data + b"\n" * n for n in range(1, 201)] + [data + data]
    for changed in lengths + longer:
        file.write_bytes(changed)
        with pytest.raises(DamagedError, match=r"bank.json is damaged"):
            Store.open(store.path)


def test_every_other_length_of_a_blob_is_seen(store):
    file = blob_file(store, A)
    for changed in [A[:n] for n in range(len(A))] + [A + bytes(n) for n in range(1, 201)]:
        file.write_bytes(changed)
        with pytest.raises(DamagedError, match=f"has {len(changed)} bytes where {len(A)} were"):
            store.read("a")


def test_swapped_blobs_are_seen(store):
    a, b = blob_file(store, A), blob_file(store, B)
    a.write_bytes(B)
    b.write_bytes(A)
    for name in ("a", "b"):
        with pytest.raises(DamagedError, match=f"domain '{name}' cannot be read: .* has SHA-256"):
            store.read(name)


def test_an_older_manifest_over_newer_blobs_is_seen(store):
    old = (store.path / "bank.json").read_bytes()
    store.replace("a", {}, b"new")
    (store.path / "bank.json").write_bytes(old)
    with pytest.raises(DamagedError, match=r"is not there. Restore it from a copy"):
        store.read("a")
    assert store.read("b").blob == B


def test_a_manifest_too_large_is_refused_unread(store):
    with (store.path / "bank.json").open("ab") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(DamagedError, match=r"more than the 67,108,864 that such a file may have"):
        Store.open(store.path)


# Files of another kind


def make_link(path: Path, target: Path) -> None:
    path.rename(target)  # a link to the right bytes: refused all the same
    path.symlink_to(target)


def make_fifo(path: Path, target: Path) -> None:
    path.rename(target)
    os.mkfifo(path)


def make_folder(path: Path, target: Path) -> None:
    path.rename(target)
    path.mkdir()


def make_loop(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(path.name)


ODD_FILES = [make_link, make_fifo, make_folder, make_loop]
ONLY_REGULAR = r"is (a symbolic link|a folder|a special file), and only a regular file is read here"


@pytest.mark.parametrize("make", ODD_FILES)
def test_an_odd_manifest_is_refused_at_once(store, tmp_path, make):
    make(store.path / "bank.json", tmp_path / "canary")
    before = tree(tmp_path)
    for request in (
        lambda: Store.open(store.path),
        lambda: store.manifest,
        lambda: store.read("a"),
        lambda: store.add("c", {}, b"c"),
        lambda: store.remove("a"),
    ):
        with pytest.raises(DamagedError, match=ONLY_REGULAR):
            request()
    assert [problem.file for problem in store.verify()] == ["bank.json"]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("make", ODD_FILES)
def test_an_odd_blob_is_refused_and_replaced_without_touching_its_target(store, tmp_path, make):
    file, canary = blob_file(store, A), tmp_path / "canary"
    make(file, canary)
    before = tree(tmp_path)[str(canary)]
    with pytest.raises(DamagedError, match=f"domain 'a' cannot be read: .*{ONLY_REGULAR}"):
        store.read("a")
    assert [problem.kind for problem in store.verify()] == ["damaged"]
    if make is make_folder:
        with pytest.raises(BankError, match=r"cannot replace domain 'a' of bank .*Is a directory"):
            store.replace("a", {}, A)
    else:
        store.replace("a", {}, A)
        assert store.verify() == []
    assert tree(tmp_path)[str(canary)] == before


@pytest.mark.parametrize("make", ODD_FILES)
def test_an_odd_blob_that_nothing_needs_is_removed_without_touching_its_target(
    store, tmp_path, make
):
    orphan, canary = blob_file(store, b"orphan"), tmp_path / "canary"
    orphan.write_bytes(b"orphan")
    make(orphan, canary)
    store.add("c", {}, b"c")
    assert canary.read_bytes() == b"orphan"
    assert os.path.lexists(orphan) == (make is make_folder)


@pytest.mark.parametrize("make", ODD_FILES)
def test_an_odd_lock_is_refused(store, tmp_path, make):
    make(store.path / "bank.lock", tmp_path / "canary")
    before = tree(tmp_path)
    with pytest.raises(DamagedError, match=r"bank.lock is not a regular file. Remove it and ask"):
        store.add("c", {}, b"c")
    assert tree(tmp_path) == before
    assert store.read("a").blob == A


@pytest.mark.parametrize("kind", ["link", "file", "fifo"])
def test_an_odd_blobs_folder_is_refused_and_nothing_behind_it_is_touched(store, tmp_path, kind):
    blobs, outside = store.path / "blobs", tmp_path / "outside"
    blobs.rename(outside)
    (outside / f"{'0' * 64}.safetensors").write_bytes(b"would be removed as an orphan")
    if kind == "link":
        blobs.symlink_to(outside)
    elif kind == "file":
        blobs.write_bytes(b"")
    else:
        os.mkfifo(blobs)
    before = tree(outside)
    for request in (
        lambda: store.read("a"),
        lambda: store.add("c", {}, b"c"),
        lambda: store.remove("a"),
    ):
        with pytest.raises(DamagedError, match=r"is not a folder, and a link to one is not foll"):
            request()
    assert "damaged: blobs" in {f"{x.kind}: {x.file}" for x in store.verify()}
    assert tree(outside) == before


def test_a_bank_may_itself_be_reached_by_a_link(store, tmp_path):
    (tmp_path / "link").symlink_to(store.path)
    Store.open(tmp_path / "link").add("c", {}, b"c")
    assert store.read("c").blob == b"c"


# Hostile names

NAMES: list[Any] = [
    *("", " ", "\t", "\n", ".", "..", "...", " ..", ".. ", "/", "//", "\\", "~", "~root", "-", "_"),
    *(
        "../x",
        "../../x",
        "a/../b",
        "a/b",
        "a\\b",
        "./a",
        "a/",
        "/a",
        "/etc/passwd",
        "subdir/../../x",
    ),
    *(
        "..\\x",
        "..\\..\\x",
        "C:",
        "C:\\",
        "C:/x",
        "c:x",
        "\\\\srv\\share",
        "//srv/share",
        "\\\\?\\C:",
    ),
    *("file:///etc/passwd", "http://x", "a:b", "a::$DATA", "a.", "a ", " a", ".a", "a.safetensors"),
    *("bank.json", "blobs/x", "../blobs", "../bank.json", "a\0", "\0", "a\0b", "a\n", "a\r", "\na"),
    *("a\tb", "a b", "a\x1b[31m", "\x7f", "a\x80", "%2e%2e", "%2e%2e%2fx", "..%2f", "%00", "a%00"),
    *("..%c0%af", "&#46;", "$HOME", "${HOME}", "$(id)", "`id`", ";id", "a;b", "a|b", "a&b", "a>b"),
    *(
        "a<b",
        "a*",
        "a?",
        "[a]",
        "{a}",
        "a'b",
        'a"b',
        "a,b",
        "a=b",
        "a+b",
        "a@b",
        "a#b",
        "a!b",
        "^a",
    ),
    *("CON.", "NUL.txt", "A", "Flowers", "FLOWERS", "fLowers", "\u0131", "\u017f", "\u212a"),
    *("\u0430", "\u0435", "\u043e", "\u03bf", "\uff41", "\u1d43", "\U0001d41a", "\xe9", "e\u0301"),
    *("\u202ea", "a\u202e", "\u200b", "a\u200b", "\u200da", "\ufeffa", "\u2060", "\xad", "a\xa0b"),
    *(
        "\u2028",
        "\u2024\u2024",
        "\uff0e\uff0e",
        "\u2215x",
        "\uff0fx",
        "\u2044x",
        "\ud800",
        "a\udfff",
    ),
    *("\U0001f33c", "\u0661", "\uff11", "\xb2", "\u2460", "_a", "-a", "--help", "-rf", "__base__"),
    *("a/../../b", "....//x", "..;/x", "/proc/self/environ", "/dev/null", "blobs/", "bank.lock"),
    *("a" * 65, "a" * 256, "a" * 100_000, "1" * 65, "\u0430" * 64),
    *(None, 1, 1.5, True, b"a", ("a",), ["a"], {"a": 1}, Path("a"), float("nan")),
]
ENTRY_POINTS: dict[str, Callable[[Store, Any], object]] = {
    "read": lambda store, name: store.read(name),
    "add": lambda store, name: store.add(name, {}, b"new"),
    "replace": lambda store, name: store.replace(name, {}, b"new"),
    "rename from": lambda store, name: store.rename(name, "c"),
    "rename to": lambda store, name: store.rename("a", name),
    "remove": lambda store, name: store.remove(name),
}


def test_there_are_enough_hostile_names():
    assert len(NAMES) >= 150


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_hostile_names_are_refused_before_any_file_is_touched(tmp_path, entry_point):
    store = Store.create(tmp_path / "room" / "for" / "dots" / "garden.bank", BACKBONE)
    store.add("a", {}, A)
    (tmp_path / "canary").write_bytes(b"canary")
    store.manifest  # noqa: B018
    before = tree(tmp_path)
    for name in NAMES:
        with pytest.raises(BankError, match="is no name for a domain: names are 1-64") as caught:
            ENTRY_POINTS[entry_point](store, name)
        assert len(str(caught.value)) < 500
        str(caught.value).encode()  # it can be printed
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["a", "0", "a-", "a_", "1-2_3", "con", "nul", "blobs", "a" * 64])
def test_ordinary_names_are_accepted_and_become_no_file_names(store, name):
    store.replace("a", {}, A) if name == "a" else store.add(name, {}, b"new")
    assert store.read(name).entry.card == {}
    assert store.verify() == []


# Hostile manifests

ZEROS = "0" * 64
DOMAIN = {"digest": digest(A), "size": len(A), "card": {}, "shared": []}
GOOD = {
    "sha256": ZEROS,
    "format": 1,
    "generation": 1,
    "backbone": {**BACKBONE, "blob": None, "size": None},
    "shared": {},
    "domains": {"a": DOMAIN},
}


def sealed(text: str) -> bytes:
    """`text` with the hash of itself in the place of the zeros: a forger can do that too."""
    data = text.encode("utf-8", "surrogatepass")
    return data.replace(ZEROS.encode(), digest(data).encode(), 1)


def manifest(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes}, indent=2)


def domain(**changes: Any) -> str:
    return manifest(domains={"a": {**DOMAIN, **changes}})


def without(key: str) -> str:
    return json.dumps({k: v for k, v in GOOD.items() if k != key}, indent=2)


def card(text: str) -> str:
    """A manifest whose card is `text`, JSON or not."""
    return domain(card="CARD").replace('"CARD"', text)


def test_the_good_manifest_of_these_tests_is_good():
    assert list(decode(sealed(manifest()), "bank.json").domains) == ["a"]
    assert decode(sealed(card(r'{"path": "C:\\ud800", "a": 1e300}')), "").domains["a"].card
    assert decode(sealed(card('{"n": [' + "1" * 4000 + "]}")), "").domains["a"].card


HOSTILE = {
    "no object": ("[]", "does not begin as a manifest does"),
    "empty": ("", "does not begin as a manifest does"),
    "another order": (
        json.dumps({"format": 1, **GOOD}, indent=2),
        "does not begin as a manifest does",
    ),
    "a byte-order mark": ("\ufeff" + manifest(), "does not begin as a manifest does"),
    "compact": (json.dumps(GOOD), "does not begin as a manifest does"),
    "not UTF-8": (card('{"x": "\ud800"}'), "can't decode"),
    "not JSON": (manifest()[:-2], "Expecting"),
    "more after the end": (manifest() + "{}", "Extra data"),
    "a comment": (manifest() + "// x", "Extra data"),
    "a line break in a text": (card('{"x": "\n"}'), "Invalid control character"),
    "format 0": (manifest(format=0), r"its 'format' is not 1, 2\.\."),
    "format true": (manifest(format=True), r"its 'format' is not 1, 2\.\."),
    "format 1.0": (manifest(format=1.0), r"its 'format' is not 1, 2\.\."),
    "format text": (manifest(format="1"), r"its 'format' is not 1, 2\.\."),
    "no format": (without("format"), r"its 'format' is not 1, 2\.\."),
    "no generation": (without("generation"), "the manifest has no 'generation'"),
    "no backbone": (without("backbone"), "the manifest has no 'backbone'"),
    "no domains": (without("domains"), "the manifest has no 'domains'"),
    "unknown key": (manifest(signature="x"), "the manifest has the unknown key 'signature'"),
    "long unknown key": (manifest(**{"x" * 10_000: 1}), "unknown key 'x{80}'"),
    "generation 0": (manifest(generation=0), r"the generation is not 1, 2\.\."),
    "generation -1": (manifest(generation=-1), r"the generation is not 1, 2\.\."),
    "generation true": (manifest(generation=True), r"the generation is not 1, 2\.\."),
    "generation 1e3": (manifest(generation=1e3), r"the generation is not 1, 2\.\."),
    "generation 2**63": (manifest(generation=1 << 63), r"the generation is not 1, 2\.\."),
    "backbone null": (manifest(backbone=None), "the backbone is not an object"),
    "backbone list": (manifest(backbone=[]), "the backbone is not an object"),
    "backbone without spec": (manifest(backbone={}), "the backbone's 'spec' is not a text"),
    "backbone without blob": (manifest(backbone=BACKBONE), "has no 'blob' or no 'size'"),
    "backbone blob a path": (
        manifest(backbone={**BACKBONE, "blob": "../../etc/passwd", "size": 1}),
        "the backbone's blob is not 64 of 0-9 a-f",
    ),
    "backbone blob without size": (
        manifest(backbone={**BACKBONE, "blob": digest(A), "size": None}),
        "the backbone's size is not a whole number",
    ),
    "backbone size without blob": (
        manifest(backbone={**BACKBONE, "blob": None, "size": 1}),
        "the backbone's blob is not 64 of 0-9 a-f",
    ),
    "shared list": (manifest(shared=[]), "'shared' is not an object"),
    "shared a path": (manifest(shared={"../x": 1}), "a shared blob's name is not 64 of 0-9 a-f"),
    "shared size": (manifest(shared={digest(A): -1}), r"the size of shared blob \w{12}... is not"),
    "domains list": (manifest(domains=[]), "'domains' is not an object"),
    "domains null": (manifest(domains=None), "'domains' is not an object"),
    "domain null": (manifest(domains={"a": None}), "domain 'a' is not an object"),
    "domain without size": (manifest(domains={"a": {"digest": ""}}), "domain 'a' has no 'card'"),
    "domain unknown key": (domain(path="/etc/passwd"), "domain 'a' has the unknown key 'path'"),
    "digest a path": (domain(digest="../../../etc/passwd"), "digest of domain 'a' is not 64 of"),
    "digest upper case": (domain(digest=digest(A).upper()), "digest of domain 'a' is not 64 of"),
    "digest short": (domain(digest=digest(A)[:-1]), "digest of domain 'a' is not 64 of"),
    "digest line break": (domain(digest=digest(A) + "\n"), "digest of domain 'a' is not 64 of"),
    "digest null": (domain(digest=None), "digest of domain 'a' is not 64 of"),
    "digest wide digits": (domain(digest="\uff11" * 64), "digest of domain 'a' is not 64 of"),
    "size negative": (domain(size=-1), "the size of domain 'a' is not a whole number"),
    "size huge": (domain(size=1 << 63), "the size of domain 'a' is not a whole number"),
    "size float": (domain(size=48.0), "the size of domain 'a' is not a whole number"),
    "size true": (domain(size=True), "the size of domain 'a' is not a whole number"),
    "size text": (domain(size="48"), "the size of domain 'a' is not a whole number"),
    "card list": (domain(card=[]), "the card of domain 'a' is not an object"),
    "card null": (domain(card=None), "the card of domain 'a' is not an object"),
    "shared text": (domain(shared=digest(A)), "'shared' of domain 'a' is not a list of texts"),
    "shared numbers": (domain(shared=[1]), "'shared' of domain 'a' is not a list of texts"),
    "shared nested": (domain(shared=[[]]), "'shared' of domain 'a' is not a list of texts"),
    "shared unlisted": (domain(shared=["../x"]), "needs a shared blob that the manifest does not"),
    "NaN": (card('{"x": NaN}'), "NaN is no JSON number"),
    "Infinity": (card('{"x": Infinity}'), "Infinity is no JSON number"),
    "-Infinity": (card('{"x": -Infinity}'), "-Infinity is no JSON number"),
    "1e999": (card('{"x": 1e999}'), "the number 1e999 is too large"),
    "a million digits": (card('{"x": ' + "1" * 1_000_000 + "}"), "integer string conversion"),
    "01": (card('{"x": 01}'), "Expecting"),
    "single quotes": (card("{'x': 1}"), "Expecting"),
    "a key twice": (card('{"x": 1, "x": 2}'), "the key 'x' stands twice in one object"),
    "a key twice, escaped": (card(r'{"x": 1, "\u0078": 2}'), "the key 'x' stands twice"),
    "a surrogate": (card(r'{"x": "\ud800"}'), "it has an escaped surrogate"),
    "a surrogate in a key": (card(r'{"\uDFFF": 1}'), "it has an escaped surrogate"),
    "a surrogate after a backslash": (card(r'{"x": "\\\ud800"}'), "it has an escaped surrogate"),
    "deep lists": (card('{"x":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "deep objects": (card('{"x":' * 100_000 + "1" + "}" * 100_000), "nested too deeply"),
    "open lists": (card("[" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests_are_refused_with_the_reason(tmp_path, case):
    text, said = HOSTILE[case]
    bank = tmp_path / "garden.bank"
    (bank / "blobs").mkdir(parents=True)
    (bank / "bank.json").write_bytes(sealed(text))
    before = tree(tmp_path)
    said = rf"garden.bank/bank.json is damaged: .*{said}.*Restore it from a copy"
    with pytest.raises(DamagedError, match=said) as caught:
        Store.open(bank)
    assert len(str(caught.value)) < 700
    assert tree(tmp_path) == before


@pytest.mark.parametrize("key", ["domains", "format", "generation", "backbone", "sha256"])
def test_a_key_twice_in_the_manifest_itself_is_refused(key):
    text = manifest().removesuffix("\n}") + f',\n  "{key}": {json.dumps(GOOD[key])}\n}}'
    with pytest.raises(DamagedError, match=f"the key '{key}' stands twice in one object"):
        decode(sealed(text), "bank.json")


def test_a_domain_twice_is_refused():
    text = manifest().replace('"a": {', f'"a": {json.dumps(DOMAIN)},\n    "a": {{')
    with pytest.raises(DamagedError, match="the key 'a' stands twice in one object"):
        decode(sealed(text), "bank.json")


def test_hostile_names_in_the_manifest_are_refused():
    for name in NAMES:
        if isinstance(name, str):
            with pytest.raises(DamagedError, match=r"is no name for a domain|escaped surrogate"):
                decode(sealed(manifest(domains={name: DOMAIN})), "bank.json")


def test_a_newer_format_says_to_upgrade(tmp_path):
    bank = tmp_path / "garden.bank"
    bank.mkdir()
    future = {"sha256": ZEROS, "format": 2, "anything": ["else"]}
    (bank / "bank.json").write_bytes(sealed(json.dumps(future, indent=2)))
    said = r"bank.json has format 2, and this onetrunk reads format 1: it was written by a newer "
    with pytest.raises(BankError, match=said + "onetrunk. Upgrade onetrunk to read it") as caught:
        Store.open(bank)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("seal", [ZEROS, "f" * 64, "upper"], ids=["zeros", "f", "upper case"])
def test_the_seal_is_compared_exactly(seal):
    data = sealed(manifest())
    right = json.loads(data)["sha256"]
    wrong = right.upper() if seal == "upper" else seal
    assert wrong != right
    with pytest.raises(DamagedError, match="not those that its first line's SHA-256 was taken of"):
        decode(data.replace(right.encode(), wrong.encode()), "bank.json")


def test_a_size_in_the_manifest_reserves_no_memory(store):
    text = (store.path / "bank.json").read_text()
    found = json.loads(text)
    found["sha256"], found["domains"]["a"]["size"] = ZEROS, (1 << 63) - 1
    (store.path / "bank.json").write_bytes(sealed(json.dumps(found, indent=2)))
    with pytest.raises(DamagedError, match="has 48 bytes where 9,223,372,036,854,775,807 were"):
        store.read("a")


def test_a_card_that_can_be_read_but_is_too_deep_to_be_written_is_refused_or_kept(store):
    for depth in (500, 900, 950, 990):
        text = card('{"x":' + "[" * depth + "]" * depth + "}")
        (store.path / "bank.json").write_bytes(sealed(text))
        try:
            store.add("z", {}, b"z")
        except BankError as error:
            assert "nested too deeply" in str(error)
        else:
            assert "z" in Store.open(store.path).manifest.domains


def test_a_copy_of_a_bank_is_a_bank(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "copy.bank")
    copy = Store.open(tmp_path / "copy.bank")
    assert copy.verify() == []
    assert copy.manifest == store.manifest
