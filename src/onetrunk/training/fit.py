"""fit: training as a generator of steps; the caller owns the loop.

A step is a pure function of the state before it and of its number: the order of images, their crops
and the dropout are drawn from (seed, epoch, step), never from a generator that runs along. That is
why a training that was killed goes on bit for bit from its last checkpoint, in the middle of an epoch
too (same threads, same build).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attach import delta, delta_names
from ..errors import TrainingError
from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .evaluate import logits_of
from .examples import Examples, Progress, examples_of, one_ahead
from .recipe import Recipe, build_optimizer


@dataclass(frozen=True)
class Step:
    """What one training step did.

    Args:
        step, n_steps: number of the step, from 1, and how many there will be.
        epoch: number of the epoch it belongs to, from 1.
        loss: mean loss of the batch before the step.
        lr: the learning rate's factor in this step, 0 to 1, times the recipe's `lr`.
        val_accuracy: accuracy on the validation data after an epoch's last step; else None.
        best: whether the network after this step is the best by validation so far.
    """

    step: int
    n_steps: int
    epoch: int
    loss: float
    lr: float
    val_accuracy: float | None = None
    best: bool = False


@dataclass
class _Run:
    """What a training carries from one step to the next, besides the network itself."""

    step: int = 0
    best_accuracy: float = -1.0
    best: dict[str, Tensor] | None = None
    good: dict[str, Tensor] = field(default_factory=dict)


def fit(
    model: nn.Module,
    train: Any,
    recipe: Recipe | None = None,
    *,
    val: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float = 60.0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Iterator[Step]:
    """Trains the domain's own numbers of `model` in place, one step for every record it yields.

    With `val`, the network is at the end the one of the epoch that did best there; leaving the loop
    early keeps the network of the last step.

    Args:
        train, val: `Images`, `Prepared` (see onetrunk.data), or a map-style dataset of (image,
            label) whose images are PIL images, uint8 arrays or float tensors (c, h, w).
        recipe: by default `Recipe()`.
        checkpoint: a file that is written every `checkpoint_every_s` seconds and when the loop is
            left; where it exists already, training goes on from it. Remove it when done.
        device: by default CUDA, then MPS, then the CPU, whatever there is; the network is moved.
        progress: called with (images read, images) while the images are prepared.

    Raises:
        TrainingError: for data or a checkpoint that does not fit, and for a loss that is not
            finite; the network then has the state after its last good epoch.
        DataError: where images cannot be read.

    >>> # for step in fit(model, images, Recipe(epochs=5), val=more): print(step.loss)
    """
    recipe = recipe or Recipe()
    device = torch.device(device or best_device())
    train_examples = examples_of(model, train, progress)
    val_examples = None if val is None else examples_of(model, val, progress)
    model.to(device)
    optimizer = build_optimizer(model, recipe, len(train_examples))
    run = _Run(good=_snapshot(model))
    identity = _identity(model, train_examples, recipe)
    if checkpoint is not None and Path(checkpoint).exists():
        _resume(Path(checkpoint), model, optimizer, run, identity)
    loop = _Loop(model, train_examples, val_examples, recipe, optimizer, run, device)
    saved_at = time.monotonic()
    try:
        for record in loop.steps():
            yield record
            if checkpoint is not None and time.monotonic() - saved_at >= checkpoint_every_s:
                _save(Path(checkpoint), model, optimizer, run, identity)
                saved_at = time.monotonic()
    except GeneratorExit:  # the caller left its loop, by `break` or by an exception of its own
        if checkpoint is not None:
            _save(Path(checkpoint), model, optimizer, run, identity)
        raise
    if run.best is not None:
        _restore(model, run.best)
    model.eval()


def best_device() -> str:
    """`cuda`, `mps` or `cpu`: the first that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class _Loop:
    """The steps of one training over its parts."""

    def __init__(
        self,
        model: nn.Module,
        train: Examples,
        val: Examples | None,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        run: _Run,
        device: torch.device,
    ) -> None:
        self.model, self.train, self.val, self.recipe = model, train, val, recipe
        self.optimizer, self.run, self.device = optimizer, run, device
        self.batch_size = min(recipe.batch_size, len(train))
        self.steps_an_epoch = len(train) // self.batch_size
        self.n_steps = self.steps_an_epoch * recipe.epochs
        self.dtype = next(model.parameters()).dtype
        self.autocast = _autocasts(recipe, device)

    def steps(self) -> Iterator[Step]:
        first_epoch = self.run.step // self.steps_an_epoch
        for epoch in range(first_epoch, self.recipe.epochs):
            yield from self._epoch(epoch)

    def _epoch(self, epoch: int) -> Iterator[Step]:
        done = self.run.step - epoch * self.steps_an_epoch
        batches = self._order(epoch)[done:]
        for x_bchw, labels_b in one_ahead(lambda rows: self._batch(rows, epoch), batches):
            lr = self.recipe.learning_rate(self.run.step, self.n_steps)
            loss = self._step(x_bchw, labels_b, lr)
            if not math.isfinite(loss):
                self._stop(loss)
            self.run.step += 1
            last = self.run.step % self.steps_an_epoch == 0
            accuracy, best = self._after_epoch() if last else (None, False)
            yield Step(
                self.run.step, self.n_steps, epoch + 1, loss, lr * self.recipe.lr, accuracy, best
            )

    def _order(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(_mixed(self.recipe.seed, epoch))
        order = torch.randperm(len(self.train), generator=generator)
        return list(order[: self.steps_an_epoch * self.batch_size].split(self.batch_size))

    def _batch(self, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        scale = self.recipe.crop_scale
        x_bchw = self.train.training_views(rows, self.recipe.seed, epoch, scale)
        return x_bchw, self.train.labels[rows]

    def _step(self, x_bchw: Tensor, labels_b: Tensor, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr
        self.model.train()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_mixed(self.recipe.seed, self.run.step))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                logits_bc = self.model(x_bchw.to(self.device, self.dtype))
            loss = F.cross_entropy(
                logits_bc.float() if self.autocast else logits_bc,
                labels_b.to(self.device),
                label_smoothing=self.recipe.label_smoothing,
            )
            self.optimizer.zero_grad()
            loss.backward()
        if not torch.isfinite(loss):
            return float(loss)
        if self.recipe.clip_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.recipe.clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    def _after_epoch(self) -> tuple[float | None, bool]:
        accuracy, best = None, False
        if self.val is not None:
            logits_nc = logits_of(self.model, self.val)
            accuracy = float((logits_nc.argmax(1) == self.val.labels).float().mean())
            best = accuracy > self.run.best_accuracy
        state = _snapshot(self.model)
        if all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point()):
            self.run.good = state
        elif self.run.step == self.n_steps:
            self._stop(math.nan)
        if best and self.run.good is state:
            self.run.best_accuracy, self.run.best = accuracy or 0.0, state
        return accuracy, best

    def _stop(self, loss: float) -> None:
        _restore(self.model, self.run.best or self.run.good)
        raise TrainingError(
            f"the loss is {loss} at step {self.run.step + 1} of {self.n_steps}: the network has "
            f"its last good state again. Lower the learning rate (lr={self.recipe.lr:g}), or look "
            "for broken numbers in the data."
        )


def _mixed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number + 1) % 2**63


def _autocasts(recipe: Recipe, device: torch.device) -> bool:
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return recipe.precision == "bfloat16"


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in delta(model).items()}


@torch.no_grad()
def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fills the domain's own tensors in place."""
    for name, tensor in delta(model).items():
        tensor.copy_(state[name])


def _identity(model: nn.Module, train: Examples, recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint must agree on with the training that goes on from it."""
    labels = train.labels
    weighted = (labels * torch.arange(1, len(labels) + 1)).sum()
    return {
        "recipe": str(recipe),
        "family": model.domain.family,
        "classes": list(model.domain.classes),
        "n_images": len(train),
        "labels": int(weighted),
        "tensors": len(delta_names(model)),
        "threads": torch.get_num_threads(),
    }


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: _Run,
    identity: dict[str, Any],
) -> None:
    write_checkpoint(
        path,
        Checkpoint(
            identity=identity,
            step=run.step,
            best_accuracy=run.best_accuracy,
            network=delta(model),
            best=run.best,
            good=run.good,
            optimizer=_optimizer_state(optimizer),
        ),
    )


def _resume(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: _Run,
    identity: dict[str, Any],
) -> None:
    saved = read_checkpoint(path, identity)
    _restore(model, saved.network)
    device = next(model.parameters()).device
    run.step, run.best_accuracy = saved.step, saved.best_accuracy
    run.best = None if saved.best is None else {n: t.to(device) for n, t in saved.best.items()}
    run.good = {n: t.to(device) for n, t in saved.good.items()}
    _fill_optimizer(optimizer, saved.optimizer)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }


def _fill_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": state})
