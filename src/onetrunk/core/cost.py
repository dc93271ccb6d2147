"""cost: what one domain costs, in numbers, bytes and multiply-adds; one counter for everything.

Numbers and bytes are those that a bank stores: the domain's own tensors, but for norm statistics
that are still the backbone's. Multiply-adds are those of convolutions and matrix products for one
image, as PyTorch's FLOP counter counts them (half its figure); element-wise work (norms, gains,
sums) is left out on both sides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapted import Adapted
from .domain import domain_of, stored, trace_of
from .trace import Size
from .tree import is_norm, own_tensors


@dataclass(frozen=True)
class SiteCost:
    """What a domain adds at one site: its family, numbers and multiply-adds beside the layer's."""

    name: str
    stage: str
    family: str
    numbers: int
    multiply_adds: int
    layer_numbers: int
    layer_multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """What one domain costs beside its backbone.

    Args:
        adapters, norms, head, weights: numbers by what holds them, running statistics included
            where a training has moved them; `weights` are pretrained weights of the domain's own
            (`full`) and other buffers.
        delta_bytes: bytes of all of them: what a bank stores, but for the file's header.
        backbone_numbers, backbone_bytes: of the backbone with its own classifier.
        multiply_adds: what the adapters add an image before merging; 0 after.
        backbone_multiply_adds: of the backbone's adaptable layers an image.
        sites: the same site by site, in order of execution.
        basis, basis_bytes: numbers and bytes that this domain shares with others over its basis;
            they are stored once for all of them and are no part of the delta.
        basis_share: the side or sides that are shared: `output`, `input`, `both`; else empty.
    """

    adapters: int
    norms: int
    head: int
    weights: int
    delta_bytes: int
    backbone_numbers: int
    backbone_bytes: int
    multiply_adds: int
    backbone_multiply_adds: int
    sites: tuple[SiteCost, ...]
    basis: int = 0
    basis_bytes: int = 0
    basis_share: str = ""

    @property
    def numbers(self) -> int:
        """Numbers that are the domain's own."""
        return self.adapters + self.norms + self.head + self.weights

    @property
    def share(self) -> float:
        """The domain's numbers as a share of the backbone's; a second fine-tuned network is 1."""
        return self.numbers / self.backbone_numbers

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        sites = [site.__dict__ for site in self.sites]
        return {**self.__dict__, "numbers": self.numbers, "share": self.share, "sites": sites}

    def __str__(self) -> str:
        """The table: what the delta costs beside the backbone and a second fine-tuned network."""
        full = self.backbone_bytes
        rows = [
            ("", "numbers", "bytes", "of a fine-tuned network"),
            ("adapters", f"{self.adapters:,}", "", f"{self.adapters / self.backbone_numbers:.2%}"),
            ("norms", f"{self.norms:,}", "", f"{self.norms / self.backbone_numbers:.2%}"),
            ("head", f"{self.head:,}", "", f"{self.head / self.backbone_numbers:.2%}"),
            ("weights", f"{self.weights:,}", "", f"{self.weights / self.backbone_numbers:.2%}"),
            ("this domain", f"{self.numbers:,}", f"{self.delta_bytes:,}", f"{self.share:.2%}"),
            *self._basis_row(),
            ("backbone, shared", f"{self.backbone_numbers:,}", f"{full:,}", "100.00%"),
            (
                "multiply-adds, unmerged",
                f"{self.multiply_adds:,}",
                "",
                f"{self.multiply_adds / max(1, self.backbone_multiply_adds):.2%}",
            ),
        ]
        return "\n".join(f"{a:<24}{b:>14}{c:>14}{d:>26}" for a, b, c, d in rows)

    def _basis_row(self) -> list[tuple[str, str, str, str]]:
        if not self.basis:
            return []
        share = f"{self.basis / self.backbone_numbers:.2%}"
        return [("basis, shared", f"{self.basis:,}", f"{self.basis_bytes:,}", share)]


def cost(model: nn.Module, input_size: Size | None = None) -> Cost:
    """What the domain of `model` costs.

    Args:
        input_size: channels, rows, columns that multiply-adds are counted for; by default the
            domain's own preprocessing, else what the backbone says of itself.

    Raises:
        AttachError: where `model` is no domain's network.
        BackboneError: where the backbone does not run at that size.
    """
    domain = domain_of(model)
    traced = {site.name: site for site in trace_of(domain, input_size).sites}
    sites = tuple(
        SiteCost(
            name,
            site.stage,
            str(domain.plan[name]),
            sum(t.numel() for t in own_site_tensors(model, name)),
            site.positions * sum(t.numel() for t in adapter_tensors(model, name) if t.ndim == 2),
            site.n_weights,
            site.multiply_adds,
        )
        for name, site in traced.items()
        if name in domain.plan
    )
    own = stored(model)
    counts = _numbers_by_holder(model, own)
    backbone = domain.backbone.state_dict()
    basis = domain.basis
    return Cost(
        **counts,
        delta_bytes=sum(t.numel() * t.element_size() for t in own.values()),
        backbone_numbers=sum(t.numel() for t in backbone.values()),
        backbone_bytes=sum(t.numel() * t.element_size() for t in backbone.values()),
        multiply_adds=sum(site.multiply_adds for site in sites),
        backbone_multiply_adds=sum(site.multiply_adds for site in traced.values()),
        sites=sites,
        basis=0 if basis is None else basis.numbers,
        basis_bytes=0 if basis is None else basis.n_bytes,
        basis_share="" if basis is None else basis.share,
    )


def adapter_tensors(model: nn.Module, site: str) -> list[torch.Tensor]:
    """The numbers that act at one site, a shared basis' too; none where a family adds nothing."""
    module = model.get_submodule(site)
    return list(module.adapter.state_dict().values()) if isinstance(module, Adapted) else []


def own_site_tensors(model: nn.Module, site: str) -> list[torch.Tensor]:
    """The domain's numbers at one site: its adapter's, else the layer's own where it is trained."""
    module = model.get_submodule(site)
    if not isinstance(module, Adapted):
        return list(own_tensors(module))
    shared = domain_of(model).shared
    held = module.adapter.state_dict().items()
    return [tensor for name, tensor in held if f"{site}.adapter.{name}" not in shared]


def _numbers_by_holder(model: nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, int]:
    domain = domain_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    heads = tuple(f"{name}." for name in domain.head)
    adapters = tuple(f"{n}.adapter." for n, m in modules.items() if isinstance(m, Adapted))
    counts = {"adapters": 0, "norms": 0, "head": 0, "weights": 0}
    for name, tensor in own.items():
        if name.startswith(adapters):
            holder = "adapters"
        elif name.startswith(heads):
            holder = "head"
        else:
            holder = "norms" if is_norm(modules[name.rpartition(".")[0]]) else "weights"
        counts[holder] += tensor.numel()
    return counts
