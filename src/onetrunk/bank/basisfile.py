"""A basis as one blob of a bank: the shared factors, and what says which basis it is.

The card holds the format, the backbone's fingerprint, the plan of a domain over the basis, and the
basis' own fingerprint, which is taken again from what was read.
"""

from typing import Any

from ..core.adapters import Shared
from ..core.basis import Basis
from ..errors import BankError, DamagedError, OnetrunkError
from ..tensorfile import pack, unpack
from .card import read_plan, write_plan
from .manifest import plain_card

FORMAT = 1
KEYS = {"basis", "backbone", "plan", "fingerprint"}


def write_basis(basis: Basis) -> bytes:
    """The bytes of a basis; equal ones give equal bytes."""
    card = {
        "basis": FORMAT,
        "backbone": basis.backbone,
        "plan": write_plan(basis.plan),
        "fingerprint": basis.fingerprint,
    }
    return pack(basis.tensors(), plain_card(card, "the card of a basis"))


def read_basis(blob: bytes, origin: str, *, trusted: bool = False) -> Basis:
    """The basis that `write_basis` wrote; `origin` names it in errors, `trusted` as in `unpack`.

    Raises:
        DamagedError: where it is not what was written.
        BankError: where a newer onetrunk wrote it.
    """
    tensors, card = unpack(blob, origin, trusted=trusted)
    version = card.get("basis")
    if type(version) is int and version > FORMAT:
        raise BankError(
            f"{origin} has format {version}, and this onetrunk reads format {FORMAT}: it was "
            "written by a newer onetrunk. Upgrade onetrunk to read it."
        )
    try:
        plan = read_plan(_described(card)["plan"])
        factors: dict[str, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            site, _, name = key.rpartition(".")
            factors.setdefault(site, {})[name] = tensor
        basis = Basis(factors, plan, card["backbone"])
        shared = {site for site, family in plan.items() if isinstance(family, Shared)}
        if basis.fingerprint != card["fingerprint"] or shared != factors.keys():
            raise ValueError("its factors, its plan and its fingerprint disagree")
    except (ValueError, TypeError, ArithmeticError, OnetrunkError) as error:
        told = f"{error}".replace("\n", " ")[:300].rstrip(".")
        raise DamagedError(
            f"{origin}: its card is not what was written: {told}. Restore the bank from a copy."
        ) from None
    return basis


def _described(card: dict[str, Any]) -> dict[str, Any]:
    if card.get("basis") != FORMAT or card.keys() != KEYS:
        raise ValueError(f"it is no basis of format {FORMAT} with {', '.join(sorted(KEYS))}")
    texts = isinstance(card["backbone"], str) and isinstance(card["fingerprint"], str)
    if not texts or not isinstance(card["plan"], dict):
        raise ValueError("'backbone' and 'fingerprint' are texts, 'plan' is an object")
    return card
