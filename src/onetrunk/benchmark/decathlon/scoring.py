"""The decathlon score, Rebuffi, Bilen and Vedaldi, NIPS 2017:

    S = sum over domains of 1000 (max(0, Emax - E) / Emax)^2,  E = 1 - accuracy

with Emax twice the test error of the challenge's own fine-tuned networks, so that those score 250 a
domain and 2500 in all. The exponent rewards the last errors: near 0.993 on gtsrb, 0.001 of accuracy
is worth 35.
"""

import math
from collections.abc import Iterable, Mapping
from numbers import Real

from ...errors import DataError
from .domains import DOMAINS, E_MAX, checked_names

Accuracies = Mapping[str, float] | Iterable[tuple[str, float]]


def score(accuracies: Accuracies) -> float:
    """S, from 0 to 10000, of test accuracies in [0, 1] on all ten domains.

    Args:
        accuracies: official name -> accuracy, or (name, accuracy) pairs.

    Raises:
        DataError: for a name that is unknown, missing or twice, or an accuracy outside [0, 1].

    >>> round(score({name: domain.reference for name, domain in DOMAINS.items()}))
    2500
    """
    found = points(accuracies)
    missing = [name for name in DOMAINS if name not in found]
    if missing:
        raise DataError(
            f"the score needs all ten domains, and {len(missing)} have no accuracy: "
            f"{', '.join(missing)}. For some of the ten, use points(...)."
        )
    return sum(found.values())


def points(accuracies: Accuracies) -> dict[str, float]:
    """What each of these domains adds to S, from 0 to 1000, in the order given.

    Raises:
        DataError: for a name that is unknown or twice, or an accuracy outside [0, 1].

    >>> {name: round(value) for name, value in points({"aircraft": 0.6421, "svhn": 0.9654}).items()}
    {'aircraft': 301, 'svhn': 249}
    """
    pairs = list(accuracies.items() if isinstance(accuracies, Mapping) else accuracies)
    checked_names(name for name, _ in pairs)
    return {name: _points(name, accuracy) for name, accuracy in pairs}


def _points(name: str, accuracy: object) -> float:
    known = _number(accuracy)
    if not 0 <= known <= 1:
        per_cent = f" If it is in per cent, divide by 100: {known / 100:g}." if known > 1 else ""
        raise DataError(
            f"accuracy {accuracy!r} of {name!r}: an accuracy is a number from 0 to 1."
            + (per_cent if known <= 100 else "")
        )
    error = 1 - known
    return 1000 * (max(0.0, E_MAX[name] - error) / E_MAX[name]) ** 2


def _number(value: object) -> float:
    """A real number, NumPy's too, as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value)
