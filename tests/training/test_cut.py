"""The cut: a tail computes what the network does, bit for bit, over real architectures."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import resnet26
from onetrunk.core.domain import delta
from onetrunk.core.trace import trace
from onetrunk.core.tree import recast, rewired
from onetrunk.errors import TrainingError
from onetrunk.training.cut import cut_off, features

LATE = ot.Where(stages="late")
REAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet26": (lambda: resnet26(0.25), "stages.2.0"),
    "timm resnet18": (lambda: timm.create_model("resnet18"), "layer4.0"),
    "timm resnet50": (lambda: timm.create_model("resnet50"), "layer4.0"),
    "timm efficientnet_lite0": (
        lambda: timm.create_model("efficientnet_lite0"),
        "blocks.5.0.conv_pwl",
    ),
    "timm convnext": (lambda: timm.create_model("convnext_atto"), "stages.3.blocks.0"),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
        "blocks.8",
    ),
    "timm swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=2, drop_path_rate=0.0
        ),
        "layers.3.downsample.reduction",
    ),
    "timm densenet": (lambda: timm.create_model("densenet121"), "features.denseblock4"),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(weights=None), "layer4.0"),
    "torchvision mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(weights=None),
        "features.9.block.2",
    ),
}


def images(n: int, side: int = 64, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn((n, channels, side, side), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """The domain's own numbers away from those of birth, where much is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def late(net: nn.Module, family: Any = None, where: ot.Where = LATE, side: int = 64) -> nn.Module:
    return ot.attach(
        net, family, ["a", "b", "c"], where=where, norms="placed", input_size=(3, side, side)
    )


def one_step(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits and gradients in train mode."""
    torch.manual_seed(2)  # of the dropout before a head
    y = network.train()(x)
    trained = [p for p in network.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.logsumexp(1).sum() + y[:, 0].sum(), trained)]


@pytest.mark.parametrize("name", REAL)
def test_a_tail_computes_what_the_network_does(name: str) -> None:
    make, at = REAL[name]
    torch.manual_seed(0)
    model = shaken(late(make()))
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cut, tail = cut_off(model, images(3))
    assert cut.at == at
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())

    x_bchw = images(4, seed=1)  # another batch size than those of the search
    with torch.no_grad():
        z = cut.unpacked(cut.packed(features(model.eval(), cut, x_bchw)))
        assert tuple(z.shape) == (4, *cut.shape)
        assert torch.equal(tail.eval()(z), model.eval()(x_bchw))
    z = cut.unpacked(cut.packed(features(model.train(), cut, x_bchw)))
    ours, statistics = one_step(tail, z), {k: t.clone() for k, t in delta(model).items()}
    model.load_state_dict(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, one_step(model, x_bchw), strict=True))
    assert all(torch.equal(tensor, statistics[key]) for key, tensor in delta(model).items())


@pytest.mark.parametrize("name", ["resnet26", "timm convnext", "timm vit"])
def test_to_train_the_tail_is_to_train_the_network(name: str) -> None:
    make, _ = REAL[name]
    model = late(make())
    cut, tail = cut_off(model, images(3))
    theirs = dict(model.named_parameters())
    ours = {n: p for n, p in tail.named_parameters() if p.requires_grad}
    assert ours.keys() == {n for n, p in theirs.items() if p.requires_grad}
    assert all(p is theirs[n] for n, p in ours.items())
    assert delta(tail).keys() == delta(model).keys()
    assert tail.domain.frozen < model.domain.frozen and isinstance(tail, type(make()))
    before = {n: t.clone() for n, t in delta(model).items()}
    y = tail.train()(cut.unpacked(cut.packed(features(model, cut, images(4)))))
    optimizer = torch.optim.SGD(list(ours.values()), lr=0.1)
    y.square().sum().backward()
    optimizer.step()
    changed = {n for n, t in delta(model).items() if not torch.equal(t, before[n])}
    assert any("running" in n for n in changed) or name != "resnet26"
    assert {n for n in ours if ".adapter." in n} & changed


def test_the_tail_holds_nothing_of_the_trunk() -> None:
    model = late(resnet26(0.25))
    cut, tail = cut_off(model, images(3))
    names, trunk = set(tail.state_dict()), set(cut.trunk)
    assert not any(name.startswith(("stem", "stages.0", "stages.1")) for name in names)
    assert trunk | names == set(model.state_dict()) and not trunk & names


def test_parameters_of_a_module_on_the_way_count_as_the_trunks() -> None:
    model = late(timm.create_model("vit_tiny_patch16_224", img_size=64))
    cut, _ = cut_off(model, images(3))
    assert {"pos_embed", "cls_token"} < set(cut.trunk)
    assert not any(name.startswith(("blocks.8", "blocks.9")) for name in cut.trunk)


def test_a_module_that_no_stub_can_stand_for_counts_as_the_trunks() -> None:
    class Pair(nn.Conv2d):
        def forward(self, x_bihw: Tensor) -> Any:
            return super().forward(x_bihw), None

    class Pairs(Small):
        def __init__(self) -> None:
            super().__init__()
            self.first = Pair(3, 4, 3, 2, 1)

        def between(self, x_bihw: Any) -> Tensor:
            return self.norm(x_bihw[0])

    cut, tail = cut_off(placed(Pairs()), images(3, 8))
    assert cut.at == "last" and {"first.weight", "first.bias"} <= set(cut.trunk)
    assert isinstance(tail.first, Pair)  # it runs, on blanks


def test_a_head_alone_is_cut_before_the_head() -> None:
    model = ot.attach(resnet26(0.25), ot.Head(), ["a", "b"], input_size=(3, 32, 32))
    cut, tail = cut_off(model, images(3, 32))
    assert cut.at == "fc" and cut.shape == (64,)
    assert {n for n, p in tail.named_parameters()} == {"fc.weight", "fc.bias"}


def test_features_of_another_shape_are_refused() -> None:
    _, tail = cut_off(late(resnet26(0.25)), images(3))
    with pytest.raises(TrainingError, match=r"takes features of shape \(32, 16, 16\).*\(3, 64, 64"):
        tail(images(2))


# Where there is no cut


class Small(nn.Module):
    """Two convolutions; what is between them is for the tests to say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.last, self.fc = nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 2)

    def between(self, x_bihw: Tensor) -> Tensor:
        return self.norm(x_bihw)

    def forward(self, x_bihw: Tensor) -> Tensor:
        x_bihw = self.last(self.between(self.first(x_bihw)))
        return self.fc(x_bihw.relu().mean((2, 3)))


class BatchStatistics(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)


class Drops(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Dropout(0.5)


class DropsByItself(Small):
    def between(self, x_bihw: Tensor) -> Tensor:
        return nn.functional.dropout(x_bihw, 0.5, self.training)


class LooksBack(Small):
    """The image comes in again above the cut, through a factor that is zero at birth."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(1))

    def forward(self, x_bihw: Tensor) -> Tensor:
        y = super().forward(x_bihw)
        return y + self.factor * x_bihw.mean((1, 2, 3))[:, None]


class ComparesBatch(Small):
    def between(self, x_bihw: Tensor) -> Tensor:
        return x_bihw - x_bihw.mean(0)


def placed(net: nn.Module, layer: str = "last") -> nn.Module:
    return ot.attach(
        net, ot.Channelwise(), ["a", "b"], where=ot.Where(pattern=layer), norms="placed",
        input_size=(3, 8, 8), head="fc",
    )  # fmt: skip


def test_a_small_network_is_cut_at_its_last_convolution() -> None:
    cut, tail = cut_off(placed(Small()), images(3, 8))
    assert cut.at == "last" and [name for name, _ in tail.first.named_parameters()] == []


@pytest.mark.parametrize("net", [BatchStatistics, Drops])
def test_a_cut_is_never_above_what_draws_or_looks_at_the_batch(net: type[Small]) -> None:
    cut, _ = cut_off(placed(net()), images(3, 8))
    assert cut.at == "norm"


def test_a_tail_that_would_compute_something_else_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"comes after the input of last depends on more than"):
        cut_off(placed(LooksBack()), images(3, 8))


@pytest.mark.parametrize("net", [DropsByItself, ComparesBatch])
def test_features_that_depend_on_more_than_their_image_are_refused(net: type[Small]) -> None:
    torch.manual_seed(0)
    with pytest.raises(TrainingError, match=r"into last depends on chance or on the rest of"):
        cut_off(placed(net()), images(3, 8))


def test_a_network_that_learns_from_its_first_layer_on_has_no_trunk() -> None:
    with pytest.raises(
        TrainingError,
        match=r"no frozen trunk .*: first.adapter learns .*, and nothing is before it. Adapt late",
    ):
        cut_off(placed(Small(), "first"), images(3, 8))


def test_a_trunk_that_would_save_next_to_nothing_is_refused() -> None:
    model = ot.attach(resnet26(0.25), None, ["a", "b"], where=LATE, input_size=(3, 64, 64))
    with pytest.raises(
        TrainingError, match=r"stem_norm learns .*, and only 1\.\d% of the multiply"
    ):
        cut_off(model, images(3))


def test_a_cut_says_what_it_saves() -> None:
    net = resnet26(0.25)
    cut, _ = cut_off(late(net), images(3))
    traced = trace(net)
    every = sum(site.multiply_adds for site in traced.sites) + 64 * 1000
    late_ones = sum(site.multiply_adds for site in traced.sites if site.stage == "late")
    assert cut.share == pytest.approx(1 - late_ones / every, abs=0.01)


def test_norms_of_its_own_end_the_trunk() -> None:
    model = ot.attach(
        Small(), ot.Channelwise(), ["a", "b"], where=ot.Where(pattern="last"),
        input_size=(3, 8, 8), head="fc",
    )  # fmt: skip
    cut, _ = cut_off(model, images(3, 8))
    assert cut.at == "norm"


def test_a_network_that_runs_only_on_images_is_refused() -> None:
    class Reads(Small):
        def between(self, x_bihw: Tensor) -> Tensor:
            if not torch.isfinite(x_bihw).all():
                raise RuntimeError("broken numbers")
            return x_bihw

    with pytest.raises(TrainingError, match=r"does not run on the input of last \(RuntimeError: b"):
        cut_off(placed(Reads()), images(3, 8))


def test_a_pass_that_goes_another_way_is_noticed() -> None:
    model = placed(Small())
    cut, _ = cut_off(model, images(3, 8))
    model.forward = lambda x_bihw: x_bihw  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the network did not come to last"):
        features(model, cut, images(3, 8))


# Trees over the same modules


def test_rewired_copies_only_what_is_above_a_new_module() -> None:
    net = resnet26(0.25)
    old, new = net.stages[1][2], nn.Identity()
    twin = rewired(net, {old: new})
    assert twin.stages[1][2] is new and net.stages[1][2] is old
    assert twin is not net and twin.stages is not net.stages and twin.stages[1] is not net.stages[1]
    assert twin.stages[0] is net.stages[0] and twin.stages[1][0] is net.stages[1][0]
    assert twin.stem.weight is net.stem.weight and type(twin) is type(net)
    assert rewired(net, {}) is net


def test_a_module_that_is_there_twice_is_replaced_twice() -> None:
    shared, new = nn.ReLU(), nn.Identity()
    net = nn.Sequential(shared, nn.Sequential(shared, nn.Linear(2, 2)))
    twin = rewired(net, {shared: new})
    assert twin[0] is new and twin[1][0] is new and net[1][0] is shared


def test_recast_puts_a_behaviour_before_a_class() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return 2 * super().forward(x)

    layer = nn.Linear(2, 2)
    twin, x = recast(layer, Twice), torch.ones(1, 2)
    assert torch.equal(twin(x), 2 * layer(x)) and twin.weight is layer.weight
    assert isinstance(twin, nn.Linear) and type(twin).__name__ == "Linear"


class Normalises(Small):
    """Takes means off the image, which nothing ever writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Normalize()


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((4, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


class Instances(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(4)


class Remembers(Small):
    """Keeps a mean in train mode, by a class that looks like no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Memory()


class Memory(Normalize):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 2, 3), keepdim=True)[0], 0.1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("net", "at"), [(Normalises, "last"), (Instances, "last"), (Remembers, "norm")]
)
def test_a_cut_is_above_numbers_that_stay_and_below_those_that_move(
    net: type[Small], at: str
) -> None:
    model = ot.attach(
        net(), ot.Channelwise(), ["a", "b"], where=ot.Where(pattern="last"),
        input_size=(3, 8, 8), head="fc",
    )  # fmt: skip
    cut, _ = cut_off(model, images(3, 8))
    assert cut.at == at


def test_a_tail_on_its_way_disturbs_no_network() -> None:
    model, x = placed(Small()).eval(), images(3, 8)
    cut, tail = cut_off(model, x)
    expected, found = model(x), list[Tensor]()

    def meanwhile(*_args: Any) -> None:  # as another thread might
        if not found:
            found.append(x)  # the network comes here too, once
            found[0] = model(x)

    with tail.fc.register_forward_pre_hook(meanwhile):
        tail(features(model, cut, x))
    assert torch.equal(found[0], expected)
