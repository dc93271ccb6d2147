"""One global budget spent over many sites, each where it buys the most energy for its numbers.

A site offers a menu: what each of its possible plans costs and what energy (of singular directions)
it keeps. Steps are taken in order of energy over price along the menus' upper convex hulls, where
they get ever worse, so that all but the last step is the best spending.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Menu:
    """What a site may become: what each entry costs in numbers, and the energy that it keeps."""

    prices: Floats
    energies: Floats


def spend(
    gains: Mapping[str, Sequence[float]], prices: Mapping[str, Sequence[int]], budget: int
) -> dict[str, int]:
    """How many units each site gets where a site's units are bought in order.

    Args:
        gains: site -> gain of each of its units; units of no gain are never bought.
        prices: site -> price of each, above 0.
        budget: what may be spent in all.

    >>> spend({"a": [9.0, 4.0], "b": [5.0, 1.0]}, {"a": [2, 2], "b": [1, 1]}, budget=4)
    {'a': 1, 'b': 2}
    """
    menus = {
        site: Menu(np.cumsum([0.0, *prices[site]]), np.cumsum([0.0, *own]))
        for site, own in gains.items()
    }
    chosen = choose(menus, budget)
    assert chosen is not None  # nothing costs nothing
    return chosen


def choose(menus: Mapping[str, Menu], budget: int) -> dict[str, int] | None:
    """The place in every site's menu that keeps the most energy; None where not even the cheapest
    entries fit into `budget`.

    Each site starts at its cheapest entry; then the step of the most energy for its numbers is
    taken, over all sites, along the upper convex hull of each menu, where steps get ever worse. A
    site whose next step does not fit goes on along the hull of what does.
    """
    hulls = {site: _hull(menu) for site, menu in menus.items()}
    at = dict.fromkeys(menus, 0)
    chosen = {site: hull[0] for site, hull in hulls.items()}
    budget -= sum(int(menus[site].prices[place]) for site, place in chosen.items())
    if budget < 0:
        return None
    steps = [_step(site, menus[site], hull, 0) for site, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, site = heapq.heappop(steps)
        menu, hull, here = menus[site], hulls[site], chosen[site]
        there = hull[at[site] + 1]
        price = int(menu.prices[there] - menu.prices[here])
        if price <= budget:
            at[site] += 1
            if at[site] + 1 < len(hull):
                heapq.heappush(steps, _step(site, menu, hull, at[site]))
            budget, chosen[site] = budget - price, there
        else:
            hulls[site] = hull = _hull(menu, menu.prices[here], menu.prices[here] + budget)
            at[site] = 0
            if len(hull) > 1:
                heapq.heappush(steps, _step(site, menu, hull, 0))
    return chosen


def _step(site: str, menu: Menu, hull: list[int], k: int) -> tuple[float, str]:
    gain = menu.energies[hull[k + 1]] - menu.energies[hull[k]]
    return -float(gain / (menu.prices[hull[k + 1]] - menu.prices[hull[k]])), site


def _hull(menu: Menu, least: float = -np.inf, most: float = np.inf) -> list[int]:
    """Places in the menu, of those prices, on the upper convex hull of energy over numbers, the
    cheapest first."""
    order = np.lexsort((-menu.energies, menu.prices))
    order = order[(menu.prices[order] >= least) & (menu.prices[order] <= most)]
    best = np.maximum.accumulate(menu.energies[order])
    better = np.flatnonzero(np.diff(best, prepend=-np.inf) > 0)
    hull: list[int] = []
    for place in order[better].tolist():
        while len(hull) > 1 and _slope(menu, hull[-2], hull[-1]) <= _slope(menu, hull[-1], place):
            hull.pop()
        hull.append(place)
    return hull


def _slope(menu: Menu, a: int, b: int) -> float:
    return float((menu.energies[b] - menu.energies[a]) / (menu.prices[b] - menu.prices[a]))
