"""Pictures of values: figures drawn with matplotlib, for the command line and the reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import MissingExtraError, SpecError

EMPTY = "#f2f3f5"  # where nothing was spent
RANGE = (0.001, 1.0)  # shares of a layer with a colour of their own


def check_drawable(path: Path, what: str, instead: str = "") -> None:
    """Refuses early what could not be drawn after hours of work; `instead` is another way out.

    Raises:
        MissingExtraError: where matplotlib is not installed.
        SpecError: where the file's ending is no format that it writes.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise MissingExtraError(
            f"{what} {path}{instead} needs matplotlib, which is not installed: "
            "pip install onetrunk[report]"
        ) from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise SpecError(
            f"{what} {path} ends in {path.suffix!r}, and the ending says the format: give one of "
            f"{', '.join(sorted(known))}, for example {path.with_suffix('.png').name}."
        )


def draw_site_map(
    shares: Mapping[str, Mapping[str, float]],
    path: Path,
    title: str = "Adapter numbers, as a share of the layer's own",
) -> None:
    """A heat map, sites down and domains across; the colour is logarithmic, nothing spent is grey.

    Args:
        shares: domain -> site -> numbers spent relative to the layer's own, 0 for none. Sites stand
            in the order of the first domain that has them.
        path: the file to write; its ending says the format.

    Raises:
        MissingExtraError, SpecError: as `check_drawable`.
    """
    check_drawable(path, "the map")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    domains = list(shares)
    sites = list(dict.fromkeys(site for spent in shares.values() for site in spent))
    rows = [[shares[name].get(site, 0.0) or float("nan") for name in domains] for site in sites]
    size = (3.6 + 0.42 * len(domains), 2.2 + 0.17 * len(sites))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = colormaps["viridis_r"].with_extremes(bad=EMPTY)
    image = axes.imshow(rows, aspect="auto", cmap=colours, norm=LogNorm(*RANGE))
    axes.set_xticks(range(len(domains)), domains, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(sites)), sites, fontsize=7)
    axes.set_xticks([place - 0.5 for place in range(1, len(domains))], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, len(sites))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=9)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, pad=0.02, extend="min")
    bar.set_ticks([0.001, 0.01, 0.1, 1], labels=["0.1 %", "1 %", "10 %", "100 %"], fontsize=8)
    bar.ax.minorticks_off()
    figure.savefig(path, dpi=140)


def draw_accuracy_against_size(
    curve: Sequence[tuple[float, float]],
    stored: tuple[float, float],
    original: float,
    path: Path,
) -> None:
    """Mean accuracy against the share of the adapters' numbers that is kept.

    Args:
        curve: (share kept, accuracy) of compressions that were not tuned.
        stored: the same of what was stored, tuned or not.
        original: accuracy of the domains as they were.
        path: the file to write; its ending says the format.

    Raises:
        MissingExtraError, SpecError: as `check_drawable`.
    """
    check_drawable(path, "the picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(100 * original, color="#5b6472", linewidth=1, linestyle="--")
    axes.annotate(
        "as they were", (0.01, 100 * original), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", fontsize=8, color="#5b6472",
    )  # fmt: skip
    shares, accuracies = zip(*sorted(curve), strict=True) if curve else ((), ())
    axes.plot(
        [100 * x for x in shares], [100 * y for y in accuracies], "o-", color="#1f6f8b",
        label="compressed, not tuned",
    )  # fmt: skip
    axes.plot(
        [100 * stored[0]], [100 * stored[1]], "D", color="#e08e45", markersize=9, label="stored"
    )
    axes.set(
        xlabel="adapter numbers kept, %, the shared basis counted once",
        ylabel="mean validation accuracy, %", xlim=(0, 105),
    )  # fmt: skip
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
