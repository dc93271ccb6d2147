"""write: a report on disk: NAME.md, NAME.json, the pictures, and NAME.html that holds all."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onetrunk.errors import DataError
from onetrunk.files import reason, write_atomically

from .compose import Report, Section, compose
from .html import page
from .look import require_extra
from .markdown import escape, table_text
from .rows import MethodLabel, Place, Row, read_rows


def write_report(
    rows: Iterable[Mapping[str, Any]],
    methods: Sequence[MethodLabel],
    out: Path,
    name: str,
    command: str,
    expected: Sequence[Place] = (),
    failures: Sequence[str] = (),
) -> list[Path]:
    """Writes the report of `rows` into the folder `out`, and returns the files.

    Args:
        rows: one dict a finished cell, some or all of a study; see `Row`.
        methods: order, labels and colours; a method of the rows that is not among them comes last.
        out: made where it is missing; files of an earlier report of that name are replaced, each
            in one step, and its pictures that this one does not have are removed.
        name: of the study; its files are called by it.
        command: the line that repeats the study.
        expected: the cells of the whole study: those without a row are listed as missing.
        failures: why some are, a sentence each.

    Returns:
        NAME.md, the pictures, NAME.html (which needs none of the others), NAME.json.

    Raises:
        DataError: no row, a row that cannot be, or a folder that cannot be written.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    require_extra()
    read = read_rows(rows)
    if not read:
        raise DataError(
            f"report {name!r} has no finished cell to show. Run the study first: {command}"
        )
    report = compose(read, methods, f"onetrunk: {name}", command, expected, failures)
    plain = [_plain(row) for row in read]
    contents = {
        f"{name}.md": markdown_text(report).encode(),
        **{picture.name: picture.png for s in report.sections for picture in s.pictures},
        f"{name}.html": page(report, plain).encode(),
        f"{name}.json": _json(report, command, plain),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in _pictures_of(out / f"{name}.json") - contents.keys():
            (out / file).unlink(missing_ok=True)
        for file, data in contents.items():
            write_atomically(out / file, data)
    except OSError as error:
        raise DataError(f"the report cannot be written to {out}: {reason(error)}") from error
    return [out / file for file in contents]


def _pictures_of(path: Path) -> set[str]:
    """The pictures that an earlier report lists as its own; none where that cannot be read."""
    try:
        names = set(map(str, json.loads(path.read_bytes())["pictures"]))
    except (OSError, ValueError, LookupError, TypeError):
        return set()
    return {name for name in names if Path(name).name == name and name.endswith(".png")}


def markdown_text(report: Report) -> str:
    """The report's facts, what is missing, sentences, tables and pictures, as Markdown."""
    parts = [f"# {escape(report.title)}", *_facts(report)]
    for section in report.sections:
        parts.append(f"## {escape(section.title)}")
        parts += [escape(section.sentence)] if section.sentence else []
        parts += [table_text(table) for table in section.tables]
        parts += [
            f"![{escape(picture.caption)}]({picture.name})"
            for picture in section.pictures
            if not picture.folded
        ]
    return "\n\n".join(parts) + "\n"


def _facts(report: Report) -> list[str]:
    known = "\n".join(f"- {escape(name)}: {escape(text)}" for name, text in report.facts)
    absent = "\n".join(f"- {escape(line)}" for line in report.missing)
    return [known, f"Missing:\n\n{absent}"] if absent else [known]


def _json(report: Report, command: str, rows: list[dict[str, Any]]) -> bytes:
    value = {
        "title": report.title,
        "command": command,
        "missing": report.missing,
        "pictures": [picture.name for s in report.sections for picture in s.pictures],
        "sections": [_section_value(section) for section in report.sections],
        "rows": rows,
    }
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode()


def _section_value(section: Section) -> dict[str, Any]:
    tables = [{"title": t.title, "head": t.head, "rows": t.rows} for t in section.tables]
    return {
        "title": section.title,
        "sentence": section.sentence,
        "methods": [dataclasses.asdict(summary) for summary in section.summaries],
        "tables": tables,
    }


def _plain(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row)
