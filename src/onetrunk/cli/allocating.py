"""allocate: measure a domain's sensitivity, spend a budget, show the plan, train with it."""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..bank.bank import Bank
from ..core.adapters import Parallel
from ..core.allocate import Allocation, allocate, parse_budget, plan_by_hand
from ..core.basis import Basis
from ..core.cost import cost
from ..core.domain import domain_of
from ..core.plan import Plan, Where
from ..core.sensitivity import Sensitivity
from ..errors import AttachError, BankError, SpecError
from ..files import check_place, read_checked, reason, write_atomically
from ..pictures import check_drawable, draw_site_map
from ..training.fit import fit
from ..training.sensitivity import By, sensitivity
from .console import Screen, followed
from .training import (
    Ready,
    Request,
    alone,
    attached,
    prepare,
    probe,
    start_at_head,
    train_ready,
)

MAX_PLAN_BYTES = 1 << 24


@dataclass(frozen=True)
class Wish:
    """What to allocate, as the user asked for it."""

    budget: str
    by: By
    plan_only: bool = False
    out: Path | None = None
    map: Path | None = None


def run(bank: Bank, request: Request, wish: Wish, screen: Screen) -> dict[str, Any]:
    """Measures, spends, shows and, unless only the plan is wanted, trains and stores.

    Raises:
        OnetrunkError: of the room that refuses; the bank is then as it was.
    """
    parse_budget(wish.budget, bank.backbone)  # a budget that cannot be read costs no minutes
    for file in (wish.out, wish.map):
        if file is not None:
            _check_place(file)
    if wish.map is not None:
        check_drawable(wish.map, "the map")
    with nullcontext() if wish.plan_only else alone(bank, request):
        result, allocation = _allocated(bank, request, wish, screen)
    if wish.map is not None:
        draw_site_map(_shares(bank, request.domain, allocation), wish.map)
        screen.say(f"  map {wish.map}")
    return result


def _allocated(
    bank: Bank, request: Request, wish: Wish, screen: Screen
) -> tuple[dict[str, Any], Allocation]:
    ready = prepare(bank, request, screen)
    probed = probe(bank.backbone, ready, request.device, screen)
    found = _measured(bank, request, ready, probed, wish.by, screen)
    allocation = allocate(bank.backbone, found, wish.budget, request.where)
    screen.say(str(allocation))
    if wish.out is not None:
        _write(allocation, wish.out)
        screen.say(f"  plan {wish.out}")
    result: dict[str, Any] = {"domain": request.domain, **allocation.to_json()}
    result |= {"numbers": allocation.numbers, "sites": len(allocation.plan)}
    if not wish.plan_only:
        asked = dataclasses.replace(
            request,
            family=allocation.plan,
            where=None,
            provenance={"allocation": f"{allocation.how}, {wish.budget}"},
        )
        result |= train_ready(bank, asked, ready, screen, probed).to_json()
    return result, allocation


def read_plan(path: Path, backbone: nn.Module) -> Plan:
    """The plan of a file: what `allocate` wrote, or {"layer or glob": "family", ...} by hand.

    Raises:
        BankError: where the file cannot be read.
        SpecError: where it is neither.
        AttachError: where it is for another backbone, or names a layer that there is not.
    """
    try:
        values = json.loads(read_checked(path, limit=MAX_PLAN_BYTES))
    except OSError as error:
        raise BankError(f"the plan {path} cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BankError):
            raise
        raise SpecError(
            f"{path} is no JSON file. Write a plan with onetrunk allocate --out, or by hand: "
            '{"layer or glob": "lowrank(rank=4)"}.'
        ) from None
    if isinstance(values, Mapping) and "allocation" in values:
        return Allocation.from_json(values).plan_for(backbone)
    if not isinstance(values, Mapping) or not all(isinstance(v, str) for v in values.values()):
        raise SpecError(
            f'{path} is no plan: write {{"layer or glob": "lowrank(rank=4)", ...}}, or make one '
            "with onetrunk allocate --out."
        )
    try:
        return plan_by_hand(backbone, values)
    except (AttachError, SpecError) as error:
        raise type(error)(f"the plan {path}: {error}") from error


def plan_of(bank: Bank, name: str) -> tuple[Plan, Basis | None]:
    """The plan of a domain that the bank has, and the basis that it is over where there is one.

    Raises:
        BankError: where there is no such domain, or it has no adapters.
    """
    domain = domain_of(bank.load(name))
    if not domain.plan:
        raise BankError(
            f"domain {name!r} has no plan to reuse: it is {bank.domains[name].family}, without "
            "adapters at single layers. Name another domain."
        )
    return domain.plan, domain.basis


def _measured(
    bank: Bank, request: Request, ready: Ready, probed: nn.Module, by: By, screen: Screen
) -> Sensitivity:
    model = probed if by != "trained" else _trained_in_full(bank, request, ready, probed, screen)
    with screen.bar("measuring the layers") as show:
        return sensitivity(model, ready.parts["train"], by=by, device=request.device, progress=show)


def _trained_in_full(
    bank: Bank, request: Request, ready: Ready, probed: nn.Module, screen: Screen
) -> nn.Module:
    """A domain with a whole matrix beside every layer, trained to its last epoch.

    Not to the best one on validation images: where that is the start, every matrix is zero.
    """
    model = attached(bank.backbone, Parallel(), ready, request.where or Where(layers="all"))
    start_at_head(model, probed, request, ready)
    with screen.bar("training whole matrices first") as show:
        steps = fit(model, ready.parts["train"], request.recipe, device=request.device)
        for _ in followed(steps, show):
            pass
    return model


def _check_place(file: Path) -> None:
    try:
        check_place(file)
    except OSError as error:
        raise BankError(f"{file} cannot be written: {reason(error)}") from error


def _write(allocation: Allocation, path: Path) -> None:
    data = json.dumps(allocation.to_json(), indent=1, allow_nan=False).encode() + b"\n"
    try:
        write_atomically(path, data)
    except OSError as error:
        raise BankError(f"the plan {path} cannot be written: {reason(error)}") from error


def _shares(bank: Bank, name: str, allocation: Allocation) -> dict[str, dict[str, float]]:
    """Numbers spent relative to the layer's own, by domain and layer, of the whole bank."""
    asked = {share.site: share.numbers / share.layer_numbers for share in allocation.shares}
    others = [other for other in bank.domains if other != name]
    costs = {other: cost(bank.load(other)).sites for other in others}
    found = {
        other: {**dict.fromkeys(asked, 0.0), **{s.name: s.numbers / s.layer_numbers for s in sites}}
        for other, sites in costs.items()
    }
    return {**found, name: asked}
