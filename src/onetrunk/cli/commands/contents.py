"""list and show: what a bank holds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..console import Screen, counted, percent, size
from ..options import AsJson, BankPath, Domain
from ..values import open_bank

if TYPE_CHECKING:
    from ...bank.card import Card


def list_domains(bank: BankPath, as_json: AsJson = False) -> None:
    """The domains of a bank; reads its manifest only.

    Example: onetrunk list garden.bank --json
    """
    screen = Screen(as_json)
    opened = open_bank(bank)
    cards = list(opened.domains.values())
    screen.say(f"{bank}: {opened.backbone_form}, {counted(len(cards), 'domain')}")
    rows = [
        (c.name, str(len(c.classes)), c.family, size(c.size), _accuracy(c.metrics)) for c in cards
    ]
    if opened.basis_bytes:
        rows.append(("basis, shared", "", "", size(opened.basis_bytes), ""))
    if rows:
        screen.table(("domain", "classes", "family", "size", "accuracy"), rows)
    screen.finish(
        {
            "bank": str(bank),
            "backbone": opened.backbone_form,
            "fingerprint": opened.backbone_fingerprint,
            "basis_bytes": opened.basis_bytes,
            "domains": {card.name: _card_json(card) for card in cards},
        }
    )


def show(bank: BankPath, domain: Domain, as_json: AsJson = False) -> None:
    """Everything about one domain: classes, family, preprocessing, metrics, what it costs.

    Example: onetrunk show garden.bank flowers
    """
    from ...core.cost import cost
    from ...core.domain import domain_of

    screen = Screen(as_json)
    opened = open_bank(bank)
    cards, model = opened.domains, opened.load(domain)
    card, record, costs = cards[domain], domain_of(model), cost(model)
    screen.say(f"{domain} in {bank}, on {opened.backbone_form}")
    screen.say(f"  family         {card.family} at {len(record.plan)} sites")
    screen.say(f"  classes        {len(card.classes)}: {', '.join(card.classes)}")
    seen = record.preprocessing
    screen.say(f"  preprocessing  {_pairs(vars(seen)) if seen else 'none: its images are tensors'}")
    screen.say(f"  metrics        {_pairs(card.metrics)}")
    screen.say(f"  provenance     {_pairs(card.provenance)}")
    screen.say(f"  digest         {card.digest}")
    screen.say(str(costs))
    if record.skipped:
        screen.say(f"  {len(record.skipped)} layers without adapter:")
        for name, reason in record.skipped.items():
            screen.say(f"    {name or '(the network itself)'}: {reason}")
    screen.finish(
        {
            **_card_json(card),
            "classes": list(card.classes),
            "plan": {site: str(family) for site, family in record.plan.items()},
            "skipped": dict(record.skipped),
            "preprocessing": record.preprocessing and record.preprocessing.to_json(),
            "cost": costs.to_json(),
        }
    )


def _pairs(values: Mapping[str, Any]) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    shown = (f"{value:.4f}" if isinstance(value, float) else value for value in known.values())
    return ", ".join(f"{name} {value}" for name, value in zip(known, shown, strict=True))


def _accuracy(metrics: Any) -> str:
    for name in ("test_accuracy", "val_accuracy"):
        if isinstance(metrics.get(name), float):
            return percent(metrics[name])
    return ""


def _card_json(card: "Card") -> dict[str, Any]:
    return {
        "name": card.name,
        "classes": len(card.classes),
        "family": card.family,
        "numbers": card.numbers,
        "size": card.size,
        "digest": card.digest,
        "metrics": dict(card.metrics),
        "provenance": dict(card.provenance),
    }
