"""One global budget spent over many sites: each unit goes where it buys the most for its price.

A site offers units in a fixed order (the singular directions of its matrix), each with a gain (the
energy it carries) and all at one price (the numbers it costs). Gains fall along a site, so taking
units in order of gain over price is the best spending but for the last unit that still fits.
"""

import heapq
from collections.abc import Mapping, Sequence


def spend(
    gains: Mapping[str, Sequence[float]], prices: Mapping[str, int], budget: int
) -> dict[str, int]:
    """How many units each site gets: site -> count, the sum of count x price within `budget`.

    Args:
        gains: site -> gains of its units, falling; units of no gain are never bought.
        prices: site -> price of one unit, above 0.
        budget: what may be spent in all.

    >>> spend({"a": [9.0, 4.0], "b": [5.0, 1.0]}, {"a": 2, "b": 1}, budget=4)
    {'a': 1, 'b': 2}
    """
    counts = dict.fromkeys(gains, 0)
    offers = [(-g[0] / prices[site], site) for site, g in gains.items() if len(g) and g[0] > 0]
    heapq.heapify(offers)
    while offers:
        _, site = heapq.heappop(offers)
        if prices[site] > budget:
            continue  # the site is closed: its later units cost the same
        budget -= prices[site]
        counts[site] += 1
        rest = gains[site][counts[site] :]
        if len(rest) and rest[0] > 0:
            heapq.heappush(offers, (-rest[0] / prices[site], site))
    return counts
