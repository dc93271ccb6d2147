"""train --norms, --cache and --recompute: the same domain with less work or memory."""

import json

import pytest

import onetrunk as ot
from onetrunk.core.domain import delta

LATE = ("--stages", "late", "--norms", "placed")


@pytest.fixture
def short(run, photos, bank):
    """short(name, *options) -> what a short training said, as JSON."""

    def call(name, *options):
        words = ("--data", photos, "--epochs", 2, "--no-probe", "--json")
        ran = run("train", bank, name, *words, *options)
        assert ran.status == 0, ran.err
        return json.loads(ran.out)

    return call


def test_placed_norms_make_a_domain_smaller(run, short, bank):
    every, placed = short("every", "--stages", "late"), short("placed", *LATE)
    assert placed["delta_numbers"] < every["delta_numbers"]
    assert ot.Bank.open(bank).load("placed").domain.held[-1] == "stages.1.3.norm2"
    assert run("verify", bank).status == 0


def test_a_cached_training_stores_an_ordinary_domain(run, photos, bank, tmp_path):
    words = ("train", bank, "late", "--data", photos, "--epochs", 2, "--no-probe", *LATE)
    ran = run(*words, "--cache", 1, "--cache-folder", tmp_path / "features")
    assert ran.status == 0, ran.err
    assert "17 norms stay the backbone's, up to stages.1.3.norm2" in ran.out
    assert "% of the network runs once, up to stages.2.0" in ran.out
    assert len(list((tmp_path / "features").iterdir())) == 2
    again = json.loads(run("evaluate", bank, "late", "--data", photos, "--json").out)
    assert f"test accuracy {100 * again['accuracy']:.1f} %" in ran.out


def test_recomputing_changes_no_number(short, bank):
    short("plain", *LATE)
    short("less", *LATE, "--recompute")
    plain, less = (ot.Bank.open(bank).load(name) for name in ("plain", "less"))
    assert all(tensor.equal(delta(plain)[name]) for name, tensor in delta(less).items())


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (("--cache", 1), 1, "no frozen trunk to take features from: stem.adapter learns"),
        (("--cache", 1, "--stages", "late"), 1, "only 1.6% of the multiply-adds are before it"),
        (("--norms", "some"), 1, "norms='some': give 'all', 'placed' or 'none'"),
        (("--norms", "placed", "--adapter", "norm"), 1, "norm adapts no single layer"),
        (("--graphed", "--device", "cpu"), 1, "fit(graphed=True) on cpu with 1 process(es)"),
        (("--cache", -1), 2, "'--cache'"),
        (("--cache-folder", "x"), 2, "it is for --cache VIEWS"),
    ],
)
def test_what_does_not_fit_is_refused(run, photos, bank, options, status, says):
    ran = run("train", bank, "x", "--data", photos, "--epochs", 1, "--no-probe", *options)
    assert ran.status == status and says in ran.err.replace("\n", " ")
    assert run("verify", bank).status == 0
