"""allocate: a budget of numbers spent over a backbone's sites, where they buy the most.

A unit of rank at a site costs o + i numbers and buys the energy of its next singular direction
(see core/sensitivity.py); units are bought in order of energy over cost until nothing fits. A site
gets `lowrank(rank=r)` with r the units bought, `parallel` where that costs no more, and nothing
where other sites need the numbers more. Milliseconds, once the sensitivity is measured.

A budget counts the adapters alone: norms and classifier are the domain's under any plan.
"""

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..errors import AttachError, OnetrunkError, SpecError
from ..tensorfile import fingerprint_of
from .adapters import Family, LowRank, Parallel, read_family
from .budget import spend
from .plan import Plan, Where
from .sensitivity import Sensitivity
from .sites import Site
from .trace import Size, trace

FORMAT = 1
_BUDGET = re.compile(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)\s*(%|B|kB|MB|GB|)")
BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_BAR = 12  # characters of the longest bar: a line of EfficientNet's fits 80


@dataclass(frozen=True)
class Share:
    """What one site got.

    Args:
        site: its name.
        stage: `early`, `mid` or `late`.
        family: what stands beside the layer; None for nothing.
        numbers: what that costs.
        layer_numbers: numbers of the layer's own weight.
        kept: share of the site's energy that the plan can hold, from 0 to 1.
    """

    site: str
    stage: str
    family: Family | None
    numbers: int
    layer_numbers: int
    kept: float


@dataclass(frozen=True)
class Allocation:
    """A budget spent: which site gets which family, for one backbone.

    Args:
        backbone: fingerprint of the backbone that it is for.
        how: what decided: `gradient`, `curvature`, `trained` or `uniform`.
        budget: numbers that were to be spent.
        shares: every site that was asked about, in order of execution.
    """

    backbone: str
    how: str
    budget: int
    shares: tuple[Share, ...]

    @property
    def plan(self) -> Plan:
        """Site -> family, without the sites that get nothing: what `attach` takes."""
        return {share.site: share.family for share in self.shares if share.family is not None}

    @property
    def numbers(self) -> int:
        """Numbers spent, as `cost` counts a domain's adapters; never above the budget."""
        return sum(share.numbers for share in self.shares)

    def plan_for(self, backbone: nn.Module) -> Plan:
        """The plan, where `backbone` is the one that it was made for: for the next domain.

        Raises:
            AttachError: where it is another.
        """
        _refuse_other("this allocation was made for", self.backbone, backbone)
        return self.plan

    def __str__(self) -> str:
        """The table: site by site, with a bar as long as the numbers spent."""
        rows = [("site", "stage", "gets", "numbers", "of layer", "")]
        most = max((share.numbers for share in self.shares), default=0)
        for share in self.shares:
            of_layer = f"{share.numbers / share.layer_numbers:.1%}"
            bar = "█" * math.ceil(_BAR * share.numbers / max(1, most))
            gets = "-" if share.family is None else str(share.family)
            rows.append((share.site, share.stage, gets, f"{share.numbers:,}", of_layer, bar))
        widths = [max(len(row[place]) for row in rows) for place in range(5)]
        a, b, c, d, e = widths
        lines = [
            f"{r[0]:<{a}}  {r[1]:<{b}}  {r[2]:<{c}}  {r[3]:>{d}}  {r[4]:>{e}}  {r[5]}" for r in rows
        ]
        total = (
            f"{self.numbers:,} of {self.budget:,} numbers at {len(self.plan)} of "
            f"{len(self.shares)} sites, by {self.how}"
        )
        return "\n".join(line.rstrip() for line in [*lines, total])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives back an equal value."""
        shares = [
            {**asdict(share), "family": None if share.family is None else str(share.family)}
            for share in self.shares
        ]
        head = {"allocation": FORMAT, "backbone": self.backbone}
        return {**head, "how": self.how, "budget": self.budget, "shares": shares}

    @classmethod
    def from_json(cls, values: object) -> "Allocation":
        """Reads what `to_json` wrote.

        Raises:
            SpecError: where it is something else, or a newer onetrunk wrote it.
        """
        try:
            return _read(values)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SpecError) and "newer onetrunk" in str(error):
                raise
            reason = f"{error}" if isinstance(error, OnetrunkError) else f"{error!r}"
            raise SpecError(
                f"this is no allocation as it was written: {reason[:200].rstrip('.')}. "
                "Allocate again, or get the file from where it came from."
            ) from None


def allocate(
    backbone: nn.Module,
    sensitivity: Sensitivity,
    budget: int | str,
    where: Where | None = None,
) -> Allocation:
    """Spends `budget` where it buys the most.

    Args:
        sensitivity: of a domain on this backbone; see `onetrunk.training.sensitivity`.
        budget: numbers, or a text that `parse_budget` reads: "2%", "150kB", "40000".
        where: which of the measured sites may get anything; by default all.

    Raises:
        AttachError: for a sensitivity of another backbone, and a budget below the smallest plan.
        SpecError: for a budget that cannot be read.

    >>> import torch
    >>> from onetrunk.core.attach import attach
    >>> from onetrunk.core.sensitivity import by_curvature, measure
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ... )
    >>> model = attach(net, classes=["dark", "light"], input_size=(3, 8, 8))
    >>> seen = measure(model, [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))])
    >>> allocate(net, by_curvature(seen), budget=11).plan
    {'0': LowRank(rank=1, init='identity', dropout=0.0)}
    """
    _refuse_other("the sensitivity was measured on", sensitivity.backbone, backbone)
    n_numbers = parse_budget(budget, backbone)
    sites = (where or Where(layers="all")).choose(sensitivity.sites)
    gains = {site.name: _gains(site, sensitivity.energies[site.name]) for site in sites}
    useful = [site for site in sites if gains[site.name][0] > 0]
    if not useful:
        reason = (
            "The training left every matrix at zero: train longer, or measure by curvature."
            if sensitivity.how == "trained"
            else "Measure it on a network whose head fits the domain, such as a linear probe."
        )
        raise AttachError(
            f"the sensitivity is zero at all {len(sites)} sites: there is nothing to spend on. "
            + reason
        )
    smallest = min(useful, key=_price)
    if _price(smallest) > n_numbers:
        raise AttachError(
            f"a budget of {n_numbers:,} numbers buys nothing: the smallest plan is "
            f"{_family(smallest, 1)} at {smallest.name}, {_price(smallest):,} numbers. Give as "
            "many at least."
        )
    units = spend(gains, {site.name: _prices(site) for site in sites}, n_numbers)
    shares = [_share(s, units[s.name], sensitivity.energies[s.name]) for s in sites]
    return Allocation(sensitivity.backbone, sensitivity.how, n_numbers, tuple(shares))


def uniform(
    backbone: nn.Module,
    budget: int | str,
    where: Where | None = None,
    input_size: Size | None = None,
) -> Allocation:
    """The yardstick: one rank at every chosen site, the largest that fits; the rest is unspent.

    Args:
        where: which sites; by default those where the backbone mixes channels, as for `attach`.
        input_size: channels, rows, columns of the dry run, as for `attach`.

    Raises:
        AttachError: where not even rank 1 fits.
        SpecError: for a budget that cannot be read.
        BackboneError: as `attach`.
    """
    n_numbers = parse_budget(budget, backbone)
    sites = (where or Where()).choose(trace(backbone, input_size).sites)
    rank = 0
    most = max(_n_units(site) for site in sites)
    while rank < most and _numbers(sites, rank + 1) <= n_numbers:
        rank += 1
    if rank == 0:
        raise AttachError(
            f"a budget of {n_numbers:,} numbers buys no uniform plan: rank 1 at all {len(sites)} "
            f"sites costs {_numbers(sites, 1):,}. Give as many at least, or choose fewer sites."
        )
    shares = [_share(site, min(rank, _n_units(site))) for site in sites]
    fingerprint = fingerprint_of(backbone.state_dict())
    return Allocation(fingerprint, "uniform", n_numbers, tuple(shares))


def parse_budget(budget: int | str, backbone: nn.Module) -> int:
    """A budget in numbers: "2%" of the backbone's, "150kB" in its type, or numbers as they are.

    Raises:
        SpecError: where it cannot be read, or is nothing.

    >>> parse_budget("50%", nn.Linear(9, 2)), parse_budget("80B", nn.Linear(9, 2))
    (10, 20)
    """
    numbers = _read_budget(budget, backbone)
    if numbers < 1:
        raise SpecError(
            f"the budget {budget!r} is {numbers} numbers: give 1 at least. For no adapters at all, "
            "the family is `norm`."
        )
    return numbers


def plan_by_hand(
    backbone: nn.Module, rules: Mapping[str, str | Family], input_size: Size | None = None
) -> Plan:
    """A plan from layers or globs and families, later rules over earlier ones.

    A glob passes over layers that the family cannot adapt; a layer by its own name does not.

    Raises:
        AttachError: where a rule meets no adaptable layer, or its family fits none.
        SpecError: where a family cannot be read.

    >>> from onetrunk.backbones import resnet26
    >>> plan = plan_by_hand(resnet26(0.25), {"stages.2.*": "lowrank(rank=2)", "stem": "parallel"})
    >>> len(plan), str(plan["stem"])
    (9, 'parallel')
    """
    sites = trace(backbone, input_size).sites
    plan: dict[str, Family] = {}
    for pattern, written_family in rules.items():
        family = read_family(written_family) if isinstance(written_family, str) else written_family
        met = [site for site in sites if fnmatch.fnmatchcase(site.name, pattern)]
        if not met:
            raise _unknown_layer(pattern, sites)
        fits = [site for site in met if family.refuses(site) is None]
        if not fits:
            raise AttachError(f"{family} at {pattern!r}: {family.refuses(met[0])}")
        plan |= {site.name: family for site in fits}
    return {site.name: plan[site.name] for site in sites if site.name in plan}


def _unknown_layer(pattern: str, sites: Iterable[Site]) -> AttachError:
    names = [site.name for site in sites]
    close = difflib.get_close_matches(pattern, names, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return AttachError(
        f"unknown layer {pattern!r}: none of the {len(names)} that can be adapted has that name or "
        f"fits that glob; the first are {', '.join(names[:4])}.{guess}"
    )


def _refuse_other(what: str, fingerprint: str, backbone: nn.Module) -> None:
    found = fingerprint_of(backbone.state_dict())
    if found != fingerprint:
        raise AttachError(
            f"{what} backbone {fingerprint[:12]}, and this is {found[:12]}: its plan means nothing "
            "here. Load that backbone, or allocate for this one."
        )


def _read_budget(budget: int | str, backbone: nn.Module) -> int:
    amount, unit = budget_parts(budget)
    tensors = backbone.state_dict().values()
    if unit == "%":
        return math.floor(amount / 100 * sum(tensor.numel() for tensor in tensors))
    if unit:
        sizes = (tensor.element_size() for tensor in tensors if tensor.is_floating_point())
        return math.floor(amount * BYTES[unit] / next(sizes, 4))
    return int(amount)


def budget_parts(budget: int | str) -> tuple[float, str]:
    """A budget as its amount and its unit: `%`, one of bytes, or none for numbers.

    Raises:
        SpecError: where it cannot be read.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget, ""
    met = _BUDGET.fullmatch(budget.strip()) if isinstance(budget, str) else None
    number, unit = met.groups() if met else ("", "")
    whole = "." not in number
    if not met or (unit == "" and not whole):
        raise SpecError(
            f"cannot read the budget {budget!r}: write numbers (40000), bytes (150kB) or a share "
            "of the backbone (2%)."
        )
    amount = float(number.replace(",", "").replace("_", ""))
    if amount * BYTES.get(unit, 1) == math.inf:
        raise SpecError(f"the budget {number[:20]}... is beyond every number: give a smaller one.")
    return amount, unit


def _price(site: Site) -> int:
    """Numbers of a unit of rank, or of the whole matrix where that is less (depthwise layers)."""
    return min(site.cout + site.cin, Parallel().n_numbers(site))


def _prices(site: Site) -> list[int]:
    """Of every unit, in order: the last one brings the whole matrix for what that still costs."""
    last = _n_units(site) - 1
    return [_price(site)] * last + [Parallel().n_numbers(site) - last * _price(site)]


def _n_units(site: Site) -> int:
    """Units after which the whole matrix costs no more."""
    return -(-Parallel().n_numbers(site) // _price(site))


def _family(site: Site, n_units: int) -> Family | None:
    if n_units == 0:
        return None
    return Parallel() if n_units >= _n_units(site) else LowRank(n_units)


def _numbers(sites: Iterable[Site], rank: int) -> int:
    families = ((site, _family(site, min(rank, _n_units(site)))) for site in sites)
    return sum(family.n_numbers(site) for site, family in families if family is not None)


def _gains(site: Site, energies: tuple[float, ...]) -> list[float]:
    """Energies of the units on sale: the last brings the whole matrix, so the rest with it.

    Counted no higher for its numbers than the unit before, so that they fall.
    """
    prices = _prices(site)
    last = len(prices) - 1
    rest = sum(energies[last:])
    if last:
        rest = min(rest, energies[last - 1] * prices[-1] / prices[0])
    return [*energies[:last], rest]


def _share(site: Site, n_units: int, energies: tuple[float, ...] = ()) -> Share:
    family = _family(site, n_units)
    held = sum(energies if isinstance(family, Parallel) else energies[:n_units])
    kept = held / sum(energies) if sum(energies) else 0.0
    numbers = 0 if family is None else family.n_numbers(site)
    return Share(site.name, site.stage, family, numbers, site.n_weights, kept)


def _read(values: Any) -> Allocation:
    if isinstance(values, Mapping) and isinstance(values.get("allocation"), int):
        version = values["allocation"]
        if version > FORMAT:
            raise SpecError(
                f"an allocation of format {version}, and this onetrunk reads format {FORMAT}: a "
                "newer onetrunk wrote it. Upgrade onetrunk to read it."
            )
    keys = {"allocation", "backbone", "how", "budget", "shares"}
    if not isinstance(values, Mapping) or values.keys() != keys:
        raise SpecError(f"its keys are not {', '.join(sorted(keys))}")
    _require(values["allocation"] == FORMAT, "allocation")
    _require(isinstance(values["backbone"], str) and isinstance(values["how"], str), "backbone")
    _require(type(values["budget"]) is int and isinstance(values["shares"], list), "budget")
    shares = tuple(_read_share(found) for found in values["shares"])
    _require(len({share.site for share in shares}) == len(shares), "shares")
    return Allocation(values["backbone"], values["how"], values["budget"], shares)


def _read_share(found: Mapping[str, Any]) -> Share:
    text = found["family"]
    _require(text is None or (isinstance(text, str) and len(text) <= 200), "family")
    share = Share(**{**found, "family": None if text is None else read_family(text)})
    _require(isinstance(share.site, str) and isinstance(share.stage, str), "site")
    _require(type(share.numbers) is int and share.numbers >= 0, "numbers")
    _require(type(share.layer_numbers) is int and share.layer_numbers > 0, "layer_numbers")
    _require(isinstance(share.kept, float | int) and 0 <= share.kept <= 1 + 1e-9, "kept")
    return share


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise SpecError(f"{what!r} has a value that is never written")
