"""Transfer: accuracy against images a class, and the sentence that says who wins where."""

import statistics

import pytest

from onetrunk.benchmark.report import MethodLabel, read_rows
from onetrunk.benchmark.report.transfer import contests, curves, levels, mean_curves, sentence

METHODS = [
    MethodLabel("parallel", "Parallel", "adapters"),
    MethodLabel("norm", "Norm only", "adapters"),
    MethodLabel("full", "Fine-tuning", "reference"),
]


@pytest.fixture
def rows(row):
    """Parallel wins with 5 and 10 images a class, fine-tuning with all of them."""
    mean = {
        ("parallel", 5): 0.6, ("parallel", 10): 0.7, ("parallel", None): 0.8,
        ("norm", 5): 0.55, ("norm", 10): 0.6, ("norm", None): 0.65,
        ("full", 5): 0.5, ("full", 10): 0.699, ("full", None): 0.82,
    }  # fmt: skip
    shift = {("signs", 0): 0.01, ("signs", 1): -0.02, ("faces", 0): 0.02, ("faces", 1): 0.0}
    return [
        row(
            method, domain, seed, per_class=level, study="transfer",
            # what differs between domains differs between methods too: intervals have a width
            test_accuracy=round(value + noise * (1 if method == "parallel" else 0.9), 6),
        )
        for (method, level), value in mean.items()
        for (domain, seed), noise in shift.items()
    ]  # fmt: skip


def test_levels_ascend_and_all_images_come_last(rows):
    assert levels(read_rows(reversed(rows))) == [5, 10, None]


def test_a_curve_is_the_mean_over_seeds_and_the_mean_curve_that_over_domains(rows):
    found, means = curves(read_rows(rows)), mean_curves(read_rows(rows))
    for method in ("parallel", "norm", "full"):
        for level in (5, 10, None):
            of_domain = {}
            for row in rows:
                if (row["method"], row["per_class"]) == (method, level):
                    of_domain.setdefault(row["domain"], []).append(row["test_accuracy"])
            for domain, values in of_domain.items():
                assert found[method, domain, level].mean == pytest.approx(statistics.fmean(values))
            mean = statistics.fmean(statistics.fmean(values) for values in of_domain.values())
            assert means[method, level].accuracy.mean == pytest.approx(mean)
            assert means[method, level].n_domains == 2


def test_the_sentence_says_who_wins_where_by_how_much_and_how_surely(rows):
    assert sentence(read_rows(rows), METHODS) == (
        "Parallel is best with 5 and 10 images a class (by 10.0 and 0.1 points over Fine-tuning, "
        "clearly with 5 images a class); Fine-tuning is best with all images a class (by 2.0 "
        "points over Parallel, clearly). Clearly: the paired 95 % interval leaves out zero, "
        "of many some by chance."
    )


def test_a_method_that_lacks_cells_takes_no_part_and_is_named(rows):
    lucky = [
        row | {"test_accuracy": 0.99} if row["method"] == "norm" else row
        for row in rows
        if row["method"] != "norm" or row["domain"] == "signs"
    ]
    found = contests(read_rows(lucky))
    assert [contest.winner for contest in found] == ["parallel", "parallel", "full"]
    assert sentence(read_rows(lucky), METHODS).endswith(
        "Left out where cells are missing: Norm only."
    )


def test_a_probe_of_one_seed_on_all_images_is_compared_with_every_seed(rows):
    made = [dict(row, method="head") for row in rows if row["method"] == "parallel"]
    probe = [row | {"test_accuracy": 0.99} for row in made if row["seed"] == 0]
    found = {c.level: c for c in contests(read_rows([*rows, *probe]))}
    assert found[None].winner == "head" and found[None].incomplete == ()
    assert found[5].winner == "parallel" and found[5].incomplete == ("head",)


def test_methods_with_as_many_but_other_cells_are_not_compared(rows):
    lucky = [
        row | {"test_accuracy": 0.99} if row["method"] == "norm" else row
        for row in rows
        if row["method"] == "full" or row["domain"] == {"norm": "signs"}.get(row["method"], "faces")
    ]
    (names,) = {(c.winner, c.rival, c.incomplete) for c in contests(read_rows(lucky))[:1]}
    assert names == ("parallel", "full", ("norm",))


def test_where_fine_tuning_was_not_run_nothing_is_said(rows):
    assert sentence(read_rows(r for r in rows if r["method"] != "full"), METHODS) is None
    only = read_rows(r for r in rows if r["method"] != "full" or r["per_class"] == 5)
    assert [contest.level for contest in contests(only)] == [5]
