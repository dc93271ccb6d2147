"""The decathlon score, Rebuffi, Bilen and Vedaldi, NIPS 2017:

    S = sum over domains of 1000 (max(0, Emax - E) / Emax)^2,  E = 1 - accuracy

with Emax twice the test error of the challenge's own fine-tuned networks, so that those score 250 a
domain and 2500 in all. The exponent rewards the last errors: near 0.993 on gtsrb, 0.001 of accuracy
is worth 35.
"""

from collections.abc import Iterable, Mapping

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


def _points(name: str, accuracy: float) -> float:
    number = isinstance(accuracy, int | float) and not isinstance(accuracy, bool)
    if not number or not 0 <= accuracy <= 1:
        raise DataError(
            f"accuracy {accuracy!r} of {name!r}: an accuracy is a number from 0 to 1."
            + (_in_per_cent(accuracy) if number else "")
        )
    error = 1 - accuracy
    return 1000 * (max(0.0, E_MAX[name] - error) / E_MAX[name]) ** 2


def _in_per_cent(accuracy: float) -> str:
    if not 1 < accuracy <= 100:
        return ""
    return f" If it is in per cent, divide by 100: {accuracy / 100:g}."
