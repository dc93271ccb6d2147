"""Tables: the same figures in Markdown and HTML, with what limits them beside them."""

import pytest

from onetrunk.benchmark.report import MethodLabel, read_rows
from onetrunk.benchmark.report.markdown import escape, table_text
from onetrunk.benchmark.report.summary import summarise
from onetrunk.benchmark.report.tables import (
    Table,
    cell_table,
    choice_table,
    domain_table,
    method_table,
    transfer_tables,
)

METHODS = [
    MethodLabel("head", "Probe", "base"),
    MethodLabel("parallel", "Parallel", "adapters"),
    MethodLabel("lowrank(rank=8)", "Low rank 8", "adapters"),
    MethodLabel("full", "Fine-tuning", "reference"),
]


def column(table: Table, name: str) -> dict[str, str]:
    place = table.head.index(name)
    return {row[0]: row[place] for row in table.rows}


def all_tables(rows):
    if any(row.per_class for row in rows):
        return [*transfer_tables(rows, METHODS), choice_table(rows, METHODS)]
    return [
        method_table(summarise(rows, METHODS)),
        domain_table(rows, METHODS),
        choice_table(rows, METHODS),
        cell_table(rows, METHODS),
    ]


def cases(table):
    whole = table()
    return {
        "whole": whole,
        "one cell": whole[:1],
        "one seed": [row for row in whole if row["seed"] == 0],
        "no fine-tuning": [row for row in whole if row["method"] != "full"],
        "every fifth": whole[::5],
        "transfer": [row for k in (5, 20) for row in table(per_class=k)][::3],
    }


@pytest.mark.parametrize("case", ["whole", "one cell", "one seed", "every fifth", "transfer"])
def test_every_line_has_the_heads_length_and_no_figure_is_nan(table, case):
    for found in all_tables(read_rows(cases(table)[case])):
        assert all(len(row) == len(found.head) for row in found.rows)
        text = table_text(found).lower()
        assert "nan" not in text and "none" not in text and "inf" not in text.replace("info", "")


def test_the_main_table_says_over_how_many_domains_a_line_is(table):
    rows = [r for r in table() if (r["method"], r["domain"]) != ("parallel", "faces")]
    found = method_table(summarise(read_rows(rows), METHODS))
    assert column(found, "domains")["Parallel"] == "3 of 4"
    assert column(found, "S of Fine-tuning") == {
        "Probe": "1000", "Parallel": "750", "Low rank 8": "1000", "Fine-tuning": "",
    }  # fmt: skip
    assert any(note.endswith("compare: Parallel.") for note in found.notes)


def test_without_fine_tuning_nothing_is_said_of_it(table):
    rows = read_rows(cases(table)["no fine-tuning"])
    found = method_table(summarise(rows, METHODS))
    assert not {"S", "against full, points"} & set(found.head)
    assert "accuracy, %" in found.head and "full" not in table_text(found)


def test_a_domain_that_fine_tuning_solves_is_named_below_the_scores(table):
    rows = [
        r | {"test_accuracy": 1.0} if (r["method"], r["domain"]) == ("full", "signs") else r
        for r in table()
    ]
    found = method_table(summarise(read_rows(rows), METHODS))
    assert any("makes no error on signs: Emax is 0 there" in note for note in found.notes)


def test_the_best_of_a_domain_is_marked(row):
    rows = [row("head", "signs", 0, test_accuracy=0.5), row("full", "signs", 0, test_accuracy=0.7)]
    found = domain_table(read_rows(rows), METHODS)
    assert found.rows[0] == ("signs", "50.0", "70.0")
    assert found.best == {(0, 2)}


def test_levels_that_classes_cannot_fill_are_named_below_the_table(row):
    rows = [row("full", "signs", 0, per_class=5), row("full", "faces", 0, per_class=5)]
    rows.append(row("full", "faces", 0, per_class=25, short_classes=2))
    notes = transfer_tables(read_rows(rows), METHODS)[0].notes
    assert notes[-1] == "Classes with fewer than 25 images: faces 2."
    assert not any("than 5 images" in note for note in notes)


def test_a_mean_over_fewer_domains_is_never_marked_as_the_best(row):
    rows = [row("full", d, 0, per_class=5, test_accuracy=0.5) for d in ("signs", "faces")]
    rows += [row("head", d, 0, per_class=5, test_accuracy=0.4) for d in ("signs", "faces")]
    rows += [row("parallel", "signs", 0, per_class=5, test_accuracy=0.9)]
    found = transfer_tables(read_rows(rows), METHODS)[0]
    assert column(found, "5") == {
        "Probe": "40.0",
        "Parallel": "90.0 (1 of 2)",
        "Fine-tuning": "50.0",
    }
    assert found.best == {(2, 1)}


def test_fewer_seeds_are_said_beside_a_mean(row):
    rows = [
        row("parallel", "signs", seed, per_class=per_class, test_accuracy=0.4 + 0.1 * seed)
        for per_class, seeds in ((5, 3), (25, 2))
        for seed in range(seeds)
    ]
    (found,) = transfer_tables(read_rows(rows), METHODS)
    assert column(found, "5") == {"Parallel": "50.0 ± 10.0"}
    assert column(found, "25") == {"Parallel": "45.0 ± 7.1 (n=2)"}


def test_chosen_rates_at_an_end_of_the_grid_are_counted(row):
    rates = (0.001, 0.01, 0.1)
    trials = [{"lr": rate, "decay": d, "val_accuracy": 0.5} for rate in rates for d in (0.0, 1.0)]
    rows = [
        row("full", "signs", i, lr=rate, decay=1.0, trials=trials) for i, rate in enumerate(rates)
    ]
    for i, statistics in enumerate(("batch", "running", "running")):
        rows[i]["norm_statistics"] = statistics
    found = read_rows(rows)
    assert choice_table(found, METHODS).rows[0][4] == "2 of 3"
    assert choice_table(found, METHODS).rows[0][-2:] == ("2 (1 lowest, 1 highest)", "3 (3 highest)")
    assert list(column(cell_table(found, METHODS), "lr at an edge").values()) == ["highest tried"]
    assert [line[9] for line in cell_table(found, METHODS).rows] == [
        "lowest tried", "", "highest tried",
    ]  # fmt: skip


def test_markdown_shows_any_name_as_it_is():
    assert escape("<script>|*_[`") == r"&lt;script&gt;\|\*\_\[\`"
    assert escape("tf_efficientnet_lite0\nb") == "tf_efficientnet_lite0 b"
    found = table_text(Table("t", ("method", "%"), (("a|b", "1"),)))
    assert found.splitlines()[-1] == r"| a\|b | 1 |"
