"""Setting: what every method of a study starts from in one cell, and a domain made of it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.attach import Norms, attach
from ..core.plan import Where
from ..data import Prepared, Preprocessing
from ..training.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """What a method starts from in one cell; `recipe` is the protocol's own, before any tuning."""

    backbone: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Prepared
    val: Prepared
    seed: int
    recipe: Recipe

    @property
    def input_size(self) -> tuple[int, int, int]:
        side = self.preprocessing.size_px
        return self.preprocessing.channels, side, side

    def attach(self, family: Any, where: Where | None = None, norms: Norms = "all") -> nn.Module:
        """A fresh domain of this cell's classes."""
        return attach(
            self.backbone,
            family,
            self.classes,
            where=where,
            norms=norms,
            preprocessing=self.preprocessing,
            input_size=self.input_size,
            seed=self.seed,
        )
