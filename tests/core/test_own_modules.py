"""Modules as users write them: the laws hold for them, or they are refused.

Classes that look like torch's or timm's and compute something else, and torch's own encoder, which
in eval mode takes its children's weights and calls none of them.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.core.attach import attach
from onetrunk.core.domain import delta
from onetrunk.core.together import Together
from onetrunk.core.tree import is_norm
from onetrunk.errors import AttachError, BackboneError, MixError

SIZE = (3, 8, 8)
FAMILIES = [ot.LowRank(2), ot.Series(), ot.Channelwise(), ot.Norm(), ot.Head()]


@torch.no_grad()
def drawn(model: nn.Module, tensors: dict[str, Tensor], seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else 0.5 * values)
    return model.eval()


def started(net: nn.Module) -> nn.Module:
    net = net.double()
    return drawn(net, net.state_dict(), seed=0)


def domain(net: nn.Module, family: Any = None, seed: int = 1, **options: Any) -> nn.Module:
    model = attach(net, family or ot.Parallel(), ["a", "b", "c"], input_size=SIZE, **options)
    return drawn(model, delta(model), seed)


def images(n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(n, *SIZE, generator=generator, dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def mixed_apart(models: dict[str, nn.Module]) -> float:
    """How far rows of a mixture are from their own domains' scores, which alternate."""
    rows = [list(models)[k % len(models)] for k in range(4)]
    scores = torch.stack(ot.mix(models)(images(), rows))
    own = torch.stack([models[name](images())[k] for k, name in enumerate(rows)])
    return apart(scores, own)


class Tail(nn.Sequential):
    """Layers with a mean and a classifier behind."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


# torch's encoder


class Encoder(nn.Module):
    """A small vision transformer out of torch's own parts."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.patch, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patch(x_bchw).flatten(2).transpose(1, 2)).mean(1))


@pytest.fixture(params=[False, True], ids=["norm last", "norm first"])
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    return started(Encoder(request.param))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_adapters_inside_torchs_encoder_count_without_gradients_too(
    encoder: nn.Module, family: Any
) -> None:
    model = domain(encoder, family)
    with_gradients = model(images().requires_grad_())
    with torch.no_grad():
        assert apart(model(images()), with_gradients) < 1e-10
        assert apart(ot.merge(model)(images()), with_gradients) < 1e-10


def test_domains_over_torchs_encoder_mix(encoder: nn.Module) -> None:
    models = {str(f): domain(encoder, f, seed) for seed, f in enumerate(FAMILIES)}
    with torch.no_grad():
        assert mixed_apart(models) < 1e-10


# Norms


class BatchNormAndReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class LayerNorm(nn.LayerNorm):
    """Over the channels of maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm2d(nn.Module):
    """ConvNeXt's own, with other names than timm's."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        return 2 * y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("norm", [BatchNormAndReLU, LayerNorm, LayerNorm2d])
def test_norms_with_a_forward_of_their_own_keep_it_in_a_mixture(norm: type[nn.Module]) -> None:
    net = started(Tail(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.Conv2d(8, 8, 3, padding=1)))
    models = {"one": domain(net, seed=1), "two": domain(net, ot.Norm(), seed=2)}
    assert mixed_apart(models) < 1e-10
    assert apart(ot.merge(models["one"])(images()), models["one"](images())) < 1e-10


class NormedConv2d(nn.Conv2d):
    """A convolution whose weight is normalised, after mmdetection's."""


def test_a_convolution_with_norm_in_its_name_is_no_norm() -> None:
    net = Tail(NormedConv2d(3, 8, 3))
    assert not is_norm(net[0]) and not is_norm(nn.Linear(2, 2))
    trained = {n for n, p in domain(net).named_parameters() if p.requires_grad}
    assert not {"0.weight", "0.bias", "0.layer.weight", "0.layer.bias"} & trained


# Rows


class TwoViews(nn.Module):
    """Averages over an image and its mirror image, in one batch."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.body, self.fc = Tail(nn.Conv2d(3, 8, 3, padding=1)), nn.Linear(5, 5)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        if self.together:
            return self.fc(self.body(torch.stack([x, x.flip(-1)], 1).flatten(0, 1)).view(
                len(x), 2, -1).mean(1))  # fmt: skip
        left, right = self.body(torch.cat([x, x.flip(-1)])).chunk(2)
        return self.fc((left + right) / 2)


def test_views_of_an_image_that_lie_together_mix() -> None:
    net = started(TwoViews(together=True))
    assert mixed_apart({name: domain(net, seed=ord(name)) for name in "ab"}) < 1e-10


def test_views_of_images_that_lie_apart_are_refused() -> None:
    net = started(TwoViews(together=False))
    models = {name: domain(net, seed=ord(name)) for name in "ab"}
    for join in (ot.mix, Together):
        with pytest.raises(
            MixError, match=r"body.0 gets several rows .* do not lie .*Call the dom"
        ):
            join(models)


def test_rows_of_a_backbone_that_does_not_run_are_unknown() -> None:
    net = started(Tail(nn.Conv2d(3, 8, 3)))
    models = {name: domain(net, seed=ord(name)) for name in "ab"}
    for model in models.values():
        model.forward = None
    with pytest.raises(BackboneError, match="it is unknown which rows inside belong to which im"):
        ot.mix(models)


def test_the_check_sees_rows_that_get_another_domains_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = started(TwoViews(together=False))
    models = {name: domain(net, seed=ord(name)) for name in "ab"}
    monkeypatch.setattr("onetrunk.core.mix.check_rows", lambda *_args: set())
    with pytest.raises(MixError, match="mixing changes the scores of 'a' by"):
        ot.mix(models, check=images())


def test_scores_stay_minus_infinity_behind_an_activation_after_the_classifier() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.ReLU())
    net = started(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    few = drawn(attach(net, ot.Parallel(), ["a", "b"], input_size=SIZE), {}, 0)
    mixed = ot.mix({"few": few, "more": domain(net)})
    padded = mixed.padded(images(2), torch.tensor([0, 1]))
    assert padded.isneginf().tolist() == [[False, False, True], [False, False, False]]


def test_domains_with_classifiers_at_other_places_are_refused() -> None:
    net = started(nn.Sequential(Tail(nn.Conv2d(3, 8, 3)), nn.Identity()))
    one, two = domain(net), domain(net, head="0.3")
    with pytest.raises(MixError, match=r"'two' has its classifier at 0.3, the others at 1: attach"):
        ot.mix({"one": one, "two": two})


def test_a_layer_with_two_names_mixes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
            self.alias = self.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.alias(self.first(x)).mean((2, 3)))

    net = started(Twice())
    models = {name: domain(net, seed=ord(name)) for name in "ab"}
    assert mixed_apart(models) < 1e-10
    mixed = ot.mix(models).with_domain("c", domain(net, seed=3))
    assert mixed.domains == ("a", "b", "c")


def test_a_mixture_holds_none_of_its_first_domains_modules() -> None:
    net = started(Tail(nn.Conv2d(3, 8, 3)))
    first, later = domain(net, seed=1), domain(net, seed=2)
    mixed = ot.mix({"first": first})
    first.float()  # what becomes of it is no business of the mixture's
    more = mixed.with_domain("later", later)
    assert apart(torch.stack(more(images(), ["later"] * 4)), later(images())) < 1e-10


# What a backbone has of its own


class Counting(nn.Module):
    """Counts its calls in train mode, over a table of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("order", torch.arange(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x[:, self.order]


def test_counting_in_one_domain_moves_no_other() -> None:
    net = started(Tail(nn.Conv2d(3, 8, 3), Counting()))
    one, two, before = domain(net), domain(net), fingerprint(net)
    one.train()(images())
    assert (one[1].calls, two[1].calls, net[1].calls) == (1, 0, 0)
    assert fingerprint(net) == before
    assert one[1].order.data_ptr() == net[1].order.data_ptr()


class Named(Tail):
    def __init__(self, value: object) -> None:
        super().__init__(nn.Conv2d(3, 8, 3))
        self.domain = value


@pytest.mark.parametrize("value", ["adult", nn.Identity()])
def test_a_backbone_with_a_domain_of_its_own_is_refused(value: object) -> None:
    with pytest.raises(AttachError, match=r"has a `domain` of its own, .*call it something else"):
        domain(Named(value))


def test_a_backbone_that_cannot_be_copied_is_refused_with_the_reason() -> None:
    net = Tail(nn.Conv2d(3, 8, 3))
    net.computed = 2 * net[0].weight  # as torch.nn.utils.weight_norm keeps one
    with pytest.raises(BackboneError, match=r"cannot be copied .*take those of .*parametrizations"):
        domain(net)
