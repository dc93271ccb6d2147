"""markdown: a report's tables as Markdown, for docs/results."""

import re
from collections.abc import Iterable

from .tables import Table

_SPECIAL = re.compile(r"([\\`*\[\]|])|(?<!\w)(_)|(_)(?!\w)")


def table_text(table: Table) -> str:
    """A heading, the table, its notes; figures to the right, the best ones in bold.

    >>> print(table_text(Table("T", ("method", "%"), (("a|b", "1"),), best=frozenset({(0, 1)}))))
    ### T
    <BLANKLINE>
    | method | % |
    |---|---:|
    | a\\|b | **1** |
    """
    n_columns = len(table.head)
    lines = [f"### {escape(table.title)}", ""]
    lines.append(_line(map(escape, table.head)))
    lines.append(
        f"|{'|'.join('---' if place < table.n_names else '---:' for place in range(n_columns))}|"
    )
    for place, row in enumerate(table.rows):
        cells = [
            f"**{escape(cell)}**" if (place, column) in table.best else escape(cell)
            for column, cell in enumerate(row)
        ]
        lines.append(_line(cells))
    for note in table.notes:
        lines += ["", escape(note)]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table.

    >>> escape("<script> a|b *c* tf_lite")
    '&lt;script&gt; a\\\\|b \\\\*c\\\\* tf_lite'
    """
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(lambda match: "\\" + match.group(), plain)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
