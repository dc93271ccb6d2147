"""Norm only: the domain's own affine and running statistics, nothing beside the layers.

Every family but `head` gives the domain its own norms; this one stops there: 2 o numbers and 2 o
statistics a batch norm. Batch norm that follows a convolution folds into it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from ..sites import Site
from .base import Family


@dataclass(frozen=True)
class Norm(Family):
    """The domain's own batch, layer or group norms and head; no adapters."""

    name: ClassVar[str] = "norm"

    def n_numbers(self, site: Site) -> int:
        return 0

    def make(self, site: Site, generator: Generator) -> None:
        return None
