"""spend: never above the budget, falling gains taken in order, as good as every other spending."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onetrunk.core.budget import spend

FALLING = st.lists(st.integers(1, 50), min_size=1, max_size=4).map(lambda g: sorted(g)[::-1])


def gained(gains, counts):
    return sum(sum(gains[site][:n]) for site, n in counts.items())


@given(st.lists(FALLING, min_size=1, max_size=4), st.integers(0, 20))
def test_at_equal_prices_nothing_buys_more(lists, budget):
    gains = {f"s{k}": g for k, g in enumerate(lists)}
    prices = {site: [2] * len(own) for site, own in gains.items()}
    counts = spend(gains, prices, budget)
    assert sum(counts.values()) * 2 <= budget
    every = itertools.product(*(range(len(g) + 1) for g in gains.values()))
    affordable = (dict(zip(gains, c, strict=True)) for c in every if sum(c) * 2 <= budget)
    assert gained(gains, counts) == max(gained(gains, c) for c in affordable)


@given(st.lists(st.tuples(FALLING, st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 60))
def test_it_stays_within_the_budget_and_leaves_nothing_that_fits(sites, budget):
    gains = {f"s{k}": g for k, (g, _) in enumerate(sites)}
    prices = {f"s{k}": price for k, (_, price) in enumerate(sites)}
    counts = spend(gains, {s: [prices[s]] * len(own) for s, own in gains.items()}, budget)
    left = budget - sum(prices[site] * n for site, n in counts.items())
    assert left >= 0
    assert all(prices[s] > left for s, n in counts.items() if n < len(gains[s]))


def test_units_without_gain_are_not_bought():
    assert spend({"a": [3.0, 0.0], "b": [0.0]}, {"a": [1, 1], "b": [1]}, 10) == {"a": 1, "b": 0}


@pytest.mark.parametrize("budget", [0, 1])
def test_a_budget_below_the_smallest_price_buys_nothing(budget):
    assert spend({"a": [1.0]}, {"a": [2]}, budget) == {"a": 0}
