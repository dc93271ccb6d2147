"""allocate, and train with a plan: as a user types them."""

import builtins
import json

import pytest

import onetrunk as ot
from onetrunk.cli import allocating, training

BUDGET = "5000"


def plan_in(path):
    return {s["site"]: s["family"] for s in json.loads(path.read_text())["shares"] if s["family"]}


def test_a_budget_becomes_a_plan_a_domain_and_a_map(run, photos, bank, tmp_path):
    out, picture = tmp_path / "plan.json", tmp_path / "map.png"
    words = ("allocate", bank, "lean", "--data", photos, "--budget", BUDGET, "--epochs", 1)
    ran = run(*words, "--norms", "none", "--out", out, "--map", picture)
    assert ran.status == 0, ran.err
    assert "of 5,000 numbers at" in ran.out and "█" in ran.out and "linear probe" in ran.out
    model = ot.Bank.open(bank).load("lean")
    assert {site: str(family) for site, family in model.domain.plan.items()} == plan_in(out)
    assert 0.9 * 5000 < ot.cost(model).adapters <= 5000
    assert ot.cost(model).norms == 0
    assert ot.Bank.open(bank).domains["lean"].provenance["allocation"] == "curvature, 5000"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("by", ["gradient", "trained"])
def test_only_the_plan_leaves_the_bank_alone(run, photos, bank, by):
    before = ot.Bank.open(bank).domains["stripes"].digest
    words = ("allocate", bank, "stripes", "--data", photos, "--budget", "2%", "--epochs", 1)
    found = json.loads(run(*words, "--by", by, "--plan-only", "--json").out)
    assert found["how"] == by and 0 < found["numbers"] <= found["budget"]
    assert "accuracy" not in found and len(found["shares"]) == 25
    assert ot.Bank.open(bank).domains["stripes"].digest == before


def test_whole_matrices_are_trained_from_the_probes_head_as_a_domain_is(
    run, photos, bank, monkeypatch
):
    heads, probed = [], []
    fit, probe = allocating.fit, allocating.probe

    def head_of(model):
        (name,) = model.domain.head
        return model.get_submodule(name).weight.detach().clone()

    def watched(model, *args, **options):
        heads.append(head_of(model))
        return fit(model, *args, **options)

    monkeypatch.setattr(training, "held_norms", lambda *_: [True])  # the backbone is not trained
    monkeypatch.setattr(allocating, "fit", watched)
    monkeypatch.setattr(allocating, "probe", lambda *args: probed.append(probe(*args)) or probed[0])
    words = ("allocate", bank, "stripes", "--data", photos, "--budget", "2%", "--epochs", 1)
    assert run(*words, "--by", "trained", "--plan-only").status == 0
    assert heads[0].equal(head_of(probed[0]))


def test_a_plan_serves_the_next_domain_from_its_file_or_from_the_bank(run, photos, bank, tmp_path):
    out = tmp_path / "plan.json"
    source = ("--data", photos, "--epochs", 1)
    asked = ("--budget", BUDGET, "--layers", "auto", "--plan-only", "--out", out)
    assert run("allocate", bank, "first", *source, *asked).status == 0
    for name, option in (("second", ("--plan", out)), ("third", ("--plan-of", "second"))):
        assert run("train", bank, name, *source, "--no-probe", *option).status == 0
        plan = ot.Bank.open(bank).load(name).domain.plan
        assert {site: str(family) for site, family in plan.items()} == plan_in(out)


def test_a_plan_by_hand_is_a_file_of_globs(run, photos, bank, tmp_path):
    out = tmp_path / "hand.json"
    out.write_text('{"stages.2.*": "lowrank(rank=2)", "stem": "parallel"}')
    words = ("train", bank, "hand", "--data", photos, "--epochs", 1, "--no-probe", "--plan", out)
    found = json.loads(run(*words, "--json").out)
    assert found["sites"] == 9 and found["family"] == "lowrank(rank=2) + parallel"


FILES = {
    "text.json": "no json",
    "list.json": "[1]",
    "layer.json": '{"stam": "parallel"}',
    "head.json": '{"stem": "head"}',
    "family.json": '{"stem": "lora"}',
    "glob.json": '{"nolayer*": "parallel"}',
    "half.json": '{"allocation": 1}',
    "other.json": json.dumps(
        {"allocation": 1, "backbone": "0" * 64, "how": "uniform", "budget": 1, "shares": []}
    ),
}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("allocate", "--budget", "lots"), "cannot read the budget 'lots'"),
        (("allocate", "--budget", "3"), "the smallest plan is"),
        (("allocate", "--budget", "2%", "--pattern", "layer9"), "none of the backbone's 25"),
        (("allocate", "--budget", "2%", "--plan-only", "--out", "no/p.json"), "cannot be written"),
        (("allocate", "--budget", "9" * 400), "the budget 99999999999999999999... is beyond"),
        (("allocate", "--budget", "9" * 308 + "GB"), "the budget 99999999999999999999... is"),
        (("allocate", "--budget", "2%", "--map", "a.xyz"), "a.xyz ends in '.xyz', and the ending"),
        (("allocate", "--budget", "2%", "--map", "map"), "for example map.png"),
        (("train", "--plan", "head.json"), "the plan puts head at 'stem', and that is no family"),
        (("train", "--plan", "none.json"), "the plan none.json cannot be read"),
        (("train", "--plan", "text.json"), "text.json is no JSON file. Write a plan with"),
        (("train", "--plan", "list.json"), "list.json is no plan: write"),
        (("train", "--plan", "layer.json"), "Did you mean 'stem'?"),
        (("train", "--plan", "family.json"), "unknown adapter family 'lora'"),
        (("train", "--plan", "half.json"), "no allocation as it was written"),
        (("train", "--plan", "other.json"), "made for backbone 000000000000"),
        (("train", "--plan", "glob.json"), "glob.json: unknown layer 'nolayer*': none of the 25"),
        (("train", "--plan-of", "strips"), "no domain 'strips'. Did you mean 'stripes'?"),
        (("train", "--plan-of", "headonly"), "domain 'headonly' has no plan to reuse: it is head"),
    ],
)
def test_bad_input_gets_one_line_and_status_1(
    run, photos, bank, tmp_path, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    if "headonly" in words:
        opened = ot.Bank.open(bank)
        opened.add("headonly", ot.attach(opened.backbone, ot.Head(), ["a", "b"]))
    verb, *options = words
    ran = run(verb, bank, "x", "--data", photos, "--epochs", 1, *options)
    assert ran.status == 1 and says in ran.err
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert "x" not in ot.Bank.open(bank).domains


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("allocate", "--budget", "2%", "--by", "magic"), "none of gradient, curvature, trained"),
        (("allocate",), "--budget"),
        (("train", "--plan", "a.json", "--adapter", "norm"), "exclude each other"),
        (("train", "--plan", "a.json", "--stages", "late"), "a plan says which layers: leave"),
    ],
)
def test_wrong_usage_gets_status_2(run, photos, bank, words, says):
    verb, *options = words
    ran = run(verb, bank, "x", "--data", photos, *options)
    assert ran.status == 2 and says in ran.err


def test_a_map_without_matplotlib_is_refused_before_any_work(run, photos, bank, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    ran = run("allocate", bank, "x", "--data", photos, "--budget", "2%", "--map", "map.png")
    assert ran.status == 1 and "needs matplotlib, which is not installed: pip install" in ran.err
    assert "images" not in ran.out
