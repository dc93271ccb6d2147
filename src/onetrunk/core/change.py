"""How much a domain changes each layer: |w' - w| / |w|, w' the merged weight, Frobenius norms.

Rebuffi et al. (CVPR 2018): both shallow and deep layers must change, "but the required changes are
very small". Norms and biases are left out: only the weights that mix channels are compared.
"""

import torch
from torch import Tensor, nn

from .domain import domain_of, trace_of
from .merge import merge
from .sites import effective_weight


@torch.no_grad()
def relative_change(model: nn.Module) -> dict[str, float]:
    """Site -> relative size of the domain's change of that layer, in order of execution.

    Sites that the domain leaves alone have 0.

    Raises:
        AttachError: where `model` is no domain's network.
        MergeError: where it does not merge.

    >>> from onetrunk import Parallel, attach, backbone
    >>> net = backbone("resnet26(width=0.125)", pretrained=False)
    >>> fresh = attach(net, Parallel(), ["cat", "dog"], input_size=(3, 32, 32))
    >>> set(relative_change(fresh).values())
    {0.0}
    """
    domain = domain_of(model)
    merged = merge(model, fold_norms=False)
    changes = {}
    for site in trace_of(domain).sites:
        before, after = (_weight(network, site.name) for network in (domain.backbone, merged))
        size = before.norm().clamp_min(torch.finfo(torch.float64).tiny)
        changes[site.name] = float((after - before).norm() / size)
    return changes


def _weight(network: nn.Module, site: str) -> Tensor:
    layer = network.get_submodule(site)
    assert isinstance(layer, nn.Conv2d | nn.Linear)  # what a site is
    return effective_weight(layer).cpu().double()  # a trained network may lie on a GPU
