"""Rows: checked, one of each cell, and what is missing among them is said."""

import math

import pytest

from onetrunk.benchmark.report import MethodLabel, Place, read_rows
from onetrunk.benchmark.report.overview import facts, missing
from onetrunk.benchmark.report.rows import with_methods_of
from onetrunk.benchmark.report.summary import decay_edge, lr_edge
from onetrunk.errors import DataError

METHODS = [MethodLabel("full", "Fine-tuning", "reference"), MethodLabel("head", "Probe", "base")]


def test_a_cell_that_was_run_twice_counts_once_the_later_time(row):
    twice = [row("full", "signs", 0), row("full", "signs", 0, test_accuracy=0.25)]
    (read,) = read_rows(twice)
    assert read.test_accuracy == 0.25


def test_keys_that_no_report_shows_are_ignored(row):
    (read,) = read_rows([row("full", "signs", 0, key="0f", kind="cell")])
    assert read.domain == "signs"


@pytest.mark.parametrize("wrong", [math.nan, 1.5, -0.1, None, "high"])
def test_an_accuracy_that_cannot_be_is_refused(row, wrong):
    rows = [row("full", "signs", 0), row("head", "signs", 0, test_accuracy=wrong)]
    with pytest.raises(DataError, match=r"row 2 .*test_accuracy.*Remove the row, or run its cell"):
        read_rows(rows)


def test_a_row_without_a_needed_key_is_refused(row):
    incomplete = {key: value for key, value in row("full", "signs", 0).items() if key != "domain"}
    with pytest.raises(DataError, match="row 1 of the results cannot be reported: domain"):
        read_rows([incomplete])


def test_a_method_that_the_table_does_not_name_comes_last(row):
    rows = read_rows([row("new(keep=1)", "signs", 0), row("head", "signs", 0)])
    assert [m.name for m in with_methods_of(rows, METHODS)] == ["full", "head", "new(keep=1)"]


def test_missing_cells_are_named_by_domain_and_a_whole_table_has_none(table):
    rows = read_rows(table(["full", "head"], ["flowers", "signs"], range(3)))
    expected = [row.place for row in rows]
    assert missing(rows, METHODS, expected) == []
    fewer = [row for row in rows if row.method != "head" or (row.domain, row.seed) < ("signs", 1)]
    (line,) = missing(fewer, METHODS, expected)
    assert line == "mini, resnet26(width=0.5): Probe lacks 2 of 6 cells (signs 2)"
    (line,) = missing([row for row in rows if row.method == "full"], METHODS, expected)
    assert line.endswith("Probe lacks 6 of 6 cells (all)")
    lone = Place("mini", "timm:resnet18", "series", "signs", 0, None)  # of a backbone without a row
    assert missing(rows, METHODS, [*expected, lone]) == [
        "mini, timm:resnet18: series lacks 1 of 1 cell (all)"
    ]


def test_the_facts_say_how_the_table_came_about(table):
    found = dict(facts(read_rows(table(["full"], ["signs"], [0, 2])), "onetrunk benchmark mini"))
    assert found["command"] == "onetrunk benchmark mini"
    assert found["cells"] == "2, over 1 domain"
    assert found["seeds"] == "0, 2"
    assert found["computing time"] == "2 min 1 s"


@pytest.mark.parametrize(
    ("lr", "tried", "edge"),
    [
        (0.001, (0.001, 0.01, 0.1), "lowest"),
        (0.1, (0.001, 0.01, 0.1), "highest"),
        (0.01, (0.001, 0.01, 0.1), None),
        (0.01, (0.01,), None),
        (None, (0.01, 0.1), None),
        (0.0, (0.0, 0.1, 0.3), None),  # a compressed network, as it was
        (0.1, (0.0, 0.1), None),
    ],
)
def test_a_learning_rate_at_the_edge_of_its_grid_is_found(row, lr, tried, edge):
    trials = [{"lr": rate, "decay": 0.0, "val_accuracy": 0.5} for rate in tried]
    (read,) = read_rows([row("full", "signs", 0, lr=lr, trials=trials)])
    assert lr_edge(read) == edge


def test_a_decay_is_held_against_those_tried_at_the_chosen_rate(row):
    tried = [(0.1, 0.05), (0.3, 0.05), (0.3, 1.0)]
    trials = [{"lr": lr, "decay": decay, "val_accuracy": 0.5} for lr, decay in tried]
    found = [
        decay_edge(read)
        for read in read_rows(
            row("full", "signs", seed, lr=lr, decay=decay, trials=trials)
            for seed, (lr, decay) in enumerate(tried)
        )
    ]
    assert found == [None, "lowest", "highest"]
