"""Report: what came of a decathlon, as a table for people and JSON for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .domains import DOMAINS
from .scoring import points, score


@dataclass(frozen=True)
class DomainResult:
    """One domain: how many images and classes it had, and accuracies in [0, 1] where known.

    Args:
        val_accuracy: of the epoch that stays, chosen there, so it flatters a little; None where the
            validation images were trained on.
        test_accuracy: where labels were given.
        n_numbers: how many numbers are the domain's own.
    """

    name: str
    n_classes: int
    n_train: int
    n_val: int
    n_test: int
    n_numbers: int
    val_accuracy: float | None
    test_accuracy: float | None = None

    @property
    def is_official(self) -> bool:
        """Whether classes and test images are as many as the challenge has."""
        official = DOMAINS[self.name]
        return (self.n_classes, self.n_test) == (official.n_classes, official.n_test)


@dataclass(frozen=True)
class Report:
    """A decathlon, run.

    Args:
        domains: one result each.
        backbone, adapter, recipe, train_on: how they were trained, as written.
        results: the file to submit, or its beginning.
        answered: the domains that it has answers for, from this run or an earlier one.
        left_out: domains that are trained there, and why their answers are not in it.
    """

    domains: tuple[DomainResult, ...]
    backbone: str
    adapter: str
    recipe: str
    train_on: str
    results: str
    answered: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def lacking(self) -> tuple[str, ...]:
        """Domains without answers: a submission has none."""
        return tuple(name for name in DOMAINS if name not in self.answered)

    @property
    def measured_on(self) -> Literal["test", "val"] | None:
        """Where the accuracies are from; None where there are none."""
        if all(domain.test_accuracy is not None for domain in self.domains):
            return "test"
        return "val" if all(one.val_accuracy is not None for one in self.domains) else None

    @property
    def accuracies(self) -> dict[str, float]:
        """By domain, on `measured_on`; none where it is None."""
        found = {
            one.name: one.test_accuracy if self.measured_on == "test" else one.val_accuracy
            for one in self.domains
        }
        return {name: accuracy for name, accuracy in found.items() if accuracy is not None}

    @property
    def points(self) -> dict[str, float]:
        """What each domain adds to S."""
        return points(self.accuracies) if self.measured_on else {}

    @property
    def mean_accuracy(self) -> float | None:
        """Over the domains."""
        found = self.accuracies
        return sum(found.values()) / len(found) if self.measured_on else None

    @property
    def score(self) -> float | None:
        """S, where all ten domains have an accuracy. On validation images it is no result."""
        return score(self.accuracies) if len(self.points) == len(DOMAINS) else None

    @property
    def unofficial(self) -> tuple[str, ...]:
        """Domains with other numbers of classes or test images: their points are no result."""
        return tuple(domain.name for domain in self.domains if not domain.is_official)

    def table(self) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]]]:
        """Head and rows, accuracies in per cent, as the papers print them."""
        head = ("domain", "classes", "train", "test", "val %", "test %", "points")
        rows = [
            (
                one.name,
                str(one.n_classes),
                str(one.n_train),
                str(one.n_test),
                _percent(one.val_accuracy),
                _percent(one.test_accuracy),
                f"{self.points[one.name]:.0f}" if self.points else "",
            )
            for one in self.domains
        ]
        return head, rows

    def to_json(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "backbone": self.backbone,
            "adapter": self.adapter,
            "recipe": self.recipe,
            "train_on": self.train_on,
            "results": self.results,
            "lacking": list(self.lacking),
            "left_out": dict(self.left_out),
            "measured_on": self.measured_on,
            "mean_accuracy": self.mean_accuracy,
            "score": self.score,
            "unofficial": list(self.unofficial),
            "points": self.points,
            "domains": [{**one.__dict__} for one in self.domains],
        }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
