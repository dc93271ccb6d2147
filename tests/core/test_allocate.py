"""allocate: what a budget promises, what is measured against naive loops, and every refusal."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.core.adapters import LowRank, Parallel
from onetrunk.core.allocate import (
    Allocation,
    allocate,
    parse_budget,
    plan_by_hand,
    uniform,
)
from onetrunk.core.attach import plan_text
from onetrunk.core.budget import spend
from onetrunk.core.plan import Where
from onetrunk.core.sensitivity import (
    DAMPING,
    Measured,
    Sensitivity,
    by_curvature,
    by_gradient,
    by_training,
    measure,
)
from onetrunk.core.trace import trace
from onetrunk.errors import AttachError, SpecError
from onetrunk.tensorfile import fingerprint_of

CLASSES = ["a", "b", "c"]
SIZE = (3, 9, 9)


class Net(nn.Module):
    """Every kind of site: strided, padded, grouped, depthwise, 1x1, linear on tokens."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, 1, 1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.pointwise = nn.Conv2d(12, 10, 1)
        self.tokens = nn.Linear(10, 6)
        self.fc = nn.Linear(6, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        x = self.depthwise(self.grouped(x).tanh()).tanh()
        x = self.tokens(self.pointwise(x).flatten(2).transpose(1, 2) * self.scale)
        return self.fc(x.tanh().mean(1))


SITES = ("stem", "grouped", "depthwise", "pointwise", "tokens")


def net(scale: float = 1.0) -> Net:
    torch.manual_seed(0)
    made = Net(scale).double().eval()
    made.norm.running_mean.normal_()
    return made


def batches(n: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator}
    return [
        (
            torch.randn(size, *SIZE, dtype=torch.float64, **draw),
            torch.randint(0, 3, (size,), **draw),
        )
        for _ in range(n)
    ]


def probe(backbone: nn.Module, family: object = None) -> nn.Module:
    model = ot.attach(backbone, family or ot.Head(), CLASSES, input_size=SIZE)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.fc.weight.normal_(generator=generator)
    return model.eval()


def everywhere(family: object) -> dict[str, object]:
    return dict.fromkeys(SITES, family)


def damped(covariance_cc: Tensor) -> Tensor:
    identity_cc = torch.eye(len(covariance_cc), dtype=torch.float64)
    return covariance_cc + DAMPING * covariance_cc.diagonal().mean() * identity_cc


@pytest.fixture(scope="module")
def backbone() -> Net:
    return net()


@pytest.fixture(scope="module")
def measured(backbone: Net) -> Measured:
    return measure(probe(backbone), batches())


# What is measured


def test_the_gradient_is_the_one_of_a_zero_parallel_adapter(
    backbone: Net, measured: Measured
) -> None:
    model = probe(backbone, everywhere(Parallel()))
    for x_bchw, labels_b in batches():
        F.cross_entropy(model(x_bchw), labels_b, reduction="sum").backward()
    for name in SITES:
        naive = model.get_submodule(name).adapter.a_oi.grad / 12
        torch.testing.assert_close(measured.moments[name].gradient_goi.flatten(0, 1), naive)


def test_the_gradient_is_the_slope_of_the_mean_loss(backbone: Net, measured: Measured) -> None:
    model = probe(backbone, everywhere(Parallel()))
    x_nchw, labels_n = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    for name in SITES:
        a_oi = model.get_submodule(name).adapter.a_oi
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                a_oi[3, 0] = step
                losses.append(F.cross_entropy(model(x_nchw), labels_n))
                a_oi[3, 0] = 0.0
        slope = (losses[0] - losses[1]) / 2e-5
        found = measured.moments[name].gradient_goi.flatten(0, 1)[3, 0]
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-9)


def test_the_covariances_are_sums_over_images_and_positions(backbone: Net) -> None:
    seen = measure(probe(backbone), batches()).moments["pointwise"]
    inputs, gradients = list[Tensor](), list[Tensor]()
    model = probe(backbone, {"pointwise": Parallel()})
    model.pointwise.layer.register_forward_hook(lambda _m, args, _y: inputs.append(args[0]))
    model.pointwise.register_full_backward_hook(lambda _m, _i, grads: gradients.append(grads[0]))
    for x_bchw, labels_b in batches():
        F.cross_entropy(model(x_bchw), labels_b, reduction="sum").backward()
    s_in, s_out = torch.zeros(12, 12).double(), torch.zeros(10, 10).double()
    for x_bihw, g_bohw in zip(inputs, gradients, strict=True):
        for b in range(4):
            for h in range(5):
                for w in range(5):
                    s_in += torch.outer(x_bihw[b, :, h, w], x_bihw[b, :, h, w]).detach() / 12
                    s_out += torch.outer(g_bohw[b, :, h, w], g_bohw[b, :, h, w]) / (12 * 25)
    torch.testing.assert_close(seen.inputs_gii[0], s_in)
    torch.testing.assert_close(seen.outputs_goo[0], s_out)


def test_curvature_is_the_gradient_between_inverse_square_roots(measured: Measured) -> None:
    found = by_curvature(measured).energies
    for name, seen in measured.moments.items():
        naive = 0.0
        for group, g_oi in enumerate(seen.gradient_goi):
            roots = []
            for covariance in (seen.outputs_goo[group], seen.inputs_gii[group]):
                values, vectors = torch.linalg.eigh(damped(covariance))
                roots.append(vectors @ torch.diag(values**-0.5) @ vectors.T)
            naive = naive + torch.linalg.svdvals(roots[0] @ g_oi @ roots[1]) ** 2
        assert found[name] == pytest.approx(naive.tolist(), rel=1e-9)


def test_energies_fall_and_are_as_many_as_the_rank_can_be(measured: Measured) -> None:
    for how in (by_gradient, by_curvature):
        found = how(measured)
        assert [site.name for site in found.sites] == list(SITES)
        for site in found.sites:
            energies = found.energies[site.name]
            assert len(energies) == min(site.cin, site.cout) // site.groups
            assert list(energies) == sorted(energies, reverse=True) and energies[-1] >= 0


def test_curvature_does_not_see_the_scale_of_a_layers_input_and_gradient_does() -> None:
    plain, moved = net(), net(8.0)  # the same function: inputs 8 times, weights an eighth
    with torch.no_grad():
        moved.tokens.weight /= 8
    found = [measure(probe(one), batches()) for one in (plain, moved)]
    curvatures = [by_curvature(one).energies["tokens"] for one in found]
    gradients = [by_gradient(one).energies["tokens"] for one in found]
    assert curvatures[0] == pytest.approx(curvatures[1], rel=1e-9)
    assert gradients[1] == pytest.approx([64 * energy for energy in gradients[0]], rel=1e-9)


def test_training_is_read_off_the_matrices_and_only_off_those(backbone: Net) -> None:
    plan = {"pointwise": Parallel(), "grouped": LowRank(2), "stem": ot.Channelwise()}
    model = probe(backbone, plan)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.pointwise.adapter.a_oi.normal_(generator=generator)
        model.grouped.adapter.u_or.normal_(generator=generator)
    seen = measure(model, batches())
    found = by_training(model, seen)
    assert [site.name for site in found.sites] == ["grouped", "pointwise"]
    assert found.energies["grouped"][2:] == pytest.approx([0.0, 0.0], abs=1e-12)
    moments = seen.moments["pointwise"]
    s_out, s_in = damped(moments.outputs_goo[0]), damped(moments.inputs_gii[0])
    a_oi = model.pointwise.adapter.a_oi.detach()
    energy = (s_out @ a_oi @ s_in @ a_oi.T).trace()
    assert sum(found.energies["pointwise"]) == pytest.approx(float(energy))


def test_measuring_leaves_the_network_as_it_was(backbone: Net) -> None:
    model = probe(backbone)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    measure(model, batches())
    assert model.training and wanted == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_no_gradient_reaches_gets_nothing(backbone: Net) -> None:
    class Dead(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * self.side(x).mean((2, 3))

    torch.manual_seed(0)
    dead = Dead()
    dead.side = nn.Conv2d(3, 4, 1)
    dead.double().eval()
    model = ot.attach(dead, ot.Head(), ["a", "b", "c", "d"], input_size=SIZE, head="fc")
    with torch.no_grad():
        model.fc.weight.normal_()
    found = by_curvature(measure(model, batches()))
    assert set(found.energies["side"]) == {0.0}
    assert "side" not in allocate(dead, found, "100000").plan


# What is spent


def flat(
    backbone: nn.Module, energies: dict[str, list[float]], how: str = "gradient"
) -> Sensitivity:
    sites = tuple(s for s in trace(backbone, SIZE).sites if s.name in energies)
    fixed = {name: tuple(values) for name, values in energies.items()}
    return Sensitivity(fingerprint_of(backbone.state_dict()), how, sites, fixed)


ENERGIES = st.fixed_dictionaries(
    {
        name: st.lists(st.floats(0, 1e6), min_size=n, max_size=n).map(
            lambda found: sorted(found, reverse=True)
        )
        for name, n in zip(SITES, (3, 4, 1, 10, 6), strict=True)
    }
)
BUDGETS = st.integers(24, 500)


@settings(max_examples=60, deadline=None)
@given(energies=ENERGIES, budget=BUDGETS)
def test_a_plan_stays_within_its_budget_and_costs_what_it_says(energies, budget) -> None:
    backbone = net()
    if not any(values[0] > 0 for values in energies.values()):
        return
    found = allocate(backbone, flat(backbone, energies), budget)
    assert 0 < found.numbers <= budget
    model = ot.attach(backbone, found.plan_for(backbone), CLASSES, input_size=SIZE)
    assert ot.cost(model, SIZE).adapters == found.numbers
    for share in found.shares:
        assert share.family is None or energies[share.site][0] > 0
        assert share.numbers <= Parallel().n_numbers(
            next(site for site in trace(backbone, SIZE).sites if site.name == share.site)
        )


@settings(max_examples=30, deadline=None)
@given(
    energies=st.lists(
        st.lists(st.floats(0.1, 100), min_size=8, max_size=8).map(lambda e: sorted(e)[::-1]),
        min_size=3,
        max_size=3,
    ),
    budget=st.integers(16, 150),
    more=st.integers(0, 100),
)
def test_more_budget_takes_nothing_away_where_units_cost_the_same(energies, budget, more) -> None:
    backbone = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Identity())
    sites = trace(backbone, (8,), head="3").sites
    fingerprint = fingerprint_of(backbone.state_dict())
    table = {s.name: tuple(e) for s, e in zip(sites, energies, strict=True)}
    found = Sensitivity(fingerprint, "gradient", sites, table)
    less, larger = allocate(backbone, found, budget), allocate(backbone, found, budget + more)
    for before, after in zip(less.shares, larger.shares, strict=True):
        assert after.numbers >= before.numbers


@given(
    offers=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.lists(st.integers(0, 50), max_size=6),
            st.integers(1, 20),
            st.integers(0, 90),
        ),
        max_size=5,
    ),
    budget=st.integers(0, 120),
    more=st.integers(0, 40),
)
def test_more_budget_never_buys_less_energy(offers, budget, more) -> None:
    # the last unit brings the rest of a matrix, at a price of its own
    gains = {str(k): [*sorted(gains)[::-1], last] for k, (_, gains, _, last) in enumerate(offers)}
    prices = {
        str(k): [price] * len(gains) + [min(last_price, price)]
        for k, (price, gains, last_price, _) in enumerate(offers)
    }

    def bought(numbers: int) -> int:
        units = spend(gains, prices, numbers)
        assert sum(sum(prices[site][:n]) for site, n in units.items()) <= numbers
        return sum(sum(gains[site][:n]) for site, n in units.items())

    assert bought(budget + more) >= bought(budget)


def test_a_sensitivity_without_preference_spreads_ranks_by_price(backbone: Net) -> None:
    found = allocate(
        backbone, flat(backbone, {"pointwise": [4.0] * 10, "tokens": [1.0] * 6}), 22 * 2 + 16
    )
    assert found.plan == {"pointwise": LowRank(2), "tokens": LowRank(1)}


def test_the_whole_matrix_is_taken_where_it_costs_no_more(backbone: Net) -> None:
    energies = {"depthwise": [1.0], "tokens": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]}
    found = allocate(backbone, flat(backbone, energies), 10**6)
    assert found.plan == {"depthwise": Parallel(), "tokens": Parallel()}
    assert found.numbers == 12 + 60 and [share.kept for share in found.shares] == [1.0, 1.0]


def test_the_budget_of_every_whole_matrix_buys_them_all(backbone: Net) -> None:
    energies = {"depthwise": [1.0], "tokens": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]}
    assert allocate(backbone, flat(backbone, energies), 12 + 60).numbers == 12 + 60


def test_only_the_chosen_sites_get_anything(backbone: Net, measured: Measured) -> None:
    found = allocate(backbone, by_gradient(measured), 500, Where(layers="all", pattern="*wise"))
    assert set(found.plan) == {"depthwise", "pointwise"}


def test_uniform_is_the_largest_rank_that_fits_everywhere(backbone: Net) -> None:
    every = Where(layers="all")
    costs = {}
    for rank in (1, 2, 3):
        families = [
            Parallel() if rank * (s.cin + s.cout) >= Parallel().n_numbers(s) else LowRank(rank)
            for s in trace(backbone, SIZE).sites
        ]
        sites = trace(backbone, SIZE).sites
        costs[rank] = sum(f.n_numbers(s) for f, s in zip(families, sites, strict=True))
    for rank in (1, 2):
        for budget in (costs[rank], costs[rank + 1] - 1):
            found = uniform(backbone, budget, every, SIZE)
            assert found.numbers == costs[rank]
            assert found.plan["pointwise"] == LowRank(rank)
    assert uniform(backbone, 10**6, every, SIZE).plan == everywhere(Parallel())
    with pytest.raises(AttachError, match=rf"rank 1 at all 5 sites costs {costs[1]}\. Give"):
        uniform(backbone, costs[1] - 1, every, SIZE)


# Texts and files


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10%", 10), ("2.5 %", 2), ("400B", 50), ("0.4kB", 50), ("1_000", 1000), ("1,000", 1000),
     (7, 7)],
)  # fmt: skip
def test_a_budget_is_read_in_three_units(text: int | str, numbers: int) -> None:
    assert parse_budget(text, nn.Linear(24, 4).double()) == numbers


@pytest.mark.parametrize("text", ["much", "2 percent", "0.5", "-3", "2%%", "", "1kb", True, None])
def test_a_budget_that_cannot_be_read_is_refused(text: object) -> None:
    with pytest.raises(SpecError, match=r"cannot read the budget .*\(40000\).*\(150kB\).*\(2%\)"):
        parse_budget(text, nn.Linear(9, 2))


@pytest.mark.parametrize("text", ["0", 0, -5, "0.1%"])
def test_a_budget_of_nothing_is_refused(text: int | str) -> None:
    with pytest.raises(SpecError, match=r"the budget .* is -?\d numbers: give 1 at least\. .*norm"):
        parse_budget(text, nn.Linear(9, 2))


def test_an_allocation_reads_back_and_goes_to_the_next_domain(
    backbone: Net, measured: Measured
) -> None:
    found = allocate(backbone, by_curvature(measured), 150)
    again = Allocation.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found and again.plan_for(net()) == found.plan


def test_the_table_says_every_site_and_the_sum(backbone: Net, measured: Measured) -> None:
    found = allocate(backbone, by_curvature(measured), 60)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(SITES)
    assert lines[-1].startswith(f"{found.numbers} of 60 numbers at {len(found.plan)} of 5 sites")
    assert max(line.count("█") for line in lines) == 12


def broken(**changed: object) -> dict[str, object]:
    share = {"site": "a", "stage": "mid", "family": "parallel", "numbers": 4, "layer_numbers": 4,
             "kept": 1.0}  # fmt: skip
    whole = {"allocation": 1, "backbone": "f", "how": "uniform", "budget": 9, "shares": [share]}
    inner = {key: value for key, value in changed.items() if key in share}
    outer = {key: value for key, value in changed.items() if key not in share}
    return {**whole, "shares": [{**share, **inner}], **outer}


@pytest.mark.parametrize(
    "values",
    [
        [], {}, broken(more=1), broken(budget="9"), broken(shares=3), broken(shares=[3]),
        broken(family="lora"), broken(family=7), broken(numbers=-1), broken(layer_numbers=0),
        broken(kept=2), broken(site=3), broken(backbone=None), broken(allocation=0),
        broken(shares=[{}]), broken(family="lowrank(rank=0)"),
    ],
)  # fmt: skip
def test_what_was_never_written_is_refused(values: object) -> None:
    assert Allocation.from_json(broken()).plan == {"a": Parallel()}
    with pytest.raises(SpecError, match=r"no allocation as it was written: .*Allocate again"):
        Allocation.from_json(values)


def test_a_newer_file_says_so() -> None:
    with pytest.raises(SpecError, match=r"format 2, and this onetrunk reads format 1.*Upgrade"):
        Allocation.from_json(broken(allocation=2))


def test_rules_by_hand_name_layers_and_globs_and_the_later_one_holds() -> None:
    plan = plan_by_hand(net(), {"*": "lowrank(rank=2)", "*wise": Parallel()}, SIZE)
    assert plan == {
        "stem": LowRank(2), "grouped": LowRank(2), "depthwise": Parallel(),
        "pointwise": Parallel(), "tokens": LowRank(2),
    }  # fmt: skip
    assert "depthwise" not in plan_by_hand(net(), {"*": "lowrank(rank=2)"}, SIZE)


def test_many_ranks_are_named_as_a_range() -> None:
    plan = {str(rank): LowRank(rank) for rank in (1, 2, 4, 9)}
    assert plan_text({**plan, "x": Parallel()}) == "lowrank(rank=1..9) + parallel"
    assert plan_text({"1": LowRank(1), "2": LowRank(2)}) == "lowrank(rank=1) + lowrank(rank=2)"


# Refusals


def test_a_rule_by_hand_that_meets_nothing_is_refused() -> None:
    with pytest.raises(AttachError, match=r"unknown layer 'pointwize'.*Did you mean 'pointwise'\?"):
        plan_by_hand(net(), {"pointwize": "parallel"}, SIZE)
    with pytest.raises(AttachError, match=r"lowrank\(rank=2\) at 'depthwise': 12 channels in"):
        plan_by_hand(net(), {"depthwise": "lowrank(rank=2)"}, SIZE)


@pytest.mark.parametrize(
    ("how", "advice"),
    [("gradient", "whose head fits"), ("trained", "left every matrix at zero: train longer")],
)
def test_where_nothing_is_sensitive_it_says_what_to_do(
    backbone: Net, how: str, advice: str
) -> None:
    with pytest.raises(AttachError, match=f"zero at all 1 sites: there is nothing .*{advice}"):
        allocate(backbone, flat(backbone, {"pointwise": [0.0] * 10}, how), 100)


def test_a_budget_below_the_smallest_plan_says_what_that_is(backbone: Net) -> None:
    found = flat(backbone, {"pointwise": [1.0] * 10, "tokens": [5.0] * 6})
    with pytest.raises(
        AttachError,
        match=r"a budget of 15 numbers buys nothing: the smallest plan is lowrank\(rank=1\) at "
        r"tokens, 16 numbers\. Give as many at least\.",
    ):
        allocate(backbone, found, 15)


def test_another_backbone_is_refused_by_its_fingerprint(backbone: Net, measured: Measured) -> None:
    other = net()
    with torch.no_grad():
        other.stem.bias[0] += 1
    found = allocate(backbone, by_gradient(measured), 100)
    with pytest.raises(AttachError, match=r"this allocation was made for backbone \w{12}, and"):
        found.plan_for(other)
    with pytest.raises(AttachError, match=r"sensitivity was measured on backbone .* allocate for"):
        allocate(other, by_gradient(measured), 100)


def test_a_sensitivity_of_nothing_is_refused(backbone: Net) -> None:
    with pytest.raises(AttachError, match=r"zero at all 1 sites: .*such as a linear probe"):
        allocate(backbone, flat(backbone, {"tokens": [0.0] * 6}), 100)


def test_a_measure_that_cannot_be_taken_is_refused(backbone: Net, measured: Measured) -> None:
    with pytest.raises(AttachError, match=r"no batch of images: give \(images, labels\)"):
        measure(probe(backbone), [])
    x_bchw, labels_b = batches()[0]
    with pytest.raises(AttachError, match=r"the gradient at stem is not finite"):
        measure(probe(backbone), [(x_bchw * float("nan"), labels_b)])
    with pytest.raises(AttachError, match=r"head has no matrix beside a layer.*with Parallel\(\)"):
        by_training(probe(backbone), measured)
