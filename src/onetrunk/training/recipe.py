"""Recipe: everything that decides a training but the data, as typed fields."""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeGuard

from .. import written
from ..errors import TrainingError

HEAD_LR_RATIO, LORAPLUS_LR_RATIO = 0.2, 4.0  # docs/recipes.md
SHORT = 600  # steps up to which norms may keep the backbone's statistics: docs/recipes.md
BySize = tuple[tuple[int, float], ...]  # (up to so many training images, value), then the rest


@dataclass(frozen=True)
class Recipe:
    """How to train a domain. The default is chosen by the evidence in docs/recipes.md.

    Args:
        epochs: passes over the training images; None: by their number, see `n_epochs`.
        batch_size: images a step; the last, smaller batch of an epoch is left out, and a domain
            with fewer images has one step an epoch.
        optimizer: `adamw` or `sgd`.
        lr: the highest learning rate, of adapters, norms and head.
        lr_full: the same of pretrained weights that are trained themselves (`Full`).
        head_lr_ratio: the head's learning rate over `lr`; None: `HEAD_LR_RATIO` where norms keep
            the backbone's statistics, since the head may start at the linear probe's there, else 1.
        loraplus_lr_ratio: how many times faster U of an adapter U V learns than V, whose rate is
            `lr` over it (LoRA+, Hayou et al., ICML 2024; PEFT's name for it); None:
            `LORAPLUS_LR_RATIO` where norms keep the backbone's statistics, else 1.
        momentum, nesterov: of SGD.
        decay_adapter, decay_norm, decay_head, decay_full: weight decay by kind of parameter.
        decay_by_size: a table ((n, decay), ...), the smallest n first: the adapters' decay for
            domains of up to n training images; larger ones have `decay_adapter`.
        schedule: `cosine` (to zero), `step` (times 0.1 at `drops`) or `constant`.
        drops: where `step` drops, as shares of the training.
        warmup: share of the training in which the learning rate rises from zero.
        label_smoothing: share of the target spread over all classes.
        clip_norm: gradients are scaled down to this norm; None leaves them.
        crop_scale: (least, most) share of an image's area in a training crop; None: a crop of
            fixed size, as in the paper.
        precision: `auto` (bfloat16 autocast on CUDA devices that have it), `float32`, `bfloat16`.
        norm_statistics: what batch norms train with. `batch`: each batch's mean and variance, and
            the domain's own are learned for evaluation; `running`: the backbone's, as in
            evaluation, so that training starts where the linear probe is, and gain and shift alone
            are learned (an adapter's own norm takes the batch's either way); `auto`: `running`
            where the backbone's statistics were trained and the training is short, up to 600 steps,
            as long ones at this learning rate need norms that follow what the adapters change.
        keep: which epoch's network stays where there are validation images, and is no worse there
            than the start. `late`: the latest within two standard errors of the best, as the best
            of many epochs on a few images is mostly luck; `best`: the best, the first of equals.
        seed: of order, augmentation and dropout.

    Raises:
        TrainingError: for a value out of range.
    """

    epochs: int | None = None
    batch_size: int = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 5e-3
    lr_full: float = 5e-4
    head_lr_ratio: float | None = None
    loraplus_lr_ratio: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    decay_adapter: float = 0.05
    decay_norm: float = 0.0
    decay_head: float = 0.05
    decay_full: float = 0.05
    decay_by_size: BySize = ()
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    drops: tuple[float, ...] = (2 / 3, 5 / 6)
    warmup: float = 0.1
    label_smoothing: float = 0.1
    clip_norm: float | None = 1.0
    crop_scale: tuple[float, float] | None = (0.4, 1.0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    norm_statistics: Literal["auto", "batch", "running"] = "auto"
    keep: Literal["late", "best"] = "late"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and not (_is_whole(self.epochs) and self.epochs >= 1):
            raise self._refused("epochs", "a whole number of at least 1, or None")
        if not _is_whole(self.batch_size) or self.batch_size < 1:
            raise self._refused("batch_size", "a whole number of at least 1")
        if not _is_whole(self.seed):
            raise self._refused("seed", "a whole number")
        for name in _NOT_NEGATIVE:
            if not _is_number(getattr(self, name)):
                raise self._refused(name, "a number of 0 or more")
        if self.head_lr_ratio is not None and not _is_number(self.head_lr_ratio):
            raise self._refused("head_lr_ratio", "a number of 0 or more, or None")
        for name in ("loraplus_lr_ratio", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value):
                raise self._refused(name, "a number above 0, or None")
        for name in ("warmup", "momentum", "label_smoothing"):
            if not _is_number(getattr(self, name)) or getattr(self, name) >= 1:
                raise self._refused(name, "a share from 0 to below 1")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise self._refused(name, f"one of {', '.join(known)}")
        pulls = self.optimizer == "sgd" and bool(self.momentum)
        if not isinstance(self.nesterov, bool) or (self.nesterov and not pulls):
            raise self._refused("nesterov", "True (with sgd and a momentum above 0) or False")
        self._check_tables()
        self._normalise()

    def _check_tables(self) -> None:
        if not _is_list(self.drops) or not all(_is_number(x) and x <= 1 for x in self.drops):
            raise self._refused("drops", "shares of the training, e.g. (0.5, 0.75)")
        table = self.decay_by_size
        if not _is_list(table) or not all(_is_size_and_decay(row) for row in table):
            raise self._refused("decay_by_size", "(images, decay) pairs, e.g. ((2000, 0.005),)")
        if any(fewer[0] >= more[0] for fewer, more in pairwise(table)):
            raise self._refused("decay_by_size", "the pair with the fewest images first")
        crop = self.crop_scale
        pair = _is_list(crop) and len(crop) == 2 and all(_is_number(x) for x in crop)
        if crop is not None and not (pair and 0 < crop[0] <= crop[1] <= 1):
            raise self._refused("crop_scale", "(least, most) with 0 < least <= most <= 1, or None")

    def _normalise(self) -> None:
        """One written form for equal values: 1 and 1.0, a list and a tuple."""
        normal: dict[str, Any] = {
            name: float(getattr(self, name)) for name in _FLOATS if getattr(self, name) is not None
        }
        normal["drops"] = tuple(float(share) for share in self.drops)
        normal["decay_by_size"] = tuple((n, float(decay)) for n, decay in self.decay_by_size)
        if self.crop_scale is not None:
            normal["crop_scale"] = tuple(float(share) for share in self.crop_scale)
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    def _refused(self, name: str, wanted: str) -> TrainingError:
        return TrainingError(f"Recipe({name}={getattr(self, name)!r}): give {wanted}.")

    def __str__(self) -> str:
        """The form that `read_recipe` reads: the nearest named recipe and what differs from it."""
        ours = _fields(self)
        changed = {
            name: {key: value for key, value in ours.items() if value != getattr(recipe, key)}
            for name, recipe in RECIPES.items()
        }
        nearest = min(changed, key=lambda name: len(changed[name]))
        return written.write(nearest, changed[nearest])

    def learning_rate(self, step: int, n_steps: int) -> float:
        """The factor on the learning rate at `step` (from 0) of `n_steps`, from 0 to 1.

        >>> recipe = Recipe(schedule="step", warmup=0.0)
        >>> [round(recipe.learning_rate(s, 120), 3) for s in (0, 79, 80, 100)]
        [1.0, 1.0, 0.1, 0.01]
        """
        n_warmup = round(self.warmup * n_steps)
        if step < n_warmup:
            return (step + 1) / n_warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return 0.1 ** sum(step >= round(drop * n_steps) for drop in self.drops)
        return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))

    def n_epochs(self, n_images: int) -> int:
        """The passes over `n_images` training images.

        Where `epochs` is None: 900 / sqrt(n), from 5 to 90, so that small domains are seen often
        and large ones take more steps in all.

        >>> [Recipe().n_epochs(n) for n in (100, 300, 2_000, 30_000)]
        [90, 52, 20, 5]
        """
        if self.epochs is not None:
            return self.epochs
        return max(5, min(90, round(900 / n_images**0.5)))

    def n_steps(self, n_images: int) -> int:
        """The steps of a training on `n_images` images.

        >>> Recipe(epochs=3).n_steps(100), Recipe(epochs=3).n_steps(10)
        (9, 3)
        """
        return self.n_epochs(n_images) * max(1, n_images // self.batch_size)

    def adapter_decay(self, n_images: int) -> float:
        """The adapters' weight decay for a domain of `n_images` training images."""
        for limit, decay in self.decay_by_size:
            if n_images <= limit:
                return decay
        return self.decay_adapter


_FLOATS = (
    "lr", "lr_full", "head_lr_ratio", "loraplus_lr_ratio", "momentum", "decay_adapter",
    "decay_norm", "decay_head", "decay_full", "warmup", "label_smoothing", "clip_norm",
)  # fmt: skip
_NOT_NEGATIVE = (
    "lr", "lr_full", "decay_adapter", "decay_norm", "decay_head", "decay_full",
)  # fmt: skip
_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "step", "constant"),
    "precision": ("auto", "float32", "bfloat16"),
    "norm_statistics": ("auto", "batch", "running"),
    "keep": ("late", "best"),
}


def _is_size_and_decay(row: Any) -> bool:
    return _is_list(row) and len(row) == 2 and _is_whole(row[0]) and _is_number(row[1])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Finite, 0 or more."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 <= value < math.inf


def _is_list(value: Any) -> TypeGuard[tuple[Any, ...] | list[Any]]:
    return isinstance(value, (tuple, list))


PAPER = Recipe(
    epochs=120,
    batch_size=128,
    optimizer="sgd",
    lr=0.1,
    lr_full=0.1,
    decay_adapter=5e-4,
    decay_by_size=((2_000, 5e-3), (10_000, 2e-3)),
    decay_norm=5e-4,
    decay_head=5e-4,
    decay_full=5e-4,
    schedule="step",
    warmup=0.0,
    label_smoothing=0.0,
    clip_norm=None,
    crop_scale=None,
    norm_statistics="batch",
    keep="best",
)
"""The papers' text: SGD, 0.1 to 0.001, and more decay for small domains (0.005, 0.002, 0.0005)."""

RELEASED = dataclasses.replace(
    PAPER,
    decay_adapter=1e-4,
    decay_by_size=(),
    decay_norm=1e-4,
    decay_head=1e-4,
    decay_full=1e-4,
)
"""What the released code really does: its optimiser gives every parameter the adapters' 1e-4."""

PRETRAIN = Recipe(
    epochs=30,
    batch_size=64,
    optimizer="sgd",
    nesterov=True,
    lr=0.05,
    lr_full=0.05,
    decay_adapter=5e-4,
    decay_head=5e-4,
    decay_full=5e-4,
    warmup=0.05,
    clip_norm=None,
    crop_scale=(0.35, 1.0),
    norm_statistics="batch",
)
"""A backbone from random weights: SGD with Nesterov momentum, cosine to zero, random crops."""

RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    "paper": PAPER,
    "released": RELEASED,
    "pretrain": PRETRAIN,
}


def checked(recipe: object) -> Recipe:
    """The recipe; the default for None.

    Raises:
        TrainingError: where it is none.
    """
    if recipe is None:
        return Recipe()
    if not isinstance(recipe, Recipe):
        raise TrainingError(f"{recipe!r} is no recipe: give a Recipe, or read_recipe(text).")
    return recipe


def read_recipe(text: str) -> Recipe:
    """`default`, `paper`, `released`, `pretrain`, or one with fields: `paper(epochs=10, lr=0.05)`.

    Raises:
        SpecError: where the form, the name or a field is unknown.
        TrainingError: where a value is out of its range.
    """
    name, fields = written.read(text, "recipe")
    if name not in RECIPES:
        raise written.unknown("recipe", name, RECIPES)
    recipe: Recipe = written.build(Recipe, {**_fields(RECIPES[name]), **fields}, text, "recipe")
    return recipe


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
