"""Recipe: everything that decides a training but the data, as typed fields.

A parameter's kind (adapter, norm, head, full) is decided once from the module that holds it, and
learning rate and decay follow the kind; nothing depends on the order of parameters (in the authors'
released optimiser the decay of one layer leaks into the next, see RELEASED).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn, optim

from .. import written
from ..core.adapters import Adapter
from ..core.attach import domain_of
from ..core.tree import is_norm
from ..errors import TrainingError

Kind = Literal["adapter", "norm", "head", "full"]
BySize = tuple[tuple[int, float], ...]  # (up to so many training images, value), then the rest


@dataclass(frozen=True)
class Recipe:
    """How to train a domain. The default is chosen by the evidence in docs/recipes.md.

    Args:
        epochs: passes over the training images.
        batch_size: images a step; the last, smaller batch of an epoch is left out.
        optimizer: `adamw` or `sgd`.
        lr: the highest learning rate, of adapters, norms and head.
        lr_full: the same of pretrained weights that are trained themselves (`Full`).
        momentum, nesterov: of SGD.
        decay_adapter, decay_norm, decay_head, decay_full: weight decay by kind of parameter.
        decay_by_size: a table ((n, decay), ...): the adapters' decay for domains of up to n images.
        schedule: `cosine` (to zero), `step` (times 0.1 at `drops`) or `constant`.
        drops: where `step` drops, as shares of the training.
        warmup: share of the training in which the learning rate rises from zero.
        label_smoothing: share of the target spread over all classes.
        clip_norm: gradients are scaled down to this norm; None leaves them.
        crop_scale: (least, most) share of an image's area in a training crop; None: a crop of
            fixed size, as in the paper.
        precision: `auto` (bfloat16 autocast on CUDA devices that have it), `float32`, `bfloat16`.
        seed: of order, augmentation and dropout.

    Raises:
        TrainingError: for a value out of range.
    """

    epochs: int = 30
    batch_size: int = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-3
    lr_full: float = 3e-4
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
    crop_scale: tuple[float, float] | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"epochs": self.epochs, "batch_size": self.batch_size}
        for name, value in whole.items():
            if not isinstance(value, int) or value < 1:
                raise TrainingError(f"Recipe({name}={value!r}): give a whole number of at least 1.")
        for name in ("lr", "lr_full", "decay_adapter", "decay_norm", "decay_head", "decay_full"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainingError(f"Recipe({name}={getattr(self, name)!r}): give 0 or more.")
        for name in ("warmup", "momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(
                    f"Recipe({name}={getattr(self, name)!r}): give a share from 0 to below 1."
                )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise TrainingError(f"Recipe(clip_norm={self.clip_norm!r}): give more than 0, or None.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise TrainingError(
                    f"Recipe({name}={getattr(self, name)!r}): known are {', '.join(known)}."
                )

    def __str__(self) -> str:
        return written.write("recipe", written.changed_fields(self))

    def learning_rate(self, step: int, n_steps: int) -> float:
        """The factor on the learning rate at `step` of `n_steps`, from 0 to 1.

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
            return 0.1 ** sum(step >= drop * n_steps for drop in self.drops)
        return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))

    def adapter_decay(self, n_images: int) -> float:
        """The adapters' weight decay for a domain of `n_images` training images."""
        for limit, decay in self.decay_by_size:
            if n_images <= limit:
                return decay
        return self.decay_adapter


_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "step", "constant"),
    "precision": ("auto", "float32", "bfloat16"),
}

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
)
"""The papers' text: SGD, 0.1 to 0.001, and more decay for small domains (0.005, 0.002 or 0.0005)."""

RELEASED = dataclasses.replace(
    PAPER,
    decay_adapter=1e-4,
    decay_by_size=(),
    decay_norm=1e-4,
    decay_head=1e-4,
    decay_full=1e-4,
)
"""What the released code really does: its optimiser gives every parameter the adapters' 1e-4."""

RECIPES: dict[str, Recipe] = {"default": Recipe(), "paper": PAPER, "released": RELEASED}


def read_recipe(text: str) -> Recipe:
    """`default`, `paper`, `released`, or one with fields: `paper(epochs=10, lr=0.05)`.

    Raises:
        SpecError: where the form, the name or a field is unknown.
        TrainingError: where a value is out of its range.
    """
    name, fields = written.read(text, "recipe")
    if name not in RECIPES:
        raise written.unknown("recipe", name, RECIPES)
    base = {f.name: getattr(RECIPES[name], f.name) for f in dataclasses.fields(Recipe)}
    recipe: Recipe = written.build(Recipe, {**base, **fields}, text, "recipe")
    return recipe


def kinds(model: nn.Module) -> dict[str, Kind]:
    """The kind of every trainable parameter of a domain's network, by name."""
    fresh_heads = _head_prefixes(model)
    found: dict[str, Kind] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                full_name = f"{name}.{own}" if name else own
                found[full_name] = _kind(module, full_name, fresh_heads)
    return found


def _kind(module: nn.Module, name: str, heads: tuple[str, ...]) -> Kind:
    if isinstance(module, Adapter):
        return "adapter"
    if is_norm(module):
        return "norm"
    return "head" if name.startswith(heads) else "full"


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in domain_of(model).head)


def build_optimizer(model: nn.Module, recipe: Recipe, n_images: int) -> optim.Optimizer:
    """The optimiser over the domain's parameters; vectors (gains, biases) are decayed as norms.

    Raises:
        TrainingError: where nothing of `model` is trainable.
    """
    lr: dict[Kind, float] = dict.fromkeys(("adapter", "norm", "head"), recipe.lr)  # type: ignore[arg-type]
    lr["full"] = recipe.lr_full
    decay: dict[Kind, float] = {
        "adapter": recipe.adapter_decay(n_images),
        "norm": recipe.decay_norm,
        "head": recipe.decay_head,
        "full": recipe.decay_full,
    }
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, kind in kinds(model).items():
        weight_decay = decay[kind] if parameters[name].ndim > 1 else decay["norm"]
        groups.setdefault((lr[kind], weight_decay), []).append(parameters[name])
    if not groups:
        raise TrainingError("nothing to train: the domain's network has no trainable parameter.")
    listed: list[dict[str, Any]] = [
        {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": weight_decay}
        for (rate, weight_decay), params in groups.items()
    ]
    if recipe.optimizer == "adamw":
        return optim.AdamW(listed)
    return optim.SGD(listed, momentum=recipe.momentum, nesterov=recipe.nesterov)
