"""mix: rows keep to themselves, mixtures are values, and what cannot be mixed is refused.

That a mixed row equals its own domain's network, for every family and layer, is a law of
test_laws.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.core.adapted import Adapted
from onetrunk.core.attach import attach
from onetrunk.core.domain import delta, domain_of
from onetrunk.core.tree import storage_key
from onetrunk.errors import AttachError, MixError

CLASSES = {
    "flowers": ("daisy", "rose"),
    "signs": ("stop", "yield", "no entry", "priority"),
    "digits": tuple("0123456789"),
}
FAMILIES = {"flowers": ot.Parallel(), "signs": ot.LowRank(2), "digits": ot.Series()}
ROWS = ["signs", "flowers", "digits", "signs", "flowers"]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1), nn.GroupNorm(3, 12), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7),
    )  # fmt: skip


@pytest.fixture
def make(net: nn.Module) -> Callable[..., nn.Module]:
    """make(name, family=..., **options): a trained-looking domain over `net`."""

    def made(name: str, family: Any = None, **options: Any) -> nn.Module:
        family = family or FAMILIES[name]
        classes = options.pop("classes", CLASSES.get(name, ("yes", "no")))
        return drawn(attach(net, family, classes, input_size=(3, 8, 8), **options), name)

    return made


@pytest.fixture
def models(make: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    return {name: make(name) for name in CLASSES}


@torch.no_grad()
def drawn(model: nn.Module, seed: str) -> nn.Module:
    generator = torch.Generator().manual_seed(sum(map(ord, seed)))
    for name, tensor in delta(model).items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else 0.5 * values)
    return model.eval()


def images(n: int = len(ROWS), seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_rows_by_name_and_by_index_give_their_own_domains_scores(
    models: dict[str, nn.Module],
) -> None:
    mixed = ot.mix(models)
    assert mixed.domains == tuple(CLASSES) and mixed.classes("flowers") == CLASSES["flowers"]
    index = torch.tensor([mixed.domains.index(name) for name in ROWS])
    for scores, same, name, k in zip(
        mixed(images(), ROWS), mixed(images(), index), ROWS, range(5), strict=True
    ):
        assert torch.equal(scores, same) and len(scores) == len(CLASSES[name])
        own = models[name](images())[k]
        assert (scores - own).abs().max() <= 1e-5 * own.abs().max()


def test_padded_scores_are_minus_infinity_behind_a_rows_own_classes(
    models: dict[str, nn.Module],
) -> None:
    mixed = ot.mix(models)
    padded = mixed.padded(images(), torch.tensor([1, 0, 2, 1, 0]))
    assert padded.shape == (5, 10)
    for row, scores in zip(padded, mixed(images(), ROWS), strict=True):
        assert torch.equal(row[: len(scores)], scores)
        assert (row[len(scores) :] == -torch.inf).all()


def test_other_rows_change_no_bit_of_a_row(models: dict[str, nn.Module]) -> None:
    mixed, x = ot.mix(models), images()
    before = mixed(x, ROWS)
    order = [3, 0, 4, 1, 2]
    after = mixed(x[order], [ROWS[k] for k in order])
    assert all(torch.equal(after[place], before[k]) for place, k in enumerate(order))
    others = torch.cat([x[:1], images(4, seed=2)])
    for rows in (["signs"] * 5, ["signs", "digits", "digits", "flowers", "signs"]):
        assert torch.equal(mixed(others, rows)[0], before[0])


def test_nan_in_a_row_or_in_a_domain_reaches_no_other_row(models: dict[str, nn.Module]) -> None:
    x = images()
    before = ot.mix(models)(x, ROWS)
    with torch.no_grad():
        for tensor in delta(models["digits"]).values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    x[3] = torch.nan
    after = ot.mix(models)(x, ROWS)
    assert all(torch.equal(after[k], before[k]) for k in (0, 1, 4))
    assert after[2].isnan().all() and after[3].isnan().all()


def test_a_mixture_is_a_snapshot_over_the_backbones_own_tensors(
    net: nn.Module, models: dict[str, nn.Module]
) -> None:
    mixed = ot.mix(models)
    before = mixed(images(), ROWS)
    drawn(models["signs"], "other numbers")
    assert all(map(torch.equal, mixed(images(), ROWS), before))
    theirs = {storage_key(t) for t in net.state_dict().values()}
    layer = mixed.network[0].layer
    assert storage_key(layer.weight) in theirs and layer.weight is not net[0].weight


@pytest.mark.parametrize("family", [ot.LowRank(3), ot.Channelwise(), ot.Norm(), ot.Head()], ids=str)
def test_one_domain_more_and_one_less_are_new_mixtures(
    make: Callable[..., nn.Module], models: dict[str, nn.Module], family: Any
) -> None:
    mixed, late = ot.mix(models), make("late", family)
    before, rows = mixed(images(), ROWS), ["late", *ROWS[1:]]
    larger = mixed.with_domain("late", late)
    expected = ot.mix({**models, "late": late})
    assert larger.domains == expected.domains == (*CLASSES, "late")
    assert all(map(torch.equal, larger(images(), rows), expected(images(), rows)))
    smaller = larger.without("digits")
    assert smaller.domains == ("flowers", "signs", "late")
    for scores, same in zip(smaller(images(), ["signs"] * 5), larger(images(), ["signs"] * 5),
                            strict=True):  # fmt: skip
        assert (scores - same).abs().max() <= 1e-6 * same.abs().max()
    assert all(map(torch.equal, mixed(images(), ROWS), before))


def test_a_mixture_of_another_type_takes_domains_of_that_type(
    make: Callable[..., nn.Module], models: dict[str, nn.Module]
) -> None:
    mixed, late = ot.mix(models).double(), make("late", ot.LowRank(2)).double()
    larger, rows, x = mixed.with_domain("late", late), ["late", *ROWS[1:]], images().double()
    for k, (scores, name) in enumerate(zip(larger(x, rows), rows, strict=True)):
        own = {**models, "late": late}[name].double()(x)[k]
        assert (scores - own).abs().max() <= 1e-7 * own.abs().max()
    assert models["signs"].double()[0].layer.weight.dtype == torch.float64


def test_norms_in_float32_keep_a_half_network_in_its_type(net: nn.Module) -> None:
    half = net.bfloat16()
    half[1].float()
    model = drawn(attach(half, ot.Norm(), ("yes", "no"), input_size=(3, 8, 8)), "half")
    x_bchw = images().bfloat16()
    scores = torch.stack(ot.mix({"half": model})(x_bchw, ["half"] * len(x_bchw)))
    torch.testing.assert_close(scores, model(x_bchw), rtol=0.05, atol=0.05)


def test_domains_of_any_ranks_and_plans_go_together(make: Callable[..., nn.Module]) -> None:
    where = ot.Where(pattern="3")
    models = {
        **{f"rank{r}": make(f"rank{r}", ot.LowRank(r)) for r in (1, 2, 3)},
        "late": make("late", ot.Parallel(), where=where),
        "none": make("none", ot.Norm()),
    }
    mixed, rows = ot.mix(models), ["rank3", "late", "none", "rank1", "rank2"]
    for k, (scores, name) in enumerate(zip(mixed(images(), rows), rows, strict=True)):
        own = models[name](images())[k]
        assert (scores - own).abs().max() <= 1e-5 * own.abs().max()


def test_hundreds_of_domains_cost_their_numbers_and_one_backbone() -> None:
    net = ot.backbone("resnet26(width=0.125)")
    model = attach(net, ot.LowRank(4), CLASSES["digits"], input_size=(3, 16, 16))
    n_bytes = sum(t.numel() * t.element_size() for t in delta(model).values())
    mixed = ot.mix({f"domain{k}": model for k in range(100)})
    shared = {storage_key(t) for t in net.state_dict().values()}
    tensors = [*mixed.parameters(), *mixed.buffers()]
    held = {storage_key(t): t.untyped_storage().nbytes() for t in tensors}
    assert sum(n for key, n in held.items() if key not in shared) <= 1.3 * 100 * n_bytes


def test_threads_with_other_mixtures_do_not_meet(models: dict[str, nn.Module]) -> None:
    mixed = ot.mix(models)
    rows = [[ROWS[(k + shift) % 5] for k in range(5)] for shift in range(5)] * 8
    expected = [mixed(images(), r) for r in rows]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda r: mixed(images(), r), rows))
    for ours, alone in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, alone))


def test_it_compiles_once_for_every_mixture(models: dict[str, nn.Module]) -> None:
    graphs = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    mixed = ot.mix(models)
    torch._dynamo.reset()
    compiled = torch.compile(mixed.padded, backend=count, fullgraph=True, dynamic=True)
    for seed, n in enumerate((5, 5, 5, 7, 9, 5)):
        index = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(images(n), index), mixed.padded(images(n), index))
    assert len(graphs) == 1


def test_windows_of_an_image_belong_to_its_domain() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=12,
        depths=(2, 2), num_heads=(2, 2),
    )  # fmt: skip
    models = {
        name: drawn(attach(swin, ot.LowRank(2), classes, input_size=(3, 32, 32)), name)
        for name, classes in CLASSES.items()
    }
    x = torch.randn(5, 3, 32, 32)
    for k, (scores, name) in enumerate(zip(ot.mix(models)(x, ROWS), ROWS, strict=True)):
        own = models[name](x)[k]
        assert (scores - own).abs().max() <= 1e-4 * own.abs().max()


# Refusals


def test_rows_that_name_no_domain_are_refused(models: dict[str, nn.Module]) -> None:
    mixed, x = ot.mix(models), images(2)
    refused: list[tuple[Any, Any, str]] = [
        (x, ["signs", "flower"], "no domain 'flower' in this mixture of flowers, signs, digits. "
                                 "Did you mean 'flowers'"),
        (x, "signs", "give one domain for each image"),
        (x, ["signs"], "2 images and 1 rows: give at least one image, and one domain"),
        (x[:0], [], "0 images and 0 rows"),
        (x, torch.tensor([0, 3]), "row index 3: this mixture has 3 domains, so give 0 to 2"),
        (x, torch.tensor([0, -1]), "row index -1"),
        (x, torch.tensor([0.0, 1.0]), "give whole numbers"),
        (x, torch.tensor([True, False]), "give whole numbers"),
        (x, torch.tensor([[0, 1]]), "shape \\(1, 2\\)"),
    ]  # fmt: skip
    for images_bchw, rows, message in refused:
        with pytest.raises(MixError, match=message):
            mixed(images_bchw, rows)


def test_what_shares_no_forward_is_refused(
    net: nn.Module, make: Callable[..., nn.Module], models: dict[str, nn.Module]
) -> None:
    with pytest.raises(MixError, match="at least one domain"):
        ot.mix({})
    with pytest.raises(AttachError, match="no domain's network"):
        ot.mix({"plain": net})
    with pytest.raises(MixError, match=r"'tuned' has layers of its own \(full\)"):
        ot.mix({**models, "tuned": make("tuned", ot.Full())})
    other = nn.Sequential(*net[:-1], nn.Linear(12, 7))
    foreign = attach(other, ot.Norm(), ("a", "b"), input_size=(3, 8, 8))
    with pytest.raises(MixError, match=r"'foreign' is over backbone .* the others over"):
        ot.mix({**models, "foreign": foreign})


def test_domains_of_other_types_are_refused(models: dict[str, nn.Module]) -> None:
    models["signs"].double()
    with pytest.raises(MixError, match=r"'signs' is torch.float64 on cpu, the first one torch.flo"):
        ot.mix(models)


def test_a_copy_of_the_backbone_is_the_same_backbone(
    net: nn.Module, models: dict[str, nn.Module]
) -> None:
    import copy

    twin = attach(copy.deepcopy(net), ot.Norm(), ("a", "b"), input_size=(3, 8, 8)).eval()
    scores = ot.mix({**models, "twin": twin})(images(1), ["twin"])[0]
    assert torch.allclose(scores, twin(images(1))[0], atol=1e-5)


def test_a_layer_whose_rows_are_not_the_batchs_is_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.table = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).mean((2, 3)) + self.table(x.new_ones(6, 6)).mean(0))

    net = Positions()
    models = {
        name: attach(net, ot.LowRank(1, init="released"), ("a", "b"), input_size=(3, 8, 8),
                     where=ot.Where(layers="all"), head="fc")
        for name in ("one", "two")
    }  # fmt: skip
    with pytest.raises(MixError, match="table gets a number of rows that does not follow the"):
        ot.mix(models)


def test_numbers_that_no_row_can_have_are_refused(make: Callable[..., nn.Module]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.register_buffer("temperature", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).mean((2, 3)) / self.temperature)

    net = Scaled()
    one, two = (attach(net, ot.Parallel(), ("a", "b"), input_size=(3, 8, 8)) for _ in range(2))
    ot.mix({"one": one, "two": two})
    two.temperature.fill_(2.0)
    with pytest.raises(MixError, match="'two' has temperature of its own"):
        ot.mix({"one": one, "two": two})


def test_a_mixture_neither_trains_nor_takes_a_name_twice(models: dict[str, nn.Module]) -> None:
    mixed = ot.mix(models)
    with pytest.raises(MixError, match="Train domains with fit"):
        mixed.train()
    assert not any(p.requires_grad for p in mixed.parameters()) and mixed.eval() is mixed
    with pytest.raises(MixError, match="a domain 'signs' already"):
        mixed.with_domain("signs", models["signs"])
    with pytest.raises(MixError, match="the only domain"):
        ot.mix({"signs": models["signs"]}).without("signs")
    with pytest.raises(MixError, match="no domain 'x'"):
        mixed.without("x")


def test_the_check_passes_and_refuses(
    models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    ot.mix(models, check=images())
    kept = type(ot.mix(models)).padded
    monkeypatch.setattr("onetrunk.core.mix.Mixed.padded", lambda *a: kept(*a) + 0.01)
    with pytest.raises(MixError, match="mixing changes the scores of 'flowers' by"):
        ot.mix(models, check=images())


def test_the_domains_stay_as_they_were(models: dict[str, nn.Module]) -> None:
    before = {name: model(images()) for name, model in models.items()}
    ot.mix(models)(images(), ROWS)
    for name, model in models.items():
        assert domain_of(model).classes == CLASSES[name]
        assert torch.equal(model(images()), before[name])


def test_a_list_of_networks_is_told_to_have_names():
    with pytest.raises(MixError, match=r"mix was given a list: give names too, mix\(\{'flowers'"):
        ot.mix([])


@pytest.mark.parametrize(
    "family", [ot.Parallel(), ot.LowRank(2), ot.Series(), ot.Channelwise()], ids=str
)
def test_a_mixture_runs_under_autocast(family) -> None:
    net = ot.backbone("resnet26(width=0.125)", pretrained=False).eval()
    models = {n: ot.attach(net, family, ["no", "yes"], input_size=(3, 16, 16)) for n in "ab"}
    mixed, x = ot.mix(models), torch.rand(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = mixed(x, ["b", "a"])
        own = [models[n].eval()(x[k : k + 1])[0] for k, n in enumerate("ba")]
    for found, expected in zip(scores, own, strict=True):
        assert torch.allclose(found.float(), expected.float(), atol=2e-2)


def test_a_mixture_that_moved_holds_its_backbone_once() -> None:
    net = ot.backbone("resnet26(width=0.125)", pretrained=False)
    models = {n: ot.attach(net, classes=["no", "yes"], input_size=(3, 16, 16)) for n in "abc"}
    mixed = ot.mix({n: models[n] for n in "ab"}).double().without("a")
    (base,) = mixed._base
    held = {p.data_ptr() for p in mixed.network.parameters()}
    outside = [p for p in base.parameters() if p.data_ptr() not in held]
    assert all(p.ndim < 4 for p in outside)  # norms and head: placeholders of a later domain's
    assert not any(isinstance(m, Adapted) for m in base.modules())
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    grown = mixed.with_domain("c", models["c"].double())
    assert torch.allclose(grown(x, ["c"])[0], models["c"].eval()(x)[0])


def test_a_mixture_is_not_saved(tmp_path) -> None:
    net = ot.backbone("resnet26(width=0.125)", pretrained=False)
    mixed = ot.mix({"a": ot.attach(net, classes=["no", "yes"], input_size=(3, 16, 16))})
    with pytest.raises(MixError, match="a mixture is not saved: keep its domains in a bank"):
        torch.save(mixed, tmp_path / "mixed.pt")


class Bound(nn.Module):
    """A block whose forward is chosen when it is made, as timm's FasterNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.forward = self.chosen

    def chosen(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def moved(net: nn.Module, names: str) -> dict[str, nn.Module]:
    """Domains whose norms and adapters are far from the backbone's."""
    models = {}
    for k, name in enumerate(names):
        models[name] = attach(net, ot.Parallel(), ["no", "yes"], input_size=(3, 8, 8), seed=k)
        with torch.no_grad():
            for tensor in delta(models[name]).values():
                if tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor))
    return models


def test_a_forward_that_is_bound_when_it_is_made_mixes() -> None:
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    models = moved(nn.Sequential(Bound(), *pooled).double(), "ab")
    mixed, x = ot.mix(models), torch.rand(2, 3, 8, 8).double()
    for k, (name, scores_c) in enumerate(zip("ba", mixed(x, ["b", "a"]), strict=True)):
        assert torch.allclose(scores_c, models[name].eval()(x[k : k + 1])[0])


def test_a_norm_that_the_forward_passes_by_is_refused() -> None:
    class Listed(Bound):
        def __init__(self) -> None:
            super().__init__()
            self.steps = [self.norm]

        def chosen(self, x: Tensor) -> Tensor:
            return self.steps[0](self.conv(x))

    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    with pytest.raises(MixError, match=r"calls 0.norm past its place.*rows cannot differ there"):
        ot.mix(moved(nn.Sequential(Listed(), *pooled), "ab"))


def test_a_mixture_has_its_shapes_on_meta() -> None:
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    mixed = ot.mix(moved(nn.Sequential(Bound(), *pooled), "ab")).to("meta")
    images_bchw = torch.empty(2, 3, 8, 8, device="meta")
    index_b = torch.zeros(2, dtype=torch.long, device="meta")
    assert mixed._scores(images_bchw, index_b).shape == (2, 2)


def test_a_norm_that_no_evaluation_calls_is_no_hindrance() -> None:
    class Aside(Bound):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.BatchNorm2d(8)  # of training alone, as GoogLeNet has some

    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    models = moved(nn.Sequential(Aside(), *pooled), "ab")
    assert ot.mix(models, check=torch.rand(2, 3, 8, 8)).domains == ("a", "b")
