"""Figures of a report against naive loops, on whole tables and on partial ones."""

import math
import statistics

import pytest

from onetrunk.benchmark.report import MethodLabel, read_rows
from onetrunk.benchmark.report.summary import (
    by_domain,
    interval,
    over_domains,
    paired,
    parameters,
    score,
    spread,
    summarise,
    t_quantile,
)

METHODS = [
    MethodLabel("parallel", "Parallel", "adapters"),
    MethodLabel("full", "Fine-tuning", "reference"),
]


@pytest.fixture
def partial(table):
    """Parallel lacks a domain and a seed of another; fine-tuning lacks a seed."""
    rows = table(["parallel", "full"])
    absent = {("parallel", "faces", s) for s in range(3)}
    absent |= {("parallel", "signs", 2), ("full", "flowers", 0)}
    return read_rows(r for r in rows if (r["method"], r["domain"], r["seed"]) not in absent)


def test_a_probe_on_all_images_is_compared_with_every_seed(table):
    rows = read_rows(table(["full"]) + table(["head"], seeds=[0]))
    found, baseline = of(rows, "head"), of(rows, "full")
    naive = [
        statistics.fmean(
            mine.test_accuracy - row.test_accuracy for row in baseline if row.domain == mine.domain
        )
        for mine in found
    ]
    against = paired(found, baseline)
    assert against.mean == pytest.approx(statistics.fmean(naive))
    assert (against.n_cells, against.n_domains) == (12, 4)
    assert against.wins + against.losses == 12
    back = paired(baseline, found)
    assert back.mean == pytest.approx(-against.mean) and back.n_cells == 12
    assert score(found, baseline).by_domain.keys() == {row.domain for row in found}


def of(rows, method):
    return [row for row in rows if row.method == method]


def naive_common(rows):
    """{domain: [(parallel, full), ...]} over the seeds of both."""
    found = {}
    for mine in of(rows, "parallel"):
        for theirs in of(rows, "full"):
            if (mine.domain, mine.seed) == (theirs.domain, theirs.seed):
                found.setdefault(mine.domain, []).append((mine.test_accuracy, theirs.test_accuracy))
    return found


def test_mean_and_spread_by_domain_are_those_of_the_statistics_module(partial):
    for (method, domain), found in by_domain(partial).items():
        values = [r.test_accuracy for r in of(partial, method) if r.domain == domain]
        assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert found.deviation == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert found.n == len(values)


def test_the_spread_of_the_mean_is_over_seeds_that_have_nearly_every_domain(partial):
    found = over_domains(of(partial, "full"))  # seed 0 has no flowers
    means = []
    for seed in (1, 2):
        means.append(
            statistics.fmean(r.test_accuracy for r in of(partial, "full") if r.seed == seed)
        )
    assert found.n == 2
    assert found.deviation == pytest.approx(statistics.stdev(means), abs=1e-12)


def test_a_seed_that_lacks_few_domains_counts_in_the_spread_over_the_others(table):
    rows = read_rows(table(["full"], [f"d{n:02}" for n in range(12)], [0, 1, 2]))
    lacking = [row for row in rows if (row.domain, row.seed) != ("d03", 1)]
    of_seed = [
        statistics.fmean(r.test_accuracy for r in rows if r.seed == seed and r.domain != "d03")
        for seed in (0, 1, 2)
    ]
    assert over_domains(lacking).n == 3
    assert over_domains(lacking).deviation == pytest.approx(statistics.stdev(of_seed), abs=1e-12)
    fewer = [row for row in lacking if (row.domain, row.seed) != ("d04", 1)]
    assert over_domains(fewer).n == 2
    nowhere = [row for row in rows if int(row.domain[1:]) != row.seed]
    assert over_domains(nowhere).n == 3
    diagonal = read_rows(table(["full"], [f"d{n:02}" for n in range(10)], list(range(10))))
    empty = over_domains([row for row in diagonal if int(row.domain[1:]) != row.seed])
    assert empty.deviation is None and empty.n == 0


def test_the_mean_weighs_every_domain_alike_however_many_seeds_it_has(partial):
    domains = {}
    for row in of(partial, "parallel"):
        domains.setdefault(row.domain, []).append(row.test_accuracy)
    expected = sum(sum(values) / len(values) for values in domains.values()) / len(domains)
    assert over_domains(of(partial, "parallel")).mean == pytest.approx(expected, abs=1e-12)


def test_the_score_is_the_naive_sum_over_common_cells(partial):
    total = 0.0
    for pairs in naive_common(partial).values():
        error = 1 - sum(mine for mine, _ in pairs) / len(pairs)
        allowed = 2 * (1 - sum(theirs for _, theirs in pairs) / len(pairs))
        total += 1000 * max(0, (allowed - error) / allowed) ** 2
    found = score(of(partial, "parallel"), of(partial, "full"))
    assert found.total == pytest.approx(total, abs=1e-9)
    assert set(found.by_domain) == {"flowers", "signs", "digits"}
    assert found.reference == 750


def test_fine_tuning_scores_250_a_domain(partial):
    found = score(of(partial, "full"), of(partial, "full"))
    assert found.by_domain == pytest.approx(dict.fromkeys(found.by_domain, 250.0))


def test_an_error_above_twice_that_of_fine_tuning_scores_nothing(row):
    mine = read_rows([row("parallel", "signs", 0, test_accuracy=0.1)])
    theirs = read_rows([row("full", "signs", 0, test_accuracy=0.9)])
    assert score(mine, theirs).total == 0


def test_a_domain_without_error_of_fine_tuning_counts_in_nobodys_score(row):
    mine = read_rows([row("parallel", d, 0, test_accuracy=0.9) for d in ("signs", "faces")])
    theirs = read_rows(
        [row("full", "signs", 0, test_accuracy=1.0), row("full", "faces", 0, test_accuracy=0.9)]
    )
    found = score(mine, theirs)
    assert found.perfect == ("signs",)
    assert found.by_domain == pytest.approx({"faces": 250.0})


def test_paired_differences_are_the_naive_ones(partial):
    pairs = naive_common(partial)
    means = [statistics.fmean(a - b for a, b in group) for group in pairs.values()]
    found = paired(of(partial, "parallel"), of(partial, "full"))
    assert found.mean == pytest.approx(statistics.fmean(means), abs=1e-12)
    half = 4.302653 * statistics.stdev(means) / math.sqrt(3)  # t of 2 degrees of freedom
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), abs=1e-6)
    cells = [(a, b) for group in pairs.values() for a, b in group]
    assert found.wins == sum(a > b for a, b in cells)
    assert found.losses == sum(a < b for a, b in cells)
    assert (found.n_cells, found.n_domains) == (len(cells), 3)


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 15, 47, 500])
def test_the_t_quantile_is_that_of_scipy(degrees):
    scipy_stats = pytest.importorskip("scipy.stats")
    assert t_quantile(degrees) == pytest.approx(scipy_stats.t.ppf(0.975, degrees), rel=1e-5)


def test_without_a_common_cell_nothing_is_compared(row):
    mine = read_rows([row("parallel", "signs", 0)])
    theirs = read_rows([row("full", "signs", 1), row("full", "faces", 0)])
    assert paired(mine, theirs) is None
    assert score(mine, theirs) is None


def test_equal_differences_have_no_interval():
    assert interval([0.01, 0.01]) is None and interval([0.01]) is None
    low, high = interval([0.01, 0.02])
    assert low < 0.015 < high


def test_one_seed_of_one_domain_has_no_spread_and_no_interval(row):
    rows = read_rows([row("parallel", "signs", 0), row("full", "signs", 0)])
    mine, _ = summarise(rows, METHODS)
    assert mine.accuracy.deviation is None
    assert mine.paired.interval is None and not mine.paired.clear


def test_parameters_count_the_backbone_and_a_shared_basis_once(row):
    rows = read_rows(
        row("joint", domain, seed, numbers=10_000, shared_numbers=50_000)
        for domain in ("signs", "faces", "digits")
        for seed in range(2)
    )
    found = parameters(rows)
    assert found.multiple == pytest.approx((1_000_000 + 3 * 10_000 + 50_000) / 1_000_000)
    assert found.share == pytest.approx((3 * 10_000 + 50_000) / 1_000_000 / 3)


def test_methods_come_in_the_order_asked_for_and_fine_tuning_is_not_paired_with_itself(partial):
    mine, theirs = summarise(partial, METHODS)
    assert (mine.method.name, theirs.method.name) == ("parallel", "full")
    assert theirs.paired is None and theirs.score is not None
    assert mine.domains == ("digits", "flowers", "signs")
    assert mine.seconds == pytest.approx(60.5 * mine.n_cells)


def test_a_study_without_fine_tuning_has_means_and_no_score(row):
    (only,) = summarise(read_rows([row("parallel", "signs", 0)]), METHODS)
    assert only.score is None and only.paired is None


def test_equal_values_have_no_spread():
    assert spread([0.5, 0.5]).deviation == 0
