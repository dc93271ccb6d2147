"""Protocol: everything that the cells of one study have in common, as typed fields.

Every method starts at the linear probe's head and has the same tuning: whole trainings, whose best
epoch on validation images chooses. First which statistics batch norms train with; then the learning
rates, the recipe's times each of `factors`, and where the best lies at an end of the row one more
beyond it, up to twice; then higher decays for as long as each is better. The best training is the
result, and its test images are scored once. Other seeds than `TUNED_SEED` train once, at the
setting that it chose.

A trial is as long as the training it stands for: short ones choose what is fastest, not what is
best, and that costs slow starters such as adapters more than fine-tuning.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import TrainingError
from ..training.recipe import Recipe

Statistics = Literal["batch", "running"]
TUNED_SEED = 0  # whose trials choose for every seed


@dataclass(frozen=True)
class Tuning:
    """One setting of what is tuned: a factor on the recipe's learning rates, decay, statistics."""

    factor: float
    decay: float
    statistics: Statistics


@dataclass(frozen=True)
class Protocol:
    """How the cells of a study are trained.

    Args:
        images: training images a domain at most, at least `least_per_class` a class.
        val_images: validation images a domain at most.
        per_class: training images of each class at most instead of `images`; None: not limited.
        size_px: side of the square that the network sees.
        epochs, least_steps: passes of a training, and more where it would have fewer steps.
        factors: on the recipe's learning rates, rising by a constant ratio.
        decays: weight decays, rising; the first one goes with the other trials.
        statistics: what batch norms may train with (`Recipe.norm_statistics`).
        batch_size: images a step.
        tune_epochs: passes when the factors of a joint compression are tuned.
    """

    images: int = 320
    least_per_class: int = 4
    val_images: int = 160
    per_class: int | None = None
    size_px: int = 48
    epochs: int = 10
    least_steps: int = 200
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    decays: tuple[float, ...] = (0.05, 1.0, 5.0)
    statistics: tuple[Statistics, ...] = ("running", "batch")
    batch_size: int = 16
    tune_epochs: int = 4

    def __post_init__(self) -> None:
        for field in ("images", "least_per_class", "val_images", "epochs", "least_steps"):
            if getattr(self, field) < 1:
                raise TrainingError(f"Protocol({field}={getattr(self, field)}): give at least 1.")
        if len(self.factors) < 2 or list(self.factors) != sorted(set(self.factors)):
            raise TrainingError(
                f"Protocol(factors={self.factors}): give two or more learning-rate factors, rising."
            )
        if not self.decays or list(self.decays) != sorted(set(self.decays)):
            raise TrainingError(f"Protocol(decays={self.decays}): give decays that rise.")
        if not self.statistics or not set(self.statistics) <= {"batch", "running"}:
            raise TrainingError(
                f"Protocol(statistics={self.statistics}): give 'batch', 'running' or both."
            )

    @property
    def start(self) -> Tuning:
        """The setting from which the search goes on: the recipe's own rates, the least decay."""
        return Tuning(1.0, self.decays[0], self.statistics[0])

    def n_epochs(self, n_images: int) -> int:
        """The passes of a training on so many images.

        >>> Protocol().n_epochs(320), Protocol().n_epochs(50)
        (10, 67)
        """
        steps_an_epoch = max(1, n_images // self.batch_size)
        return max(self.epochs, -(-self.least_steps // steps_an_epoch))

    def recipe(self, tuning: Tuning, seed: int, epochs: int) -> Recipe:
        """The recipe of one training: the default one at other rates, decays and statistics."""
        base = Recipe()
        return dataclasses.replace(
            base,
            epochs=epochs,
            batch_size=self.batch_size,
            lr=base.lr * tuning.factor,
            lr_full=base.lr_full * tuning.factor,
            decay_adapter=tuning.decay,
            decay_head=tuning.decay,
            decay_full=tuning.decay,
            norm_statistics=tuning.statistics,
            seed=seed,
        )

    def search(self, accuracy: Callable[[Tuning], float]) -> Tuning:
        """The setting that did best; `accuracy` is asked for each once or more."""
        settings = [dataclasses.replace(self.start, statistics=s) for s in self.statistics]
        best = max(settings, key=accuracy)  # of equals the first
        tried = {f: accuracy(dataclasses.replace(best, factor=f)) for f in self.factors}
        while (factor := self.beyond(tried)) is not None:
            tried[factor] = accuracy(dataclasses.replace(best, factor=factor))
        best = dataclasses.replace(best, factor=self.best(tried))
        for decay in self.decays[1:]:
            more = dataclasses.replace(best, decay=decay)
            if accuracy(more) <= accuracy(best):
                break
            best = more
        return best

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
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


SMALL = Protocol()
"""For two CPU cores: a domain and method in two to eight minutes on one of them."""

FULL = Protocol(
    images=10**9, val_images=10**9, size_px=64, least_steps=300, batch_size=64,
)  # fmt: skip
"""For one GPU: every image."""
