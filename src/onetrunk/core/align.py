"""align: the inner factors of low-rank adapters, turned to where a domain's gradients are.

While U is zero, the first steps change U alone, and what A = U V can follow of an image's gradient
by A, G_b = sum_p g x', is its part in the rows of V. Over images the most is followed by the top
eigenvectors of

    E = sum_b G_b' G_b

of which a random V follows the share r / i only. The mean gradient says less: on images that the
head fits already single gradients cancel, and these are what training goes on with.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .adapters.lowrank import LowRankAdapter
from .attach import Adapted
from .sites import Site
from .watch import by_group, refuse_non_finite, watch


def unaligned(model: nn.Module) -> dict[str, LowRankAdapter]:
    """Site -> adapter, of those that are to be aligned and have not begun to change: U is zero."""
    return {adapter.site.name: adapter for adapter in _asking(model) if not adapter.u_or.any()}


def align(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], label_smoothing: float = 0.0
) -> None:
    """Fills V of every adapter in `unaligned(model)`; the network computes what it did.

    Args:
        model: a domain's network, best at the head of its linear probe.
        batches: inputs (b, c, h, w) and labels (b,), on any device.
        label_smoothing: of the cross-entropy whose gradients count. Above zero, an image that is
            classified well counts too.

    Raises:
        AttachError: where a gradient is not finite; every V is as it was then.
    """
    adapters = unaligned(model)
    meters = {name: _Energy(adapter.site) for name, adapter in adapters.items()}
    watch(model, meters, batches, label_smoothing)
    for meter in meters.values():
        refuse_non_finite(meter.energy_gii, meter.site)
    for name, adapter in adapters.items():
        adapter.point_at(meters[name].energy_gii)


def _asking(model: nn.Module) -> Iterator[LowRankAdapter]:
    for module in model.modules():
        adapter = module.adapter if isinstance(module, Adapted) else None
        if isinstance(adapter, LowRankAdapter) and adapter.aligned:
            yield adapter


class _Energy:
    """E at one site, (groups, i, i)."""

    def __init__(self, site: Site) -> None:
        self.site, i = site, site.cin // site.groups
        self.energy_gii = torch.zeros(site.groups, i, i)

    def add(self, x: Tensor, g: Tensor) -> None:
        x_bgip, g_bgop = by_group(x, self.site), by_group(g, self.site)
        few_positions = x_bgip.shape[-1] < g_bgop.shape[-2]
        if few_positions:  # sum_b X (g' g) X', which never forms G_b
            left_bgir, right_bgri = x_bgip, (g_bgop.mT @ g_bgop) @ x_bgip.mT
        else:
            right_bgri = g_bgop @ x_bgip.mT
            left_bgir = right_bgri.mT
        left_gir = left_bgir.movedim(0, -2).flatten(-2)
        right_gri = right_bgri.movedim(0, 1).flatten(1, 2)
        self.energy_gii = self.energy_gii.to(x_bgip) + left_gir @ right_gri
