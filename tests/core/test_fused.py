"""The fused step: what it computes and what not, when it steps aside, how often it differentiates.

That it equals the plain step, for every family and kind of layer, is a law: see test_laws.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import onetrunk as ot
from onetrunk.core.adapted import Adapted
from onetrunk.core.attach import attach
from onetrunk.core.fused import folded_product, pays
from onetrunk.core.sites import Tap, site_of

CLASSES = ("ant", "bee", "cat")
GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 strided, grouped": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2},
    "1x1": {"kernel_size": 1},
    "3x3 valid, dilated": {"kernel_size": 3, "dilation": 2},
}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


@pytest.fixture
def model(net: nn.Module) -> nn.Module:
    return drawn(attach(net, ot.Parallel(), CLASSES, input_size=(3, 8, 8)).train())


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    """The adapters away from zero."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, Adapted):
            for parameter in module.adapter.parameters():
                parameter.normal_(0, 0.3)
    return model


class Backward(TorchDispatchMode):
    """Lists (shape of the weight, output mask) of every convolution_backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[int, ...], tuple[bool, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.calls.append((tuple(args[2].shape), tuple(args[10])))
        return func(*args, **(kwargs or {}))


def test_no_filter_banks_gradient_is_computed_and_no_input_gradient_below_the_first_site(
    model: nn.Module,
) -> None:
    loss = model(torch.randn(4, 3, 8, 8)).square().sum()
    with Backward() as seen:
        loss.backward()
    assert {(shape[2:], mask[1]) for shape, mask in seen.calls} == {((3, 3), False), ((1, 1), True)}
    of_first_site = [mask for shape, mask in seen.calls if shape[1] == 3]
    assert of_first_site == [(False, True, False)]


def test_the_plain_step_and_the_fused_one_are_told_apart_by_what_they_convolve(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def n_convolutions() -> int:
        with Forward() as seen:
            model(torch.randn(4, 3, 8, 8))
        return seen.calls

    assert n_convolutions() == 2
    model.eval()
    assert n_convolutions() == 4
    with torch.no_grad():
        model.train()
        assert n_convolutions() == 4
    model[3].layer.register_forward_hook(lambda *_: None)
    assert n_convolutions() == 3
    model[0].adapter.register_forward_pre_hook(lambda *_: None)
    assert n_convolutions() == 4


class Forward(TorchDispatchMode):
    """Counts convolutions."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_a_trained_weight_and_dropout_on_the_adapters_input_take_the_plain_step(
    net: nn.Module,
) -> None:
    def n_convolutions(model: nn.Module) -> int:
        with Forward() as seen:
            model.train()(torch.randn(4, 3, 8, 8))
        return seen.calls

    dropping = attach(net, ot.Parallel(dropout=0.5), CLASSES, input_size=(3, 8, 8))
    assert n_convolutions(dropping) == 4
    trained = attach(net, ot.Parallel(), CLASSES, input_size=(3, 8, 8))
    trained[0].layer.weight.requires_grad_(True)
    assert n_convolutions(trained) == 3


@pytest.mark.parametrize("family", [ot.LowRank(2), ot.Series(), ot.Parallel(), ot.Channelwise()])
@pytest.mark.parametrize("bias", [False, True])
def test_a_1x1_convolution_over_a_few_channels_last_pixels_is_a_product_of_matrices(
    family: Any, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onetrunk.core.fused.pays", lambda adapter, site: False)
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 5, 1, bias=bias), nn.Flatten(), nn.Linear(5 * 6, 3)).double()
    model = drawn(attach(net, family, CLASSES, input_size=(3, 3, 2), norms="placed").train())
    adapted, x = model[0], torch.randn(4, 3, 3, 2, dtype=torch.float64)

    def step(way: Any, layout: torch.memory_format) -> tuple[int, list[Tensor]]:
        ours = x.to(memory_format=layout).requires_grad_()
        with Forward() as seen:
            y = way(adapted, ours)
        own = [p for p in adapted.adapter.parameters() if p.requires_grad]
        return seen.calls, [y, *torch.autograd.grad(y.square().sum(), [ours, *own])]

    calls, found = step(Adapted.forward, torch.channels_last)
    plain_calls, expected = step(Adapted.plain, torch.contiguous_format)
    assert calls == 0 < plain_calls == step(Adapted.forward, torch.contiguous_format)[0]
    for ours, plain in zip(found, expected, strict=True):
        assert (ours - plain).abs().max() <= 1e-12 * plain.abs().max()
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr("onetrunk.core.adapters.base.FEW_PIXELS", 4 * 3 * 2 - 1)
    assert step(Adapted.forward, torch.channels_last)[0] == plain_calls


def test_a_1x1_convolution_that_standardises_its_weight_stays_a_convolution() -> None:
    conv = StdConv2d(8, 8, 1)
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model = drawn(attach(net, ot.LowRank(2), CLASSES, input_size=(8, 3, 2)).train())
    x = torch.randn(4, 8, 3, 2).to(memory_format=torch.channels_last)
    with torch.enable_grad():
        assert torch.equal(model[0](x), model[0].plain(x))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_it_differentiates_twice(geometry: dict[str, Any]) -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(4, 4, **geometry).double().requires_grad_(False)
    site = site_of("conv", conv)
    tap = Tap.of(conv, site)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    a_oi = torch.randn(4, 4 // conv.groups, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, a_oi: Tensor) -> Tensor:
        return folded_product(conv, a_oi, x, tap)

    assert torch.autograd.gradcheck(call, (x, a_oi))
    assert torch.autograd.gradgradcheck(call, (x, a_oi))


def test_under_autocast_it_has_the_plain_steps_types_and_numbers(model: nn.Module) -> None:
    def step(way: Any) -> list[Tensor]:
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = way(model[0], x)
        (y.float() ** 2).sum().backward()
        found = [y.detach(), x.grad, model[0].adapter.a_oi.grad]
        model[0].adapter.a_oi.grad = None
        return found

    ours, plain = step(Adapted.forward), step(Adapted.plain)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    assert ours[0].dtype == torch.bfloat16
    for one, other in zip(ours, plain, strict=True):
        assert (one.float() - other.float()).abs().max() <= 0.02 * other.float().abs().max()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_same(model: nn.Module, backend: str) -> None:
    x = torch.randn(4, 3, 8, 8)

    def gradients(call: Any) -> Iterator[Tensor]:
        model.zero_grad()
        call(x).square().sum().backward()
        return (p.grad.clone() for p in model.parameters() if p.grad is not None)

    expected = list(gradients(model))
    torch._dynamo.reset()
    found = list(gradients(torch.compile(model, backend=backend)))
    assert len(found) == len(expected) > 0
    for ours, plain in zip(found, expected, strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_factors_are_folded_where_counting_says_that_it_pays() -> None:
    def judged(family: ot.LowRank | ot.Parallel, channels: int) -> bool:
        site = site_of("conv", nn.Conv2d(channels, channels, 3, padding=1))
        assert site is not None and not isinstance(site, str)
        return pays(family.build(site), site)

    assert judged(ot.Parallel(), 64) and judged(ot.Parallel(), 512)
    assert judged(ot.LowRank(8), 64)
    assert not judged(ot.LowRank(8), 512)
    assert judged(ot.LowRank(128), 512)
