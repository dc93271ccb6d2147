"""transfer: accuracy against images a class, and a sentence a backbone that says who wins where."""

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import MethodLabel, Row
from .summary import (
    REFERENCE,
    Paired,
    Spread,
    common,
    grouped,
    over_domains,
    paired,
    spread,
)

Level = int | None  # images a class; None: all of them


@dataclass(frozen=True)
class Point:
    """A method at one number of images a class: mean over domains, and how many domains it has."""

    accuracy: Spread
    n_domains: int


@dataclass(frozen=True)
class Contest:
    """Who is best with `level` images a class, and by how much over or under fine-tuning.

    Args:
        winner: a method's name, the reference's own where no other is above it.
        rival: the other side of `difference`: the reference, or the best of the others.
        difference: winner less rival, in [0, 1].
        incomplete: methods left out, because they lack cells that others have.
    """

    level: Level
    winner: str
    rival: str
    difference: Paired
    incomplete: tuple[str, ...]


def levels(rows: Sequence[Row]) -> list[Level]:
    """The numbers of images a class, ascending, None (all images) last."""
    found = {row.per_class for row in rows}
    return sorted(found, key=lambda level: (level is None, level or 0))


def curves(rows: Sequence[Row]) -> dict[tuple[str, str, Level], Spread]:
    """Test accuracy by (method, domain, images a class) over seeds."""
    groups = grouped(rows, lambda row: (row.method, row.domain, row.per_class))
    return {key: spread([row.test_accuracy for row in group]) for key, group in groups.items()}


def mean_curves(rows: Sequence[Row]) -> dict[tuple[str, Level], Point]:
    """Mean over domains by (method, images a class), each over the domains that it has."""
    groups = grouped(rows, lambda row: (row.method, row.per_class))
    return {
        key: Point(over_domains(group), len({row.domain for row in group}))
        for key, group in groups.items()
    }


def contests(rows: Sequence[Row], reference: str = REFERENCE) -> list[Contest]:
    """The winner at each number of images a class at which fine-tuning and another method are.

    Only methods with the most cells in common with fine-tuning take part: a mean over fewer
    domains may be higher because the hard ones are missing.
    """
    of_level = grouped(rows, lambda row: row.per_class)
    found = (_contest(level, of_level[level], reference) for level in levels(rows))
    return [contest for contest in found if contest is not None]


def sentence(
    rows: Sequence[Row], methods: Sequence[MethodLabel], reference: str = REFERENCE
) -> str | None:
    """Says who wins where on one backbone; None where there is nothing to compare.

    "Parallel is best with 5 and 10 images a class (by 3.1 and 0.8 points over Fine-tuning, clearly
    with 5 images a class); Fine-tuning is best with all images a class (by 0.4 points over
    Parallel, not clearly)."
    """
    found = contests(rows, reference)
    if not found:
        return None
    labels = {method.name: method.label for method in methods}
    runs: list[list[Contest]] = []
    for contest in found:
        if runs and (runs[-1][0].winner, runs[-1][0].rival) == (contest.winner, contest.rival):
            runs[-1].append(contest)
        else:
            runs.append([contest])
    text = "; ".join(_run(run, labels) for run in runs) + "."
    left_out = sorted({labels.get(m, m) for contest in found for m in contest.incomplete})
    if any(contest.difference.clear for contest in found):
        text += " Clearly: the paired 95 % interval leaves out zero, of many some by chance."
    if left_out:
        text += f" Left out where cells are missing: {_listed(left_out)}."
    return text


def _contest(level: Level, rows: Sequence[Row], reference: str) -> Contest | None:
    of_method = grouped(rows, lambda row: row.method)
    baseline = of_method.pop(reference, [])
    cells = {
        name: frozenset((other.domain, other.seed) for _, other in common(group, baseline))
        for name, group in of_method.items()
    }
    most = max(cells.values(), key=len, default=frozenset())
    if not most:
        return None
    whole = [name for name, found in cells.items() if found == most]
    against = {name: paired(of_method[name], baseline) for name in whole}
    found = {name: difference for name, difference in against.items() if difference is not None}
    best = max(found, key=lambda name: found[name].mean)
    incomplete = tuple(name for name in of_method if name not in whole)
    if found[best].mean > 0:
        return Contest(level, best, reference, found[best], incomplete)
    return Contest(level, reference, best, _reversed(found[best]), incomplete)


def _reversed(found: Paired) -> Paired:
    interval = found.interval and (-found.interval[1], -found.interval[0])
    return Paired(
        -found.mean, interval, found.losses, found.wins, found.n_cells, found.n_domains
    )  # fmt: skip


def _run(run: Sequence[Contest], labels: dict[str, str]) -> str:
    winner, rival = (labels.get(name, name) for name in (run[0].winner, run[0].rival))
    margins = _listed([f"{100 * contest.difference.mean:.1f}" for contest in run])
    clear = [contest.level for contest in run if contest.difference.clear]
    if not clear:
        clearly = ", nowhere clearly" if len(run) > 1 else ", not clearly"
    elif len(clear) == len(run):
        clearly = ", clearly"
    else:
        clearly = f", clearly {_images(clear)}"
    where = _images([contest.level for contest in run])
    return f"{winner} is best {where} (by {margins} points over {rival}{clearly})"


def _images(found: Sequence[Level]) -> str:
    """`[5, 10, None]` as `with 5, 10 and all images a class`."""
    names = ["all" if level is None else str(level) for level in found]
    return f"with {_listed(names)} images a class"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
