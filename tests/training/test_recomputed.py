"""recomputed: the same training, bit for bit, in less memory."""

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
from onetrunk.errors import AttachError, MergeError, TrainingError
from onetrunk.training.cached import cached
from onetrunk.training.fit import fit
from onetrunk.training.recomputed import blocks_of, recomputed

Make = Callable[..., Any]
# makes the backbone, blocks, the class of the first
REAL: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "resnet26": (lambda: resnet26(0.125), 12, "BasicBlock"),
    "timm resnet18": (lambda: timm.create_model("resnet18", drop_path_rate=0.2), 8, "BasicBlock"),
    "timm resnet50": (lambda: timm.create_model("resnet50"), 16, "Bottleneck"),
    "timm efficientnet_lite0": (
        lambda: timm.create_model("efficientnet_lite0", drop_path_rate=0.2),
        16,
        "DepthwiseSeparableConv",
    ),
    "timm convnext": (
        lambda: timm.create_model("convnext_atto", drop_path_rate=0.2),
        12,
        "ConvNeXtBlock",
    ),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, proj_drop_rate=0.1),
        12,
        "Block",
    ),
    "timm swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=1),
        12,
        "SwinTransformerBlock",
    ),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(weights=None), 8, "BasicBlock"),
    "torchvision efficientnet": (
        lambda: torchvision.models.efficientnet_b0(weights=None),
        16,
        "MBConv",
    ),
    "torchvision densenet": (
        lambda: torchvision.models.densenet121(weights=None, drop_rate=0.1),
        58,
        "_DenseLayer",
    ),
}


def images(n: int = 3, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((n, 3, side, side), generator=generator, dtype=torch.float64)


def step(network: nn.Module, x_bchw: Tensor) -> list[Tensor]:
    """Logits and gradients of one step in train mode from one seed."""
    torch.manual_seed(1)
    y = network.train()(x_bchw)
    trained = [p for p in network.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.logsumexp(1).sum() + y[:, 0].sum(), trained)]


@pytest.mark.parametrize("name", REAL)
def test_gradients_statistics_and_draws_are_the_same(name: str) -> None:
    make, n_blocks, first = REAL[name]
    torch.manual_seed(0)
    net = make().double()
    plain = ot.attach(net, None, ["a", "b", "c"], input_size=(3, 32, 32))
    model = ot.attach(net, None, ["a", "b", "c"], input_size=(3, 32, 32))
    less = recomputed(model)
    blocks = blocks_of(less)
    assert (len(blocks), type(blocks[0]).__name__) == (n_blocks, first)
    for _ in range(2):
        for ours, theirs in zip(step(less, images()), step(plain, images()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert delta(model).keys() == delta(less).keys() == delta(plain).keys()
    for key, tensor in delta(plain).items():
        assert torch.equal(delta(model)[key], tensor), key  # moved once, not twice
    with torch.no_grad():
        assert torch.equal(less.eval()(images()), plain.eval()(images()))


class Counts(nn.Module):
    """A block whose statistics are a mean over all batches, and which writes a power iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x_bihw: Tensor) -> Tensor:
        return self.conv(self.norm(x_bihw))


def counting(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), Counts(), Counts(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    ).double()  # fmt: skip
    return ot.attach(net, ot.Full(), ["a", "b"], input_size=(3, 8, 8), **options)


def test_a_second_pass_starts_from_what_the_first_one_saw() -> None:
    plain, model = counting(), counting()
    less = recomputed(model)
    for _ in range(3):
        for ours, theirs in zip(step(less, images(4, 8)), step(plain, images(4, 8)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for key, tensor in delta(plain).items():
        assert torch.equal(delta(model)[key], tensor), key


def test_a_backward_pass_may_run_twice() -> None:
    plain, less = counting(), recomputed(counting())
    found = []
    for network in (plain, less):
        loss = network.train()(images(4, 8)).square().sum()
        trained = [p for p in network.parameters() if p.requires_grad]
        found.append([torch.autograd.grad(loss, trained, retain_graph=True) for _ in range(2)])
    for ours, theirs in zip(*found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_backward_pass_that_fails_leaves_the_statistics_in_place() -> None:
    model = counting()
    less = recomputed(model)
    buffers = {name: buffer for name, buffer in model.named_buffers()}
    loss = less.train()(images(4, 8)).square().sum()
    second = less.get_submodule("2.conv")
    second.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        loss.backward()
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def saved_bytes(network: nn.Module, x_bchw: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, but for the network's own."""
    own = {t.untyped_storage().data_ptr() for t in network.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = network.train()(x_bchw)
    del y
    return sum(size for place, size in kept.items() if place not in own)


def test_an_apple_gpu_draws_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = {"state": torch.tensor([1])}
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: draws["state"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: draws.update(state=state))
    seen = []
    net = timm.create_model("resnet18")
    net.layer4[1].conv1.register_forward_pre_hook(lambda *_: seen.append(int(draws["state"])))
    model = ot.attach(net, ot.Parallel(), ["a", "b"], input_size=(3, 32, 32)).train()
    logits_bc = recomputed(model)(torch.randn(2, 3, 32, 32))
    draws["state"] = torch.tensor([2])
    logits_bc.sum().backward()
    assert seen[-2:] == [1, 1] and int(draws["state"]) == 2


def test_a_forward_pass_keeps_a_fraction() -> None:
    model = ot.attach(resnet26(0.25), ot.Parallel(), ["a", "b"], input_size=(3, 32, 32))
    x_bchw = images(4).float()
    assert saved_bytes(recomputed(model), x_bchw) < 0.4 * saved_bytes(model, x_bchw)


def test_it_computes_nothing_twice_where_no_gradient_is_wanted() -> None:
    model = ot.attach(resnet26(0.125), ot.Parallel(), ["a", "b"], input_size=(3, 16, 16))
    less, calls = recomputed(model), list[int]()
    model.get_submodule("stages.0.0.conv2").register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        less.train()(images(2, 16).float())
    less.eval()(images(2, 16).float()).sum().backward()
    assert len(calls) == 2
    less.train()(images(2, 16).float()).sum().backward()
    assert len(calls) == 4


@pytest.fixture
def make_blocks(make_model: Make) -> Make:
    """make_blocks() -> a domain over a small ResNet-26, in the types that `fit` trains."""
    return lambda **options: make_model(
        ot.LowRank(rank=2, dropout=0.2), backbone=resnet26(0.125), **options
    )


def test_a_training_is_the_same_bit_for_bit(make_blocks: Make, make_images: Make) -> None:
    recipe = ot.Recipe(epochs=2, batch_size=8)
    torch.manual_seed(0)
    plain = make_blocks()
    torch.manual_seed(0)
    model = make_blocks()
    options = {"val": make_images(12, seed=2), "device": "cpu"}
    theirs = list(fit(plain, make_images(), recipe, **options))
    ours = list(fit(recomputed(model), make_images(), recipe, **options))
    assert ours == theirs
    assert all(torch.equal(t, delta(plain)[name]) for name, t in delta(model).items())


def test_the_tail_of_a_network_is_recomputed_too(make_blocks: Make, make_images: Make) -> None:
    recipe, late = ot.Recipe(epochs=2, batch_size=8), {"where": ot.Where("late")}
    networks = []
    for wrap in (lambda tail: tail, recomputed):
        torch.manual_seed(0)
        model = make_blocks(norms="placed", **late)
        made = cached(model, make_images(), recipe, device="cpu")
        list(fit(wrap(made.model), made.train, recipe, device="cpu"))
        networks.append(model)
    first, second = networks
    assert all(torch.equal(t, delta(second)[name]) for name, t in delta(first).items())


def test_a_network_without_blocks_is_refused(make_model: Make) -> None:
    with pytest.raises(TrainingError, match=r"Sequential has no blocks whose activations could be"):
        recomputed(make_model(ot.Parallel()))


def test_a_plain_network_is_refused() -> None:
    with pytest.raises(AttachError, match="ResNet26 is no domain's network"):
        recomputed(resnet26(0.125))


def test_the_first_blocks_alone_are_recomputed_with_the_same_gradients() -> None:
    model = ot.attach(resnet26(0.125), ot.Parallel(), ("ant", "bee"), input_size=(3, 32, 32))
    some = recomputed(model, n_blocks=2).train()
    assert sum("_Recomputed" in str(type(m).__mro__) for m in some.modules()) == 2
    own = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(some(images().float()).square().sum(), own)
    expected = torch.autograd.grad(model.train()(images().float()).square().sum(), own)
    assert all(map(torch.equal, found, expected))
    with pytest.raises(TrainingError, match=r"n_blocks=0\): give at least 1, or None for all"):
        recomputed(model, n_blocks=0)


def test_a_recomputed_network_is_not_merged() -> None:
    model = ot.attach(resnet26(0.125), classes=["daisy", "rose"], input_size=(3, 16, 16))
    with pytest.raises(MergeError, match=r"computes otherwise than its class.*Merge the network"):
        ot.merge(recomputed(model))
