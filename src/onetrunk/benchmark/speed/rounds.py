"""Rounds: contestants timed in turn, so that what slows the machine slows all of them.

A round runs every contestant once, in an order drawn by its number. A ratio is taken within its
round, against the reference of that round; medians and quartiles are of these ratios.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ledger import Ledger, digest_of

Call = Callable[[], object]


@dataclass(frozen=True)
class Contest:
    """What is timed against each other.

    Args:
        group: the group's name.
        title: backbone, pixels, batch.
        reference: the contestant that ratios are taken against.
        calls: contestant -> one repetition of its work.
        limits: contestant -> the least time that counting allows, as a share of the reference's.
        bytes: contestant -> bytes it holds at its peak, where they are counted.
        skipped: contestant -> why it does not run here.
    """

    group: str
    title: str
    reference: str
    calls: Mapping[str, Call]
    limits: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a contestant's time over the reference's, and its median seconds."""

    median: float
    low: float
    high: float
    seconds: float


def run_rounds(
    contest: Contest, n_rounds: int, ledger: Ledger, machine: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The records of a contest's rounds; those that the ledger has are not run again."""
    known, records = ledger.read(), []
    warm = False
    for number in range(n_rounds):
        what = {"group": contest.group, "title": contest.title, "round": number, **machine}
        key = digest_of({**what, "contestants": sorted(contest.calls)})
        if key not in known:
            if not warm:
                for call in contest.calls.values():
                    call()
                warm = True
            record = {**what, "key": key, "kind": "round", **_facts(contest)}
            record["seconds"] = _round(contest.calls, number)
            ledger.append(record)
            known[key] = record
        records.append(known[key])
    return records


def _facts(contest: Contest) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "reference": contest.reference,
        "limits": dict(contest.limits),
        "bytes": dict(contest.bytes),
        "skipped": dict(contest.skipped),
    }


def _round(calls: Mapping[str, Call], number: int) -> dict[str, float]:
    names = list(calls)
    random.Random(number).shuffle(names)
    seconds = {}
    for name in names:
        start = clock()
        calls[name]()
        seconds[name] = clock() - start
    return {name: seconds[name] for name in calls}


def clock() -> float:
    """Seconds: of the processor for one thread on the CPU, which other programs do not change."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def ratios(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Ratio]:
    """Contestant -> its ratio to the reference, over the rounds of one contest.

    >>> rounds = [{"reference": "a", "seconds": {"a": 2.0, "b": b}} for b in (1.0, 1.5, 1.0)]
    >>> ratios(rounds)["b"].median
    0.5
    """
    reference = rounds[0]["reference"]
    found = {}
    for name in rounds[0]["seconds"]:
        shares = [r["seconds"][name] / r["seconds"][reference] for r in rounds]
        low, _, high = statistics.quantiles(shares, n=4, method="inclusive")
        seconds = statistics.median(r["seconds"][name] for r in rounds)
        found[name] = Ratio(statistics.median(shares), low, high, seconds)
    return found
