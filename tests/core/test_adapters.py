"""Families: their written forms, their options and what each refuses."""

import pytest
import torch
from torch import nn

import onetrunk as ot
from onetrunk.core.adapters import read_family
from onetrunk.core.sites import Site
from onetrunk.errors import AttachError, OnetrunkError, SpecError

SITE = Site("layer2.0.conv1", "conv", 8, 16, (3, 3))


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (ot.Parallel(), "parallel"),
        (ot.Parallel(dropout=0.1), "parallel(dropout=0.1)"),
        (ot.Series(init="released"), "series(init='released')"),
        (ot.LowRank(), "lowrank(rank=8)"),
        (ot.LowRank(rank=4, init="released"), "lowrank(rank=4, init='released')"),
        (ot.Norm(), "norm"),
    ],
)
def test_a_family_writes_what_differs_from_the_defaults_and_its_rank(
    family: object, text: str
) -> None:
    assert str(family) == text and read_family(text) == family


def test_an_unknown_family_is_refused_with_the_closest_one() -> None:
    with pytest.raises(
        SpecError,
        match=r"unknown adapter family 'paralel': known are channelwise, full, head, lowrank, "
        r"norm, parallel, series\. Did you mean 'parallel'\?",
    ):
        read_family("paralel")


def test_an_unknown_field_is_refused_with_the_real_ones() -> None:
    with pytest.raises(
        SpecError, match=r"'lowrank\(r=8\)' has no field 'r': it takes rank, init, dropout\."
    ):
        read_family("lowrank(r=8)")
    with pytest.raises(SpecError, match=r"has no field 'rank': it takes no fields\."):
        read_family("norm(rank=8)")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "low rank",
        "lowrank(8)",
        "lowrank(rank=8",
        "a.b()",
        "lowrank(**{})",
        "rank=8",
        "lowrank(rank=x)",
        "lowrank(rank=8, rank=9)",
        "lowrank(rank=__import__('os'))",
        "lowrank(rank=" + "(" * 5000,
    ],
)
def test_what_is_no_written_form_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(SpecError, match=r"cannot read adapter .*write it as name or name\(field"):
        read_family(text)


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8"])
def test_a_rank_that_is_no_whole_number_is_refused(rank: object) -> None:
    with pytest.raises(AttachError, match=r"lowrank\(rank=.+\): rank must be a whole number"):
        ot.LowRank(rank=rank)


def test_a_rank_above_the_sites_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(
        AttachError,
        match=r"lowrank\(rank=9\) at layer2\.0\.conv1: 8 channels in, 16 out, 1 group\(s\): no "
        r"matrix there has rank above 8\. Use a smaller rank, or parallel",
    ):
        ot.LowRank(rank=9).build(SITE)


@pytest.mark.parametrize("family", [ot.Series, ot.Parallel, ot.LowRank])
def test_an_unknown_initialisation_is_refused_with_the_two(family: type) -> None:
    with pytest.raises(AttachError, match=r"\(init='zero'\): the initialisations are 'identity'"):
        family(init="zero")


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan"), "half"])
@pytest.mark.parametrize("family", [ot.Parallel, ot.LowRank])
def test_a_dropout_out_of_range_is_refused(family: type, dropout: object) -> None:
    with pytest.raises(AttachError, match=r"\(dropout=.+\): dropout is a share from 0 to below 1"):
        family(dropout=dropout)


def test_every_refusal_is_one_family_of_exceptions() -> None:
    assert issubclass(SpecError, OnetrunkError) and issubclass(AttachError, OnetrunkError)


def test_released_draws_what_the_authors_draw() -> None:
    wide = Site("w", "conv", 256, 512, (3, 3))
    expected = (2 / 512) ** 0.5
    a_oi = ot.Parallel(init="released").build(wide).a_oi
    a_oo = ot.Series(init="released").build(wide).a_oo
    assert a_oi.std().item() == pytest.approx(expected, rel=0.02)
    assert a_oo.std().item() == pytest.approx(expected, rel=0.02)
    low = ot.LowRank(rank=64, init="released").build(wide)
    assert (low.u_or @ low.v_ri).std().item() == pytest.approx(expected, rel=0.05)


def test_identity_starts_low_rank_with_one_factor_at_zero_and_the_other_not() -> None:
    adapter = ot.LowRank(rank=4).build(SITE)
    assert not adapter.u_or.any() and (adapter.v_ri != 0).all()


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_series_adapter_normalises_over_everything_but_channels(kind: str) -> None:
    adapter = ot.Series().build(Site("s", kind, 4, 4)).train()
    y = 3 + torch.randn((6, 4, 5, 5), generator=torch.Generator().manual_seed(0))
    y = y if kind == "conv" else y.permute(0, 2, 3, 1)
    adapter(y, y)
    mean = y.mean((0, 2, 3) if kind == "conv" else (0, 1, 2))
    assert torch.allclose(adapter.norm.running_mean, 0.1 * mean, atol=1e-5)
    assert isinstance(adapter.norm, nn.BatchNorm2d if kind == "conv" else nn.BatchNorm1d)
