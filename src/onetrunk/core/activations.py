"""Activations: what goes into the adapters and comes out of their layers, on unlabelled images.

Per site the second moments C = E[x x^T] (i, i) of the adapter's own input and the energy E|y|^2 of
the layer's output. An error D of an adapter's matrix then costs tr(D C D^T) / E|y|^2 of the output.
One forward pass over the images; i i numbers a site.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompressError
from .adapted import Adapted
from .adapters import Adapter
from .adapters.series import normed
from .domain import domain_of
from .tree import copy_tree


@dataclass(frozen=True)
class Activations:
    """The second moments of one adapter's input, and the mean energy of its layer's output."""

    covariance_ii: Tensor
    energy: float


Covariances = Mapping[str, Mapping[str, Activations]]  # domain -> site -> activations


def activation_covariances(
    models: Mapping[str, nn.Module], images: Mapping[str, Tensor | Iterable[Tensor]]
) -> dict[str, dict[str, Activations]]:
    """What `compress(..., covariances=...)` weighs errors with: domain -> site -> activations.

    Args:
        models: the domains' networks; they are left as they were.
        images: domain -> its images as the network takes them, (b, c, h, w) or batches of that; a
            hundred do.

    Raises:
        CompressError: where a domain has no images.
        AttachError: where a model is no domain's network.
    """
    for name in models:
        if name not in images:
            raise CompressError(
                f"domain {name!r} has no images, so nothing is known of its activations. Give "
                "some (no labels are needed), or leave covariances out."
            )
    return {name: _activations(name, model, images[name]) for name, model in models.items()}


@torch.no_grad()
def _activations(
    name: str, model: nn.Module, images: Tensor | Iterable[Tensor]
) -> dict[str, Activations]:
    domain_of(model)
    network = copy_tree(model, own=model.buffers()).eval()
    sums: dict[str, _Sums] = {}
    for site, module in network.named_modules():
        if isinstance(module, Adapted) and getattr(module.adapter, "site", None) is not None:
            module.adapter.register_forward_hook(_noting(sums, site))
    like = next(network.parameters())
    for x_bchw in [images] if isinstance(images, Tensor) else images:
        network(x_bchw.to(like.device, like.dtype))
    if not all(torch.isfinite(s.moments_ii).all() for s in sums.values()):
        raise CompressError(
            f"domain {name!r} has activations that are not finite on its images. Look for broken "
            "numbers in the images, or train the domain again."
        )
    return {site: s.mean() for site, s in sums.items()}


@dataclass
class _Sums:
    moments_ii: Tensor
    energy: float = 0.0
    n_positions: int = 0

    def mean(self) -> Activations:
        n = max(1, self.n_positions)
        return Activations(self.moments_ii / n, self.energy / n)


def _noting(sums: dict[str, _Sums], site: str) -> Callable[[Adapter, Any, Tensor], None]:
    def hook(adapter: Any, args: tuple[Tensor, Tensor], out: Tensor) -> None:
        x, y = args
        if not adapter.reads_input:
            x = normed(adapter.norm, y, adapter.site) if hasattr(adapter, "norm") else y
        x_ni, out_no = _rows(x, adapter.site.kind), _rows(out, adapter.site.kind)
        found = sums.setdefault(site, _Sums(x_ni.new_zeros(x_ni.shape[1], x_ni.shape[1])))
        found.moments_ii += x_ni.T @ x_ni
        found.energy += float(out_no.square().sum())
        found.n_positions += len(out_no)

    return hook


def _rows(x: Tensor, kind: str) -> Tensor:
    """(n, channels) in float64 on the CPU, a row for every position."""
    rows = x.movedim(1, -1) if kind == "conv" else x
    return rows.reshape(-1, rows.shape[-1]).cpu().double()
