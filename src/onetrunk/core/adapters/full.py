"""Full: every weight of the domain is its own and trained. Fine-tuning, the reference.

Given for the whole network, everything is the domain's, position embeddings and the like included;
placed at some sites, only those layers' weights are.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Generator

from ..sites import Site
from .base import Family


@dataclass(frozen=True)
class Full(Family):
    """Fine-tuning: a whole network of the domain's own, started from the backbone."""

    name: ClassVar[str] = "full"
    scope: ClassVar[Literal["adapters", "head", "everything"]] = "everything"

    def n_numbers(self, site: Site) -> int:
        return site.n_weights + site.n_other

    def make(self, site: Site, generator: Generator) -> None:
        return None
