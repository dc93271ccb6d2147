"""Basis: what several domains' adapters have in common, as a value.

Per site one factor (or two, where both sides are shared), the plan of a domain over it, and the
backbone that it belongs to. Its fingerprint is the SHA-256 over all of that, so that a domain and
its basis find each other again on disk.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..tensorfile import fingerprint_of
from .adapters import Family, Shared

Factors = Mapping[str, Mapping[str, Tensor]]  # site -> name of the shared factor -> its numbers


@dataclass(frozen=True, eq=False)
class Basis:
    """The shared factors of compressed adapters; equal to another where the fingerprints are.

    Args:
        factors: site -> `left_or` (o, r), `right_ri` (r, i) or both.
        plan: site -> family of a domain over this basis; `Shared` at the sites above.
        backbone: fingerprint of the backbone that it was made over.

    The factors are shared by every domain over them: nobody may write to them.
    """

    factors: Factors
    plan: Mapping[str, Family]
    backbone: str
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", self.taken_now())

    def taken_now(self) -> str:
        """The fingerprint of what the factors hold by now."""
        plan = json.dumps({site: str(family) for site, family in sorted(self.plan.items())})
        text = f"{self.backbone}\0{plan}\0{fingerprint_of(self.tensors())}"
        return hashlib.sha256(text.encode()).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """`site.factor` -> numbers: what a bank stores, once for all domains over it."""
        return {
            f"{site}.{name}": tensor
            for site, factors in self.factors.items()
            for name, tensor in factors.items()
        }

    def on(self, device: torch.device) -> "Basis":
        """The same basis on another device; itself where it lies there."""
        if all(tensor.device == device for tensor in self.tensors().values()):
            return self
        moved = {s: {n: t.to(device) for n, t in f.items()} for s, f in self.factors.items()}
        return replace(self, factors=moved)

    @property
    def numbers(self) -> int:
        """Numbers in the shared factors."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def n_bytes(self) -> int:
        """Their bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def share(self) -> str:
        """The side or sides that are shared: `output`, `input`, `both`; empty without sites."""
        kinds = {family.share for family in self.plan.values() if isinstance(family, Shared)}
        return " + ".join(sorted(kinds))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __deepcopy__(self, memo: object) -> "Basis":
        return self  # a value: copies of a domain's network share it

    def __repr__(self) -> str:
        return (
            f"Basis({self.share or 'empty'}, {len(self.factors)} sites, {self.numbers:,} numbers, "
            f"{self.fingerprint[:12]})"
        )
