"""Channelwise scale and shift: y = s . (w * x) + t, with s and t of shape (o,).

The diagonal of a series adapter; known as scale-and-shift of features (SSF, NeurIPS 2022). A site
costs 2 o numbers and merges to diag(s) w and the bias s . b + t.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from ..sites import Site
from .base import Adapter, Correction, Family


@dataclass(frozen=True)
class Channelwise(Family):
    """A gain and a shift for every output channel: y = s . (w * x) + t. Born as s = 1, t = 0."""

    name: ClassVar[str] = "channelwise"

    def n_numbers(self, site: Site) -> int:
        return 2 * site.cout

    def make(self, site: Site, generator: Generator) -> "ChannelwiseAdapter":
        return ChannelwiseAdapter(site)


class ChannelwiseAdapter(Adapter):
    reads_input = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.s_o = nn.Parameter(torch.ones(site.cout))
        self.t_o = nn.Parameter(torch.zeros(site.cout))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.site.kind == "linear":
            return self.s_o * y + self.t_o
        return self.s_o[:, None, None] * y + self.t_o[:, None, None]

    def correction(self) -> Correction:
        return Correction(gain_o=self.s_o.detach(), shift_o=self.t_o.detach())

    def fold(
        self, weight_oikk: Tensor, bias_o: Tensor, tap: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        s_o, t_o = self.s_o.to(weight_oikk), self.t_o.to(weight_oikk)
        return s_o[:, None, None, None] * weight_oikk, s_o * bias_o + t_o
