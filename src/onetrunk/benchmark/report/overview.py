"""overview: under what conditions a table came about, and what is still missing in it."""

from collections.abc import Iterable, Sequence

from .rows import MethodLabel, Place, Row
from .summary import grouped

N_NAMED = 8  # domains that are named before the rest is counted


def facts(rows: Sequence[Row], command: str) -> list[tuple[str, str]]:
    """What a reader must know to repeat the study: (name, text) in the order to show."""
    seconds = sum(row.seconds for row in rows)
    n_domains = len({row.domain for row in rows})
    found = [
        ("command", command),
        ("cells", f"{len(rows)}, over {_n(n_domains, 'domain')}"),
        ("backbones", _values(row.backbone for row in rows)),
        ("seeds", _values(sorted({row.seed for row in rows}))),
        ("image size", _values(sorted({row.size_px for row in rows if row.size_px}), " px")),
        ("epochs", _values(sorted({row.epochs for row in rows if row.epochs}))),
        ("computing time", duration(seconds)),
        ("machine", _values(row.machine for row in rows if row.machine)),
        ("threads", _values(sorted({row.threads for row in rows if row.threads}))),
        ("torch", _values(sorted({row.torch for row in rows if row.torch}))),
    ]
    return [(name, text) for name, text in found if text]


def missing(
    rows: Sequence[Row], methods: Sequence[MethodLabel], expected: Sequence[Place]
) -> list[str]:
    """Sentences on the cells of `expected` that are not there; empty where the table is whole."""
    found, done = [], {row.place for row in rows}
    labels = {method.name: method.label for method in methods}
    of_method = grouped(expected, lambda at: (at.study, at.backbone, at.method))
    for (study, backbone, method), places in of_method.items():
        absent = [place for place in places if place not in done]
        if absent:
            which = "all" if len(absent) == len(places) else _named(absent)
            found.append(
                f"{study}, {backbone}: {labels.get(method, method)} lacks {len(absent)} of "
                f"{_n(len(places), 'cell')} ({which})"
            )
    return found


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(42), duration(750), duration(7320)
    ('42 s', '12 min 30 s', '2 h 2 min')
    """
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    if hours:
        return f"{hours} h {rest_min} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"


def _named(absent: Sequence[Place]) -> str:
    """Domains and how many cells of each are missing."""
    of_domain = grouped(absent, lambda place: place.domain)
    names = [f"{domain} {len(places)}" for domain, places in of_domain.items()]
    rest = [f"{len(names) - N_NAMED} more domains"] if len(names) > N_NAMED else []
    return ", ".join([*names[:N_NAMED], *rest])


def _values(values: Iterable[object], unit: str = "") -> str:
    return ", ".join(f"{value}{unit}" for value in dict.fromkeys(values))


def _n(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
