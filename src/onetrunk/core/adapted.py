"""A layer with its adapter beside it: what `attach` puts in the place of every adapted layer."""

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .fused import FOLDING_DEVICES, folded_product, folds, is_matrix, product
from .sites import Site, Tap
from .tree import Wrapper


class Adapted(Wrapper):
    """A frozen layer and the adapter that corrects its output."""

    layer: nn.Conv2d | nn.Linear
    adapter: Adapter

    def __init__(self, layer: nn.Conv2d | nn.Linear, adapter: Adapter, site: Site) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter
        self.tap = Tap.of(layer, site) if isinstance(layer, nn.Conv2d) else None
        self.folds, self.is_matrix = folds(layer, adapter, site), is_matrix(layer, site)

    def forward(self, x: Tensor) -> Tensor:
        fused = (self.folds or self.is_matrix) and x.device.type in FOLDING_DEVICES
        if not (fused and self.training and torch.is_grad_enabled() and self._untouched()):
            return self.plain(x)
        a_oi = self.adapter.matrix() if self.folds else None
        if a_oi is not None:
            return folded_product(self.layer, a_oi, x, self.tap)
        return self.beside(x, product(self.layer, x) if self.is_matrix else self.layer(x))

    def plain(self, x: Tensor) -> Tensor:
        """The layer and the adapter beside it: what the fused step must equal."""
        return self.beside(x, self.layer(x))

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """What the adapter makes of the layer's input and output."""
        if not self.adapter.reads_input:
            return _laid_out_as(y, self.adapter(y, y))
        x = x if self.tap is None else self.tap.pick(x, y.shape[-2:])
        return _laid_out_as(y, self.adapter(x, y))

    def _untouched(self) -> bool:
        """Whether the weight is frozen, and nobody listens to layer or adapter by a hook."""
        hooks = (
            hook
            for module in (self.layer, self.adapter)
            for hook in (
                module._forward_pre_hooks, module._forward_hooks,
                module._backward_pre_hooks, module._backward_hooks,
            )
        )  # fmt: skip
        return not self.layer.weight.requires_grad and not any(hooks)


def _laid_out_as(y: Tensor, corrected: Tensor) -> Tensor:
    """`corrected` with y's strides along axes of size 1, where strides mean nothing.

    The next layer picks its algorithm by them: on maps of 1x1 pixels a sum with other strides than
    y's moved EfficientViM's features by 3e-8 although nothing was added.
    """
    if corrected.stride() == y.stride() or corrected.shape != y.shape:
        return corrected
    axes = zip(y.shape, y.stride(), corrected.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in axes):
        return corrected.as_strided(y.shape, y.stride())
    return corrected
