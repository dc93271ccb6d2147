"""watch: one pass over labelled images that notes what goes into layers, and the gradients at them.

The network computes as in evaluation, running statistics included, and is left as it was: the pass
runs over a copy of the module tree that shares every tensor.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AttachError
from .attach import Adapted
from .sites import Site, Tap
from .tree import copy_tree, passed_on, replace_modules


class Meter(Protocol):
    """What adds up, batch by batch, what it is shown at one site."""

    site: Site

    def add(self, x: Tensor, g: Tensor) -> None:
        """Takes a batch.

        Args:
            x: the layer's input, aligned with its output as for `Adapter.forward`.
            g: the gradient of the sum of the images' losses by the output of the layer, adapter
                included, in the output's shape.
        """


def watch(
    model: nn.Module,
    meters: Mapping[str, Meter],
    batches: Iterable[tuple[Tensor, Tensor]],
    label_smoothing: float = 0.0,
) -> int:
    """Shows every batch to the meters; the number of images.

    Args:
        model: a network of class scores.
        meters: site name -> meter.
        batches: inputs (b, c, h, w) and labels (b,), on any device.
        label_smoothing: of the cross-entropy whose gradients are shown.
    """
    watched = copy_tree(model).eval()
    replace_modules(watched, {name: _watching(watched, meters[name]) for name in meters})
    reference = next(watched.parameters())
    n_images = 0
    for x_bchw, labels_b in batches:
        y = watched(x_bchw.to(reference.device, reference.dtype))
        logits_bc = y if isinstance(y, Tensor) else y[0]
        labels_b = labels_b.to(logits_bc.device)
        F.cross_entropy(
            logits_bc, labels_b, reduction="sum", label_smoothing=label_smoothing
        ).backward()
        n_images += len(labels_b)
    return n_images


def by_group(x: Tensor, site: Site) -> Tensor:
    """(images, groups, channels of a group, positions) of a layer's input or output, in float."""
    x = x if x.dtype == torch.float64 else x.float()
    x_bcp = x.flatten(2) if site.kind == "conv" else x.reshape(len(x), -1, x.shape[-1]).mT
    return x_bcp.unflatten(1, (site.groups, -1))


def refuse_non_finite(tensor: Tensor, site: Site) -> None:
    """Raises AttachError where what gradients at `site` add up to has NaN or infinity."""
    if not tensor.isfinite().all():
        raise AttachError(
            f"the gradient at {site.name} is not finite (NaN or infinity): look for "
            "broken numbers in the images or in the network's weights."
        )


class _Watch(torch.autograd.Function):
    """y, noting x and dL/dy; autograd itself refuses an x that was changed in place since."""

    @staticmethod
    def forward(ctx: Any, zero: Tensor, x: Tensor, y: Tensor, meter: Meter) -> Tensor:
        ctx.meter = meter
        ctx.save_for_backward(x)
        return y + zero  # zero: a gradient is wanted here even where nothing before learns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        ctx.meter.add(ctx.saved_tensors[0], grads[0])
        return None, None, grads[0], None


class _Watched(nn.Module):
    """A layer, adapted or not, whose inputs and output gradients are noted."""

    def __init__(self, layer: nn.Module, tap: Tap | None, meter: Meter, zero: Tensor) -> None:
        super().__init__()
        self.layer, self.tap, self.meter = layer, tap, meter
        self.zero = nn.Parameter(zero)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        x = x if self.tap is None else self.tap.pick(x, y.shape[-2:])
        watched: Tensor = _Watch.apply(self.zero, x, y, self.meter)
        return watched

    def __getattr__(self, name: str) -> Any:
        return passed_on(self, "layer", super().__getattr__, name)


def _watching(model: nn.Module, meter: Meter) -> _Watched:
    module = model.get_submodule(meter.site.name)
    layer: Any = module.layer if isinstance(module, Adapted) else module
    tap = Tap.of(layer, meter.site) if meter.site.kind == "conv" else None
    return _Watched(module, tap, meter, layer.weight.new_zeros(()))
