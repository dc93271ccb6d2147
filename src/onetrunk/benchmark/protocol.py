"""Protocol: everything that the cells of one study have in common, as typed fields.

Every method starts at the linear probe's head and has the same ratios of rates and the same tuning:
whole trainings, whose best epoch on validation images chooses. Learning rates are the recipe's
times a power of `ratio`; the search climbs from the recipe's own, down or up, for as long as each
is better. Batch norms keep the backbone's statistics first; where the batch's are better at the
recipe's rates, the climb begins anew there. Then higher decays for as long as each is better. The
best training is the result, and its test images are scored once. Other seeds than `TUNED_SEED`
train once, at the setting that it chose.

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
Keep = Literal["late", "best"]
HEAD_RATIO, INNER_RATIO = 0.2, 16.0  # rates of head and inner factor: docs/recipes.md
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
        ratio, most_steps: learning rates are the recipe's times a power of `ratio`, whose exponent
            is at most `most_steps` up or down.
        decays: weight decays, rising; the first one goes with the other trials.
        statistics: what batch norms may train with (`Recipe.norm_statistics`), in this order.
        batch_size: images a step.
        keep: which epoch stays (`Recipe.keep`); `late` where validation images are few.
        tune_epochs: passes when the factors of a joint compression are tuned.
    """

    images: int = 320
    least_per_class: int = 4
    val_images: int = 160
    per_class: int | None = None
    size_px: int = 48
    epochs: int = 10
    least_steps: int = 200
    ratio: float = 3.0
    most_steps: int = 3
    decays: tuple[float, ...] = (0.05, 1.0, 5.0)
    statistics: tuple[Statistics, ...] = ("running", "batch")
    batch_size: int = 16
    keep: Keep = "best"
    tune_epochs: int = 4

    def __post_init__(self) -> None:
        counts = (
            "images", "least_per_class", "val_images", "size_px", "epochs", "least_steps",
            "most_steps", "batch_size", "tune_epochs",
        )  # fmt: skip
        for field in counts:
            if getattr(self, field) < 1:
                raise TrainingError(f"Protocol({field}={getattr(self, field)}): give at least 1.")
        if self.ratio <= 1:
            raise TrainingError(
                f"Protocol(ratio={self.ratio}): give a ratio of learning rates above 1."
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
            head_lr_ratio=HEAD_RATIO,
            loraplus_lr_ratio=INNER_RATIO,
            decay_adapter=tuning.decay,
            decay_head=tuning.decay,
            decay_full=tuning.decay,
            norm_statistics=tuning.statistics,
            keep=self.keep,
            seed=seed,
        )

    def search(self, accuracy: Callable[[Tuning], float]) -> Tuning:
        """The setting that did best; `accuracy` is asked for each once or more."""
        best = self.climbed(accuracy, self.start)
        for statistics in self.statistics[1:]:
            other = dataclasses.replace(self.start, statistics=statistics)
            if accuracy(other) > accuracy(best):
                best = self.climbed(accuracy, other)
        for decay in self.decays[1:]:
            more = dataclasses.replace(best, decay=decay)
            if accuracy(best) >= accuracy(more):
                break
            best = more
        return best

    def climbed(self, accuracy: Callable[[Tuning], float], start: Tuning) -> Tuning:
        """The best rates that a climb from `start` comes to, while each is better than the last.

        It first goes where the optimum is more often: down with the backbone's statistics, which
        do not follow what a high rate changes, up with the batch's.
        """
        best, down_and_up = start, (1 / self.ratio, self.ratio)
        for step in down_and_up if start.statistics == "running" else reversed(down_and_up):
            for n in range(1, self.most_steps + 1):
                following = dataclasses.replace(start, factor=start.factor * step**n)
                if accuracy(best) >= accuracy(following):
                    break
                best = following
            if best != start:
                break
        return best

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
