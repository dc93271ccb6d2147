"""A domain's card: everything that its file says besides the numbers, written and read strictly.

The card stands in the domain's own file; the manifest repeats its light part (`LIGHT`), so that a
listing reads no file. Whatever a card says is checked before anything is built from it: a wrong
type, an unknown key, a second way to say the same, or a size that the file's numbers do not bear
out is a DamagedError that names the file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..core.adapters import Family, read_family
from ..core.attach import build
from ..core.basis import Basis
from ..core.domain import Domain, Scope
from ..data import Preprocessing
from ..errors import BankError, DamagedError
from .manifest import plain_card

FORMAT = 4  # the newest that is read; a domain is written as the first one that can say it
WITHOUT_BASIS, WITH_BASIS, WITH_HELD_NORMS, WITHOUT_STATISTICS = 1, 2, 3, 4
LIGHT = ("family", "classes", "preprocessing", "metrics", "provenance", "numbers")
REST = ("domain", "backbone", "scope", "plan", "skipped", "head", "head_features", "input_size")
KEYS = {*LIGHT, *REST}
MORE_KEYS: dict[Any, set[str]] = {
    WITHOUT_BASIS: set(),
    WITH_BASIS: {"basis"},
    WITH_HELD_NORMS: {"basis", "held"},  # its basis is null where it has none
    WITHOUT_STATISTICS: {"basis", "held"},  # and `held` is empty where it has none
}
MAX_FAMILY_LETTERS = 200
MAX_INPUT_NUMBERS = 1 << 26  # of one image: 256 MB in float32


@dataclass(frozen=True)
class Card:
    """What the manifest says of one domain, without reading its file.

    Args:
        name: the domain's name in this bank.
        family: the written form of what was attached.
        classes: names of the classes, in the order of the logits.
        preprocessing: from an image to the network's input.
        metrics: figures that were given with it, e.g. {"test_accuracy": 0.94}.
        provenance: where it comes from: versions, data, recipe.
        numbers: how many numbers are its own.
        size: bytes of its file.
        digest: SHA-256 of its file.
    """

    name: str
    family: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]
    numbers: int
    size: int
    digest: str


@dataclass(frozen=True)
class Blueprint:
    """What a domain's network is built from, checked."""

    fingerprint: str
    scope: Scope
    family: str
    plan: Mapping[str, Family]
    skipped: Mapping[str, str]
    classes: tuple[str, ...]
    head: tuple[str, ...]
    head_features: int
    preprocessing: Preprocessing | None
    input_size: tuple[int, int, int] | None
    numbers: int
    basis: str | None = None  # fingerprint of what its adapters share with other domains'
    held: tuple[str, ...] = ()  # norms that stay the backbone's
    whole: bool = True  # else the file leaves out norm statistics that are the backbone's

    def build(self, backbone: nn.Module, basis: Basis | None = None) -> nn.Module:
        """The network over `backbone`, its own numbers still those of a fresh domain."""
        return build(
            backbone,
            scope=self.scope,
            family=self.family,
            plan=self.plan,
            skipped=self.skipped,
            classes=self.classes,
            head=self.head,
            head_features=self.head_features,
            preprocessing=self.preprocessing,
            input_size=self.input_size,
            basis=basis,
            held=self.held,
        )

    def refuse_unborne(self, tensors: Mapping[str, Tensor], backbone: nn.Module) -> None:
        """Refuses (ValueError) sizes beyond the file's numbers, which would cost memory."""
        n_numbers = sum(tensor.numel() for tensor in tensors.values())
        _require(self.numbers == n_numbers, "numbers", f"the {n_numbers:,} that the file has")
        n_head = self.head_features * len(self.classes)
        _require(n_head <= n_numbers, "head_features", "borne out by the file's numbers")
        for name in self.head:
            own = [tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")]
            n_rows = {tensor.shape[0] for tensor in own if tensor.ndim}
            _require(len(self.classes) in n_rows, "classes", f"the rows of the file's {name}")
            weight, layer = tensors.get(f"{name}.weight"), backbone.get_submodule(name)
            n_features = getattr(layer, "in_features", self.head_features) or self.head_features
            if weight is not None and weight.ndim == 2 and n_features:
                _require(n_features == weight.shape[1], "head_features", str(weight.shape[1]))


def write_card(
    domain: Domain,
    tensors: Mapping[str, Tensor],
    backbone: Mapping[str, str],
    metrics: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    what: str,
    *,
    whole: bool = True,
) -> dict[str, Any]:
    """The card of a domain's network over its file's `tensors`; `what` names it in errors.

    Args:
        whole: whether they are all that is the domain's; else norm statistics are left out.

    Raises:
        BankError: where metrics or provenance are not plain JSON values.
    """
    preprocessing, version = domain.preprocessing, _format_of(domain, whole)
    versions = {"onetrunk": __version__, "torch": str(torch.__version__)}
    card: dict[str, Any] = {
        "domain": version,
        "backbone": dict(backbone),
        "family": domain.family,
        "scope": domain.scope,
        "plan": write_plan(domain.plan),
        "skipped": dict(domain.skipped),
        "classes": list(domain.classes),
        "head": list(domain.head),
        "head_features": domain.head_features,
        "preprocessing": None if preprocessing is None else preprocessing.to_json(),
        "input_size": None if domain.input_size is None else list(domain.input_size),
        "numbers": sum(tensor.numel() for tensor in tensors.values()),
    }
    if domain.basis is not None:
        card["basis"] = domain.basis.fingerprint
    if version in (WITH_HELD_NORMS, WITHOUT_STATISTICS):
        card |= {"basis": card.get("basis"), "held": list(domain.held)}
    try:
        card["metrics"] = _without_scalars(metrics or {})
        card["provenance"] = _without_scalars({**versions, **(provenance or {})})
    except RecursionError:
        raise BankError(f"{what} holds a value that holds itself. Flatten it.") from None
    return plain_card(card, what)


def _format_of(domain: Domain, whole: bool) -> int:
    if not whole:
        return WITHOUT_STATISTICS
    if domain.held:
        return WITH_HELD_NORMS
    return WITHOUT_BASIS if domain.basis is None else WITH_BASIS


def write_plan(plan: Mapping[str, Family]) -> dict[str, list[str]]:
    """A plan as a card has it: family's written form -> sites."""
    sites: dict[str, list[str]] = {}
    for site, family in plan.items():
        sites.setdefault(str(family), []).append(site)
    return sites


def light(card: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a card that the manifest repeats."""
    return {key: card[key] for key in LIGHT}


def read_light(name: str, found: Mapping[str, Any], *, size: int, digest: str, origin: str) -> Card:
    """The manifest's part of a card.

    Raises:
        DamagedError: where it is not what was written.
    """
    try:
        _require(found.keys() == set(LIGHT), "its keys", f"{', '.join(LIGHT)}")
        return Card(
            name=name,
            family=_text(found, "family"),
            classes=_classes(found),
            preprocessing=_preprocessing(found),
            metrics=_object(found, "metrics"),
            provenance=_object(found, "provenance"),
            numbers=_count(found, "numbers"),
            size=size,
            digest=digest,
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        raise _unreadable(origin, error) from None


def read_blueprint(card: dict[str, Any], origin: str) -> Blueprint:
    """What a domain's own file says of its network; `origin` names the file in errors.

    Raises:
        DamagedError: where the card is not what was written.
        BankError: where a newer onetrunk wrote it.
    """
    version = card.get("domain")
    if type(version) is int and version > FORMAT:
        raise BankError(
            f"{origin} has format {version}, and this onetrunk reads format {FORMAT}: it was "
            "written by a newer onetrunk. Upgrade onetrunk to read it."
        )
    try:
        return _blueprint(plain_card(card, "the card"))
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise _unreadable(origin, error) from None


def _blueprint(card: Mapping[str, Any]) -> Blueprint:
    version = card.get("domain")
    _require(type(version) is int and version in MORE_KEYS, "domain", "format 1, 2, 3 or 4")
    keys = KEYS | MORE_KEYS[version]
    _require(card.keys() == keys, "its keys", ", ".join(sorted(keys)))
    held = _texts(card, "held") if "held" in keys else ()
    if "held" in keys:
        some = bool(held) or version == WITHOUT_STATISTICS
        _require(some and len(set(held)) == len(held), "held", "one or more different names")
        _require(card["scope"] == "adapters" or not held, "scope", "adapters, where norms are held")
    with_basis = version == WITH_BASIS or card.get("basis") is not None
    scope = _text(card, "scope")
    _require(scope in get_args(Scope), "scope", " or ".join(get_args(Scope)))
    for key in ("metrics", "provenance"):
        _object(card, key)
    skipped = _object(card, "skipped")
    _require(_all_text(skipped.values()), "skipped", "an object of texts")
    return Blueprint(
        fingerprint=_text(_object(card, "backbone"), "fingerprint"),
        scope=cast(Scope, scope),
        family=_text(card, "family"),
        plan=read_plan(_object(card, "plan")),
        skipped=skipped,
        classes=_classes(card),
        head=_texts(card, "head"),
        head_features=_count(card, "head_features"),
        preprocessing=_preprocessing(card),
        input_size=_input_size(card),
        numbers=_count(card, "numbers"),
        basis=_text(card, "basis") if with_basis else None,
        held=held,
        whole=version != WITHOUT_STATISTICS,
    )


def _input_size(card: Mapping[str, Any]) -> tuple[int, int, int] | None:
    found = card["input_size"]
    if found is None:
        return None
    three = isinstance(found, list) and len(found) == 3
    whole = three and all(type(side) is int and side > 0 for side in found)
    fits = whole and math.prod(found) <= MAX_INPUT_NUMBERS
    _require(fits, "input_size", "channels, rows and columns of an image")
    return found[0], found[1], found[2]


def read_plan(found: Mapping[str, Any]) -> dict[str, Family]:
    """A plan from its card (ValueError where it is none)."""
    plan: dict[str, Family] = {}
    for text in found:
        _require(len(text) <= MAX_FAMILY_LETTERS, "plan", "of families with short names")
        family = read_family(text)
        for site in _texts(found, text):
            _require(site not in plan, "plan", f"one family at each site ({site[:80]!r} has two)")
            plan[site] = family
    return plan


def _classes(card: Mapping[str, Any]) -> tuple[str, ...]:
    classes = _texts(card, "classes")
    distinct = len(set(classes)) == len(classes) >= 2
    _require(distinct, "classes", "two or more different names")
    return classes


def _preprocessing(card: Mapping[str, Any]) -> Preprocessing | None:
    found = card["preprocessing"]
    return None if found is None else Preprocessing.from_json(found)


def _text(card: Mapping[str, Any], key: str) -> str:
    _require(isinstance(card.get(key), str), key, "a text")
    return cast(str, card[key])


def _texts(card: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = card[key]
    _require(isinstance(found, list) and _all_text(found), key, "a list of texts")
    return tuple(found)


def _object(card: Mapping[str, Any], key: str) -> dict[str, Any]:
    _require(isinstance(card[key], dict), key, "an object")
    return cast(dict[str, Any], card[key])


def _count(card: Mapping[str, Any], key: str) -> int:
    _require(type(card[key]) is int and card[key] >= 0, key, "a whole number")
    return cast(int, card[key])


def _all_text(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _require(holds: bool, what: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{what[:80]!r} is not {expected}")


def _unreadable(origin: str, error: Exception) -> DamagedError:
    return DamagedError(
        f"{origin}: its card is not what was written: {_one_line(error)}. "
        "Get it again from where it came from."
    )


def _one_line(error: Exception) -> str:
    return f"{error}".replace("\n", " ")[:300].rstrip(".")


def _without_scalars(value: object) -> object:
    """`value` with numpy's and torch's single numbers as Python's own, which JSON has forms for."""
    if isinstance(value, dict):
        return {key: _without_scalars(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_scalars(inner) for inner in value]
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        return value.item()
    return value
