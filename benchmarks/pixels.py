"""Forward and backward of 1x1 convolutions as products of matrices, over convolutions' time.

    python benchmarks/pixels.py                                                      layers
    python benchmarks/pixels.py timm:tf_efficientnet_lite0 "lowrank(rank=16)" 48     a network

Both ways take turns in one process with one thread; the processor's time, medians and quartiles of
ratios within a turn. 16 images.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import onetrunk as ot
from onetrunk.core import fused
from onetrunk.core.adapters import base

N_IMAGES, RANK, N_TURNS = 16, 16, 30
CHANNELS, SIDES = ((64, 256), (192, 1152), (480, 80), (256, 256)), (2, 3, 4, 6, 8, 12, 24)


def seconds(call: Callable[[], Tensor], direction: Tensor) -> float:
    started = time.process_time()
    call().backward(direction)
    return time.process_time() - started


def ratios(product: Callable[[], Tensor], convolution: Callable[[], Tensor]) -> str:
    direction = torch.randn_like(convolution())
    for way in (product, convolution):
        seconds(way, direction)
    turns = [seconds(product, direction) / seconds(convolution, direction) for _ in range(N_TURNS)]
    low, middle, high = statistics.quantiles(turns, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def images(*shape: int) -> Tensor:
    return torch.randn(N_IMAGES, *shape).to(memory_format=torch.channels_last).requires_grad_()


def convolution(x: Tensor, a_oi: Tensor) -> Tensor:
    return F.conv2d(x, a_oi[:, :, None, None])


def layer(cin: int, cout: int, side: int) -> None:
    x, w_oi = images(cin, side, side), torch.randn(cout, cin)
    v_ri = torch.randn(RANK, cin, requires_grad=True)
    u_or = torch.randn(cout, RANK, requires_grad=True)
    frozen = ratios(lambda: base.on_pixels(x, w_oi), lambda: convolution(x, w_oi))
    pair = ratios(
        lambda: base.on_pixels(base.on_pixels(x, v_ri), u_or),
        lambda: convolution(convolution(x, v_ri), u_or),
    )
    print(f"{cin} to {cout} | {N_IMAGES * side * side} | {frozen} | {pair}", flush=True)


def network(form: str, family: str, side: int) -> None:
    backbone = ot.backbone(form).to(memory_format=torch.channels_last)
    model = ot.attach(backbone, ot.read_family(family), ["a", "b"], input_size=(3, side, side))
    x, rule = images(3, side, side).detach(), base.has_few_pixels

    def forward(rule: Callable[[Tensor], bool]) -> Tensor:
        with (
            mock.patch.object(base, "has_few_pixels", rule),
            mock.patch.object(fused, "has_few_pixels", rule),
        ):
            return model.train()(x)

    print(ratios(lambda: forward(rule), lambda: forward(lambda x: False)))


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        form, family, side = sys.argv[1:]
        network(form, family, int(side))
        return
    print("channels | pixels of the batch | frozen layer | rank 16 beside it")
    for (cin, cout), side in itertools.product(CHANNELS, SIDES):
        layer(cin, cout, side)


if __name__ == "__main__":
    main()
