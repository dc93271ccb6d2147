"""pictures: a study's figures as PNG bytes; matplotlib, imported when the first one is drawn."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .look import BAND, FAINT, INK, Canvas, Look, picture, place_labels
from .rows import Row
from .summary import REFERENCE, MethodSummary, Spread, by_domain, common, grouped, spread
from .transfer import Level, curves, levels, mean_curves

SMALL_COLUMNS = 4  # of small multiples
PLAIN = "{x:g}"  # how matplotlib writes a tick: its own form of powers of ten is a formula


def accuracy_against_parameters(
    summaries: Sequence[MethodSummary], looks: Mapping[str, Look], reference: str = REFERENCE
) -> bytes:
    """The paper's central picture: mean accuracy against the numbers that a domain adds.

    x: own and shared numbers a domain in per cent of the backbone, logarithmic, with a place for
    zero (a linear probe). Bars: the standard deviation over seeds. Hollow: fewer domains than
    others. Fine-tuning is the line.
    """
    n_domains = len({domain for summary in summaries for domain in summary.domains})
    shares = [100 * summary.parameters.share for summary in summaries]
    zero_at = min((share for share in shares if share > 0), default=1.0) / 4
    with picture(8.4, 5.4) as canvas:
        axes = canvas.figure.subplots()
        points, ends, line_y = [], [], None
        for summary, share in zip(summaries, shares, strict=True):
            look, x, y = looks[summary.method.name], share or zero_at, 100 * summary.accuracy.mean
            whole = len(summary.domains) == n_domains
            bar = 100 * (summary.accuracy.deviation or 0)
            ends += [y - bar, y + bar]
            axes.errorbar(
                x, y, bar, color=look.colour,
                marker=look.marker, markersize=12 if look.marker == "*" else 7, elinewidth=1.2,
                markerfacecolor=look.colour if whole else "white",
            )  # fmt: skip
            if summary.method.name == reference:
                line_y = y
                axes.axhline(y, color=INK, linewidth=0.9, linestyle="--", zorder=1)
            fewer = "" if whole else f" ({len(summary.domains)} of {n_domains})"
            points.append((x, y, look.label + fewer, look.colour))
        axes.set_xscale("log")
        _widen(axes, [x for x, *_ in points], ends)
        _percent_ticks(axes, zero_at if 0 in shares else None)
        axes.set(
            xlabel="numbers a domain adds, % of the backbone (log; without classifiers)",
            ylabel="test accuracy, %, mean over domains",
        )
        place_labels(axes, points, line_y)
        return canvas.png()


def accuracy_by_domain(
    rows: Sequence[Row], looks: Mapping[str, Look], reference: str = REFERENCE
) -> bytes:
    """A line a domain, the hardest first: accuracy left, difference to fine-tuning right.

    The difference is over the seeds that both have; the right half is left out without fine-tuning.
    """
    found = by_domain(rows)
    domains = sorted({row.domain for row in rows}, key=lambda d: _hardness(found, d, reference))
    has_reference = any(row.method == reference for row in rows)
    drawn = [name for name in looks if any(row.method == name for row in rows)]
    step = min(0.15, 0.76 / max(len(drawn) - 1, 1))  # side by side: none on top of another
    dodge = {name: (place - (len(drawn) - 1) / 2) * step for place, name in enumerate(drawn)}
    height_in = min(max(0.25, 0.045 * len(drawn)), 0.6) * len(domains)
    with picture(9.2 if has_reference else 5.6, 1.4 + height_in) as canvas:
        all_axes = np.atleast_1d(canvas.figure.subplots(1, 1 + has_reference, sharey=True))
        for name in drawn:
            of = {d: found.get((name, d)) for d in domains}
            _dots(all_axes[0], looks[name], of, dodge[name])
        all_axes[0].set(xlabel="test accuracy, %")
        if has_reference:
            differences = _differences(rows, reference)
            for name in drawn:
                if name != reference:
                    of = {d: differences.get((name, d)) for d in domains}
                    _dots(all_axes[1], looks[name], of, dodge[name])
            all_axes[1].axvline(0, color=INK, linewidth=1)
            all_axes[1].set(xlabel=f"points above or below {looks[reference].label}")
        _name_rows(all_axes, domains)
        _legend(canvas.figure, [looks[name] for name in drawn], lines=False)
        return canvas.png()


def change_range(rows: Sequence[Row]) -> tuple[float, float]:
    """The smallest and the largest change above 0 of all rows: one colour scale for many maps."""
    changes = [change for row in rows for change in (row.site_change or {}).values() if change > 0]
    low, high = min(changes, default=0.1), max(changes, default=1.0)
    return (low, high) if low < high else (low / 2, high * 2)


def change_map(rows: Sequence[Row], scale: tuple[float, float]) -> bytes:
    """Where one method changes the backbone: a line a site, a column a domain, logarithmic colour.

    Sites stand in order of execution; grey: no change, or nothing run. Means over seeds. `scale`
    has the changes of the darkest and the lightest colour.
    """
    sites, domains, change_sd = change_of(rows)
    shown = np.ma.masked_less_equal(np.nan_to_num(change_sd), 0)
    with picture(max(2.6 + 0.36 * len(domains), 5.2), 1.6 + 0.155 * len(sites)) as canvas:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import LogLocator, NullLocator

        axes = canvas.figure.subplots()
        axes.grid(False)
        axes.set_facecolor("#d9dbdf")
        image = axes.pcolormesh(
            shown, cmap="viridis", norm=LogNorm(*scale), edgecolors="white", linewidth=0.3
        )
        axes.set_yticks(np.arange(len(sites)) + 0.5, sites, fontsize=6.5)
        axes.set_xticks(np.arange(len(domains)) + 0.5, domains, rotation=90, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylim(len(sites), 0)
        for start in _stage_starts(sites)[1:]:
            axes.axhline(start, color="white", linewidth=2)
        bar = canvas.figure.colorbar(
            image, ax=axes, aspect=40, pad=0.02, format=PLAIN, location="top"
        )
        bar.outline.set_visible(False)
        bar.locator = LogLocator(subs=(1, 2, 5))
        bar.ax.xaxis.set_minor_locator(NullLocator())
        bar.set_label("size of the change, relative to the layer's weights")
        return canvas.png()


def change_by_layer(rows: Sequence[Row], looks: Mapping[str, Look]) -> bytes:
    """Size of the change along the network, a panel a method: median and middle half of domains.

    x: the sites in order of execution, marked where a stage begins.
    """
    of_method = grouped([row for row in rows if row.site_change], lambda row: row.method)
    names = [name for name in looks if name in of_method]
    every_site = merged_order([list(row.site_change or {}) for row in rows if row.site_change])
    from matplotlib.ticker import LogLocator, NullFormatter

    with _small_multiples(len(names), 2.9, 1.9, columns=3, sharey=True) as (canvas, all_axes):
        for name, axes in zip(names, all_axes, strict=True):
            sites, _, change_sd = change_of(of_method[name])
            places = [every_site.index(site) for site in sites]
            changed = [(place, row[row > 0]) for place, row in zip(places, change_sd, strict=True)]
            changed = [(place, row) for place, row in changed if row.size]  # a line goes over gaps
            places = [place for place, _ in changed]
            low, middle, high = (
                [float(np.quantile(row, q)) for _, row in changed] for q in (0.25, 0.5, 0.75)
            )
            colour = looks[name].colour
            axes.fill_between(places, low, high, color=colour, alpha=0.22, linewidth=0)
            axes.plot(places, middle, color=colour, linewidth=1.4, marker=".", markersize=4)
            axes.set(yscale="log", title=looks[name].label)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(PLAIN)
            axes.yaxis.set_minor_formatter(NullFormatter())
            _stage_ticks(axes, every_site)
        canvas.figure.supylabel("size of the change, relative to the layer", fontsize=9)
        return canvas.png()


def transfer_curves(rows: Sequence[Row], looks: Mapping[str, Look]) -> bytes:
    """Accuracy against images a class, a panel a domain, the mean over domains first.

    Bars: the standard deviation over seeds. Hollow in the mean: fewer domains than others.
    """
    places = {level: place for place, level in enumerate(levels(rows))}
    domains = sorted({row.domain for row in rows})
    drawn = [name for name in looks if any(row.method == name for row in rows)]
    found, means = curves(rows), mean_curves(rows)
    with _small_multiples(1 + len(domains), 2.35, 2.1, columns=SMALL_COLUMNS) as (canvas, panels):
        for place, name in enumerate(drawn):
            middle = (len(drawn) - 1) / 2  # bars side by side, not on top of another
            shift = 0.22 * (place - middle) / max(len(drawn) - 1, 1)
            points = {level: means.get((name, level)) for level in places}
            _curve(
                panels[0], looks[name], shift, places,
                {level: point.accuracy if point else None for level, point in points.items()},
                {lv for lv, point in points.items() if point and point.n_domains < len(domains)},
            )  # fmt: skip
            for domain, axes in zip(domains, panels[1:], strict=True):
                of = {level: found.get((name, domain, level)) for level in places}
                _curve(axes, looks[name], shift, places, of, set())
        for title, axes in zip(["mean over domains", *domains], panels, strict=True):
            axes.set_title(title, fontweight="bold" if axes is panels[0] else "normal")
            names = ["all" if level is None else str(level) for level in places]
            axes.set_xticks(list(places.values()), names)
        canvas.figure.supxlabel("training images a class", fontsize=9)
        canvas.figure.supylabel("test accuracy, %", fontsize=9)
        _legend(canvas.figure, [looks[name] for name in drawn], lines=True)
        return canvas.png()


def change_of(rows: Sequence[Row]) -> tuple[list[str], list[str], Any]:
    """Sites in order of execution, domains, and the change (s, d): mean over seeds, NaN if none."""
    measured = [row for row in rows if row.site_change]
    sites = merged_order([list(row.site_change or {}) for row in measured])
    domains = sorted({row.domain for row in measured})
    change_sd = np.full((len(sites), len(domains)), np.nan)
    groups: dict[tuple[str, str], list[float]] = {}
    for row in measured:
        for site, change in (row.site_change or {}).items():
            groups.setdefault((site, row.domain), []).append(change)
    for (site, domain), changes in groups.items():
        change_sd[sites.index(site), domains.index(domain)] = np.mean(changes)
    return sites, domains, change_sd


def merged_order(lists: Sequence[Sequence[str]]) -> list[str]:
    """One order of all names that keeps each list's: a name new in a list follows the one before.

    >>> merged_order([["a", "c"], ["a", "b", "c", "d"]])
    ['a', 'b', 'c', 'd']
    """
    order: list[str] = []
    for names in dict.fromkeys(map(tuple, lists)):
        after = 0
        for name in names:
            if name not in order:
                order.insert(after, name)
            after = order.index(name) + 1
    return order


def stage(site: str) -> str:
    """The part of a site's name that its stage shares: up to the first part with a digit.

    >>> stage("blocks.3.1.conv_pw"), stage("layer2.0.conv1"), stage("conv_stem")
    ('blocks.3', 'layer2', 'conv_stem')
    """
    parts = site.split(".")
    first = next((i for i, part in enumerate(parts) if any(map(str.isdigit, part))), len(parts))
    return ".".join(parts[: first + 1])


def _hardness(
    found: Mapping[tuple[str, str], Spread], domain: str, reference: str
) -> tuple[float, str]:
    """Fine-tuning's accuracy where it is there, else the mean of the others'."""
    if (reference, domain) in found:
        return found[reference, domain].mean, domain
    return float(np.mean([spread.mean for (_, d), spread in found.items() if d == domain])), domain


def _differences(rows: Sequence[Row], reference: str) -> dict[tuple[str, str], Spread]:
    baseline = [row for row in rows if row.method == reference]
    pairs = common([row for row in rows if row.method != reference], baseline)
    groups = grouped(pairs, lambda pair: (pair[0].method, pair[0].domain))
    return {
        key: spread([mine.test_accuracy - theirs.test_accuracy for mine, theirs in group])
        for key, group in groups.items()
    }


def _dots(
    axes: Any, look: Look, by_place: Mapping[str, Spread | None], dodge: float
) -> None:  # fmt: skip
    for place, found in enumerate(by_place.values()):
        if found is not None:
            axes.errorbar(
                100 * found.mean, place + dodge, xerr=100 * (found.deviation or 0),
                color=look.colour, marker=look.marker, markersize=7 if look.marker == "*" else 4,
                elinewidth=0.8, linestyle="none",
            )  # fmt: skip


def _name_rows(all_axes: Any, names: Sequence[str]) -> None:
    for axes in all_axes:
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(False, axis="y")
        for place in range(0, len(names), 2):
            axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0, zorder=0)


def _curve(
    axes: Any, look: Look, shift: float, places: Mapping[Level, int],
    by_level: Mapping[Level, Spread | None], hollow: set[Level],
) -> None:  # fmt: skip
    at = [places[level] + shift for level in by_level]
    means = [100 * spread.mean if spread else math.nan for spread in by_level.values()]  # a gap
    bars = [100 * (spread.deviation or 0) if spread else 0 for spread in by_level.values()]
    axes.errorbar(
        at, means, bars, color=look.colour, linestyle=look.dashes, linewidth=1.3, elinewidth=0.8
    )
    for level, x, y in zip(by_level, at, means, strict=True):
        axes.plot(
            x, y, color=look.colour, marker=look.marker,
            markersize=7 if look.marker == "*" else 4.5,
            markerfacecolor="white" if level in hollow else look.colour,
        )  # fmt: skip


def _legend(figure: Any, drawn: Sequence[Look], *, lines: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=look.colour, marker=look.marker, label=look.label,
            linestyle=look.dashes if lines else "none", markersize=9 if look.marker == "*" else 6,
        )
        for look in drawn
    ]  # fmt: skip
    for n_columns in range(min(6, len(handles)), 0, -1):  # as many as the picture is wide
        legend = figure.legend(
            handles=handles, loc="outside upper left", ncols=n_columns, fontsize=8
        )
        if n_columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


@contextmanager
def _small_multiples(
    n_panels: int, width_in: float, height_in: float, columns: int, *, sharey: bool = False
) -> Iterator[tuple[Canvas, list[Any]]]:
    n_columns = min(columns, n_panels)
    n_rows = math.ceil(n_panels / n_columns)
    with picture(max(n_columns * width_in, 5) + 0.3, n_rows * height_in + 0.8) as canvas:
        all_axes = canvas.figure.subplots(
            n_rows, n_columns, squeeze=False, sharex=True, sharey=sharey
        ).ravel()
        for axes in all_axes[n_panels:]:
            axes.set_visible(False)
        for axes in all_axes[:n_panels][-n_columns:]:  # the lowest of each column
            axes.tick_params(labelbottom=True)
        yield canvas, list(all_axes[:n_panels])


def _widen(axes: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Room for the labels at the points farthest out; `ys` are the ends of their bars."""
    axes.set_xlim(min(xs) / 2.2, max(xs) * 2.6)
    margin = max(0.12 * (max(ys) - min(ys)), 0.5)
    axes.set_ylim(min(ys) - margin, max(ys) + margin)


def _percent_ticks(axes: Any, zero_at: float | None) -> None:
    from matplotlib.ticker import NullLocator

    low, high = axes.get_xlim()
    ticks = [
        step * 10.0**power
        for power in range(-4, 5)
        for step in (1, 3)
        if max(low, 2 * (zero_at or 0)) <= step * 10.0**power <= high
    ]
    names = [f"{tick:g}" for tick in ticks]
    if zero_at is not None:
        ticks, names = [zero_at, *ticks], ["0", *names]
        axes.axvline(2 * zero_at, color=FAINT, linewidth=0.8, linestyle=":")
    axes.set_xticks(ticks, names)
    axes.xaxis.set_minor_locator(NullLocator())


def _stage_starts(sites: Sequence[str]) -> list[int]:
    stages = [stage(site) for site in sites]
    return [i for i, name in enumerate(stages) if i == 0 or name != stages[i - 1]]


def _stage_ticks(axes: Any, sites: Sequence[str]) -> None:
    starts = _stage_starts(sites)
    apart = max(1, len(sites) // 20)  # a name on every tick that is far enough from the last
    named: list[int] = []
    for start in starts:
        named += [start] if not named or start - named[-1] >= apart else []
    axes.set_xticks(named, [stage(sites[start]) for start in named], rotation=90, fontsize=7)
    axes.set_xlim(-1, len(sites))
