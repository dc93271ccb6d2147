"""Parallel adapter, Rebuffi et al., CVPR 2018: y = w * x + A x, with A of shape (o, i).

A site costs o i / groups numbers: 1/9 of a 3x3 bank. It merges to w + diag_k(A). Under a grouped
convolution A is block-diagonal; under a depthwise one that is a gain per channel.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

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
class Parallel(Family):
    """A full 1x1 convolution beside each adapted layer: y = w * x + A x.

    Args:
        init: `identity` (A = 0) or `released` (A ~ N(0, 2 / o), as in the authors' code).
        dropout: share of A's input channels that are dropped in training (the paper: 0.5 at most).

    Raises:
        AttachError: if `init` is neither of the two, or `dropout` is not in [0, 1).
    """

    name: ClassVar[str] = "parallel"
    init: Init = "identity"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_options(self, self.init, self.dropout)

    def n_numbers(self, site: Site) -> int:
        return site.cout * site.cin // site.groups

    def make(self, site: Site, generator: Generator) -> "ParallelAdapter":
        return ParallelAdapter(site, self, generator)


class ParallelAdapter(Adapter):
    reads_input = True

    def __init__(self, site: Site, family: Parallel, generator: Generator) -> None:
        super().__init__()
        self.site, self.dropout = site, family.dropout
        a_oi = torch.zeros(site.cout, site.cin // site.groups)
        if family.init == "released":
            a_oi.normal_(0.0, (2 / site.cout) ** 0.5, generator=generator)
        self.a_oi = nn.Parameter(a_oi)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = drop_channels(x, self.dropout, self.training, self.site)
        return y + mix_channels(x, self.a_oi, self.site)

    def correction(self) -> Correction:
        return Correction((self.a_oi.detach().unflatten(0, (self.site.groups, -1)),))

    def matrix(self) -> Tensor | None:
        return None if self.dropout and self.training else self.a_oi

    def fold(
        self, weight_oikk: Tensor, bias_o: Tensor, tap: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        return add_at_tap(weight_oikk, self.a_oi.to(weight_oikk), tap), bias_o
