"""The fused training step: an adapter that is a matrix A on a frozen layer's input, in one product.

y = w * x + A x = (w + diag_k(A)) * x is one convolution with the folded bank. Backward, the input's
gradient takes the same bank, and A's gradient is that of a 1x1 convolution on the pixels under the
tap; the k x k weight gradient, a third of a fine-tuning step, is never computed. At a linear layer
w + A is all there is, so only the second product is spared.

A 1x1 convolution over channels-last memory is a product of matrices. On a CPU it is computed as one
where the batch's maps have few pixels, which takes half to nine tenths of a convolution's time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters.base import Adapter, add_at_tap, has_few_pixels, on_pixels
from .sites import Site, Tap, forward_known

FOLDING_DEVICES = ("cpu",)  # on a GPU small steps wait for launches, of which folding has more
PASS = 16  # multiply-adds in the time of one pass over one number of an activation, about


def pays(adapter: Adapter, site: Site) -> bool:
    """Whether folding `adapter` at `site` costs less than computing it beside the layer.

    Per output position of a step. Beside it, a product of matrices takes its multiply-adds three
    times (forward, both gradients); its output and input gradient are written and added. Folded,
    A's gradient takes o i / groups, however few factors A is made of.
    """
    numbers = sum(p.numel() for p in adapter.parameters())
    beside = 3 * numbers + PASS * (2 * site.cout + site.cin)
    return site.cout * site.cin // site.groups <= beside


def folds(layer: nn.Conv2d | nn.Linear, adapter: Adapter, site: Site) -> bool:
    """Whether a layer computes as its weight says, so that A may be added to it, and that pays."""
    if not forward_known(layer) or not adapter.reads_input or not pays(adapter, site):
        return False
    if isinstance(layer, nn.Linear):
        return True
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and not site.same and not site.standardised


def is_matrix(layer: nn.Conv2d | nn.Linear, site: Site) -> bool:
    """Whether a convolution is a matrix on every pixel, and computes as its weight says."""
    return (
        isinstance(layer, nn.Conv2d)
        and forward_known(layer)
        and not site.standardised
        and _sees_one_pixel(layer)
    )


def _sees_one_pixel(conv: nn.Conv2d) -> bool:
    found = conv.kernel_size, conv.stride, conv.padding, conv.groups
    return found == ((1, 1), (1, 1), (0, 0), 1)


def product(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """w x + b of a layer that `is_matrix`, as a product of matrices where that takes less time."""
    if has_few_pixels(x):
        return on_pixels(x, layer.weight.flatten(1), layer._parameters["bias"])
    found: Tensor = layer(x)
    return found


def folded_product(
    layer: nn.Conv2d | nn.Linear, a_oi: Tensor, x: Tensor, tap: Tap | None
) -> Tensor:
    """(w + diag_k(A)) * x + b, differentiable in x and A, any number of times."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _folded_product(layer, a_oi, x, tap)
    with torch.autocast(device, enabled=False):  # the bank is folded before it is rounded
        return _folded_product(layer, a_oi, x.to(torch.get_autocast_dtype(device)), tap)


def _folded_product(
    layer: nn.Conv2d | nn.Linear, a_oi: Tensor, x: Tensor, tap: Tap | None
) -> Tensor:
    bias: Tensor | None = layer._parameters["bias"]
    bias = None if bias is None else bias.to(x.dtype)
    if tap is None or isinstance(layer, nn.Linear):
        return F.linear(x, (layer.weight + a_oi).to(x.dtype), bias)
    if _sees_one_pixel(layer) and has_few_pixels(x):
        return on_pixels(x, (layer.weight.flatten(1) + a_oi).to(x.dtype), bias)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _FoldedConv.apply(x, layer.weight, bias, a_oi, tap, *geometry)


class _FoldedConv(torch.autograd.Function):
    """conv2d(x, w + diag_k(A), b), whose backward gives x and A their gradients.

    Inputs are saved and the bank is folded again, so that a second derivative sees A in it.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a_oi: Tensor,
        tap: Tap,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        bank = add_at_tap(weight, a_oi, tap.tap).to(x.dtype)
        return F.conv2d(x, bank, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, a_oi, ctx.tap, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
        ctx.save_for_backward(x, weight, a_oi)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a_oi = ctx.saved_tensors
        (y_grad,) = gradients
        x_grad = a_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            bank = add_at_tap(weight, a_oi, ctx.tap.tap).to(x.dtype)
            x_grad = torch.ops.aten.convolution_backward(
                y_grad, x, bank, None, ctx.stride, ctx.padding, ctx.dilation,
                False, (0, 0), ctx.groups, (True, False, False),
            )[0]  # fmt: skip
        if ctx.needs_input_grad[2]:
            bias_grad = y_grad.sum((0, 2, 3))
        if ctx.needs_input_grad[3]:
            x_tap, like_oi11 = ctx.tap.pick(x, y_grad.shape[-2:]), a_oi[:, :, None, None]
            grad_oi11 = torch.ops.aten.convolution_backward(
                y_grad, x_tap, like_oi11.to(x.dtype), None, (1, 1), (0, 0), (1, 1),
                False, (0, 0), ctx.groups, (False, True, False),
            )[1]  # fmt: skip
            a_grad = grad_oi11.flatten(1).to(a_oi.dtype)
        return x_grad, None, bias_grad, a_grad, None, None, None, None, None
