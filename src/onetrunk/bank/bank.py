"""Bank: one backbone and its domains on disk, as networks.

`Store` keeps bytes and names; this room turns domains into files that check themselves and back. A
domain's file holds its own tensors and a card with everything else: family, plan, classes, head,
preprocessing, metrics, provenance, and which backbone it belongs to. The manifest repeats the light
part of the card, so that a listing reads no blob.

Loading a domain costs a copy of the backbone's module tree (8 ms for ResNet-18) and one pass over
the domain's own bytes, however many domains there are.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import backbone as build_backbone
from ..backbones import fingerprint
from ..backbones.written_form import OWN_MODULE, written_form
from ..core.basis import Basis
from ..core.domain import delta, domain_of, stored
from ..core.rebuild import standalone
from ..core.tree import copy_tree
from ..errors import BankError, DamagedError, OnetrunkError, told
from ..files import PathLike, read_checked, reason, write_atomically
from ..tensorfile import fingerprint_of, pack, unpack
from .backbone import (
    Checked,
    place_of,
    rebuilt,
    refuse_no_backbone,
    refuse_reference,
    stamp_of,
    usable_device,
)
from .basisfile import read_basis, write_basis
from .card import WITHOUT_BASIS, Blueprint, light, read_blueprint, read_light, write_card
from .card import Card as Card
from .folder import MANIFEST, plain_path
from .manifest import Entry, Manifest
from .names import check_name
from .network import (
    differences,
    network_of,
    non_finite,
    refuse_altered,
)
from .store import Contents, Store


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        n_domains: how many domains the bank has.
        fingerprint: the backbone's, as the manifest says it.
        problems: what is damaged and cannot be read, or not as it was; empty for a whole bank.
        remarks: what could not be checked, and files that are no part of the bank.
    """

    n_domains: int
    fingerprint: str
    problems: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems


class Domains(Mapping[str, Card]):
    """The domains of one generation of a bank by name; reads the manifest only."""

    def __init__(self, manifest: Manifest, path: Path) -> None:
        self._entries, self._path = manifest.domains, path

    def __getitem__(self, name: str) -> Card:
        entry = self._entries[name]
        origin = f"domain {name!r} of {self._path}"
        return read_light(name, entry.card, size=entry.size, digest=entry.digest, origin=origin)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Domains({', '.join(self)})"


class Bank:
    """One backbone and its domains, in a folder. Open one with `Bank.create` or `Bank.open`.

    Every method may be called from several threads; several processes may hold one bank.

    >>> import tempfile, onetrunk as ot
    >>> net = ot.backbone("resnet26(width=0.25)")
    >>> bank = Bank.create(tempfile.mkdtemp(), net)
    >>> bank.add("flowers", ot.attach(net, ot.Parallel(), ["daisy", "rose"]))
    >>> list(bank.domains), bank.load("flowers").domain.classes
    (['flowers'], ('daisy', 'rose'))
    """

    def __init__(self, store: Store, backbone: nn.Module | None) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._home = None
        if backbone is not None:
            self._home = Checked.of(backbone, self.backbone_fingerprint)
        self._copies: dict[torch.device, Checked] = {}
        self._bases: weakref.WeakValueDictionary[tuple[str, torch.device], Basis]
        self._bases = weakref.WeakValueDictionary()  # as long as a network lies over one

    @classmethod
    def create(
        cls, path: PathLike, backbone: nn.Module | str, *, by_reference: bool = False
    ) -> "Bank":
        """A bank without domains in a new or empty folder.

        Args:
            backbone: the module, or its written form.
            by_reference: keep the backbone's name and fingerprint only, not its weights; they are
                fetched by name again when the bank is opened, and checked.

        Raises:
            BankError: where the folder is not empty, or `by_reference` is asked for and the name
                does not bring these very weights back.
        """
        module = build_backbone(backbone) if isinstance(backbone, str) else backbone
        refuse_no_backbone(module)
        form, found = written_form(module), fingerprint(module)
        if by_reference:
            refuse_reference(form, found, known=isinstance(backbone, str))
        described = {"spec": form, "fingerprint": found}
        blob = (
            None
            if by_reference
            else pack(module.state_dict(), {"backbone": WITHOUT_BASIS, **described})
        )
        return cls(Store.create(path, described, blob), module)

    @classmethod
    def open(cls, path: PathLike, backbone: nn.Module | None = None) -> "Bank":
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
            refuse_no_backbone(backbone)
            bank._check_fingerprint(fingerprint(backbone), "the backbone that was given")
            bank._home = Checked.of(backbone, bank.backbone_fingerprint)
        return bank

    @classmethod
    def open_or_create(cls, path: PathLike, backbone: nn.Module) -> "Bank":
        """The bank at `path`, or a new one where there is none yet; see `open` and `create`."""
        return cls.open(path, backbone) if is_bank(path) else cls.create(path, backbone)

    @property
    def path(self) -> Path:
        """The bank's folder."""
        return self._store.path

    @property
    def domains(self) -> Domains:
        """Cards of the domains by name, as they are now: the newest generation, whole."""
        return Domains(self._store.manifest, self.path)

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
    def by_reference(self) -> bool:
        """Whether the backbone's weights are kept by name only."""
        return self._store.manifest.backbone["blob"] is None

    @property
    def basis_bytes(self) -> int:
        """Bytes of the bases that compressed domains share, each counted once."""
        return sum(self._store.manifest.shared.values())

    @property
    def backbone(self) -> nn.Module:
        """The backbone; built in eval mode and checked when first asked for, then kept.

        Raises:
            BankError: where it is a user's own module that was not given to `open`, or its weights
                are not, or no longer, the ones that the bank was made with. What is written through
                `.data`, PyTorch counts nowhere: `verify` finds it.
        """
        with self._lock:
            if self._home is None:
                self._home = self._build_backbone()
            self._recheck(self._home)
            return self._home.module

    def add(
        self,
        name: str,
        model: nn.Module,
        *,
        metrics: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a domain's network under a new name. Only what is the domain's own is written.

        The basis of compressed domains goes in with the first of them, once.

        Args:
            metrics: figures to keep with it, e.g. {"test_accuracy": 0.94}; plain JSON values, or
                numpy's and torch's single numbers.
            provenance: where it comes from, likewise; the versions in use are added.

        Raises:
            BankError: for a name that is taken or none, a network over another backbone or whose
                shared weights were changed, numbers that are not finite, metrics that are no JSON,
                or a failing disk; the bank is then as it was.
            AttachError: where `model` is no domain's network.
        """
        card, blob, shared = self._packed(name, model, metrics, provenance)
        self._store.add(name, light(card), blob, shared)

    def replace(
        self,
        name: str,
        model: nn.Module,
        *,
        metrics: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a domain's network in the place of another; raises as `add` does."""
        card, blob, shared = self._packed(name, model, metrics, provenance)
        self._store.replace(name, light(card), blob, shared)

    def rename(self, old: str, new: str) -> None:
        """Calls a domain by another name. Raises BankError where it is taken or none."""
        self._store.rename(old, new)

    def remove(self, name: str) -> None:
        """Removes a domain and frees its space. Raises BankError where there is none."""
        self._store.remove(name)

    def load(self, name: str, *, device: str | torch.device | None = None) -> nn.Module:
        """The network of a domain, in eval mode, over this bank's backbone; bit for bit as added.

        Networks loaded from one Bank share the backbone's memory, once per device, and compressed
        ones that of their basis. The backbone itself stays where it is.

        Args:
            device: where the network is to be; by default where the backbone is.

        Raises:
            BankError: where there is no such domain or device.
            DamagedError: where its file is not what was written, or does not fit the backbone.
        """
        held = self._intact_bases(name)
        contents = self._store.read(name, have={digest for digest, _ in held})
        origin = self._origin(name)
        tensors, blueprint = self._read(contents.entry, contents.blob, origin)
        backbone = self._backbone_on(device)
        basis = self._basis_of(contents, blueprint, held, place_of(backbone), origin)
        return network_of(blueprint, tensors, backbone, origin, basis)

    def verify(self) -> Verification:
        """Reads everything: every hash, every domain as a network, the backbone's fingerprint.

        Nothing is raised: what is wrong stands in the answer. A hash finds accidents; against
        somebody who rewrites files and hashes alike, compare `fingerprint` and digests with ones
        kept elsewhere.
        """
        try:
            manifest = self._store.manifest
        except OnetrunkError as error:
            return Verification(0, "", (str(error),))
        found = self._store.verify()
        problems = [f"{p.file}: {p.what}" for p in found if p.kind == "damaged"]
        remarks = [f"{p.file}: {p.what}" for p in found if p.kind != "damaged"]
        backbone = self._verify_backbone(manifest, problems, remarks)
        for name in manifest.domains:
            problems += self._verify_domain(name, backbone)
        return Verification(
            len(manifest.domains), str(manifest.backbone["fingerprint"]),
            tuple(dict.fromkeys(problems)), tuple(remarks),
        )  # fmt: skip

    def export_domain(self, name: str, path: PathLike) -> None:
        """Writes one domain as one safetensors file that checks itself.

        A compressed domain is written without its basis, as an ordinary one that computes the same.

        Raises:
            BankError: where there is no such domain, or the file cannot be written.
        """
        contents = self._store.read(name)
        blob, entry = contents.blob, contents.entry
        if entry.shared:
            card = read_light(
                name, entry.card, size=entry.size, digest=entry.digest, origin=self._origin(name)
            )
            alone = standalone(self.load(name))
            _, blob, _ = self._packed(name, alone, card.metrics, card.provenance)
        try:
            write_atomically(plain_path(path), blob)
        except OSError as error:
            raise BankError(f"{path} cannot be written: {reason(error)}") from error

    def import_domain(self, path: PathLike, name: str) -> None:
        """Adds a domain from a file that `export_domain` wrote.

        Raises:
            DamagedError: where the file is damaged, foreign or hostile.
            BankError: where it belongs to another backbone, or the name is taken or none.
        """
        check_name(name)
        try:
            blob = read_checked(plain_path(path))
        except OSError as error:
            raise BankError(f"{path} cannot be read: {reason(error)}") from error
        tensors, card = unpack(blob, str(path))
        blueprint = read_blueprint(card, str(path))
        self._check_fingerprint(blueprint.fingerprint, f"the domain in {path}")
        if blueprint.basis is not None:
            raise BankError(
                f"{path} lies over a basis that it does not hold. Write it with export_domain, "
                "which takes the basis in."
            )
        network_of(blueprint, tensors, self.backbone, str(path))
        self._store.add(name, light(card), blob)

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        message: str | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Uploads this bank to the Hugging Face Hub; see `onetrunk.bank.hub.push`."""
        from .hub import push

        return push(
            self, repo_id, private=private, token=token, revision=revision, message=message,
            endpoint=endpoint,
        )  # fmt: skip

    @classmethod
    def pull(
        cls,
        repo_id: str,
        path: PathLike,
        *,
        revision: str | None = None,
        token: str | None = None,
        backbone: nn.Module | None = None,
        endpoint: str | None = None,
    ) -> "Bank":
        """Downloads a bank from the Hugging Face Hub; see `onetrunk.bank.hub.pull`."""
        from .hub import pull

        return pull(
            repo_id, path, revision=revision, token=token, backbone=backbone, endpoint=endpoint
        )

    def _origin(self, name: str) -> str:
        return f"domain {name!r} of {self.path}"

    def _packed(
        self,
        name: str,
        model: nn.Module,
        metrics: Mapping[str, Any] | None,
        provenance: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Any], bytes, list[bytes]]:
        """A domain's card, its own file's bytes, and those of its basis where it has one."""
        check_name(name)
        domain = domain_of(model)
        self._check_fingerprint(fingerprint(domain.backbone), f"domain {name!r}")
        if domain.basis is not None:
            self._check_fingerprint(domain.basis.backbone, f"the basis of domain {name!r}")
        refuse_altered(name, model, domain)
        own, tensors = delta(model), stored(model)
        if (bad := non_finite(own)) is not None:
            raise BankError(
                f"domain {name!r}: {bad} holds NaN or infinity, and a bank stores finite numbers "
                "only. Train the domain again, with a smaller learning rate."
            )
        backbone = {"spec": self.backbone_form, "fingerprint": self.backbone_fingerprint}
        what = f"the card of domain {name!r}"
        whole = len(tensors) == len(own)
        card = write_card(domain, tensors, backbone, metrics, provenance, what, whole=whole)
        twin = read_blueprint(card, what).build(domain.backbone, domain.basis)
        if unlike := differences(delta(twin), own):
            raise BankError(
                f"domain {name!r}: its network was altered after attach, and the bank could not "
                f"build it again (- expected, + found):\n{unlike}"
            )
        return (
            card,
            pack(tensors, card),
            [] if domain.basis is None else [write_basis(domain.basis)],
        )

    def _intact_bases(self, name: str) -> dict[tuple[str, torch.device], Basis]:
        """The domain's bases in memory that nobody has written to: another is read again."""
        entry = self._store.manifest.domains.get(name)
        digests = () if entry is None else entry.shared
        held = {key: basis for key, basis in list(self._bases.items()) if key[0] in digests}
        return {key: basis for key, basis in held.items() if basis.taken_now() == basis.fingerprint}

    def _basis_of(
        self,
        contents: Contents,
        blueprint: Blueprint,
        held: Mapping[tuple[str, torch.device], Basis],
        place: torch.device,
        origin: str,
        *,
        trusted: bool = True,
    ) -> Basis | None:
        """The basis that a domain lies over, from memory or from its blob."""
        digests = contents.entry.shared
        if (blueprint.basis is None) != (not digests) or len(digests) > 1:
            raise DamagedError(
                f"{origin}: its file and the manifest disagree about its basis. "
                "Restore the bank from a copy, or replace the domain."
            )
        if blueprint.basis is None:
            return None
        known = {device: basis for (digest, device), basis in held.items() if digest == digests[0]}
        basis = known.get(place) or next(iter(known.values()), None)
        if basis is None:
            what = f"the basis of {origin}"
            basis = read_basis(contents.shared[digests[0]], what, trusted=trusted)
        self._check_fingerprint(basis.backbone, f"the basis of {origin}")
        if basis.fingerprint != blueprint.basis:
            raise DamagedError(
                f"{origin}: it lies over basis {blueprint.basis[:12]}..., and the bank has "
                f"{basis.fingerprint[:12]}... for it. Restore the bank from a copy."
            )
        if place not in known:
            basis = basis.on(place)
        self._bases[digests[0], place] = basis
        return basis

    def _read(self, entry: Entry, blob: bytes, origin: str) -> tuple[dict[str, Tensor], Blueprint]:
        """The numbers and the blueprint of a blob whose hash the store has checked."""
        tensors, card = unpack(blob, origin, trusted=True)
        blueprint = read_blueprint(card, origin)
        self._check_fingerprint(blueprint.fingerprint, origin)
        if light(card) != entry.card:
            raise DamagedError(
                f"{origin}: the bank's manifest and the domain's own file describe it differently. "
                "Restore the bank from a copy, or replace the domain."
            )
        return tensors, blueprint

    def _build_backbone(self) -> Checked:
        form = self.backbone_form
        module = rebuilt(form, self._store.read_backbone(), self.path)
        found = fingerprint(module)
        self._check_fingerprint(found, f"{form} as it is found now")
        return Checked.of(module, found)

    def _backbone_on(self, device: str | torch.device | None) -> nn.Module:
        home = self.backbone
        if device is None:
            return home
        place = usable_device(device)
        if all(tensor.device == place for tensor in home.state_dict().values()):
            return home
        with self._lock:
            if place not in self._copies:
                assert self._home is not None  # it was asked for above
                moved = copy_tree(home).to(place)
                self._copies[place] = Checked.of(moved, self._home.fingerprint)
            self._recheck(self._copies[place])
            return self._copies[place].module

    def _recheck(self, checked: Checked) -> None:
        """Takes the fingerprint again where a tensor was written to since it was last taken."""
        if checked.fingerprint != self.backbone_fingerprint:
            raise BankError(
                f"the bank at {self.path} was made anew over another backbone since it was opened. "
                "Open it again: Bank.open(path)."
            )
        stamp = stamp_of(checked.module)
        if stamp != checked.stamp:
            self._check_fingerprint(
                fingerprint(checked.module), "this bank's backbone as it is now"
            )
            checked.stamp = stamp

    def _check_fingerprint(self, found: str, what: str) -> None:
        expected = self.backbone_fingerprint
        if found != expected:
            raise BankError(
                f"{what} belongs to backbone {found[:12]}..., bank {self.path} to "
                f"{expected[:12]}... ({self.backbone_form}): the numbers would be meaningless "
                "together. Use the bank's own, Bank.open(path).backbone, and leave its weights as "
                "they are."
            )

    def _verify_backbone(
        self, manifest: Manifest, problems: list[str], remarks: list[str]
    ) -> nn.Module | None:
        form, blob = manifest.backbone["spec"], manifest.backbone["blob"]
        try:
            if blob is not None:
                data = self._store.read_blob(blob, manifest.backbone["size"])
                tensors, _ = unpack(data, f"the backbone of {self.path}")
                what = f"the stored backbone of {self.path}"
                self._check_fingerprint(fingerprint_of(tensors), what)
            if form.startswith(OWN_MODULE) and self._home is None:
                remarks.append(
                    f"the domains were read and not built: their backbone is a module of your own, "
                    f"{form.removeprefix(OWN_MODULE)}. Give it to Bank.open."
                )
                return None
            home = self.backbone
            for held in (self._home, *self._copies.values()):
                if held is not None:  # all of it: what is written through .data leaves no stamp
                    found = fingerprint(held.module)
                    self._check_fingerprint(found, "this bank's backbone as it is in memory")
            return home
        except Exception as error:  # a report leaves nothing out
            problems.append(f"backbone: {told(error)}")
            return None

    def _verify_domain(self, name: str, backbone: nn.Module | None) -> list[str]:
        try:
            self.domains[name]
            contents = self._store.read(name)
            origin = self._origin(name)
            unpack(contents.blob, origin)
            tensors, blueprint = self._read(contents.entry, contents.blob, origin)
            place = torch.device("cpu") if backbone is None else place_of(backbone)
            basis = self._basis_of(contents, blueprint, {}, place, origin, trusted=False)
            if backbone is not None:
                network_of(blueprint, tensors, backbone, origin, basis)
        except KeyError:
            return []  # removed since
        except Exception as error:  # a report leaves nothing out
            return [f"domain {name!r}: {told(error)}"]
        return []


def is_bank(path: PathLike) -> bool:
    """Whether a bank was made at `path`: what a creation leaves that was killed is none."""
    return (Path(path) / MANIFEST).exists()
