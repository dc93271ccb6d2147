"""Protocol: everything that the cells of one study have in common, as typed fields.

Every method has the same tuning: the learning rates of its recipe times each of `factors`, trained
for `trial_epochs`; where the best lies at an end of the row, one more beyond it, up to twice; then
`decays` at the best. Validation images choose. The best is trained for `epochs`, its best epoch by
validation is kept, and the test images are scored once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import TrainingError
from ..training.recipe import Recipe


@dataclass(frozen=True)
class Protocol:
    """How the cells of a study are trained.

    Args:
        images: training images a domain at most, at least `least_per_class` a class.
        val_images: validation images a domain at most.
        per_class: training images of each class at most instead of `images`; None: not limited.
        size_px: side of the square that the network sees.
        epochs: passes of the final training; the trials have `trial_epochs`.
        factors: on the recipe's learning rates, rising by a constant ratio.
        decays: weight decays tried; the first one goes with the trials of `factors`.
        batch_size: images a step.
        tune_epochs: passes when the factors of a joint compression are tuned.
    """

    images: int = 400
    least_per_class: int = 4
    val_images: int = 200
    per_class: int | None = None
    size_px: int = 48
    epochs: int = 16
    trial_epochs: int = 3
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    decays: tuple[float, ...] = (0.05, 1.0)
    batch_size: int = 32
    tune_epochs: int = 6

    def __post_init__(self) -> None:
        for field in ("images", "least_per_class", "val_images", "epochs", "trial_epochs"):
            if getattr(self, field) < 1:
                raise TrainingError(f"Protocol({field}={getattr(self, field)}): give at least 1.")
        if len(self.factors) < 2 or list(self.factors) != sorted(set(self.factors)):
            raise TrainingError(
                f"Protocol(factors={self.factors}): give two or more learning-rate factors, rising."
            )

    def recipe(self, factor: float, decay: float, seed: int, epochs: int) -> Recipe:
        """The recipe of one training: the default one at other learning rates and decays."""
        base = Recipe()
        return dataclasses.replace(
            base,
            epochs=epochs,
            batch_size=self.batch_size,
            lr=base.lr * factor,
            lr_full=base.lr_full * factor,
            decay_adapter=decay,
            decay_head=decay,
            decay_full=decay,
            seed=seed,
        )

    def best(self, tried: dict[float, float]) -> float:
        """The factor of the highest accuracy; of equals the one nearest to the row's middle."""
        row = sorted(tried)
        return max(row, key=lambda factor: (tried[factor], -abs(row.index(factor) - len(row) / 2)))

    def beyond(self, tried: dict[float, float]) -> float | None:
        """The next factor to try where the best of `tried` (factor -> accuracy) lies at an end."""
        row, best = sorted(tried), self.best(tried)
        if len(row) >= len(self.factors) + 2:
            return None
        ratio = self.factors[1] / self.factors[0]
        if best == row[0]:
            return best / ratio
        return best * ratio if best == row[-1] else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "factors": list(self.factors),
                "decays": list(self.decays)}  # fmt: skip


SMALL = Protocol()
"""For two CPU cores: a domain and method in one to three minutes."""

FULL = Protocol(
    images=10**9, val_images=10**9, size_px=64, epochs=40, trial_epochs=8, batch_size=64,
    tune_epochs=15,
)  # fmt: skip
"""For one GPU: every image."""
