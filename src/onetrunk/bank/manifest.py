"""The bank's manifest, `bank.json`: which domains there are, and the hash of every file they need.

Its first line carries the SHA-256 of the whole file with those 64 digits replaced by zeros, so that
one flipped bit anywhere is seen. The parser is strict: what `encode` would not write is refused.
1,000 domains with cards of 700 bytes take about 15 ms to read and as much to write.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from onetrunk.bank.names import RULE, is_name
from onetrunk.errors import BankError, DamagedError

FORMAT = 1
MAX_BYTES = 64 << 20
HEAD = b'{\n  "sha256": "'
SEALED_HEAD_BYTES = len(HEAD) + 64  # as much of the file as tells one generation from another
MAX_CARD_DEPTH = 32

_ZEROS = b"0" * 64
_MAX_INT = 1 << 63
_KEYS = {"sha256", "format", "generation", "backbone", "shared", "domains"}
_ENTRY_KEYS = {"digest", "size", "shared", "card"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
# `encode` escapes no letter, so an escaped half of a surrogate pair is somebody else's writing.
_SURROGATE = re.compile(r"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Entry:
    """One domain: its own blob, the shared blobs it needs besides, and a light description."""

    digest: str
    size: int
    card: dict[str, Any]
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """One generation of a bank, whole. `shared` has the size of every shared blob by digest."""

    generation: int
    backbone: dict[str, Any]
    domains: Mapping[str, Entry] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)
    format: int = FORMAT

    def blobs(self) -> dict[str, int]:
        """The size of every blob that this generation needs, by digest."""
        sizes = {entry.digest: entry.size for entry in self.domains.values()}
        if self.backbone["blob"] is not None:
            sizes[self.backbone["blob"]] = self.backbone["size"]
        return {**sizes, **self.shared}


def digest_of(data: bytes) -> str:
    """The name of a blob: its SHA-256 in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def encode(manifest: Manifest) -> bytes:
    """The bytes of `bank.json`: pretty where a person looks, one line a domain, and sealed."""
    parts = (
        f'"sha256": "{_ZEROS.decode()}"',
        f'"format": {manifest.format}',
        f'"generation": {manifest.generation}',
        f'"backbone": {_json(manifest.backbone)}',
        f'"shared": {_lines(manifest.shared.items())}',
        f'"domains": {_lines((name, vars(entry)) for name, entry in manifest.domains.items())}',
    )
    data = ("{\n  " + ",\n  ".join(parts) + "\n}\n").encode()
    if len(data) > MAX_BYTES:
        raise BankError(
            f"the manifest would have {len(data):,} bytes, and {MAX_BYTES:,} is the limit. "
            "Put less into the domains' cards, or split the bank."
        )
    return HEAD + _seal(data) + data[SEALED_HEAD_BYTES:]


def decode(data: bytes, source: str) -> Manifest:
    """Reads the bytes of `bank.json`; `source` names the file in the messages (DamagedError)."""
    try:
        return _decode(data)
    except RecursionError:
        raise _refusal(source, "its values are nested too deeply") from None
    except _Newer as newer:
        raise BankError(
            f"{source} has format {newer}, and this onetrunk reads format {FORMAT}: it was written "
            "by a newer onetrunk. Upgrade onetrunk to read it."
        ) from None
    except ValueError as error:
        raise _refusal(source, str(error)) from None


def plain_card(card: object, what: str) -> dict[str, Any]:
    """A copy of `card` as JSON gives it back (tuples become lists); BankError where it cannot."""
    if not isinstance(card, dict):
        raise BankError(f"{what} is a {type(card).__name__}, and a dict was expected.")
    _check_plain(card, what, MAX_CARD_DEPTH)
    copy: dict[str, Any] = json.loads(_json(card))
    return copy


class _Newer(Exception):
    """The manifest has a format of the future: its number."""


def _refusal(source: str, found: str) -> DamagedError:
    return DamagedError(f"{source} is damaged: {found}. Restore it from a copy.")


def _seal(data: bytes) -> bytes:
    """SHA-256 of `data` with zeros where the seal stands, as 64 ASCII digits."""
    sha256 = hashlib.sha256(HEAD + _ZEROS)
    sha256.update(memoryview(data)[SEALED_HEAD_BYTES:])
    return sha256.hexdigest().encode()


def _json(value: object) -> str:
    try:
        return _ENCODER.encode(value)
    except RecursionError:
        raise BankError(
            "the manifest has a card that is nested too deeply to be written."
        ) from None


def _lines(items: Iterable[tuple[str, object]]) -> str:
    lines = [f'    "{key}": {_json(value)}' for key, value in items]
    return "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"


def _decode(data: bytes) -> Manifest:
    if not data.startswith(HEAD):
        raise ValueError("it does not begin as a manifest does")
    if data[len(HEAD) : SEALED_HEAD_BYTES] != _seal(data):
        raise ValueError("its bytes are not those that its first line's SHA-256 was taken of")
    found = _parse(data.decode())
    _check_format(found.get("format"))
    _check_keys(found, _KEYS, "the manifest")
    _require(_is_count(found["generation"]) and found["generation"] > 0, "the generation", "1, 2..")
    check_backbone(found["backbone"])
    _require(isinstance(found["shared"], dict), "'shared'", "an object")
    for digest, size in found["shared"].items():
        _require(is_digest(digest), "a shared blob's name", "64 of 0-9 a-f")
        _require(_is_count(size), f"the size of shared blob {digest[:12]}...", "a whole number")
    _require(isinstance(found["domains"], dict), "'domains'", "an object")
    domains = {name: _entry(name, x, found["shared"]) for name, x in found["domains"].items()}
    return Manifest(found["generation"], found["backbone"], domains, found["shared"])


def check_backbone(backbone: object) -> None:
    """Refuses (ValueError) a description of a backbone that lacks what a bank needs to know."""
    if not isinstance(backbone, dict):
        raise ValueError("the backbone is not an object")
    for key in ("spec", "fingerprint"):
        _require(isinstance(backbone.get(key), str), f"the backbone's {key!r}", "a text")
    if not {"blob", "size"} <= backbone.keys():
        raise ValueError("the backbone has no 'blob' or no 'size'")
    if backbone["blob"] is None and backbone["size"] is None:
        return
    _require(is_digest(backbone["blob"]), "the backbone's blob", "64 of 0-9 a-f")
    _require(_is_count(backbone["size"]), "the backbone's size", "a whole number")


def _entry(name: str, found: object, shared: Mapping[str, int]) -> Entry:
    if not is_name(name):
        raise ValueError(f"{name[:80]!r} is no name for a domain: names are {RULE}")
    if not isinstance(found, dict):
        raise ValueError(f"domain {name!r} is not an object")
    if found.keys() != _ENTRY_KEYS:
        _check_keys(found, _ENTRY_KEYS, f"domain {name!r}")
    digest, size, card = found["digest"], found["size"], found["card"]
    if not is_digest(digest):
        raise ValueError(f"the digest of domain {name!r} is not 64 of 0-9 a-f")
    if not _is_count(size):
        raise ValueError(f"the size of domain {name!r} is not a whole number")
    if not isinstance(card, dict):
        raise ValueError(f"the card of domain {name!r} is not an object")
    return Entry(digest, size, card, _shared(name, found["shared"], shared))


def _shared(name: str, found: object, shared: Mapping[str, int]) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(digest, str) for digest in found):
        raise ValueError(f"'shared' of domain {name!r} is not a list of texts")
    for digest in found:
        if digest not in shared:
            raise ValueError(f"domain {name!r} needs a shared blob that the manifest does not list")
    return tuple(found)


def _parse(text: str) -> dict[str, Any]:
    if ("\\ud" in text or "\\uD" in text) and _SURROGATE.search(text):  # the search takes 30 ms
        raise ValueError("it has an escaped surrogate")
    found = json.loads(
        text,
        object_pairs_hook=_unique,
        parse_float=_finite,
        parse_constant=_no_constant,
    )
    # The first key is "sha256", as the head was compared: the value is an object.
    assert isinstance(found, dict)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:80]} is too large")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _check_format(found: object) -> None:
    if not _is_count(found) or found < 1:
        raise ValueError("its 'format' is not 1, 2..")
    if found > FORMAT:
        raise _Newer(found)


def _check_keys(found: dict[str, Any], expected: set[str], what: str) -> None:
    if unknown := sorted(found.keys() - expected):
        raise ValueError(f"{what} has the unknown key {unknown[0][:80]!r}")
    if missing := sorted(expected - found.keys()):
        raise ValueError(f"{what} has no {missing[0]!r}")


def _require(holds: bool, what: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not {expected}")


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_INT


def _check_plain(value: object, what: str, depth: int) -> None:
    if depth == 0:
        raise BankError(f"{what} is nested more than {MAX_CARD_DEPTH} deep. Flatten it.")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise BankError(f"{what} has the key {key!r}, and JSON's keys are str.")
            _check_plain(key, what, depth)
            _check_plain(inner, f"{what}[{key!r}]", depth - 1)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{what}[{i}]", depth - 1)
    elif not _is_plain_leaf(value):
        raise BankError(
            f"{what} is {repr(value)[:80]} of type {type(value).__name__}. A card is plain JSON: "
            "dicts, lists, str, bool, None, 64-bit int and finite float."
        )


def _is_plain_leaf(value: object) -> bool:
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) < _MAX_INT
    return value is None
