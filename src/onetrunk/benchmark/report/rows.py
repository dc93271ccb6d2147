"""A row: what one finished cell (backbone, domain, method, seed) of a study found, checked.

Rows come from JSON lines, so they are dicts; `read_rows` turns them into values with types. The
table of a study grows over several runs: a cell that was run twice counts once, the later time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from onetrunk.errors import DataError

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Place(NamedTuple):
    """What a cell is of; `per_class` images of each class, or None where all were used."""

    study: str
    backbone: str
    method: str
    domain: str
    seed: int
    per_class: int | None


@dataclass(frozen=True)
class MethodLabel:
    """How a report shows a method: its name in the rows, its label, the group that it is coloured
    with."""

    name: str
    label: str
    group: str


@dataclass(frozen=True)
class Trial:
    """One setting that was tried on the validation images before the cell was run."""

    lr: Finite | None = None
    decay: Finite | None = None
    val_accuracy: Share | None = None


@dataclass(frozen=True)
class Row:
    """One finished cell.

    Args:
        n_train, per_class: training images in all; a class, or None where all were used.
        short_classes: classes that have fewer images than `per_class`.
        lr, decay, norm_statistics, trials: what was chosen, and what it was chosen from.
        val_accuracy, test_accuracy: in [0, 1].
        numbers, head_numbers: the domain's own adapters and norms; its classifier.
        shared_numbers: of a basis that all domains of the method share, counted once.
        site_change, site_numbers: by site in order of execution; the size of the change relative
            to the layer's weights, and the numbers that were spent there.
    """

    study: str
    backbone: str
    domain: str
    method: str
    seed: int
    test_accuracy: Share
    numbers: Count
    backbone_numbers: Annotated[int, Field(gt=0)]
    n_train: Count | None = None
    per_class: Annotated[int, Field(gt=0)] | None = None
    short_classes: Count = 0
    size_px: int | None = None
    epochs: int | None = None
    lr: Finite | None = None
    decay: Finite | None = None
    norm_statistics: str | None = None
    trials: tuple[Trial, ...] = ()
    val_accuracy: Share | None = None
    head_numbers: Count = 0
    shared_numbers: Count = 0
    seconds: Finite = 0.0
    site_change: Mapping[str, Finite] | None = None
    site_numbers: Mapping[str, Count] | None = None
    machine: str = ""
    threads: int | None = None
    torch: str = ""

    @property
    def changes_sites(self) -> bool:
        """Whether the method changed any layer of the backbone; a linear probe does not."""
        return any(change > 0 for change in (self.site_change or {}).values())

    @property
    def place(self) -> Place:
        """The cell that it is of."""
        return Place(self.study, self.backbone, self.method, self.domain, self.seed, self.per_class)


def read_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Checks rows and keeps the last one of each cell; keys that no report shows are ignored.

    Raises:
        DataError: a row without one of the needed keys, or with a value that cannot be (an
            accuracy outside [0, 1], NaN).

    >>> row = {"study": "mini", "backbone": "resnet26()", "domain": "flowers", "method": "full"}
    >>> row |= {"seed": 0, "test_accuracy": 0.7, "numbers": 10, "backbone_numbers": 10}
    >>> [row.test_accuracy for row in read_rows([row, row | {"test_accuracy": 0.8}])]
    [0.8]
    """
    read = (_read(place, row) for place, row in enumerate(rows, 1))
    return list({row.place: row for row in read}.values())


def with_methods_of(rows: Sequence[Row], methods: Sequence[MethodLabel]) -> list[MethodLabel]:
    """The methods in their order, and after them those of the rows that the table does not name."""
    named = {method.name for method in methods}
    others = dict.fromkeys(row.method for row in rows if row.method not in named)
    return [*methods, *(MethodLabel(name, name, "other") for name in others)]


def _read(place: int, row: Mapping[str, Any]) -> Row:
    try:
        return _adapter().validate_python(dict(row))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"row {place} of the results cannot be reported: {where}: {first['msg']}. "
            "Remove the row, or run its cell again."
        ) from error


@cache
def _adapter() -> TypeAdapter[Row]:
    return TypeAdapter(Row)
