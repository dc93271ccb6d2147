"""Series adapter, Rebuffi et al., NIPS 2017: y = h + A BN_a(h), with h = w * x and A (o, o).

A site costs o o / groups + 2 o numbers and 2 o running statistics. With S the diagonal of BN_a's
gains in eval mode and t its shifts, it merges to (I + A S) w and the bias (I + A S) b + A t.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from ..sites import Site
from .base import Adapter, Correction, Family, Init, check_options, mix_channels


@dataclass(frozen=True)
class Series(Family):
    """A batch-normalised 1x1 residual after each adapted layer: h = w * x; y = h + A BN_a(h).

    The paper pretrains the backbone with series adapters in place; on a backbone pretrained without
    them, the released initialisation costs it ten points, `identity` does not (notes in docs).

    Args:
        init: `identity` (A = 0) or `released` (A ~ N(0, 2 / o), as in the authors' code).

    Raises:
        AttachError: if `init` is neither of the two.
    """

    name: ClassVar[str] = "series"
    init: Init = "identity"

    def __post_init__(self) -> None:
        check_options(self, self.init)

    def n_numbers(self, site: Site) -> int:
        matrix, gains_and_shifts, statistics_and_counter = (
            site.cout * site.cout // site.groups,
            2 * site.cout,
            2 * site.cout + 1,
        )
        return matrix + gains_and_shifts + statistics_and_counter

    def make(self, site: Site, generator: Generator) -> "SeriesAdapter":
        return SeriesAdapter(site, self, generator)


class SeriesAdapter(Adapter):
    reads_input = False

    def __init__(self, site: Site, family: Series, generator: Generator) -> None:
        super().__init__()
        self.site = site
        self.norm: nn.modules.batchnorm._BatchNorm = new_norm(site)
        a_oo = torch.zeros(site.cout, site.cout // site.groups)
        if family.init == "released":
            a_oo.normal_(0.0, (2 / site.cout) ** 0.5, generator=generator)
        self.a_oo = nn.Parameter(a_oo)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + mix_channels(normed(self.norm, y, self.site), self.a_oo, self.site)

    def correction(self) -> Correction:
        return correct_after(self.norm, self.a_oo.detach(), self.site.groups)

    def fold(
        self, weight_oikk: Tensor, bias_o: Tensor, tap: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        groups = self.site.groups
        return fold_after(self.norm, self.a_oo.to(weight_oikk), groups, weight_oikk, bias_o)


def new_norm(site: Site) -> nn.modules.batchnorm._BatchNorm:
    """BN_a, fresh: over the channels that leave the site."""
    return nn.BatchNorm2d(site.cout) if site.kind == "conv" else nn.BatchNorm1d(site.cout)


def normed(norm: nn.modules.batchnorm._BatchNorm, y: Tensor, site: Site) -> Tensor:
    """BN_a(y), of (b, o, h, w) at a convolution and (..., o) at a linear layer."""
    if site.kind == "conv":
        return norm(y)
    return norm(y.reshape(-1, y.shape[-1])).view(y.shape)


def fold_after(
    norm: nn.modules.batchnorm._BatchNorm,
    a_oo: Tensor,
    groups: int,
    weight_oikk: Tensor,
    bias_o: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weight (I + A S) w and bias (I + A S) b + A t of the layer with A BN_a after it."""
    gain_o, shift_o = norm_gain_and_shift(norm, weight_oikk)
    # A maps each output group onto itself: (g, p, o) with p = o = out channels of one group
    a_gpo = a_oo.unflatten(0, (groups, -1))
    mix_gpo = a_gpo * gain_o.view(groups, 1, -1)
    mix_gpo = mix_gpo + torch.eye(mix_gpo.shape[-1]).to(weight_oikk)
    w_goi = weight_oikk.flatten(1).unflatten(0, (groups, -1))
    merged_oikk = (mix_gpo @ w_goi).flatten(0, 1).view_as(weight_oikk)
    per_group = (groups, -1, 1)
    bias_gp1 = mix_gpo @ bias_o.view(per_group) + a_gpo @ shift_o.view(per_group)
    return merged_oikk, bias_gp1.flatten()


def correct_after(norm: nn.modules.batchnorm._BatchNorm, a_oo: Tensor, groups: int) -> Correction:
    """A BN_a(y) = A S y + A t, in the type of A."""
    a_gpo = a_oo.cpu().double().unflatten(0, (groups, -1))
    gain_o, shift_o = norm_gain_and_shift(norm, a_gpo)
    product_gpo, added_o = a_gpo * gain_o.view(groups, 1, -1), a_gpo @ shift_o.view(groups, -1, 1)
    return Correction((product_gpo.to(a_oo),), on_input=False, shift_o=added_o.flatten().to(a_oo))


def norm_gain_and_shift(
    norm: nn.modules.batchnorm._BatchNorm, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Gain and shift per channel of a batch norm in eval mode, in the dtype of `like`.

    BN(h) = gain . h + shift, gain = weight / sqrt(var + eps), shift = bias - gain . mean.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    weight_o, bias_o = norm._parameters["weight"], norm._parameters["bias"]
    gain_o = (norm.running_var.to(like) + norm.eps).rsqrt()
    if weight_o is not None:
        gain_o = gain_o * weight_o.to(like)
    shift_o = -gain_o * norm.running_mean.to(like)
    return gain_o, shift_o if bias_o is None else shift_o + bias_o.to(like)
