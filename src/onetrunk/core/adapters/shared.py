"""Shared adapters: A = B G, where several domains share the basis B and G alone is the domain's.

Joint compression of Rebuffi et al., CVPR 2018. With `share="output"` (the paper) A = B G, B (o, r);
with `share="input"` A = G B, B (r, i); with `share="both"` (Tucker) A = L G R, L (o, r), R (q, i).
In place of a parallel adapter y = w * x + A x; in place of a series one y = h + A BN_a(h), i = o.
A site costs the domain r i, o r or r q numbers (and BN_a's); the basis is counted once for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from ... import written
from ...errors import AttachError
from ..sites import Site
from .base import (
    Adapter,
    Correction,
    Family,
    add_at_tap,
    check_options,
    drop_channels,
    mix_channels,
)
from .series import correct_after, fold_after, new_norm, normed

Of = Literal["parallel", "series"]
Share = Literal["output", "input", "both"]
Rank = int | tuple[int, int]

LEFT, RIGHT = "left_or", "right_ri"  # the shared factors' names: the output's side, the input's


@dataclass(frozen=True)
class Shared(Family):
    """An adapter over a basis that several domains share; `compress` makes them.

    Args:
        of: what the product stands in for: `parallel` (low-rank adapters too) or `series`.
        share: the side whose factor is shared: `output` (the paper), `input` or `both`.
        rank: directions kept; two numbers, output and input, where both sides are shared.
        dropout: share of the adapter's input channels that are dropped in training.

    Raises:
        AttachError: for an option out of range; at `build`, which has no basis to give it.
    """

    name: ClassVar[str] = "shared"
    of: Of = "parallel"
    share: Share = "output"
    rank: Rank = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field, known in (("of", get_args(Of)), ("share", get_args(Share))):
            if getattr(self, field) not in known:
                raise AttachError(
                    f"shared({field}={getattr(self, field)!r}): give one of {', '.join(known)}."
                )
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        whole = all(type(rank) is int and rank >= 1 for rank in ranks)
        if not whole or len(ranks) != (2 if self.share == "both" else 1):
            raise AttachError(
                f"shared(share={self.share!r}, rank={self.rank!r}): rank is a whole number of at "
                "least 1, and a pair of them, (output, input), where both sides are shared."
            )
        check_options(self, "identity", self.dropout)

    def __str__(self) -> str:
        fields = {"of": self.of, "share": self.share, "rank": self.rank}
        return written.write(self.name, {**fields, **written.changed_fields(self)})

    def refuses(self, site: Site) -> str | None:
        if site.groups > 1:
            return f"{site.groups} groups: only dense matrices are factored. Keep its own family."
        o, i = self._sides(site)
        limits = {"output": (o, o), "input": (i, i), "both": (o, i)}[self.share]
        if all(rank <= limit for rank, limit in zip(self._ranks(), limits, strict=True)):
            return None
        return (
            f"{i} channels in, {o} out: no basis of the {self.share} side there has more "
            f"directions than {limits if self.share == 'both' else limits[0]}. Use a lower rank."
        )

    def n_numbers(self, site: Site) -> int:
        rows, columns = self._own_shape(site)
        return rows * columns + (4 * site.cout + 1 if self.of == "series" else 0)

    def factor_shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """The shapes of the shared factors by name."""
        (o, i), (left, right) = self._sides(site), self._ranks()
        shapes = {LEFT: (o, left), RIGHT: (right, i)}
        unshared = {"output": RIGHT, "input": LEFT, "both": ""}[self.share]
        return {name: shape for name, shape in shapes.items() if name != unshared}

    def make(self, site: Site, generator: Generator) -> "SharedAdapter":
        raise AttachError(
            f"{self} at {site.name or 'a site'}: it needs a basis, which other domains made. Use "
            "compress(models), or attach(backbone, classes=[...], basis=basis)."
        )

    def over(self, site: Site, factors: Mapping[str, Tensor]) -> "SharedAdapter":
        """A fresh adapter over the shared `factors`, whose storage it uses: G = 0.

        Raises:
            AttachError: where the factors are not those of this family and site.
        """
        reason, found = self.refuses(site), {name: tuple(t.shape) for name, t in factors.items()}
        if reason is None and found != self.factor_shapes(site):
            reason = f"the basis has {found} there, and {self.factor_shapes(site)} fits."
        if reason is not None:
            raise AttachError(f"{self} at {site.name or 'a site'}: {reason}")
        return SharedAdapter(site, self, factors)

    def _sides(self, site: Site) -> tuple[int, int]:
        return site.cout, site.cout if self.of == "series" else site.cin

    def _ranks(self) -> tuple[int, int]:
        return self.rank if isinstance(self.rank, tuple) else (self.rank, self.rank)

    def _own_shape(self, site: Site) -> tuple[int, int]:
        (o, i), (left, right) = self._sides(site), self._ranks()
        return {"output": (left, i), "input": (o, right), "both": (left, right)}[self.share]


class SharedAdapter(Adapter):
    """The domain's factor `g` between (or beside) the basis' factors, which are not trained."""

    inner = (RIGHT,)  # where the basis is trained too

    def __init__(self, site: Site, family: Shared, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.site, self.dropout = site, family.dropout
        self.reads_input = family.of == "parallel"  # type: ignore[misc]  # of the instance here
        if family.of == "series":
            self.norm: nn.modules.batchnorm._BatchNorm = new_norm(site)
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor.detach(), requires_grad=False))
        # zero: at birth nothing changes; every number learns, as the basis is not zero
        self.g = nn.Parameter(torch.zeros(family._own_shape(site)))

    def factors(self) -> list[Tensor]:
        """The matrices whose product is A, from the output's side to the input's."""
        named = (self._parameters.get(LEFT), self.g, self._parameters.get(RIGHT))
        return [factor for factor in named if factor is not None]

    def product(self, like: Tensor) -> Tensor:
        """A (o, i), computed in the type of `like`."""
        first, *rest = (factor.detach().to(like) for factor in self.factors())
        for factor in rest:
            first = first @ factor
        return first

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x if self.reads_input else normed(self.norm, y, self.site)
        x = drop_channels(x, self.dropout, self.training, self.site)
        for factor in reversed(self.factors()):
            x = mix_channels(x, factor, self.site)
        return y + x

    def correction(self) -> Correction:
        factors = [factor.detach() for factor in self.factors()]
        if self.reads_input:
            return Correction(tuple(factor[None] for factor in factors))
        return correct_after(self.norm, self.product(factors[0]), 1)

    def matrix(self) -> Tensor | None:
        if not self.reads_input or (self.dropout and self.training):
            return None
        first, *rest = self.factors()
        for factor in rest:
            first = first @ factor
        return first

    def fold(
        self, weight_oikk: Tensor, bias_o: Tensor, tap: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        a_oi = self.product(weight_oikk)
        if self.reads_input:
            return add_at_tap(weight_oikk, a_oi, tap), bias_o
        return fold_after(self.norm, a_oi, 1, weight_oikk, bias_o)
