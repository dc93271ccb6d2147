"""look: one appearance for every picture, safe for colour-blind eyes (Okabe and Ito's palette).

A method's colour says its group and its marker which of the group it is; fine-tuning is black.
Matplotlib's own settings stay: each picture is drawn inside `picture`, which puts back what it set.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from onetrunk.errors import MissingExtraError

from .rows import MethodLabel
from .summary import REFERENCE

INK, FAINT, GRID, BAND = "#222222", "#8a8f98", "#e4e6ea", "#f3f4f6"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7A5195")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
DASHES = ("-", "--", ":", "-.")
DPI = 130
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a name with two dollar signs is a name, not a formula
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn, in every picture alike."""

    label: str
    colour: str
    marker: str
    dashes: str


class Canvas:
    """A figure being drawn; `png` gives its bytes once it is done."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def png(self) -> bytes:
        """The picture as a PNG file."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi="figure")
        return stream.getvalue()


def require_extra() -> None:
    """Returns where a report can be drawn and written; ask before a study that takes hours.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    for package in ("matplotlib", "jinja2"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(
                f'a report needs {package}, which is not installed: pip install "onetrunk[report]"'
            ) from error


def looks(methods: Sequence[MethodLabel], reference: str = REFERENCE) -> dict[str, Look]:
    """A look for each method's name: a group's colour, a marker of its own within the group.

    Where a group has more methods than there are markers, the rest take colours that no group has.
    """
    groups = list(dict.fromkeys(method.group for method in methods if method.name != reference))
    n_drawn = dict.fromkeys(groups, 0)
    found = {}
    for method in methods:
        if method.name == reference:
            found[method.name] = Look(method.label, INK, "*", "-")
            continue
        place = n_drawn[method.group]
        own = groups.index(method.group)
        colour = PALETTE[(own + len(groups) * (place // len(MARKERS))) % len(PALETTE)]
        n_drawn[method.group] += 1
        marker, dashes = MARKERS[place % len(MARKERS)], DASHES[place % len(DASHES)]
        found[method.name] = Look(method.label, colour, marker, dashes)
    return found


@contextmanager
def picture(width_in: float, height_in: float) -> Iterator[Canvas]:
    """A figure of that size in the report's style.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_extra()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield Canvas(figure)


def place_labels(
    axes: Any, points: Sequence[tuple[float, float, str, str]], line_y: float | None = None
) -> None:
    """Writes (x, y, text, colour) beside its point, where it covers no point and no other label,
    nor the level line at `line_y`.

    Greedy, from the top: the first free place of a ring of places around the point, nearest first,
    and one that is nearer to another point only where there is no other; with a thin line to the
    point where it is not next to it, and it alone. The nearest one where none is free.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # the layout moves the axes: places are taken after it
    renderer, per_point = figure.canvas.get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    at = {point: axes.transData.transform(point[:2]) for point in points}
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in at.values()]
    if line_y is not None:
        level = axes.transData.transform((0, line_y))[1]
        taken.append(Bbox.from_extents(frame.x0, level - 1, frame.x1, level + 1))
    for point in sorted(points, key=lambda point: -point[1]):
        x, y, text, colour = point
        others = [place for other, place in at.items() if other != point]
        label = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", color=colour, fontsize=8.5,
            ha="left", va="bottom", in_layout=False,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
        size = label.get_window_extent(renderer)
        boxes = list(_places(at[point], size.width, size.height, per_point))
        free = [
            (box, near)
            for box, near in boxes
            if not box.count_overlaps(taken) and _inside(box, frame)
        ]
        clear = [
            (box, near)
            for box, near in free
            if all(_distance(box, at[point]) < _distance(box, other) for other in others)
        ]
        box, near = (clear or [(box, False) for box, _ in free] or boxes)[0]
        taken.append(box)
        label.set_position(tuple((box.min - at[point]) / per_point))
        if not near:
            middle = axes.transData.inverted().transform(
                (min(max(at[point][0], box.x0), box.x1), min(max(at[point][1], box.y0), box.y1))
            )
            axes.plot(*zip((x, y), middle, strict=True), color=FAINT, linewidth=0.6, zorder=1)


def _places(at: Any, width: float, height: float, per_point: float) -> Iterator[tuple[Any, bool]]:
    """Boxes around a point: right, left, above, below, corners; then the same farther away."""
    from matplotlib.transforms import Bbox

    x, y = at
    for gap_points in (7, 14, 24, 36, 50):
        gap = gap_points * per_point
        lefts = {"right": x + gap, "left": x - gap - width, "middle": x - width / 2}
        bottoms = {"middle": y - height / 2, "above": y + gap, "below": y - gap - height}
        for across, upright in (
            ("right", "middle"), ("left", "middle"), ("middle", "above"), ("middle", "below"),
            ("right", "above"), ("right", "below"), ("left", "above"), ("left", "below"),
        ):  # fmt: skip
            box = Bbox.from_bounds(lefts[across], bottoms[upright], width, height)
            yield box, gap_points == 7


def _distance(box: Any, at: Any) -> float:
    """From a point to the nearest place of a box."""
    x, y = min(max(at[0], box.x0), box.x1), min(max(at[1], box.y0), box.y1)
    return math.hypot(x - at[0], y - at[1])


def _inside(box: Any, frame: Any) -> bool:
    return bool(
        frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    )
