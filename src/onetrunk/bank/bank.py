"""Bank: one backbone and its domains on disk, as networks.

`Store` keeps bytes and names; this room turns domains into files that check themselves and back. A
domain's file holds its own tensors and a card with everything else: family, plan, classes, head,
preprocessing, metrics, provenance, and which backbone it belongs to. The manifest repeats the light
part of the card, so that a listing reads no blob.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..backbones import backbone as build_backbone
from ..backbones import fingerprint
from ..backbones.written_form import build_empty, load_tensors, written_form
from ..core.adapters import read_family
from ..core.attach import Scope, build, delta, domain_of
from ..core.tree import frozen_pairs
from ..data import Preprocessing
from ..errors import BankError, DamagedError, DataError, OnetrunkError
from ..files import read_checked, write_atomically
from ..tensorfile import pack, unpack
from .store import Contents, Store

FORMAT = 1
LIGHT = ("family", "classes", "preprocessing", "metrics", "provenance", "numbers")


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
class Verification:
    """What `verify` found: `problems` is empty for a whole bank."""

    n_domains: int
    fingerprint: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems


class Domains(Mapping[str, Card]):
    """The bank's domains by name; reads the manifest only."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getitem__(self, name: str) -> Card:
        entry = self._store.manifest.domains[name]
        return _card(name, entry.card, entry.size, entry.digest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.manifest.domains)

    def __len__(self) -> int:
        return len(self._store.manifest.domains)

    def __repr__(self) -> str:
        return f"Domains({', '.join(self)})"


class Bank:
    """One backbone and its domains, in a folder. Open one with `Bank.create` or `Bank.open`.

    >>> import tempfile, onetrunk as ot
    >>> net = ot.backbone("resnet26(width=0.25)")
    >>> bank = Bank.create(tempfile.mkdtemp(), net)
    >>> bank.add("flowers", ot.attach(net, ot.Parallel(), ["daisy", "rose"]))
    >>> list(bank.domains), bank.load("flowers").domain.classes
    (['flowers'], ('daisy', 'rose'))
    """

    def __init__(self, store: Store, backbone: nn.Module | None) -> None:
        self._store, self._backbone = store, backbone

    @classmethod
    def create(
        cls, path: str | Path, backbone: nn.Module | str, *, by_reference: bool = False
    ) -> "Bank":
        """A bank without domains in a new or empty folder.

        Args:
            backbone: the module, or its written form.
            by_reference: keep the backbone's name and fingerprint only, not its weights; they are
                fetched by name again when the bank is opened, and checked.

        Raises:
            BankError: where the folder is not empty, or a user's own module is to be kept by
                reference (nothing could bring it back).
        """
        module = build_backbone(backbone) if isinstance(backbone, str) else backbone
        form = written_form(module)
        if by_reference and form.startswith("module:"):
            raise BankError(
                f"{form} cannot be kept by reference: it has no name that brings its weights back. "
                "Leave by_reference out, so that the bank holds them."
            )
        described = {"spec": form, "fingerprint": fingerprint(module)}
        blob = (
            None if by_reference else pack(module.state_dict(), {"backbone": FORMAT, **described})
        )
        return cls(Store.create(path, described, blob), module)

    @classmethod
    def open(cls, path: str | Path, backbone: nn.Module | None = None) -> "Bank":
        """An existing bank; reads its manifest and nothing else.

        Args:
            backbone: the module itself where it is a user's own (`module:...`); elsewhere it saves
                building it. Its fingerprint is checked.

        Raises:
            BankError: where there is no bank, or the backbone is another one.
            DamagedError: where the manifest is not what was written.
        """
        bank = cls(Store.open(path), None)
        if backbone is not None:
            bank._check_fingerprint(fingerprint(backbone), "the backbone that was given")
            bank._backbone = backbone
        return bank

    @property
    def path(self) -> Path:
        """The bank's folder."""
        return self._store.path

    @property
    def domains(self) -> Domains:
        """Cards of the domains by name; always the newest generation."""
        return Domains(self._store)

    @property
    def generation(self) -> int:
        """One more after every change."""
        return self._store.manifest.generation

    @property
    def backbone_form(self) -> str:
        """The backbone's written form."""
        return str(self._store.manifest.backbone["spec"])

    @property
    def backbone_fingerprint(self) -> str:
        """The backbone's SHA-256."""
        return str(self._store.manifest.backbone["fingerprint"])

    @property
    def backbone(self) -> nn.Module:
        """The backbone, in eval mode; built and checked when first asked for, then kept.

        Raises:
            BankError: where it is a user's own module that was not given to `open`, or the weights
                its name brings are not the ones the bank was made with.
        """
        if self._backbone is None:
            self._backbone = self._build_backbone()
        return self._backbone

    def add(
        self,
        name: str,
        model: nn.Module,
        *,
        metrics: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a domain's network under a new name.

        Raises:
            BankError: for a name that is taken or none, a network over another backbone or whose
                shared weights were changed, numbers that are not finite, or a failing disk; the bank
                is then as it was.
        """
        card, blob = self._packed(name, model, metrics, provenance)
        self._store.add(name, _light(card), blob)

    def replace(
        self,
        name: str,
        model: nn.Module,
        *,
        metrics: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a domain's network in the place of another; raises as `add` does."""
        card, blob = self._packed(name, model, metrics, provenance)
        self._store.replace(name, _light(card), blob)

    def rename(self, old: str, new: str) -> None:
        """Calls a domain by another name. Raises BankError where it is taken or none."""
        self._store.rename(old, new)

    def remove(self, name: str) -> None:
        """Removes a domain and frees its space. Raises BankError where there is none."""
        self._store.remove(name)

    def load(self, name: str, *, device: str | torch.device | None = None) -> nn.Module:
        """The network of a domain, in eval mode, over this bank's backbone; bit for bit as added.

        Networks loaded from one Bank share the backbone's memory, as long as they stay on its
        device: `device` moves the backbone there first.

        Raises:
            BankError: where there is no such domain.
            DamagedError: where its file is not what was written, or does not fit the backbone.
        """
        contents = self._store.read(name)
        if device is not None:
            self._backbone = self.backbone.to(device)
        return self._network(contents, f"domain {name!r} of {self.path}")

    def verify(self) -> Verification:
        """Reads everything: every hash, every domain as a network, the backbone's fingerprint.

        A hash finds accidents; against somebody who rewrites files and hashes alike, compare
        `fingerprint` and digests with ones kept elsewhere.
        """
        problems = [f"{p.file}: {p.text}" for p in self._store.verify()]
        try:
            self._check_fingerprint(fingerprint(self.backbone), "the backbone now")
        except OnetrunkError as error:
            problems.append(f"backbone: {error}")
        else:
            for name in self.domains:
                try:
                    self.load(name)
                except OnetrunkError as error:
                    problems.append(f"domain {name!r}: {error}")
        return Verification(
            len(self.domains), self.backbone_fingerprint, tuple(dict.fromkeys(problems))
        )

    def export_domain(self, name: str, path: str | Path) -> None:
        """Writes one domain as one safetensors file that checks itself.

        Raises:
            BankError: where there is no such domain, or the file cannot be written.
        """
        contents = self._store.read(name)
        try:
            write_atomically(path, contents.blob)
        except OSError as error:
            raise BankError(f"{path} could not be written: {error.strerror}.") from error

    def import_domain(self, path: str | Path, name: str) -> None:
        """Adds a domain from a file that `export_domain` wrote.

        Raises:
            DamagedError: where the file is damaged, foreign or hostile.
            BankError: where it belongs to another backbone, or the name is taken or none.
        """
        try:
            blob = read_checked(path)
        except OSError as error:
            raise BankError(f"{path} could not be read: {error.strerror}.") from error
        tensors, card = unpack(blob, str(path))
        self._check_fingerprint(_backbone_of(card, str(path)), f"the domain in {path}")
        self._built(tensors, card, str(path))
        self._store.add(name, _light(card), blob)

    def _packed(
        self,
        name: str,
        model: nn.Module,
        metrics: Mapping[str, Any] | None,
        provenance: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Any], bytes]:
        domain = domain_of(model)
        self._check_fingerprint(fingerprint(domain.backbone), f"domain {name!r}")
        for own, theirs, tensor_name in frozen_pairs(model, domain.backbone, domain.frozen):
            if not torch.equal(own.cpu(), theirs.cpu()):
                raise BankError(
                    f"domain {name!r}: its shared weight {tensor_name} is no longer the "
                    "backbone's, and a bank stores only what is the domain's own. Train with "
                    "fit, or attach Full() to train everything."
                )
        tensors = delta(model)
        _refuse_non_finite(tensors, f"domain {name!r}")
        plan: dict[str, list[str]] = {}
        for site, family in domain.plan.items():
            plan.setdefault(str(family), []).append(site)
        preprocessing = domain.preprocessing
        card = {
            "domain": FORMAT,
            "backbone": {"spec": self.backbone_form, "fingerprint": self.backbone_fingerprint},
            "family": domain.family,
            "scope": domain.scope,
            "plan": plan,
            "skipped": dict(domain.skipped),
            "classes": list(domain.classes),
            "head": list(domain.head),
            "head_features": domain.head_features,
            "preprocessing": None if preprocessing is None else preprocessing.to_json(),
            "metrics": dict(metrics or {}),
            "provenance": {
                "onetrunk": __version__,
                "torch": torch.__version__,
                **(provenance or {}),
            },
            "numbers": sum(t.numel() for t in tensors.values()),
        }
        try:
            return card, pack(tensors, card)
        except (TypeError, ValueError) as error:
            raise BankError(
                f"domain {name!r}: metrics and provenance must be plain JSON values ({error})."
            ) from error

    def _network(self, contents: Contents, origin: str) -> nn.Module:
        tensors, card = unpack(contents.blob, origin)
        self._check_fingerprint(_backbone_of(card, origin), origin)
        return self._built(tensors, card, origin)

    def _built(self, tensors: dict[str, Tensor], card: dict[str, Any], origin: str) -> nn.Module:
        try:
            model = _build(self.backbone, card)
        except (KeyError, TypeError, AttributeError, DataError) as error:
            raise DamagedError(
                f"{origin}: its card cannot be read ({type(error).__name__}: {error})."
            ) from error
        _fill(model, tensors, origin)
        return model.eval()

    def _build_backbone(self) -> nn.Module:
        form, blob = self.backbone_form, self._store.read_backbone()
        if form.startswith("module:"):
            raise BankError(
                f"bank {self.path} was made with a module of your own, {form[7:]}: open it with "
                "Bank.open(path, backbone=that_module)."
            )
        if blob is None:
            module = build_backbone(form)
        else:
            module = build_empty(form)
            load_tensors(module, unpack(blob, f"the backbone of {self.path}")[0], str(self.path))
        self._check_fingerprint(fingerprint(module), f"{form} as it is found now")
        return module

    def _check_fingerprint(self, found: str, what: str) -> None:
        expected = self.backbone_fingerprint
        if found != expected:
            raise BankError(
                f"{what} belongs to backbone {found[:12]}..., bank {self.path} to "
                f"{expected[:12]}... ({self.backbone_form}): the numbers would be meaningless "
                "together. Use the bank's own: Bank.open(path).backbone."
            )


def _light(card: Mapping[str, Any]) -> dict[str, Any]:
    return {key: card[key] for key in LIGHT}


def _card(name: str, light: Mapping[str, Any], size: int, digest: str) -> Card:
    try:
        preprocessing = light["preprocessing"]
        return Card(
            name=name,
            family=str(light["family"]),
            classes=tuple(light["classes"]),
            preprocessing=preprocessing and Preprocessing.from_json(preprocessing),
            metrics=light["metrics"],
            provenance=light["provenance"],
            numbers=light["numbers"],
            size=size,
            digest=digest,
        )
    except (KeyError, TypeError, DataError) as error:
        raise DamagedError(f"domain {name!r}: its card cannot be read ({error}).") from error


def _backbone_of(card: Mapping[str, Any], origin: str) -> str:
    backbone = card.get("backbone")
    if card.get("domain") != FORMAT or not isinstance(backbone, dict):
        raise DamagedError(
            f"{origin}: no domain of this format (found {card.get('domain')!r}, known {FORMAT}). "
            "A newer onetrunk may read it."
        )
    return str(backbone.get("fingerprint"))


def _build(backbone: nn.Module, card: Mapping[str, Any]) -> nn.Module:
    scope: Scope = card["scope"]
    if scope not in ("adapters", "head", "everything"):
        raise TypeError(f"scope {scope!r}")
    families = {text: read_family(text) for text in card["plan"]}
    preprocessing = card["preprocessing"]
    return build(
        backbone,
        scope=scope,
        family=card["family"],
        plan={site: families[text] for text, sites in card["plan"].items() for site in sites},
        skipped=card["skipped"],
        classes=tuple(card["classes"]),
        head=tuple(card["head"]),
        head_features=int(card["head_features"]),
        preprocessing=preprocessing and Preprocessing.from_json(preprocessing),
    )


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    own = delta(model)
    expected = {name: (tuple(t.shape), t.dtype) for name, t in own.items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if expected != found:
        lines = [f"- {n} {v}" for n, v in expected.items() if found.get(n) != v]
        lines += [f"+ {n} {v}" for n, v in found.items() if expected.get(n) != v]
        raise DamagedError(
            f"{origin}: its numbers do not fit what its card describes (- expected, + found):\n"
            + "\n".join(lines[:8])
        )
    _refuse_non_finite(tensors, origin)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _refuse_non_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BankError(f"{what}: {name} holds NaN or infinity. Train the domain again.")
