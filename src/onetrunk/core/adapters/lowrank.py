"""Low-rank parallel adapter, after Rebuffi et al., CVPR 2018: y = w * x + U V x.

U is (o, r) and V is (r, i): a site costs r (o + i) numbers, and merges to w + diag_k(U V). Under a
grouped convolution every group has factors of its own: U stays (o, r), V is (groups r, i / groups).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from ... import written
from ...errors import AttachError
from ..sites import Site
from .base import (
    Adapter,
    Correction,
    Family,
    Init,
    add_at_tap,
    check_options,
    drop_channels,
    mix_channels,
)


@dataclass(frozen=True)
class LowRank(Family):
    """A 1x1 convolution of rank `rank` beside each adapted layer: y = w * x + U V x.

    Args:
        rank: the columns of U, at most min(i, o) / groups at every site. From
            i o / (groups (i + o)) on parallel costs no more.
        init: `identity` (U = 0, V ~ N(0, 1 / i)) or `released` (U V has the variance 2 / o of the
            authors' parallel adapter).
        dropout: share of V's input channels that are dropped in training.

    Raises:
        AttachError: if `rank` is below 1 or another option is out of range; at `build`, if `rank`
            is above what the site's matrix can have.
    """

    name: ClassVar[str] = "lowrank"
    rank: int = 8
    init: Init = "identity"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_options(self, self.init, self.dropout)
        if type(self.rank) is not int or self.rank < 1:
            raise AttachError(
                f"lowrank(rank={self.rank!r}): rank must be a whole number, at least 1. "
                "To adapt nothing at a site, leave the site out."
            )

    def __str__(self) -> str:
        return written.write(self.name, {"rank": self.rank, **written.changed_fields(self)})

    def refuses(self, site: Site) -> str | None:
        limit = min(site.cin, site.cout) // site.groups
        if self.rank <= limit:
            return None
        return (
            f"{site.cin} channels in, {site.cout} out, {site.groups} group(s): no matrix there "
            f"has rank above {limit}. Use a smaller rank, or parallel, which costs less there."
        )

    def n_numbers(self, site: Site) -> int:
        return self.rank * (site.cout + site.cin)

    def make(self, site: Site, generator: Generator) -> "LowRankAdapter":
        return LowRankAdapter(site, self, generator)


class LowRankAdapter(Adapter):
    reads_input = True
    inner = ("v_ri",)

    def __init__(self, site: Site, family: LowRank, generator: Generator) -> None:
        super().__init__()
        self.site, self.dropout = site, family.dropout
        i, r = site.cin // site.groups, family.rank
        v_ri, u_or = torch.empty(site.groups * r, i), torch.zeros(site.cout, r)
        if family.init == "released":
            v_ri.normal_(0.0, r**-0.5, generator=generator)
            u_or.normal_(0.0, (2 / site.cout) ** 0.5, generator=generator)
        else:
            v_ri.normal_(0.0, i**-0.5, generator=generator)
        self.v_ri, self.u_or = nn.Parameter(v_ri), nn.Parameter(u_or)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = drop_channels(x, self.dropout, self.training, self.site)
        return y + mix_channels(mix_channels(x, self.v_ri, self.site), self.u_or, self.site)

    def correction(self) -> Correction:
        groups = self.site.groups
        u_gor, v_gri = (t.detach().unflatten(0, (groups, -1)) for t in (self.u_or, self.v_ri))
        return Correction((u_gor, v_gri))

    def matrix(self) -> Tensor | None:
        return None if self.dropout and self.training else self._product(self.u_or, self.v_ri)

    def fold(
        self, weight_oikk: Tensor, bias_o: Tensor, tap: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        a_oi = self._product(self.u_or.to(weight_oikk), self.v_ri.to(weight_oikk))
        return add_at_tap(weight_oikk, a_oi, tap), bias_o

    def _product(self, u_or: Tensor, v_ri: Tensor) -> Tensor:
        groups = self.site.groups
        u_gor, v_gri = u_or.unflatten(0, (groups, -1)), v_ri.unflatten(0, (groups, -1))
        return (u_gor @ v_gri).flatten(0, 1)
