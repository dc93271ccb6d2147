"""summary: the figures of a study, from its rows; pure functions, numpy only.

Every figure works on a partial table. A comparison is made over the cells that both sides have, and
carries how many those are. A spread is the standard deviation over seeds (n - 1), and absent where
there is one.

Score (Rebuffi et al., NIPS 2017): S = sum over domains of 1000 (max(0, Emax - E) / Emax)^2, where
Emax is twice the error of fine-tuning, which so scores 250 a domain.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .rows import MethodLabel, Row

PROBE = "head"  # the linear probe, whose training on all images no seed changes
REFERENCE = "full"  # fine-tuning: what the score and the differences are measured against
MOST = 0.9  # of the domains, that a seed has to have to count in a spread of means
Item = TypeVar("Item")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Spread:
    """A mean over n seeds and their standard deviation, None for one seed."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class Score:
    """S, domain by domain; `perfect` names the domains that fine-tuning leaves no error in.

    Those have no score (Emax is 0) and count for nobody. `n_cells` is what the errors come from.
    """

    by_domain: Mapping[str, float]
    perfect: tuple[str, ...]
    n_cells: int

    @property
    def total(self) -> float:
        """S, the sum over the domains that have a score."""
        return sum(self.by_domain.values())

    @property
    def reference(self) -> float:
        """What fine-tuning scores on the same domains: 250 each."""
        return 250.0 * len(self.by_domain)


@dataclass(frozen=True)
class Parameters:
    """What a method's domains cost without their classifiers, relative to the backbone.

    Args:
        multiple: backbone, every domain's own numbers and the shared ones; 1 is the backbone.
        share: own and shared numbers a domain; 1 is a fine-tuned network.
    """

    multiple: float
    share: float


@dataclass(frozen=True)
class Paired:
    """Accuracy of one method less that of another over their common cells.

    Args:
        mean: of the domains' mean differences.
        interval: 95 %, paired t over those (over seeds where there is one domain); None where
            there is nothing to vary over.
        wins, losses: cells in which the first is above, below.
        n_cells, n_domains: what was common.
    """

    mean: float
    interval: tuple[float, float] | None
    wins: int
    losses: int
    n_cells: int
    n_domains: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class MethodSummary:
    """One line of the main table: a method on one backbone, over the domains that it has.

    `score` and `paired` are None without a cell that fine-tuning has too.
    """

    method: MethodLabel
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    n_cells: int
    accuracy: Spread
    score: Score | None
    parameters: Parameters
    paired: Paired | None
    seconds: float


def summarise(
    rows: Sequence[Row], methods: Sequence[MethodLabel], reference: str = REFERENCE
) -> list[MethodSummary]:
    """A line for each method that has rows, in the methods' order; `rows` are of one backbone."""
    of_method = grouped(rows, lambda row: row.method)
    baseline = of_method.get(reference, [])
    return [
        _summary(method, of_method[method.name], baseline)
        for method in methods
        if method.name in of_method
    ]


def by_domain(rows: Sequence[Row]) -> dict[tuple[str, str], Spread]:
    """Test accuracy by (method, domain) over seeds."""
    groups = grouped(rows, lambda row: (row.method, row.domain))
    return {key: spread([row.test_accuracy for row in group]) for key, group in groups.items()}


def over_domains(rows: Sequence[Row]) -> Spread:
    """Mean over domains of the mean over seeds, of one method's rows.

    The deviation is that of the mean over the domains that all seeds have, of the seeds that have
    `MOST` of them: seeds with different domains differ by more than chance.
    """
    domains = grouped(rows, lambda row: row.domain)
    mean = float(np.mean([np.mean(_accuracies(group)) for group in domains.values()]))
    accuracies: dict[int, dict[str, float]] = {}
    for row in rows:
        accuracies.setdefault(row.seed, {})[row.domain] = row.test_accuracy
    full = [of for of in accuracies.values() if len(of) >= MOST * len(domains)]
    in_all = [domain for domain in domains if all(domain in of for of in full)]
    means = [float(np.mean([of[domain] for domain in in_all])) for of in full if in_all]
    return Spread(mean, spread(means).deviation if means else None, len(means))


def score(rows: Sequence[Row], baseline: Sequence[Row]) -> Score | None:
    """S of one method's rows, Emax from fine-tuning's rows of the same cells; None without any."""
    pairs = common(rows, baseline)
    errors = grouped(pairs, lambda pair: pair[0].domain)
    points, perfect = {}, []
    for domain, group in sorted(errors.items()):
        error = 1 - float(np.mean([row.test_accuracy for row, _ in group]))
        allowed = 2 * (1 - float(np.mean([row.test_accuracy for _, row in group])))
        if allowed == 0:
            perfect.append(domain)
        else:
            points[domain] = 1000 * (max(0.0, allowed - error) / allowed) ** 2
    return Score(points, tuple(perfect), len(pairs)) if pairs else None


def parameters(rows: Sequence[Row]) -> Parameters:
    """(backbone + the domains' own numbers + the shared ones once) / backbone; means over seeds."""
    domains = grouped(rows, lambda row: row.domain)
    own = sum(float(np.mean([row.numbers for row in group])) for group in domains.values())
    shared = max(
        float(np.mean([row.shared_numbers for row in group])) for group in domains.values()
    )
    added = (own + shared) / rows[0].backbone_numbers
    return Parameters(1 + added, added / len(domains))


def paired(rows: Sequence[Row], baseline: Sequence[Row]) -> Paired | None:
    """Accuracy of `rows` less `baseline`, over the cells of both; None where there is none."""
    pairs = common(rows, baseline)
    if not pairs:
        return None
    differences = [mine.test_accuracy - theirs.test_accuracy for mine, theirs in pairs]
    domains = defaultdict(list)
    for (row, _), difference in zip(pairs, differences, strict=True):
        domains[row.domain].append(difference)
    means = [float(np.mean(group)) for group in domains.values()]
    return Paired(
        mean=float(np.mean(means)),
        interval=interval(means if len(means) > 1 else differences),
        wins=sum(difference > 0 for difference in differences),
        losses=sum(difference < 0 for difference in differences),
        n_cells=len(pairs),
        n_domains=len(means),
    )


def common(rows: Sequence[Row], baseline: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of the same domain, seed and images a class, in the order of `rows`.

    A linear probe on all images is of every seed.
    """
    return [(row, other) for row in rows for other in baseline if _of_one_cell(row, other)]


def lr_edge(row: Row) -> str | None:
    """'lowest' or 'highest' where the chosen learning rate is the last of those tried.

    A better one may lie beyond; but not beyond 0, a compressed network that was not tuned.
    """
    return _edge(row.lr or None, {trial.lr for trial in row.trials if trial.lr})


def decay_edge(row: Row) -> str | None:
    """The same of the weight decay, of those tried at the chosen learning rate."""
    return _edge(row.decay, {trial.decay for trial in row.trials if trial.lr == row.lr})


def _edge(chosen: float | None, values: Iterable[float | None]) -> str | None:
    tried = {value for value in values if value is not None}
    if chosen is None or len(tried) < 2:
        return None
    if chosen <= min(tried):
        return "lowest"
    return "highest" if chosen >= max(tried) else None


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (n - 1).

    >>> spread([0.5])
    Spread(mean=0.5, deviation=None, n=1)
    """
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by key, in order of appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def t_quantile(degrees: int) -> float:
    """The t of a two-sided 95 % interval: P(|T| <= t) = 0.95 with `degrees` degrees of freedom.

    With T = sqrt(degrees) tan(a), the density of a is proportional to cos(a)^(degrees - 1).

    >>> round(t_quantile(1), 2), round(t_quantile(10), 3)
    (12.71, 2.228)
    """
    angles = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(degrees) * np.tan(np.interp(0.95 * mass[-1], mass, angles)))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % of the mean of `values` (paired t for differences); None where all are equal.

    So for a single one, and for a few equal accuracies of few images, which say nothing of chance.
    """
    if len(set(values)) < 2:
        return None
    found = spread(values)
    half = t_quantile(len(values) - 1) * (found.deviation or 0.0) / np.sqrt(len(values))
    return found.mean - float(half), found.mean + float(half)


def _summary(method: MethodLabel, rows: Sequence[Row], baseline: Sequence[Row]) -> MethodSummary:
    itself = bool(baseline) and method.name == baseline[0].method
    return MethodSummary(
        method=method,
        domains=tuple(sorted({row.domain for row in rows})),
        seeds=tuple(sorted({row.seed for row in rows})),
        n_cells=len(rows),
        accuracy=over_domains(rows),
        score=score(rows, baseline),
        parameters=parameters(rows),
        paired=None if itself else paired(rows, baseline),
        seconds=sum(row.seconds for row in rows),
    )


def _accuracies(rows: Sequence[Row]) -> list[float]:
    return [row.test_accuracy for row in rows]


def _of_one_cell(row: Row, other: Row) -> bool:
    if (row.domain, row.per_class) != (other.domain, other.per_class):
        return False
    drawn = row.per_class is not None or PROBE not in (row.method, other.method)
    return row.seed == other.seed or not drawn
