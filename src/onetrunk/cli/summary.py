"""What is told of a compression, and kept with one that was stopped: figures by domain, in all."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..core.compress import Compressed
from .console import Screen, counted, percent, size


@dataclass
class Figures:
    """What is known of one domain: accuracies, bytes of its file, why something was not done.

    Args:
        judged_on: the images of its accuracies: test, or validation where it has no others.
    """

    judged_on: str = ""
    before: float | None = None
    compressed: float | None = None
    tuned: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    note: str = ""


@dataclass
class Summary:
    """A compression's figures, from before its domains are tuned.

    Args:
        domains: of every domain of the bank.
        factored: those that are over the basis.
        numbers_before, numbers_after: their adapters', the basis counted once.
        n_layers, n_whole: adapted layers, and those that stayed as they were.
        left_out: layer -> why its adapters were not factored.
        basis_tuned: whether the basis is not the factoring's.
        curve: (share kept, mean validation accuracy), for the picture.
    """

    domains: dict[str, Figures]
    factored: list[str]
    numbers_before: int
    numbers_after: int
    n_layers: int
    n_whole: int
    left_out: dict[str, str]
    basis_tuned: bool = False
    curve: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def of(cls, found: Compressed, domains: dict[str, Figures]) -> "Summary":
        """Of a compression as it was found."""
        whole = [site for site, directions in found.directions.items() if directions == (0, 0)]
        return cls(
            domains,
            list(found),
            found.numbers_before,
            found.numbers_after,
            len(found.directions),
            len(whole),
            dict(found.left_out),
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Summary":
        """The inverse of `to_json`."""
        domains = {name: Figures(**known) for name, known in values["domains"].items()}
        return cls(**{**values, "domains": domains})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def kept(self) -> float:
        """Numbers after over numbers before."""
        return self.numbers_after / self.numbers_before


def show(
    summary: Summary,
    basis_before: int,
    basis_bytes: int,
    screen: Screen,
    *,
    asked: float | None,
    uniform: bool,
) -> None:
    """Prints it as a table; `asked` is the share that was to be kept, `uniform` of the ranks."""
    screen.say(
        f"adapters of {counted(len(summary.factored), 'domain')}: {summary.numbers_before:,} -> "
        f"{summary.numbers_after:,} numbers ({percent(summary.kept)}), their basis counted once"
    )
    if uniform:
        screen.say(
            f"  {percent(asked or 0)} of the directions at every layer where that is smaller"
        )
    elif asked is not None and summary.kept < LITTLE * asked:
        screen.say("  fewer than asked for: more directions would hold nothing")
    rows = [
        (
            name,
            *(
                "" if a is None else percent(a)
                for a in (known.before, known.compressed, known.tuned)
            ),
            size(known.bytes_before),
            size(known.bytes_after),
            "; ".join(filter(None, (known.note, ON_VALIDATION * (known.judged_on == "val")))),
        )
        for name, known in summary.domains.items()
    ]
    before = sum(known.bytes_before for known in summary.domains.values()) + basis_before
    after = sum(known.bytes_after for known in summary.domains.values()) + basis_bytes
    had = size(basis_before) if basis_before else ""
    rows.append(("basis, shared", "", "", "", had, size(basis_bytes), ""))
    rows.append(("all", "", "", "", size(before), size(after), ""))
    head = ("domain", "before", "compressed", "tuned", "size before", "size after", "remark")
    screen.table(head, rows)
    if summary.n_whole:
        screen.say(
            f"  {summary.n_whole} of {summary.n_layers} layers stay as they were: factors would be "
            "larger"
        )
    for site, why in summary.left_out.items():
        screen.say(f"  {site} is kept as it was: {why}")


LITTLE = 0.9  # of the share that was asked for
ON_VALIDATION = "judged on validation images"
