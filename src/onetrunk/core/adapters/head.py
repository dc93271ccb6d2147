"""Head only: a linear probe. The backbone stays as it was, its norms included.

The norms keep the backbone's statistics even in train mode, so the features are exactly the
backbone's (but for dropout, where the backbone has any), and only the classifier's numbers are the
domain's.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Generator

from ..sites import Site
from .base import Family


@dataclass(frozen=True)
class Head(Family):
    """A linear probe: the domain's own classifier on the frozen backbone's features."""

    name: ClassVar[str] = "head"
    scope: ClassVar[Literal["adapters", "head", "everything"]] = "head"

    def n_numbers(self, site: Site) -> int:
        return 0

    def make(self, site: Site, generator: Generator) -> None:
        return None
