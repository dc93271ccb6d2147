"""compress: one basis for many domains; exact where nothing is cut, best where something is."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.core.activations import activation_covariances
from onetrunk.core.adapters import Shared, read_family
from onetrunk.core.attach import attach
from onetrunk.core.budget import Menu, choose
from onetrunk.core.compress import Compressed, compress, compress_within, project, sweep
from onetrunk.core.cost import cost
from onetrunk.core.domain import delta
from onetrunk.core.merge import merge
from onetrunk.core.rebuild import standalone, with_frozen_basis, with_trainable_basis
from onetrunk.core.sites import Site
from onetrunk.core.spectra import Spectrum, product
from onetrunk.core.tree import storage_key
from onetrunk.errors import AttachError, CompressError

FAMILIES = (ot.Series(), ot.Parallel(dropout=0.1), ot.LowRank(rank=2))
SHARES = ("output", "input", "both")
NAMES = ("flowers", "signs", "digits")
SIZE = (3, 12, 12)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_share = pytest.mark.parametrize("share", SHARES)


class Net(nn.Module):
    """Plain, strided and grouped convolutions, norms, a hidden linear layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.hidden, self.fc = nn.Linear(12, 10), nn.Linear(10, 4)

    def features(self, x_bchw: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm1(self.conv1(x_bchw)))
        x = nn.functional.gelu(self.norm2(self.conv2(x)))
        return nn.functional.gelu(self.hidden(self.conv3(x).mean((2, 3))))

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.fc(self.features(x_bchw))


@torch.no_grad()
def shaken(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in delta(model).items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else 0.5 * drawn)
    return model.eval()


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double().eval()


def domains(family: object, over: nn.Module | None = None) -> dict[str, nn.Module]:
    over, everywhere = over or net(), ot.Where(layers="all")
    return {
        name: shaken(attach(over, family, ["a", "b", "c"], where=everywhere, input_size=SIZE), seed)
        for seed, name in enumerate(NAMES)
    }


def images(n: int = 4, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, *SIZE), generator=generator, dtype=torch.float64)


@torch.no_grad()
def furthest(models: dict[str, nn.Module], others: dict[str, nn.Module]) -> float:
    x_bchw = images()
    gaps = [(models[n](x_bchw) - others[n](x_bchw)).abs().max() for n in models]
    return float(max(gaps) / max(m(x_bchw).abs().max() for m in models.values()))


def matrix(model: nn.Module, site: str) -> np.ndarray:
    adapter = model.get_submodule(site).adapter
    if hasattr(adapter, "product"):
        return adapter.product(torch.empty(0, dtype=torch.float64)).numpy()
    if hasattr(adapter, "u_or"):
        return (adapter.u_or @ adapter.v_ri).detach().numpy()
    return getattr(adapter, "a_oo" if hasattr(adapter, "a_oo") else "a_oi").detach().numpy()


def bytes_of(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in tensors.items()}


# Exact where nothing is cut


@every_family
@every_share
@pytest.mark.parametrize("option", [{"keep": 1.0}, {"rank_fraction": 1.0}], ids=str)
def test_nothing_is_lost_where_nothing_is_cut(family, share, option) -> None:
    models = domains(family)
    found = compress(models, share=share, **option)
    assert list(found) == list(models) and len(found) == 3
    assert furthest(models, found) < 1e-12
    assert max(found.errors.values()) < 1e-7  # a root of rounding
    if option == {"keep": 1.0}:
        assert found.numbers_after <= found.numbers_before


@every_family
@every_share
@pytest.mark.parametrize("covered", [False, True], ids=["white", "weighted"])
def test_a_budget_is_never_exceeded_and_counted_as_cost_counts(family, share, covered) -> None:
    models = domains(family)
    covariances = None
    if covered:
        covariances = activation_covariances(models, dict.fromkeys(models, images(8)))
    before = sum(cost(m).adapters for m in models.values())
    errors = []
    for keep in (0.6, 0.8, 1.0):
        found = compress(models, keep, share=share, covariances=covariances)
        held = sum(cost(m).adapters for m in found.values())
        assert found.numbers_before == before
        assert found.numbers_after == held + found.basis.numbers <= keep * before
        assert {cost(m).basis for m in found.values()} <= {found.basis.numbers, 0}
        errors.append(sum(found.errors.values()))
    assert errors[0] >= errors[1] >= errors[2] - 1e-7


def test_numbers_and_bytes_are_budgets_too() -> None:
    models = domains(ot.Series())
    found = compress(models, numbers=1500)
    assert found.numbers_after <= 1500 < found.numbers_before
    found = compress(models, n_bytes=12_000)
    own = sum(t.nbytes for m in found.values() for n, t in delta(m).items() if ".adapter." in n)
    assert found.bytes_after == own + found.basis.n_bytes <= 12_000


def test_the_papers_rank_counts_as_the_paper_counts() -> None:
    width, n_domains = 8, 9
    square = nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 2),
    )  # fmt: skip
    models = {
        str(t): attach(square, ot.Parallel("released"), ["a", "b"], input_size=(8, 4, 4), seed=t)
        for t in range(n_domains)
    }
    found = compress(models, rank_fraction=0.5, share="output")
    assert found.directions["0"][0] == width // 2
    assert found.kept == pytest.approx((width / 2) * (1 + n_domains) / (n_domains * width))


# Best where something is cut


@every_share
def test_the_error_is_that_of_the_discarded_singular_values(share) -> None:
    models = domains(ot.Parallel())
    found = compress(models, rank_fraction=0.5, share=share)
    for site, error in found.errors.items():
        a_doi = np.stack([matrix(m, site) for m in models.values()])
        lost = a_doi - np.stack([matrix(m, site) for m in found.values()])
        total = (a_doi**2).sum()
        assert error == pytest.approx(((lost**2).sum() / total) ** 0.5, abs=1e-9)
        if share != "both":
            side_by_side = np.concatenate(list(a_doi), axis=1 if share == "output" else 0)
            rank = found.directions[site][0 if share == "output" else 1]
            discarded = (np.linalg.svd(side_by_side, compute_uv=False)[rank:] ** 2).sum()
            assert (lost**2).sum() == pytest.approx(discarded, abs=1e-9)


@every_family
def test_weighing_by_activations_loses_the_least_of_the_outputs(family) -> None:
    models = domains(family)
    seen = dict.fromkeys(models, images(16))
    covariances = activation_covariances(models, seen)

    def lost(found: Compressed, site: str) -> float:
        total = 0.0
        for name, model in models.items():
            d_oi = matrix(model, site) - matrix(found[name], site)
            at = covariances[name][site]
            total += np.trace(d_oi @ at.covariance_ii.numpy() @ d_oi.T) / at.energy
        return total

    plain = compress(models, rank_fraction=0.4)
    weighed = compress(models, rank_fraction=0.4, covariances=covariances)
    gaps = [lost(weighed, site) - lost(plain, site) for site in plain.errors]
    assert max(gaps) <= 1e-4 and sum(gaps) < -1e-3  # Eckart and Young: the best at every site


@every_family
@every_share
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_no_share_of_the_directions_costs_more_than_the_adapters(family, share, fraction) -> None:
    found = compress(domains(family), rank_fraction=fraction, share=share)
    assert found.numbers_after <= found.numbers_before
    assert all(
        found.errors[site] == 0.0 for site, kept in found.directions.items() if not any(kept)
    )


@pytest.mark.parametrize("family", [ot.Full(), ot.Head(), ot.Norm()], ids=str)
def test_domains_without_a_basis_stay_what_they_are_called(family) -> None:
    model = attach(net(), family, ["a", "b"], input_size=SIZE)
    assert standalone(model).domain.family == str(family)


@pytest.mark.parametrize("share", ["output", "input", "both"])
def test_how_strong_a_networks_activations_are_does_not_weigh_its_domain(share) -> None:
    generator = torch.Generator().manual_seed(0)
    a_doi = torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    x_ni = torch.randn(64, 16, generator=generator, dtype=torch.float64) * torch.arange(1, 17)
    c_ii = x_ni.T @ x_ni / 64

    def errors(strength: float) -> list[float]:
        """Of each domain; the second one's outputs are the same whatever the strength."""
        strengths = torch.tensor([1.0, strength], dtype=torch.float64)[:, None, None]
        own_doi, scales_d = a_doi / strengths.sqrt(), torch.ones(2, dtype=torch.float64)
        spectrum = Spectrum.of(share, own_doi, c_ii * strengths, scales_d, 2 * 16 * 16, 32)
        factors = spectrum.factors((6, 6))
        lost = [
            a_oi - product(factors, g)
            for a_oi, g in zip(own_doi, spectrum.own_factors(factors), strict=True)
        ]
        return [float((d @ (c_ii * s) @ d.T).trace()) for d, s in zip(lost, strengths, strict=True)]

    assert errors(100.0) == pytest.approx(errors(1.0), rel=1e-6)


def test_covariances_are_those_of_an_explicit_loop() -> None:
    models = domains(ot.Parallel())
    found = activation_covariances(models, {n: [images(2), images(3, seed=5)] for n in models})
    x_bchw = torch.cat([images(2), images(3, seed=5)])
    x_ni = x_bchw.movedim(1, -1).reshape(-1, 3)
    at = found["flowers"]["conv1"]
    torch.testing.assert_close(at.covariance_ii, x_ni.T @ x_ni / len(x_ni))
    y = models["flowers"].conv1(x_bchw).detach()
    assert at.energy == pytest.approx(float(y.square().sum(1).mean()))


def test_the_budget_goes_where_it_keeps_the_most() -> None:
    steep = Menu(np.array([2.0, 4.0, 6.0]), np.array([9.0, 13.0, 13.5]))
    flat = Menu(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.9, 3.0]))
    rng = np.random.default_rng(0)
    assert choose({"a": steep, "b": flat}, 2) is None
    for budget in range(3, 10):
        found = choose({"a": steep, "b": flat}, budget)
        assert found is not None
        price = steep.prices[found["a"]] + flat.prices[found["b"]]
        assert price <= budget
    assert choose({"a": steep, "b": flat}, 6) == {"a": 1, "b": 1}
    for _ in range(50):  # falling gains at one price: the exhaustive best but for the last step
        menus = {}
        for site in "abc":
            gains = np.sort(rng.exponential(size=4))[::-1]
            numbers = np.arange(1.0, 5.0)
            menus[site] = Menu(numbers, gains.cumsum())
        found = choose(menus, 7)
        kept = sum(menus[s].energies[place] for s, place in found.items())
        best = max(
            sum(menus[s].energies[k] for s, k in zip("abc", place, strict=True))
            for place in np.ndindex(4, 4, 4)
            if sum(place) + 3 <= 7
        )
        assert kept == pytest.approx(best)


def test_the_smallest_plan_that_holds_the_accuracy_is_found() -> None:
    models = domains(ot.Parallel())
    x_bchw = images(200)
    truth = {n: m(x_bchw).argmax(1) for n, m in models.items()}

    def accuracy(name: str, model: nn.Module) -> float:
        return float((model(x_bchw).argmax(1) == truth[name]).double().mean())

    exact = compress_within(models, accuracy, loss=0.0)
    some, more = (compress_within(models, accuracy, loss=loss) for loss in (0.05, 0.4))
    assert more.kept <= some.kept <= exact.kept <= 1
    assert all(accuracy(n, m) >= 0.95 for n, m in some.items())
    assert all(accuracy(n, m) == 1 for n, m in exact.items())


def test_a_sweep_gives_what_compress_gives() -> None:
    models = domains(ot.Parallel())
    for keep, found in zip((0.4, 0.7), sweep(models, (0.4, 0.7)), strict=True):
        assert furthest(compress(models, keep), found) == 0


# A domain over a basis is a domain


@every_family
@every_share
def test_the_old_networks_and_the_backbone_stay_as_they_were(family, share) -> None:
    over = net()
    models = domains(family, over)
    before = {n: bytes_of(m.state_dict()) for n, m in models.items()}, bytes_of(over.state_dict())
    found = compress(models, 0.6, share=share)
    after = {n: bytes_of(m.state_dict()) for n, m in models.items()}, bytes_of(over.state_dict())
    assert after == before
    theirs = {storage_key(t) for m in models.values() for t in delta(m).values()}
    for model in found.values():
        assert not theirs & {storage_key(t) for t in delta(model).values()}


@every_family
@every_share
def test_merged_and_standalone_networks_compute_the_same(family, share) -> None:
    found = compress(domains(family), 0.6, share=share)
    alone = {name: standalone(model) for name, model in found.items()}
    assert furthest(found, {name: merge(model) for name, model in found.items()}) < 1e-10
    assert furthest(found, alone) < 1e-10
    for model in alone.values():
        assert model.domain.basis is None and not model.domain.shared
        assert not any(isinstance(f, Shared) for f in model.domain.plan.values())


@every_family
@every_share
def test_training_one_domain_moves_no_other_and_not_the_basis(family, share) -> None:
    found = compress(domains(family), 0.6, share=share)
    first, *others = found.values()
    own, rest = bytes_of(delta(first)), [bytes_of(m.state_dict()) for m in others]
    fingerprint = found.basis.fingerprint
    first.train()
    trained = [p for p in first.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    nn.functional.cross_entropy(first(images()), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert bytes_of(delta(first)) != own
    assert [bytes_of(m.state_dict()) for m in others] == rest
    assert found.basis.taken_now() == fingerprint
    for name, parameter in first.named_parameters():
        if name in first.domain.shared or name in first.domain.frozen:
            assert parameter.grad is None
        elif name.endswith("adapter.g"):
            assert (parameter.grad != 0).all(), name


@every_share
def test_domains_hold_the_basis_once_and_their_deltas_leave_it_out(share) -> None:
    found = compress(domains(ot.Parallel()), 0.6, share=share)
    held = [
        {storage_key(t) for n, t in m.state_dict().items() if n in m.domain.shared}
        for m in found.values()
    ]
    theirs = {storage_key(t) for t in found.basis.tensors().values()}
    assert held[0] == held[1] == held[2] == theirs
    for model in found.values():
        assert not model.domain.shared & delta(model).keys() and model.domain.shared
        assert copy.deepcopy(model).domain.basis is found.basis


@every_family
@every_share
def test_a_later_domain_over_a_basis_starts_as_the_backbone(family, share) -> None:
    over = net()
    basis = compress(domains(family, over), 0.6, share=share).basis
    model = attach(over, classes=["x", "y"], basis=basis, input_size=SIZE).eval()
    over.requires_grad_(False)
    torch.testing.assert_close(model.features(images()), over.features(images()), rtol=0, atol=0)
    assert model.domain.plan == basis.plan and model.domain.basis is basis
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.g"):
            assert parameter.grad.any() and not parameter.detach().any(), name


def test_a_later_domain_may_have_the_plan_of_any_domain_over_the_basis() -> None:
    over = net()
    models = {
        name: attach(over, ot.LowRank(rank=rank), ["a", "b"], input_size=SIZE, seed=rank)
        for name, rank in (("first", 1), ("second", 3))
    }
    for model in models.values():
        for parameter in (p for n, p in model.named_parameters() if ".adapter." in n):
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    found = compress(models, 0.9)
    plans = {name: model.domain.plan for name, model in found.items()}
    assert plans["first"] != plans["second"]
    for plan in plans.values():
        later = attach(over, plan, ["x", "y"], basis=found.basis, input_size=SIZE)
        assert later.domain.plan == plan
        assert later.domain.basis is found.basis


@every_family
@every_share
def test_projecting_the_domains_of_a_basis_onto_it_gives_them_again(family, share) -> None:
    models = domains(family)
    found = compress(models, rank_fraction=0.3, share=share)
    again = project({"signs": models["signs"]}, found.basis)
    assert again.basis is found.basis
    if share != "both":  # Tucker's best G_t is the projection too
        assert furthest({"signs": found["signs"]}, again) < 1e-10
    assert again["signs"].domain.basis == found.basis


@every_share
def test_the_counted_numbers_are_those_of_the_built_adapter(share) -> None:
    site = Site("s", "conv", 6, 8, (3, 3))
    for of in ("parallel", "series"):
        family = Shared(of, share, (3, 2) if share == "both" else 3)
        shapes = family.factor_shapes(site)
        adapter = family.over(site, {n: torch.ones(shape) for n, shape in shapes.items()})
        own = sum(t.numel() for n, t in adapter.state_dict().items() if n not in shapes)
        assert family.n_numbers(site) == own
        assert read_family(str(family)) == family


def test_a_trained_basis_is_one_parameter_and_frozen_again_a_value() -> None:
    found = compress(domains(ot.Parallel()), 0.6)
    loose = with_trainable_basis(found)
    assert furthest(found, loose) == 0
    first, second, _ = loose.values()
    name = sorted(first.domain.shared)[0]
    assert dict(first.named_parameters())[name] is dict(second.named_parameters())[name]
    first.train()(images()).square().sum().backward()
    with torch.no_grad():
        dict(first.named_parameters())[name].sub_(0.1)
    assert found.basis.taken_now() == found.basis.fingerprint
    first.eval()
    tuned = with_frozen_basis(loose)
    assert furthest(loose, tuned) == 0
    bases = {m.domain.basis for m in tuned.values()}
    assert len(bases) == 1 and found.basis not in bases
    assert not any(p.requires_grad for n, p in tuned["signs"].named_parameters() if n == name)


# What is refused, and how


def refuses(match: str, act, error=CompressError) -> None:
    with pytest.raises(error, match=match):
        act()


def test_a_budget_is_asked_for_once_and_in_range() -> None:
    models = domains(ot.Parallel())
    refuses("no budget: give exactly one of keep, numbers", lambda: compress(models))
    refuses("keep, numbers: give exactly one", lambda: compress(models, 0.5, numbers=3))
    for keep in (0, -1, 1.5, "half", True, float("nan")):
        refuses(r"keep=.*: give a share above 0", lambda k=keep: compress(models, k))
    refuses("rank_fraction=2: give a share", lambda: compress(models, rank_fraction=2))
    refuses("numbers=0: give a whole number", lambda: compress(models, numbers=0))
    refuses("n_bytes=1.5: give a whole", lambda: compress(models, n_bytes=1.5))
    refuses("share='left': the shared side", lambda: compress(models, 0.5, share="left"))
    refuses("loss=2: give a share of accuracy", lambda: compress_within(models, max, loss=2))


def test_a_budget_below_the_smallest_plan_is_refused_with_the_smallest() -> None:
    models = domains(ot.Series())
    with pytest.raises(CompressError, match=r"keep=0.01 leaves .* smallest plan has .* Keep") as e:
        compress(models, 0.01)
    least = float(str(e.value).split("or more, ")[1].split()[0])
    assert compress(models, least).kept <= least
    with pytest.raises(CompressError, match=f"keep={least - 0.001:.3g} leaves"):
        compress(models, least - 0.001)


def test_domains_that_do_not_fit_together_are_refused() -> None:
    over = net()
    models = domains(ot.Parallel(), over)
    refuses("there are none: give compress", lambda: compress({}, 0.5))
    refuses("there are none: give compress", lambda: compress([models["signs"]], 0.5))
    refuses("is no domain's network", lambda: compress({"a": over}, 0.5), AttachError)
    fewer = attach(over, ot.Parallel(), ["a", "b"], where=ot.Where(pattern="conv1"))
    refuses(
        r"domain 'few' has adapters at other sites than domain 'signs'[\s\S]*- parallel at conv2",
        lambda: compress({"signs": models["signs"], "few": fewer}, 0.5),
    )
    series = domains(ot.Series(), over)["signs"]
    refuses(r"\+ series at conv1", lambda: compress({**models, "late": series}, 0.5))
    normed = attach(over, ot.Norm(), ["a", "b"])
    refuses("has no adapters that can be factored", lambda: compress({"n": normed}, 0.5))
    other = shaken(attach(net().float().double().requires_grad_(), ot.Parallel(), ["a", "b"]), 1)
    with torch.no_grad():
        other.domain.backbone.fc.bias += 1
    refuses(
        r"domain 'o' is over backbone .*, 'flowers' over",
        lambda: compress({**models, "o": other}, 0.5),
    )
    found = compress(models, 0.6)
    refuses("over a basis already. Compress the networks", lambda: compress(found, 0.5))
    altered = domains(ot.Parallel(), over)
    altered["signs"].extra = nn.Linear(2, 2)
    refuses("altered after attach: extra.bias", lambda: compress(altered, 0.5))


def test_a_basis_of_another_backbone_or_kind_is_refused() -> None:
    over = net()
    models = domains(ot.Parallel(), over)
    basis = compress(models, 0.6).basis
    stranger = Net().double()
    refuses(
        r"the basis was made over backbone .*this is", error=AttachError,
        act=lambda: attach(stranger, classes=["a", "b"], basis=basis, input_size=SIZE),
    )  # fmt: skip
    refuses(
        "leave `where` out, and `family` too unless it is the plan", error=AttachError,
        act=lambda: attach(over, ot.Norm(), ["a", "b"], basis=basis),
    )  # fmt: skip
    refuses(
        "the basis was made over backbone .*, these domains over",
        lambda: project(domains(ot.Parallel(), stranger), basis),
    )
    refuses("at other sites than the basis", lambda: project(domains(ot.Series(), over), basis))
    refuses("it needs a basis", lambda: attach(over, Shared(), ["a", "b"]), AttachError)


def test_loading_a_state_with_another_basis_is_refused() -> None:
    found = compress(domains(ot.Parallel()), 0.6)
    model = found["signs"]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    state[sorted(model.domain.shared)[0]] += 1
    refuses(
        "is the basis's, which its domains share", lambda: model.load_state_dict(state), AttachError
    )


def test_covariances_that_say_nothing_are_refused() -> None:
    models = domains(ot.Parallel())
    refuses("'digits' has no images", lambda: activation_covariances(
        models, {n: images() for n in ("flowers", "signs")}))  # fmt: skip
    refuses(
        "activations that are not finite",
        lambda: activation_covariances(models, dict.fromkeys(models, images() * float("nan"))),
    )
    some = activation_covariances({"signs": models["signs"]}, {"signs": images()})
    refuses("say nothing of domain 'flowers'", lambda: compress(models, 0.5, covariances=some))


def test_networks_without_one_basis_train_none() -> None:
    models = domains(ot.Parallel())
    found, other = compress(models, 0.6), compress(models, 0.7)
    refuses("'signs' is over no basis", lambda: with_trainable_basis({"signs": models["signs"]}))
    mixed = {"a": found["signs"], "b": other["signs"]}
    refuses("the first over Basis", lambda: with_trainable_basis(mixed))
    refuses("there are no networks", lambda: with_trainable_basis({}))
    refuses("are not one parameter", lambda: with_frozen_basis(found))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"of": "norm"}, r"shared\(of='norm'\): give one of parallel, series"),
        ({"share": "left"}, r"shared\(share='left'\): give one of output, input, both"),
        ({"rank": 0}, "rank is a whole number of at least 1"),
        ({"rank": (2, 3)}, "a pair of them"),
        ({"share": "both", "rank": 4}, "a pair of them"),
        ({"dropout": 1}, "dropout is a share"),
    ],
)
def test_options_of_a_shared_family_out_of_range_are_refused(options, match) -> None:
    refuses(match, lambda: Shared(**options), AttachError)


def test_a_site_that_no_basis_fits_is_refused() -> None:
    site = Site("s", "conv", 6, 8, (3, 3))
    grouped = Site("s", "conv", 6, 8, (3, 3), groups=2)
    refuses("2 groups: only dense", lambda: Shared(rank=2).over(grouped, {}), AttachError)
    refuses("output side there has more", lambda: Shared(rank=9).over(site, {}), AttachError)
    refuses("the basis has {} there", lambda: Shared(rank=2).over(site, {}), AttachError)


def test_domains_of_another_type_than_their_backbone_are_refused() -> None:
    net = Net().eval()
    models = {
        name: attach(net, ot.Parallel(), ["a", "b"], input_size=SIZE, seed=ord(name)).double()
        for name in "ab"
    }
    with pytest.raises(CompressError, match=r"is torch.float64, and torch.float32 in a network ov"):
        compress(models, rank_fraction=0.5)


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    net = ot.backbone("resnet26(width=0.125)", pretrained=False)
    models = {n: ot.attach(net, ot.Parallel(), ["no", "yes"], input_size=(3, 16, 16)) for n in "ab"}
    with torch.no_grad():
        next(m for m in models["b"].modules() if hasattr(m, "a_oi")).a_oi[0, 0] = torch.nan
    with pytest.raises(CompressError, match=r"domain 'b' has an adapter at \S+ that holds NaN"):
        ot.compress(models, 0.5)
