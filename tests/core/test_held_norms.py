"""Norms that stay the backbone's, for every family: those below the first adapted layer, or all."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import fingerprint, resnet26
from onetrunk.core.adapters import FAMILIES, Family
from onetrunk.core.attach import attach, build
from onetrunk.core.compress import compress
from onetrunk.core.cost import cost
from onetrunk.core.domain import delta, stored
from onetrunk.core.merge import merge
from onetrunk.core.tree import Frozen, is_norm, own_tensors, storage_key
from onetrunk.errors import AttachError

SIZE = (3, 16, 16)
LATE = ot.Where(pattern="late.*,last", layers="all")
CASES = (
    ot.Series(),
    ot.Parallel(init="released"),
    ot.LowRank(rank=2),
    ot.Channelwise(),
    ot.Full(),
)


class Net(nn.Module):
    """Two stages of every kind of norm; `again` is called in both, `last` after all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.GroupNorm(2, 6))
        self.again = nn.BatchNorm2d(6)
        self.late = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6))
        self.norm, self.last, self.fc = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x_bihw: Tensor) -> Tensor:
        x_bihw = self.again(self.early(x_bihw)).relu()
        x_bihw = self.again(self.late(x_bihw)).relu()
        return self.fc(self.last(self.norm(x_bihw.mean((2, 3)))).relu())


EARLY = ("early.1", "early.2")


@torch.no_grad()
def shaken(module: nn.Module, tensors: dict[str, Tensor], seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else 0.5 * drawn)
    return module


@pytest.fixture
def net() -> nn.Module:
    made = Net().double().eval()
    return shaken(made, made.state_dict(), seed=1)


@pytest.fixture
def x_bihw() -> Tensor:
    return torch.randn((4, *SIZE), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def domain(net: nn.Module, family: Family, **options: Any) -> nn.Module:
    return attach(
        net, family, ["a", "b"], where=LATE, input_size=SIZE, head="fc", norms="placed", **options
    )


def test_every_family_that_is_placed_has_its_case() -> None:
    placed = {name for name, family in FAMILIES.items() if name not in ("norm", "head", "shared")}
    assert {type(family).name for family in CASES} == placed


@pytest.mark.parametrize("family", CASES, ids=str)
def test_what_is_called_before_the_first_adapted_layer_is_held(
    net: nn.Module, family: Family
) -> None:
    model = domain(net, family)
    assert model.domain.held == EARLY  # not `again`: it is called after an adapted layer too
    shared = {storage_key(t) for t in net.state_dict().values()}
    for name, module in model.named_modules():
        if is_norm(module) and name.startswith("early"):
            assert {storage_key(t) for t in own_tensors(module)} <= shared
            assert not any(p.requires_grad for p in module.parameters())
        elif is_norm(module) and not name.endswith("adapter.norm"):
            assert all(p.requires_grad for p in module.parameters())
    assert not any(name.startswith("early") for name in delta(model))


@pytest.mark.parametrize("family", CASES, ids=str)
def test_training_moves_none_of_them_and_needs_no_gradient_there(
    net: nn.Module, x_bihw: Tensor, family: Family
) -> None:
    before, model = fingerprint(net), domain(net, family).train()
    seen = list[bool]()
    model.get_submodule("early").register_forward_hook(
        lambda _module, _args, y: seen.append(y.requires_grad)
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x_bihw).logsumexp(1).sum().backward()
    optimizer.step()
    assert seen == [False] and fingerprint(net) == before
    assert not model.get_submodule("early.1").layer.training


@pytest.mark.parametrize("family", CASES, ids=str)
def test_it_computes_what_the_backbone_does_at_birth_and_merges(
    net: nn.Module, x_bihw: Tensor, family: Family
) -> None:
    fresh = domain(net, replace(family, **{"init": "identity"} if hasattr(family, "init") else {}))
    features: dict[nn.Module, Tensor] = {}
    for module in (net, fresh):
        module.get_submodule("fc").register_forward_pre_hook(
            lambda _fc, args, module=module: features.update({module: args[0]})
        )
        module.eval()(x_bihw)
    assert torch.equal(features[net], features[fresh])
    model = domain(net, family)
    shaken(model, delta(model), seed=3).eval()
    for fold_norms in (True, False):
        plain = merge(model, fold_norms=fold_norms, check=x_bihw)
        assert not any(isinstance(module, Frozen) for module in plain.modules())


@pytest.mark.parametrize("family", CASES, ids=str)
def test_the_price_falls_by_the_held_norms_numbers(net: nn.Module, family: Family) -> None:
    held = sum(t.numel() for name in EARLY for t in net.get_submodule(name).parameters())
    model = domain(net, family)
    every = attach(net, family, ["a", "b"], where=LATE, input_size=SIZE, head="fc")
    assert cost(every).norms - cost(model).norms == held == 2 * 6 + 2 * 6
    assert cost(model).numbers == sum(t.numel() for t in stored(model).values())


@pytest.mark.parametrize("family", CASES, ids=str)
def test_without_norms_of_its_own_a_domain_is_adapters_and_head(
    net: nn.Module, x_bihw: Tensor, family: Family
) -> None:
    model = attach(
        net, family, ["a", "b"], where=LATE, input_size=SIZE, head="fc", norms="none"
    ).train()
    assert set(model.domain.held) == {n for n, module in net.named_modules() if is_norm(module)}
    assert cost(model).norms == 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = fingerprint(net)
    model(x_bihw).logsumexp(1).sum().backward()
    optimizer.step()
    assert fingerprint(net) == before
    for fold_norms in (True, False):
        merge(model.eval(), fold_norms=fold_norms, check=x_bihw)


def test_compressed_domains_keep_them(net: nn.Module) -> None:
    models = {
        name: domain(net, ot.Parallel(init="released"), seed=seed).eval()
        for seed, name in enumerate(("one", "two"))
    }
    smaller = compress(models, rank_fraction=0.9)
    for name, model in smaller.items():
        assert model.domain.held == models[name].domain.held == EARLY
        assert not any(key.startswith("early") for key in delta(model))
    started = attach(
        net, None, ["x", "y"], basis=smaller.basis, input_size=SIZE, head="fc", norms="placed"
    )
    assert started.domain.held == EARLY


REAL = {
    "resnet26": (lambda: resnet26(0.25), 64),
    "resnet18": (lambda: timm.create_model("resnet18"), 64),
    "efficientnet_lite0": (lambda: timm.create_model("efficientnet_lite0"), 64),
    "convnext_atto": (lambda: timm.create_model("convnext_atto"), 64),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), 64),
}


@pytest.mark.parametrize("name", REAL)
def test_real_architectures_need_no_gradient_below_a_late_plan(name: str) -> None:
    make, side = REAL[name]
    net = make().eval()
    size = (3, side, side)
    model = attach(
        net, None, ["a", "b"], where=ot.Where("late"), norms="placed", input_size=size
    ).train()
    every = attach(net, None, ["a", "b"], where=ot.Where("late"), input_size=size)
    held, own = set(model.domain.held), {n for n, m in net.named_modules() if is_norm(m)}
    assert held and held < own
    assert cost(every).norms - cost(model).norms == sum(
        p.numel() for name in held for p in net.get_submodule(name).parameters()
    )
    first = model.get_submodule(next(iter(model.domain.plan)))
    needed = list[bool]()
    first.register_forward_pre_hook(lambda _m, args: needed.append(args[0].requires_grad))
    x_bihw = torch.randn((2, *size), generator=torch.Generator().manual_seed(0))
    model(x_bihw).logsumexp(1).sum().backward()
    assert needed == [False]


@pytest.mark.parametrize("family", [ot.Norm(), ot.Head(), ot.Full()], ids=str)
def test_a_family_that_adapts_no_single_layer_has_nothing_to_place(
    net: nn.Module, family: Family
) -> None:
    for norms in ("placed", "none"):
        with pytest.raises(AttachError, match=rf"norms='{norms}' .* {family} adapts no single l"):
            attach(net, family, ["a", "b"], input_size=SIZE, head="fc", norms=norms)  # type: ignore[arg-type]


def test_other_words_are_refused(net: nn.Module) -> None:
    with pytest.raises(AttachError, match=r"norms='late': give 'all', 'placed' or 'none'"):
        attach(net, ot.Parallel(), ["a", "b"], input_size=SIZE, head="fc", norms="late")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nowhere", "early.0", ""])
def test_a_name_that_is_no_norm_is_refused(net: nn.Module, name: str) -> None:
    with pytest.raises(AttachError, match=f"'{name}' is to stay the backbone's norm, and .* no"):
        build(
            net, scope="adapters", family="parallel", plan={"last": ot.Parallel()}, skipped={},
            classes=("a", "b"), head=("fc",), head_features=8, preprocessing=None, held=(name,),
        )  # fmt: skip
