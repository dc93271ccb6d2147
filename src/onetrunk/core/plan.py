"""Which site gets which family: by stage, by position in a block, by name, and by default.

A plan is a plain mapping, site name -> family. It is what a domain stores, so that the same network
can be built again without running anything.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import AttachError
from .adapters import Family, LowRank, Parallel
from .sites import STAGES, Site
from .trace import Trace

Plan = Mapping[str, Family]

Layers = Literal["auto", "spatial", "pointwise", "all"]
Convs = Literal["both", "first", "second"]
BUDGET = 0.12  # of the backbone's weights: what a default family may add for one domain
DEFAULT_RANK = 16  # of the default low-rank family, lowered where the budget asks for it
SPATIAL_SHARE = 0.25  # of the weights in dense spatial convolutions: above, they do the mixing


@dataclass(frozen=True)
class Where:
    """Which sites a family is placed at.

    Args:
        stages: any of `early`, `mid`, `late`; one alone may be a plain string.
        convs: `both`, `first` or `second`: the position among a block's chosen layers (the released
            code's `proj` 11, 10, 01). A layer alone in its module, like a stem, is always kept.
        layers: `spatial` (kernels above 1x1), `pointwise` (1x1 convolutions and linear layers),
            `all`, or `auto`: spatial where dense spatial convolutions do the mixing (a quarter of
            the weights or more: ResNets), else pointwise (EfficientNet, ConvNeXt, ViT).
        pattern: a glob on site names, e.g. `layer3.*`; several with commas between.

    Raises:
        AttachError: for a stage, position or kind of layer that does not exist.
    """

    stages: tuple[str, ...] | str = STAGES
    convs: Convs = "both"
    layers: Layers = "auto"
    pattern: str = "*"

    def __post_init__(self) -> None:
        stages = (self.stages,) if isinstance(self.stages, str) else tuple(self.stages)
        object.__setattr__(self, "stages", stages)
        _one_of("stages", stages, STAGES)
        _one_of("convs", (self.convs,), ("both", "first", "second"))
        _one_of("layers", (self.layers,), ("auto", "spatial", "pointwise", "all"))

    def choose(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The chosen ones of `sites`, in order.

        Raises:
            AttachError: where none is left; the message lists what there is.
        """
        spatial = mixes_in_space(sites) if self.layers == "auto" else self.layers == "spatial"
        of_kind = [s for s in sites if self.layers == "all" or s.spatial == spatial]
        position = _positions(of_kind)
        chosen = tuple(
            site
            for site in of_kind
            if site.stage in self.stages
            and (self.convs == "both" or position[site.name] in (None, self.convs))
            and any(fnmatch.fnmatchcase(site.name, p.strip()) for p in self.pattern.split(","))
        )
        if not chosen:
            names = ", ".join(site.name for site in of_kind[:6])
            raise AttachError(
                f"{self}: none of the backbone's {len(sites)} adaptable layers is chosen. "
                f"Of that kind there are {len(of_kind)}: {names or 'none'}"
                f"{' ...' if len(of_kind) > 6 else ''}. Widen stages, convs, layers or pattern."
            )
        return chosen


def _one_of(field: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise AttachError(f"Where({field}={value!r}): known are {', '.join(known)}.")
    if not values:
        raise AttachError(f"Where({field}=()): name at least one of {', '.join(known)}.")


def _positions(sites: list[Site]) -> dict[str, str | None]:
    """`first` or `second` (and later) among the layers of one parent module; None where alone."""
    siblings: dict[str, list[str]] = {}
    for site in sites:
        siblings.setdefault(site.name.rpartition(".")[0], []).append(site.name)
    position: dict[str, str | None] = {}
    for names in siblings.values():
        for place, name in enumerate(names):
            position[name] = None if len(names) == 1 else ("first" if place == 0 else "second")
    return position


def mixes_in_space(sites: tuple[Site, ...]) -> bool:
    """Whether dense spatial convolutions hold at least a quarter of the weights."""
    spatial = sum(site.n_weights for site in sites if site.spatial and not site.depthwise)
    patchify = sum(s.n_weights for s in sites if s.spatial and s.kernel == s.stride)
    return spatial - patchify >= SPATIAL_SHARE * sum(site.n_weights for site in sites)


def default_family(traced: Trace, where: Where | None = None) -> Family:
    """The family that fits a backbone and a placement: at most about 12 % of its weights a domain.

    Parallel where the mixing happens in dense spatial convolutions, low-rank elsewhere: beside a
    1x1 layer a full parallel adapter would cost as much as the layer.
    """
    chosen = (where or Where()).choose(traced.sites)
    total = sum(site.n_weights for site in traced.sites)
    candidates = [LowRank(rank) for rank in (DEFAULT_RANK, 8, 4, 2)]
    for family in [Parallel(), *candidates] if mixes_in_space(traced.sites) else candidates:
        fits = [site for site in chosen if family.refuses(site) is None]
        if fits and sum(family.n_numbers(site) for site in fits) <= BUDGET * total:
            return family
    return LowRank(1)


def place(family: Family, where: Where, traced: Trace) -> tuple[Plan, dict[str, str]]:
    """The plan of one family over the chosen sites, and the reasons for the sites left out.

    Raises:
        AttachError: where the family refuses every chosen site.
    """
    chosen = where.choose(traced.sites)
    refused = {site.name: family.refuses(site) for site in chosen}
    plan = {site.name: family for site in chosen if refused[site.name] is None}
    if not plan:
        name, reason = next(iter(refused.items()))
        raise AttachError(
            f"{family} fits none of the {len(chosen)} chosen layers; {name}: {reason}"
        )
    left_out = {name: reason for name, reason in refused.items() if reason is not None}
    return plan, {**traced.skipped, **left_out}
