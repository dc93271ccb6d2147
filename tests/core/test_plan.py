"""plan: which sites a placement chooses, which family fits a backbone, and what is refused."""

import pytest
import timm
from torch import nn

import onetrunk as ot
from onetrunk.backbones import resnet26
from onetrunk.core.adapters import Family, LowRank, Parallel
from onetrunk.core.plan import BUDGET, Where, default_family, mixes_in_space, place
from onetrunk.core.sites import Site
from onetrunk.core.trace import Trace, trace
from onetrunk.errors import AttachError


@pytest.fixture(scope="module")
def paper() -> Trace:
    return trace(resnet26(0.25))


def names(where: Where, traced: Trace) -> list[str]:
    return [site.name for site in where.choose(traced.sites)]


def test_the_papers_network_has_25_sites(paper: Trace) -> None:
    assert len(names(Where(), paper)) == len(paper.sites) == 25


def test_first_is_the_stem_and_the_first_convolution_of_each_of_12_blocks(paper: Trace) -> None:
    stem, *rest = names(Where(convs="first"), paper)
    assert stem == "stem" and len(rest) == 12 and all(n.endswith("conv1") for n in rest)


def test_second_is_the_stem_and_the_second_convolution_of_each_of_12_blocks(paper: Trace) -> None:
    stem, *rest = names(Where(convs="second"), paper)
    assert stem == "stem" and len(rest) == 12 and all(n.endswith("conv2") for n in rest)


@pytest.mark.parametrize(("stage", "n"), [("early", 1), ("mid", 8 + 8), ("late", 8)])
def test_stages_choose_by_resolution(paper: Trace, stage: str, n: int) -> None:
    by_stage = [site.name for site in paper.sites if site.stage == stage]
    assert names(Where(stages=(stage,)), paper) == by_stage
    assert names(Where(stages=stage), paper) == by_stage and by_stage


def test_every_stage_together_is_everything(paper: Trace) -> None:
    stages = ("early", "mid", "late")
    assert [n for s in stages for n in names(Where(stages=s), paper)] == names(Where(), paper)


def test_patterns_are_globs_with_commas_between(paper: Trace) -> None:
    assert names(Where(pattern="stem"), paper) == ["stem"]
    assert len(names(Where(pattern="stages.0.*"), paper)) == 8
    assert len(names(Where(pattern="stem, stages.2.3.*"), paper)) == 3


def test_layers_choose_by_kernel() -> None:
    traced = trace(timm.create_model("resnet18"), (3, 64, 64))
    assert len(names(Where(layers="spatial"), traced)) == 17
    assert len(names(Where(layers="pointwise"), traced)) == 3  # the shortcuts
    assert len(names(Where(layers="all"), traced)) == 20
    assert names(Where(layers="auto"), traced) == names(Where(layers="spatial"), traced)


def test_a_chosen_site_keeps_its_place_in_the_order_of_execution(paper: Trace) -> None:
    assert [s.order for s in Where().choose(paper.sites)] == list(range(25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("middle",)}, r"Where\(stages='middle'\): known are early, mid, late\."),
        ({"stages": "first"}, r"Where\(stages='first'\): known are early"),
        ({"stages": ()}, r"Where\(stages=\(\)\): name at least one of early, mid, late\."),
        ({"convs": "third"}, r"Where\(convs='third'\): known are both, first, second\."),
        ({"layers": "conv"}, r"Where\(layers='conv'\): known are auto, spatial, pointwise, all\."),
    ],
)
def test_a_placement_that_does_not_exist_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(AttachError, match=message):
        Where(**options)


def test_choosing_nothing_is_refused_with_what_there_is(paper: Trace) -> None:
    with pytest.raises(
        AttachError,
        match=r"pattern='layer9\.\*'.*none of the backbone's 25 adaptable layers is chosen\. "
        r"Of that kind there are 25: stem, stages\.0\.0\.conv1,.*\.\.\.\. Widen stages",
    ):
        Where(pattern="layer9.*").choose(paper.sites)
    with pytest.raises(AttachError, match=r"Of that kind there are 0: none\."):
        Where(layers="pointwise").choose(paper.sites)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("resnet18", Parallel),
        ("resnet50", Parallel),
        ("efficientnet_b0", LowRank),
        ("convnext_atto", LowRank),
        ("vit_tiny_patch16_224", LowRank),
        ("mobilenetv3_small_100", LowRank),
    ],
)
def test_the_default_family_fits_the_backbone_within_its_budget(
    name: str, family: type[Family]
) -> None:
    traced = trace(timm.create_model(name))
    chosen = default_family(traced)
    assert type(chosen) is family
    plan, _ = place(chosen, Where(), traced)
    sites = {site.name: site for site in traced.sites}
    added = sum(chosen.n_numbers(sites[name]) for name in plan)
    assert 0 < added <= BUDGET * sum(site.n_weights for site in traced.sites)


def test_the_default_family_of_the_papers_network_is_parallel(paper: Trace) -> None:
    assert default_family(paper) == Parallel()


def test_the_default_family_answers_to_the_placement() -> None:
    # beside every 1x1 layer of a bottleneck ResNet, parallel would cost as much as the layers
    traced = trace(timm.create_model("resnet50"))
    assert default_family(traced, Where(layers="pointwise")) == LowRank(rank=16)


def test_where_nothing_fits_the_budget_the_lowest_rank_is_taken() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Identity())
    assert default_family(trace(net, (3, 4, 4))) == LowRank(rank=1)


def test_patchifying_stems_are_no_mixing_in_space() -> None:
    stem = Site("stem", "conv", 3, 96, (4, 4), (4, 4))
    body = Site("body", "conv", 96, 96, (3, 3), (1, 1))
    layers = Site("mlp", "linear", 96, 96)
    assert not mixes_in_space((stem, layers))
    assert mixes_in_space((stem, body, layers))


def test_sites_that_a_family_refuses_are_listed_beside_those_that_cannot_be_adapted() -> None:
    traced = trace(timm.create_model("efficientnet_b0"), (3, 64, 64))
    plan, skipped = place(ot.LowRank(rank=8), Where(layers="all"), traced)
    assert "blocks.1.0.conv_dw" not in plan and "blocks.1.0.conv_pw" in plan
    assert skipped["blocks.1.0.conv_dw"].startswith(
        "96 channels in, 96 out, 96 group(s): no matrix"
    )
    assert set(plan) | set(skipped) == {site.name for site in traced.sites}


def test_a_rank_that_fits_nowhere_is_refused_with_the_largest_that_does(paper: Trace) -> None:
    with pytest.raises(
        AttachError,
        match=r"lowrank\(rank=65\) fits none of the 25 chosen layers; stem: 3 channels in, 8 out, "
        r"1 group\(s\): no matrix there has rank above 3\. Use a smaller rank, or parallel",
    ):
        place(ot.LowRank(rank=65), Where(), paper)
