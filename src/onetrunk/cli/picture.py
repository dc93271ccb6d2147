"""The quickstart's picture: what each domain's adapters bought, and what each domain costs."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ..bank.bank import Bank
from .training import Trained

MADE_BY = "onetrunk quickstart"  # in the picture's file
PROBE, ADAPTED, DELTA, BACKBONE = "#b8bec8", "#1f6f8b", "#e08e45", "#5b6472"


def draw_domains(bank: Bank, results: Mapping[str, Trained], path: Path) -> None:
    """Bars of accuracy (probe beside adapted) and of size (deltas beside the backbone)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _accuracies(left, results)
    _sizes(right, bank, results)
    figure.savefig(path, dpi=130, metadata={"Software": MADE_BY})


def is_ours(path: Path) -> bool:
    """Whether a quickstart drew the picture at `path`."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == MADE_BY
    except OSError:
        return False


def _accuracies(axes, results: Mapping[str, Trained]) -> None:  # type: ignore[no-untyped-def]
    places = range(len(results))
    probes = [100 * (result.probe_accuracy or 0.0) for result in results.values()]
    adapted = [100 * result.evaluation.accuracy for result in results.values()]
    low = axes.bar([p - 0.2 for p in places], probes, 0.4, color=PROBE, label="linear probe")
    high = axes.bar([p + 0.2 for p in places], adapted, 0.4, color=ADAPTED, label="adapted")
    for bars in (low, high):
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(list(places), list(results))
    axes.set(ylim=(0, 112), ylabel="test accuracy, %", title="What the adapters bought")
    axes.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _sizes(axes, bank: Bank, results: Mapping[str, Trained]) -> None:  # type: ignore[no-untyped-def]
    backbone = next(iter(results.values())).cost.backbone_bytes / 1e6
    deltas = {name: result.cost.delta_bytes / 1e6 for name, result in results.items()}
    axes.barh(["fine-tuned\nnetworks"], [backbone * len(results)], color=BACKBONE, height=0.55)
    axes.barh(["one trunk"], [backbone], color=BACKBONE, height=0.55)
    start = backbone
    for delta in deltas.values():
        axes.barh(["one trunk"], [delta], left=start, color=DELTA, height=0.55, edgecolor="white")
        start += delta
    axes.text(backbone * len(results), 0, f" {backbone * len(results):.0f} MB", va="center")
    axes.text(start, 1, f" {start:.0f} MB", va="center")
    axes.set(xlim=(0, backbone * len(results) * 1.25), xlabel="MB", title="What the domains cost")
    axes.text(
        0.98, 0.5, "orange: the domains' own numbers", transform=axes.transAxes, ha="right",
        color=DELTA, fontsize=9,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
