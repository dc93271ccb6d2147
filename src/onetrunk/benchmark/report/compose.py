"""compose: rows -> a report: its facts, sentences, tables and pictures, in the order to show."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .look import Look, looks
from .overview import facts, missing
from .pictures import (
    accuracy_against_parameters,
    accuracy_by_domain,
    change_by_layer,
    change_map,
    change_range,
    transfer_curves,
)
from .rows import MethodLabel, Place, Row, with_methods_of
from .summary import REFERENCE, MethodSummary, grouped, summarise
from .tables import Table, cell_table, choice_table, domain_table, method_table, transfer_tables
from .transfer import sentence


@dataclass(frozen=True)
class Picture:
    """A PNG with the name of its file; `folded`: one of many, shown on request."""

    name: str
    caption: str
    png: bytes
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """What one study found on one backbone."""

    title: str
    sentence: str | None
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    summaries: tuple[MethodSummary, ...]


@dataclass(frozen=True)
class Report:
    """A study's report, ready to be written in any form."""

    title: str
    facts: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    sections: tuple[Section, ...]
    cells: Table


def compose(
    rows: Sequence[Row],
    methods: Sequence[MethodLabel],
    title: str,
    command: str,
    expected: Sequence[Place] = (),
    failures: Sequence[str] = (),
) -> Report:
    """The report of `rows`, a section for each study and backbone; see `write_report`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    named = with_methods_of(rows, methods)
    drawn = looks(named)
    groups = grouped(rows, lambda row: (row.study, row.backbone))
    sections = [
        _section(f"{study}: {backbone}", place, group, named, drawn)
        for place, ((study, backbone), group) in enumerate(groups.items(), 1)
    ]
    return Report(
        title=title,
        facts=tuple(facts(rows, command)),
        missing=(*missing(rows, named, expected), *failures),
        sections=tuple(sections),
        cells=cell_table(rows, named),
    )


def file_name(kind: str, *what: int | str) -> str:
    """A file name from a kind, numbers that make it unique, and any text: only plain letters.

    >>> file_name("accuracy", 1, "mini: timm:resnet18/../<b>")
    'accuracy-1-mini-timm-resnet18-b.png'
    """
    words = re.findall(r"[A-Za-z0-9_]+", " ".join(map(str, what)))
    return f"{'-'.join([kind, *words])[:100]}.png"


def _section(
    title: str, place: int, rows: list[Row], methods: list[MethodLabel], drawn: dict[str, Look]
) -> Section:
    is_transfer = any(row.per_class is not None for row in rows)
    part = _transfer if is_transfer else _comparison
    return part(title, place, rows, methods, drawn)


def _transfer(
    title: str, place: int, rows: list[Row], methods: list[MethodLabel], drawn: dict[str, Look]
) -> Section:
    picture = Picture(
        file_name("transfer", place, title),
        "Test accuracy against training images a class: the mean over domains, then each domain. "
        "Bars: the standard deviation over seeds. Hollow: over fewer domains than others.",
        transfer_curves(rows, drawn),
    )
    tables = (*transfer_tables(rows, methods), *_choices(rows, methods))
    return Section(title, sentence(rows, methods), tables, (picture,), ())


def _comparison(
    title: str, place: int, rows: list[Row], methods: list[MethodLabel], drawn: dict[str, Look]
) -> Section:
    summaries = summarise(rows, methods)
    pictures = [
        Picture(
            file_name("accuracy-parameters", place, title),
            "Accuracy against the numbers that a domain adds. Bars: the standard deviation over "
            "seeds. Hollow: over fewer domains than others.",
            accuracy_against_parameters(summaries, drawn),
        ),
        Picture(
            file_name("accuracy-domains", place, title),
            "Accuracy by domain, the hardest for "
            f"{drawn[REFERENCE].label if REFERENCE in drawn else 'all'} first. "
            "Bars: the standard deviation over seeds.",
            accuracy_by_domain(rows, drawn),
        ),
        *_changes(title, place, rows, methods, drawn),
    ]
    tables = (
        method_table(summaries),
        domain_table(rows, methods),
        *_choices(rows, methods),
    )
    return Section(title, None, tables, tuple(pictures), tuple(summaries))


def _choices(rows: list[Row], methods: list[MethodLabel]) -> list[Table]:
    """No table where nothing was chosen: linear probes have no learning rate."""
    return [choice_table(rows, methods)] if any(row.lr is not None for row in rows) else []


def _changes(
    title: str, place: int, rows: list[Row], methods: list[MethodLabel], drawn: dict[str, Look]
) -> list[Picture]:
    measured = [row for row in rows if row.changes_sites]
    if not measured:
        return []
    of_method = grouped(measured, lambda row: row.method)
    scale = change_range(measured)
    layers = Picture(
        file_name("change-layers", place, title),
        "How much each layer changes, in order of execution, marked where a stage begins: median "
        "over domains, shaded from the first to the third quarter.",
        change_by_layer(measured, drawn),
    )
    maps = [
        Picture(
            file_name("change", place, number, method.name, title),
            f"{method.label}: size of the change by site and domain, one scale for all methods. "
            "Grey: none.",
            change_map(of_method[method.name], scale),
            folded=True,
        )
        for number, method in enumerate(methods)
        if method.name in of_method
    ]
    return [layers, *maps]
