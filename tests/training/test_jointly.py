"""jointly: trainings take turns, and a basis is trained by all of its domains."""

from types import SimpleNamespace

import pytest
import torch

import onetrunk as ot
import onetrunk.training.jointly as jointly
from onetrunk.core.compress import compress
from onetrunk.core.rebuild import with_frozen_basis, with_trainable_basis
from onetrunk.errors import TrainingError
from onetrunk.training.evaluate import evaluate
from onetrunk.training.fit import Step, fit
from onetrunk.training.jointly import fit_jointly, interleave
from onetrunk.training.optimizer import kinds

RECIPE = ot.Recipe(epochs=2, batch_size=8)


def steps(n, closed=None):
    try:
        for k in range(n):
            yield Step(k + 1, n, 1, 0.0, 0.0)
    finally:
        if closed is not None:
            closed.append(n)


@pytest.fixture
def compressed(make_model, make_net):
    backbone = make_net()
    families = {seed: ot.Parallel(init="released") for seed in range(2)}
    models = {
        f"d{seed}": make_model(family, backbone=backbone, seed=seed).eval()
        for seed, family in families.items()
    }
    return compress(models, rank_fraction=0.5)


@pytest.fixture
def data(make_tensors):
    return {f"d{seed}": make_tensors(n=24, seed=seed) for seed in range(2)}


def test_every_training_gets_every_step_and_all_end_together() -> None:
    found = [name for name, _ in interleave({"a": steps(3), "b": steps(6), "c": steps(3)})]
    assert {name: found.count(name) for name in "abc"} == {"a": 3, "b": 6, "c": 3}
    assert set(found[-4:]) == {"a", "b", "c"}
    equal = [name for name, _ in interleave({"a": steps(2), "b": steps(2)})]
    assert equal == ["a", "b", "a", "b"]
    assert list(interleave({"a": steps(0)})) == []


def test_leaving_the_loop_closes_every_training() -> None:
    closed: list[int] = []
    for _ in (turns := interleave({"a": steps(3, closed), "b": steps(4, closed)})):
        next(turns)
        break
    turns.close()
    assert sorted(closed) == [3, 4]


def test_turns_change_nothing_where_nothing_is_shared(make_model, make_net, data, same, bits):
    backbone = make_net()
    alone, by_turns = (
        {n: make_model(ot.Parallel(), backbone=backbone, seed=s) for s, n in enumerate(data)}
        for _ in range(2)
    )
    for name, model in alone.items():
        list(fit(model, data[name], RECIPE, device="cpu"))
    list(fit_jointly(by_turns, data, RECIPE, device="cpu"))
    assert all(same(bits(alone[n]), bits(by_turns[n])) for n in data)


def test_tuning_the_own_factors_moves_neither_the_basis_nor_the_others(
    compressed, data, same, bits
):
    other, basis = bits(compressed["d1"]), compressed.basis.fingerprint
    own = bits(compressed["d0"])
    list(fit(compressed["d0"], data["d0"], RECIPE, val=data["d0"], device="cpu"))
    assert same(bits(compressed["d1"]), other) and not same(bits(compressed["d0"]), own)
    assert compressed.basis.taken_now() == basis


def test_joint_tuning_moves_the_basis_for_all_and_the_given_networks_stay(
    compressed, data, same, bits
):
    before = {n: bits(m) for n, m in compressed.items()}
    loose = with_trainable_basis(compressed)
    losses: dict[str, list[float]] = {n: [] for n in loose}
    for name, step in fit_jointly(loose, data, ot.Recipe(epochs=8, batch_size=8), device="cpu"):
        losses[name].append(step.loss)
    tuned = with_frozen_basis(loose)
    assert all(same(bits(m), before[n]) for n, m in compressed.items())
    assert all(sum(found[-3:]) < sum(found[:3]) for found in losses.values())
    assert tuned["d0"].domain.basis is tuned["d1"].domain.basis
    assert tuned["d0"].domain.basis != compressed.basis
    for name, model in tuned.items():
        assert evaluate(model, data[name]).accuracy == evaluate(loose[name], data[name]).accuracy


def test_what_would_go_back_is_refused_over_a_trained_basis(compressed, data, tmp_path):
    loose = with_trainable_basis(compressed)["d0"]
    with pytest.raises(TrainingError, match="fit with val on a network whose basis is trained too"):
        next(iter(fit(loose, data["d0"], RECIPE, val=data["d0"])))
    with pytest.raises(TrainingError, match=r"fit with checkpoint .* Leave checkpoint out"):
        next(iter(fit(loose, data["d0"], RECIPE, checkpoint=tmp_path / "c")))


def test_a_domain_without_data_is_refused(compressed, data):
    with pytest.raises(TrainingError, match="domain 'd1' has no training data"):
        next(iter(fit_jointly(compressed, {"d0": data["d0"]}, RECIPE)))


@pytest.mark.parametrize("better", [None, 0, 1])
def test_a_basis_is_tuned_where_that_helps_on_validation_images(
    compressed, data, monkeypatch, better
):
    asked = []

    def evaluated(model, images, device):
        asked.append(model.domain.basis)
        accuracy = 0.9 if len(asked) in range(3 + 2 * (better or 0), 5 + 2 * (better or 0)) else 0.5
        return SimpleNamespace(accuracy=accuracy if better is not None else 0.5)

    monkeypatch.setattr(jointly, "evaluate", evaluated)
    shown = []
    tuned = jointly.tune_basis(
        compressed.models, data, data, RECIPE, device="cpu", progress=lambda *n: shown.append(n)
    )
    bases = [asked[0], asked[2], asked[4]]
    assert len(asked) == 6 and len(set(map(str, bases))) == 3
    expected = bases[0] if better is None else bases[1 + better]
    assert {model.domain.basis for model in tuned.values()} == {expected}
    assert not jointly.tune_basis({}, {}, {})
    total = 2 * sum(RECIPE.n_steps(len(d)) for d in data.values())
    assert shown[-1] == (total, total)


def test_a_rate_after_which_nothing_is_finite_leaves_the_basis_as_it_is(
    compressed, data, monkeypatch
):
    real = jointly.with_frozen_basis

    def broken(models):
        made = real(models)
        with torch.no_grad():
            list(made["d0"].parameters())[-1].fill_(torch.nan)  # the head
        return made

    monkeypatch.setattr(jointly, "with_frozen_basis", broken)
    tuned = jointly.tune_basis(compressed.models, data, data, RECIPE, device="cpu")
    assert {model.domain.basis for model in tuned.values()} == {compressed.basis}


def test_a_basis_is_tuned_slowly_and_the_given_networks_stay(compressed, data, monkeypatch, bits):
    before, recipes = {n: bits(m) for n, m in compressed.items()}, []
    fit_jointly = jointly.fit_jointly

    def watched(models, train, recipe, *, device):
        recipes.append(recipe["d0"])
        return fit_jointly(models, train, recipe, device=device)

    monkeypatch.setattr(jointly, "fit_jointly", watched)
    jointly.tune_basis(compressed.models, data, data, RECIPE, device="cpu")
    assert [r.lr / RECIPE.lr for r in recipes] == pytest.approx([0.1, 0.5])
    assert [r.lr_full / RECIPE.lr_full for r in recipes] == pytest.approx([0.1, 0.5])
    assert not any(n.endswith("right_ri") for m in compressed.values() for n in kinds(m))
    loose = with_trainable_basis(compressed)["d0"]
    assert {k for n, k in kinds(loose).items() if n.endswith("right_ri")} == {"inner"}
    assert {k for n, k in kinds(loose).items() if n.endswith(".g")} == {"adapter"}
    after = {n: bits(m) for n, m in compressed.items()}
    assert all(torch.equal(after[n][k], before[n][k]) for n in before for k in before[n])


def test_what_a_basis_needs_is_refused_before_the_work(compressed, data, make_model, make_net):
    with pytest.raises(TrainingError, match="'d1' has no validation data, which says whether"):
        jointly.tune_basis(compressed.models, data, {"d0": data["d0"]})
    with pytest.raises(TrainingError, match="'d1' has no training data"):
        jointly.tune_basis(compressed.models, {"d0": data["d0"]}, data)
    with pytest.raises(TrainingError, match="'d0' has no recipe"):
        jointly.tune_basis(compressed.models, data, data, {"d1": RECIPE})
    alone = {"d0": make_model(ot.Parallel(), backbone=make_net())}
    assert jointly.tune_basis(alone, data, data) == alone


def test_every_domain_may_have_a_recipe_of_its_own_and_none_is_left_without(compressed, data):
    recipes = {name: ot.Recipe(epochs=1 + n) for n, name in enumerate(data)}
    steps = [name for name, _ in fit_jointly(compressed, data, recipes, device="cpu")]
    short, *_, long = data
    assert steps.count(long) > steps.count(short)
    with pytest.raises(TrainingError, match="domain 'd0' has no recipe"):
        next(iter(fit_jointly(compressed, data, {"d1": RECIPE})))


def test_a_checkpoint_over_another_basis_does_not_fit(compressed, make_model, data, tmp_path):
    file = tmp_path / "tuning"
    for _ in fit(compressed["d0"], data["d0"], RECIPE, checkpoint=file, device="cpu"):
        break
    loose = with_trainable_basis(compressed)
    with torch.no_grad():
        for parameter in loose["d0"].parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                parameter.add_(0.1)
    moved = with_frozen_basis(loose)
    with pytest.raises(TrainingError, match="basis"):
        next(iter(fit(moved["d0"], data["d0"], RECIPE, checkpoint=file, device="cpu")))
