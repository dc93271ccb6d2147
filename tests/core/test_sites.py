"""sites: what a layer says of itself, why one is no site, and where the tap of a kernel sits."""

import pytest
import timm.layers
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from onetrunk.core.sites import (
    Site,
    Tap,
    effective_weight,
    forward_known,
    package_and_class,
    site_of,
)


class Loud(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class LoudLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class LoudInside(nn.Conv2d):
    def _conv_forward(self, *args: Tensor) -> Tensor:
        return 2 * super()._conv_forward(*args)


class Quiet(nn.Conv2d):
    """Only a name: it computes what Conv2d computes."""


def test_a_convolution_says_its_channels_kernel_stride_dilation_and_groups() -> None:
    site = site_of("c", nn.Conv2d(4, 6, (3, 5), 2, dilation=(1, 2), groups=2))
    assert isinstance(site, Site)
    assert (site.name, site.kind, site.cin, site.cout) == ("c", "conv", 4, 6)
    assert (site.kernel, site.stride, site.dilation) == ((3, 5), (2, 2), (1, 2))
    assert site.groups == 2 and site.spatial and not site.depthwise
    assert site.n_weights == 6 * 2 * 3 * 5 and site.n_other == 6


def test_a_linear_layer_is_one_pixel_wide() -> None:
    site = site_of("l", nn.Linear(4, 6, bias=False))
    assert isinstance(site, Site)
    assert (site.kind, site.kernel, site.n_weights, site.n_other) == ("linear", (1, 1), 24, 0)
    assert not site.spatial and not site.depthwise


def test_timms_layers_say_how_they_pad_and_whether_they_standardise() -> None:
    same = site_of("s", Conv2dSame(4, 4, 3, groups=4))
    standardised = site_of("w", ScaledStdConv2d(4, 6, 3, padding=1))
    assert isinstance(same, Site) and isinstance(standardised, Site)
    assert same.same and same.depthwise and not same.standardised
    assert standardised.standardised and not standardised.same
    assert standardised.n_other == 6 + 6  # bias and gain


@pytest.mark.parametrize("module", [nn.ReLU(), nn.BatchNorm2d(3), nn.Conv1d(3, 3, 1)])
def test_modules_of_other_kinds_are_no_sites(module: nn.Module) -> None:
    assert site_of("m", module) is None


@pytest.mark.parametrize("cls", [Loud, LoudInside])
def test_a_convolution_with_a_forward_of_its_own_is_refused(cls: type[nn.Conv2d]) -> None:
    reason = f"{cls.__name__} computes in its own way: its forward is not Conv2d's"
    assert site_of("c", cls(2, 2, 1)) == reason
    assert not forward_known(cls(2, 2, 1))


def test_a_linear_layer_with_a_forward_of_its_own_is_refused() -> None:
    reason = "LoudLinear computes in its own way: its forward is not Linear's"
    assert site_of("l", LoudLinear(2, 2)) == reason


def test_a_subclass_that_changes_nothing_is_a_site() -> None:
    assert isinstance(site_of("c", Quiet(2, 2, 1)), Site)


def test_torchs_own_class_of_that_name_with_another_forward_is_refused() -> None:
    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    Linear.__module__ = "torch.ao.nn.qat"
    assert package_and_class(Linear(2, 2)) == ("torch", "Linear")
    assert isinstance(site_of("l", Linear(2, 2)), str)


def test_a_weight_computed_from_others_is_refused() -> None:
    normed = parametrizations.weight_norm(nn.Linear(2, 2))
    assert site_of("l", normed) == "its weight is computed from other parameters"
    assert not forward_known(normed)


def test_a_mode_of_padding_that_the_tap_would_see_is_refused() -> None:
    reason = "it pads with 'reflect' where a 1x1 filter would see zeros"
    assert site_of("c", nn.Conv2d(2, 2, 1, padding=1, padding_mode="reflect")) == reason
    assert isinstance(site_of("c", nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), Site)


@pytest.mark.parametrize(
    ("conv", "tap"),
    [
        (nn.Conv2d(2, 2, 3, padding=1), (1, 1)),
        (nn.Conv2d(2, 2, 5, padding=2), (2, 2)),
        (nn.Conv2d(2, 2, 4, 4), (0, 0)),
        (nn.Conv2d(2, 2, 7, 4, 3), (3, 3)),
        (nn.Conv2d(2, 2, 3, padding=2, dilation=2), (1, 1)),
        (nn.Conv2d(2, 2, 3, padding=1, dilation=2), (1, 1)),
        (nn.Conv2d(2, 2, (1, 5), padding=(0, 2)), (0, 2)),
        (nn.Conv2d(2, 2, 3, padding=3), (1, 1)),
        (nn.Conv2d(2, 2, 3, padding="same"), (1, 1)),
        (nn.Conv2d(2, 2, 4, padding="same"), (1, 1)),
        (Conv2dSame(2, 2, 3, 2), (1, 1)),
    ],
)
def test_the_tap_is_where_a_1x1_filter_beside_the_kernel_sits(
    conv: nn.Conv2d, tap: tuple[int, int]
) -> None:
    site = site_of("c", conv)
    assert isinstance(site, Site)
    assert Tap.of(conv, site).tap == tap


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("size", [(9, 9), (10, 7), (5, 12)])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(1, 1, 3, 2, 1),
        nn.Conv2d(1, 1, 3, 3, 2),
        nn.Conv2d(1, 1, 4, 2, 1, bias=False),
        nn.Conv2d(1, 1, 4, padding="same", dilation=2),
        Conv2dSame(1, 1, 3, 2),
        Conv2dSame(1, 1, 5, 3, dilation=1),
    ],
    ids=str,
)
def test_pick_gives_the_pixel_that_the_convolution_sees_at_the_tap(
    conv: nn.Conv2d, size: tuple[int, int]
) -> None:
    site = site_of("c", conv)
    assert isinstance(site, Site)
    tap = Tap.of(conv, site)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, tap.tap[0], tap.tap[1]] = 1  # the bank that only sees the tap
        if conv.bias is not None:
            conv.bias.zero_()
    x_bihw = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(0))
    y_bohw = conv(x_bihw)
    assert torch.equal(tap.pick(x_bihw, y_bohw.shape[-2:]), y_bohw)


@pytest.mark.parametrize("cls", [StdConv2d, ScaledStdConv2d])
def test_the_effective_weight_is_the_one_that_a_standardising_layer_uses(cls: type) -> None:
    layer = cls(3, 4, 3, padding=1, bias=False)
    x_bihw = torch.randn((2, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    expected = nn.functional.conv2d(x_bihw, effective_weight(layer), padding=1)
    assert torch.equal(layer(x_bihw), expected)
    assert not torch.allclose(effective_weight(layer), layer.weight)


def test_the_effective_weight_of_an_ordinary_layer_is_its_weight() -> None:
    for layer in (nn.Linear(2, 2), nn.Conv2d(2, 2, 1), timm.layers.create_conv2d(2, 2, 3)):
        assert torch.equal(effective_weight(layer), layer.weight)
