"""tables: what a study found, as tables of text: the same ones in Markdown and in HTML.

Figures are per cent with one decimal, since only a report writes per cent.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .rows import MethodLabel, Row
from .summary import (
    REFERENCE,
    MethodSummary,
    Paired,
    Score,
    Spread,
    by_domain,
    decay_edge,
    grouped,
    lr_edge,
    over_domains,
    paired,
)
from .transfer import Level, levels, mean_curves

NONE = ""  # an empty cell: nothing was run, or there is nothing to compare


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        title: what it shows.
        head, rows: of one length each; the first `n_names` columns are names, the others figures.
        notes: sentences below it.
        best: (row, column) of the figures that are the best of their row or column.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    n_names: int = 1
    best: frozenset[tuple[int, int]] = frozenset()


def method_table(summaries: Sequence[MethodSummary], reference: str = REFERENCE) -> Table:
    """The main table: a line a method, over the domains that it has."""
    domains = {domain for summary in summaries for domain in summary.domains}
    label = _label([summary.method for summary in summaries], reference)
    head = (
        "method", "domains", "seeds", "accuracy, %", f"against {label}, points",
        "cells better / worse", "S", f"S of {label}", "parameters, x", "own a domain, %", "seconds",
    )  # fmt: skip
    rows = [_method_line(summary, len(domains), reference) for summary in summaries]
    used = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return Table(
        "Methods",
        tuple(head[place] for place in used),
        tuple(tuple(row[place] for place in used) for row in rows),
        _method_notes(summaries, len(domains), label),
    )


def domain_table(rows: Sequence[Row], methods: Sequence[MethodLabel]) -> Table:
    """Test accuracy: a line a domain, a column a method, the best of each line marked."""
    found = by_domain(rows)
    shown = [method for method in methods if any(method.name == name for name, _ in found)]
    domains = sorted({row.domain for row in rows})
    n_seeds = len({row.seed for row in rows})
    lines, best = [], set()
    for place, domain in enumerate(domains):
        spreads = [found.get((method.name, domain)) for method in shown]
        lines.append((domain, *(spread_text(spread, n_seeds) for spread in spreads)))
        best |= {(place, column + 1) for column in _highest(spreads)}
    of_method = grouped(rows, lambda row: row.method)
    means = [over_domains(of_method[method.name]) for method in shown]
    lines.append(("mean", *(f"{100 * mean.mean:.1f}" for mean in means)))
    notes = (
        _spread_note(n_seeds),
        "Marked: the highest of each line. A mean is over the domains that the method has.",
    )
    head = ("domain", *(method.label for method in shown))
    return Table("Test accuracy, %, by domain", head, tuple(lines), notes, best=frozenset(best))


def transfer_tables(
    rows: Sequence[Row], methods: Sequence[MethodLabel], reference: str = REFERENCE
) -> list[Table]:
    """Mean accuracy by images a class, and the paired differences to fine-tuning beside it."""
    of_method = grouped(rows, lambda row: row.method)
    shown = [method for method in methods if method.name in of_method]
    tables = [_mean_table(rows, shown)]
    if reference in of_method and len(of_method) > 1:
        tables.append(_difference_table(rows, shown, reference))
    return tables


def choice_table(rows: Sequence[Row], methods: Sequence[MethodLabel]) -> Table:
    """What rates and decays were chosen, a line a method, and how often the last that was tried."""
    of_method = grouped(rows, lambda row: row.method)
    lines = []
    for method in methods:
        group = [row for row in of_method.get(method.name, []) if row.lr is not None]
        if not group:
            continue
        lines.append(
            (
                method.label,
                str(len(group)),
                _numbers(row.lr for row in group),
                _numbers(row.decay for row in group),
                _share_running(group),
                _edges_text([lr_edge(row) for row in group]),
                _edges_text([decay_edge(row) for row in group]),
            )
        )
    head = (
        "method", "cells", "lr chosen", "decay chosen", "norms at the backbone's statistics",
        "lr at an end", "decay at an end",
    )  # fmt: skip
    note = (
        "At an end: cells whose choice is the lowest or highest that was tried, so that a better "
        "one may lie beyond."
    )
    return Table("Chosen hyperparameters", head, tuple(lines), (note,))


def _share_running(rows: Sequence[Row]) -> str:
    """`5 of 16`: cells that trained with the backbone's running statistics in their norms."""
    chosen = [row.norm_statistics for row in rows if row.norm_statistics is not None]
    return f"{chosen.count('running')} of {len(chosen)}" if chosen else NONE


def cell_table(rows: Sequence[Row], methods: Sequence[MethodLabel]) -> Table:
    """Every cell, with what was chosen for it and a flag where that is the lowest or highest."""
    order = {method.name: place for place, method in enumerate(methods)}
    labels = {method.name: method.label for method in methods}
    ranked = sorted(rows, key=lambda row: (row.backbone, row.domain, order[row.method], row.seed))
    lines = tuple(
        (
            row.backbone,
            row.domain,
            labels[row.method],
            str(row.seed),
            "all" if row.per_class is None else str(row.per_class),
            NONE if row.epochs is None else str(row.epochs),
            _number(row.lr),
            _number(row.decay),
            str(len(row.trials)),
            f"{edge} tried" if (edge := lr_edge(row)) else NONE,
            percent(row.val_accuracy),
            percent(row.test_accuracy),
            f"{row.numbers:,}",
            f"{row.seconds:.0f}",
        )
        for row in ranked
    )
    head = (
        "backbone", "domain", "method", "seed", "images a class", "epochs", "lr", "decay",
        "settings tried", "lr at an edge", "validation, %", "test, %", "own numbers", "seconds",
    )  # fmt: skip
    return Table("Every cell", head, lines, n_names=3)


def percent(share: float | None) -> str:
    """0.1234 as `12.3`."""
    return NONE if share is None else f"{100 * share:.1f}"


def spread_text(spread: Spread | None, n_seeds: int) -> str:
    """Mean and deviation in per cent; the number of seeds where it is not all of them.

    >>> spread_text(Spread(0.7, 0.012, 2), n_seeds=3), spread_text(Spread(0.7, None, 1), n_seeds=1)
    ('70.0 ± 1.2 (n=2)', '70.0')
    """
    if spread is None:
        return NONE
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.1f}"
    fewer = "" if spread.n == n_seeds else f" (n={spread.n})"
    return f"{100 * spread.mean:.1f}{deviation}{fewer}"


def paired_text(found: Paired | None) -> str:
    """A difference in points with its 95 % interval.

    >>> paired_text(Paired(0.012, (-0.004, 0.028), 5, 1, 6, 3))
    '+1.2 (-0.4 to +2.8)'
    """
    if found is None:
        return NONE
    interval = found.interval
    within = f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else ""
    return f"{100 * found.mean:+.1f}{within}"


def _method_line(summary: MethodSummary, n_domains: int, reference: str) -> tuple[str, ...]:
    n_own, found, itself = len(summary.domains), summary.paired, summary.method.name == reference
    deviation = summary.accuracy.deviation
    return (
        summary.method.label,
        str(n_own) if n_own == n_domains else f"{n_own} of {n_domains}",
        str(len(summary.seeds)),
        percent(summary.accuracy.mean) + (f" ± {100 * deviation:.1f}" if deviation else ""),
        paired_text(found),
        f"{found.wins} / {found.losses} of {found.n_cells}" if found else NONE,
        _score_text(summary.score),
        NONE if itself or summary.score is None else f"{summary.score.reference:.0f}",
        f"{summary.parameters.multiple:.2f}",
        f"{100 * summary.parameters.share:.2f}",
        f"{summary.seconds:.0f}",
    )


def _score_text(found: Score | None) -> str:
    return NONE if found is None or not found.by_domain else f"{found.total:.0f}"


def _method_notes(
    summaries: Sequence[MethodSummary], n_domains: int, label: str
) -> tuple[str, ...]:
    partial = [summary.method.label for summary in summaries if len(summary.domains) < n_domains]
    perfect = sorted({domain for s in summaries if s.score for domain in s.score.perfect})
    notes = [
        "Accuracy: mean over domains of the mean over seeds, ± the standard deviation over seeds "
        "(of those with nine tenths of the domains) of the mean over what they have in common.",
        "Parameters: (backbone + the own numbers of all the method's domains + shared ones) / "
        "backbone, without classifiers.",
    ]
    if any(summary.paired for summary in summaries):
        notes.append(
            f"Against {label}: over the cells (domain and seed) that both have; 95 % interval of a "
            "paired t over the domains (over the seeds of a single one), for one comparison: of "
            "many, some leave out zero by chance."
        )
    if any(summary.score for summary in summaries):
        notes.append(
            "S: 1000 (max(0, Emax - E) / Emax)^2 summed over domains, Emax twice the error of "
            f"{label}, which so scores 250 a domain; over the cells that both have."
        )
    if partial:
        notes.append(
            f"Over fewer domains than others, so that neither means nor S compare: "
            f"{', '.join(partial)}."
        )
    if perfect:
        notes.append(
            f"{label} makes no error on {', '.join(perfect)}: Emax is 0 there, and the domain "
            "counts in nobody's S."
        )
    return tuple(notes)


def _mean_table(rows: Sequence[Row], shown: Sequence[MethodLabel]) -> Table:
    points = mean_curves(rows)
    n_domains = len({row.domain for row in rows})
    n_seeds = len({row.seed for row in rows})
    columns = levels(rows)
    lines = []
    for method in shown:
        cells = []
        for level in columns:
            point = points.get((method.name, level))
            fewer = point is not None and point.n_domains < n_domains
            n_whole = point.accuracy.n if point else 0  # seeds with every domain
            cells.append(
                spread_text(point.accuracy if point else None, n_seeds if n_whole else 0)
                + (f" ({point.n_domains} of {n_domains})" if point and fewer else "")
            )
        lines.append((method.label, *cells))
    whole = [
        [
            point.accuracy
            if (point := points.get((method.name, level))) and point.n_domains == n_domains
            else None
            for method in shown
        ]
        for level in columns
    ]
    best = {(place, column + 1) for column, of in enumerate(whole) for place in _highest(of)}
    return Table(
        "Test accuracy, %, by images a class: mean over domains",
        ("method", *map(_level, columns)),
        tuple(lines),
        (
            _spread_note(n_seeds),
            "Marked: the highest of each column, of the methods that have every domain. Beside the "
            "others: how many domains they have.",
            *_short_notes(rows, columns),
        ),
        best=frozenset(best),
    )


def _short_notes(rows: Sequence[Row], columns: Sequence[Level]) -> Iterator[str]:
    """A sentence on each level that classes of some domains cannot fill."""
    for level in columns:
        short = {r.domain: r.short_classes for r in rows if r.per_class == level}
        if found := [f"{domain} {n}" for domain, n in sorted(short.items()) if n]:
            yield f"Classes with fewer than {level} images: {', '.join(found)}."


def _difference_table(rows: Sequence[Row], shown: Sequence[MethodLabel], reference: str) -> Table:
    groups = grouped(rows, lambda row: (row.method, row.per_class))
    columns = levels(rows)
    lines = []
    for method in shown:
        if method.name == reference:
            continue
        cells = []
        for level in columns:
            mine, theirs = groups.get((method.name, level), []), groups.get((reference, level), [])
            cells.append(paired_text(paired(mine, theirs)))
        lines.append((method.label, *cells))
    note = (
        "Over the cells (domain and seed) that both have; 95 % interval of a paired t over the "
        "domains (over the seeds of a single one), for one comparison: of many, some leave out "
        "zero by chance."
    )
    head = ("method", *map(_level, columns))
    return Table(f"Against {_label(shown, reference)}, points", head, tuple(lines), (note,))


def _highest(spreads: Sequence[Spread | None]) -> list[int]:
    """Places of the highest mean; none where fewer than two are there."""
    means = [spread.mean for spread in spreads if spread is not None]
    if len(means) < 2:
        return []
    top = max(means)
    return [place for place, s in enumerate(spreads) if s is not None and s.mean == top]


def _spread_note(n_seeds: int) -> str:
    if n_seeds == 1:
        return "One seed: no spread."
    return f"± the standard deviation over {n_seeds} seeds; (n=...) where there are fewer."


def _label(methods: Iterable[MethodLabel], name: str) -> str:
    labels: Mapping[str, str] = {method.name: method.label for method in methods}
    return labels.get(name, name)


def _edges_text(edges: Sequence[str | None]) -> str:
    """`["lowest", None, "lowest"]` as `2 (2 lowest)`."""
    counts = {edge: edges.count(edge) for edge in ("lowest", "highest") if edge in edges}
    n_all = len(edges) - edges.count(None)
    which = ", ".join(f"{count} {edge}" for edge, count in counts.items())
    return f"{n_all} ({which})" if which else str(n_all)


def _level(level: Level) -> str:
    return "all" if level is None else str(level)


def _numbers(values: Iterable[float | None]) -> str:
    return ", ".join(_number(value) for value in sorted({v for v in values if v is not None}))


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"
