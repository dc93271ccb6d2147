"""Pictures: valid PNGs of whole and of partial tables; labels that cover nothing; one look."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from onetrunk.benchmark.report import MethodLabel, read_rows, require_extra
from onetrunk.benchmark.report.look import Canvas, looks, picture, place_labels
from onetrunk.benchmark.report.pictures import (
    _curve,
    _legend,
    accuracy_against_parameters,
    accuracy_by_domain,
    change_by_layer,
    change_map,
    change_of,
    change_range,
    merged_order,
    transfer_curves,
)
from onetrunk.benchmark.report.summary import Spread, summarise
from onetrunk.errors import MissingExtraError

METHODS = [
    MethodLabel("head", "Probe", "base"),
    MethodLabel("parallel", "Cost $5 or $6", "adapters"),
    MethodLabel("lowrank(rank=8)", "Low rank 8", "adapters"),
    MethodLabel("full", "Fine-tuning", "reference"),
]
LOOKS = looks(METHODS)


def drawn(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    image.verify()
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert (pixels < 250).mean() > 0.005, "an empty picture"
    return pixels


@pytest.mark.parametrize("part", ["whole", "one cell", "no reference", "one seed"])
def test_every_picture_of_a_comparison_is_drawn_whatever_is_missing(table, part):
    rows = read_rows(table())
    kept = {
        "whole": rows,
        "one cell": [row for row in rows if row.method == "parallel"][:1],
        "no reference": [row for row in rows if row.method != "full"][::2],
        "one seed": [row for row in rows if row.seed == 0],
    }[part]
    drawn(accuracy_against_parameters(summarise(kept, METHODS), LOOKS))
    drawn(accuracy_by_domain(kept, LOOKS))
    drawn(change_by_layer(kept, LOOKS))
    adapted = [row for row in kept if row.method == "parallel"]
    drawn(change_map(adapted, change_range(adapted)))


def test_a_legend_has_as_many_columns_as_the_picture_is_wide():
    names = [MethodLabel(f"m{n}", f"a method of long name, {n}", "adapters") for n in range(8)]
    with picture(9.0, 3.0) as canvas:
        _legend(canvas.figure, list(looks(names).values()), lines=False)
        [legend] = canvas.figure.legends
        width = canvas.figure.bbox.width
        assert width / 2 < legend.get_window_extent().width <= width


def test_transfer_curves_are_drawn_whatever_is_missing(table):
    rows = read_rows(row for k in (5, 20, None) for row in table(seeds=range(2), per_class=k))
    drawn(transfer_curves(rows, LOOKS))
    drawn(transfer_curves(rows[::7], LOOKS))


def test_a_lone_curve_stands_at_its_numbers_of_images(table, monkeypatch):
    shifts = []
    monkeypatch.setattr(
        "onetrunk.benchmark.report.pictures._curve",
        lambda _axes, _look, shift, *_rest: shifts.append(shift),
    )
    rows = [row for row in read_rows(table()) if row.method == "parallel"]
    transfer_curves(rows, {"parallel": LOOKS["parallel"]})
    assert shifts and not any(shifts)


def test_a_change_of_nothing_anywhere_is_drawn_too(row):
    rows = read_rows([row("parallel", "signs", 0, site_change={"a": 0.0, "b": 0.0})])
    drawn(change_map(rows, change_range(rows)))
    drawn(change_by_layer(rows, LOOKS))


def test_the_map_has_the_means_over_seeds_and_gaps_where_nothing_is(row):
    changes = {("signs", 0): {"a": 0.1, "b": 0.2}, ("signs", 1): {"a": 0.3}, ("faces", 0): {"b": 1}}
    rows = read_rows(row("full", d, s, site_change=change) for (d, s), change in changes.items())
    sites, domains, change_sd = change_of(rows)
    assert (sites, domains) == (["a", "b"], ["faces", "signs"])
    assert np.array_equal(change_sd, [[np.nan, 0.2], [1, 0.2]], equal_nan=True)


def test_sites_keep_their_order_of_execution_where_domains_have_different_ones():
    order = merged_order([["stem", "b", "z"], ["stem", "a", "b"], ["b", "m", "z"]])
    assert order == ["stem", "a", "b", "m", "z"]


def test_labels_cover_neither_one_another_nor_the_points():
    rng = np.random.default_rng(0)
    points = [(x, y, f"method {i}", "black") for i, (x, y) in enumerate(rng.random((12, 2)) ** 2)]
    with picture(8, 5) as canvas:
        axes = canvas.figure.subplots()
        axes.plot([p[0] for p in points], [p[1] for p in points], "o")
        place_labels(axes, points)
        renderer = canvas.figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        places = axes.transData.transform([point[:2] for point in points])
    assert len(boxes) == 12
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:i]) == 0
        assert not any(box.contains(x, y) for x, y in places)


def test_a_label_is_nearest_to_its_own_point():
    pair = [(3.0, 1.5, "joint", "black"), (3.1, 1.51, "alone", "black")]
    points = [(1.0, 1.0, "lowest", "black"), *pair, (5.0, 2.0, "highest", "black")]
    with picture(8, 5) as canvas:
        axes = canvas.figure.subplots()
        axes.plot([p[0] for p in points], [p[1] for p in points], "o")
        place_labels(axes, points)
        renderer = canvas.figure.canvas.get_renderer()
        boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
        at = {text: axes.transData.transform((x, y)) for x, y, text, _ in points}
    for text, box in boxes.items():
        gap = {
            name: np.hypot(x - np.clip(x, box.x0, box.x1), y - np.clip(y, box.y0, box.y1))
            for name, (x, y) in at.items()
        }
        assert min(gap, key=gap.get) == text


def test_a_bar_ends_inside_the_frame(table, monkeypatch):
    rows = read_rows(
        {**row, "test_accuracy": 0.5 + 0.4 * row["seed"]} for row in table(seeds=[0, 1])
    )
    monkeypatch.setattr(Canvas, "png", lambda canvas: canvas.figure)
    axes = accuracy_against_parameters(summarise(rows, METHODS), LOOKS).axes[0]
    low, high = axes.get_ylim()
    ends = [y for bar in axes.containers for y in bar.lines[2][0].get_segments()[0][:, 1]]
    assert ends and low < min(ends) and max(ends) < high


def test_the_change_by_layer_has_a_line_where_only_some_layers_change(row, monkeypatch):
    changes = {"a": 0.1, "b": 0.0, "c": 0.2, "d": 0.0}
    rows = read_rows(row("full", domain, 0, site_change=changes) for domain in ("signs", "faces"))
    monkeypatch.setattr(Canvas, "png", lambda canvas: canvas.figure)
    axes = change_by_layer(rows, LOOKS).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.1], [2, 0.2]]
    assert len(axes.collections) == 1


def test_no_two_methods_look_alike():
    names = [MethodLabel(f"m{n}", f"m{n}", "adapters") for n in range(20)]
    found = looks([*names, *METHODS]).values()
    assert len({(look.colour, look.marker) for look in found}) == 20 + len(METHODS)


def test_a_group_shares_a_colour_a_method_has_its_own_marker_and_fine_tuning_is_black():
    assert LOOKS["parallel"].colour == LOOKS["lowrank(rank=8)"].colour != LOOKS["head"].colour
    assert len({look.marker for look in LOOKS.values()} - {"o"}) == 2
    assert LOOKS["full"].colour == "#222222"


def test_drawing_changes_nothing_of_matplotlib(table):
    import matplotlib

    before = dict(matplotlib.rcParams)
    accuracy_by_domain(read_rows(table(seeds=[0])), LOOKS)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package_of_the_extra_the_extra_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'needs {package}.*pip install "onetrunk\[report'):
        require_extra()


def test_a_curve_has_a_gap_where_a_level_is_missing():
    found = {5: Spread(0.4, 0.01, 3), 10: None, 25: Spread(0.6, None, 1)}
    with picture(4, 3) as canvas:
        axes = canvas.figure.subplots()
        _curve(axes, LOOKS["head"], 0.0, {5: 0, 10: 1, 25: 2}, found, set())
        heights = np.asarray(axes.lines[0].get_ydata(), float)
        assert heights == pytest.approx([40.0, np.nan, 60.0], nan_ok=True)


def test_a_map_of_one_domain_is_wide_enough_for_its_words(table):
    rows = read_rows(table(["parallel"], ["signs"], [0]))
    pixels = drawn(change_map(rows, (0.05, 0.4)))
    assert (pixels[:60, :4] > 250).all() and (pixels[:60, -4:] > 250).all()  # nothing is cut off
