"""fit: training as a generator of steps; the caller owns the loop.

A step is a pure function of the state before it and of its number: the order of images, their crops
and the dropout are drawn from (seed, epoch, step), never from a generator that runs along. That is
why a training that was killed goes on bit for bit from its last checkpoint, in the middle of an
epoch too (on the CPU, with the same threads and the same build of torch).
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.domain import delta, domain_of, trains_basis
from ..core.tree import reference_of
from ..errors import DivergedError, TrainingError
from ..tensorfile import fingerprint_of
from .checkpoint import Checkpoint, make_folder, read_checkpoint, write_checkpoint
from .distributed import check_batch, world
from .evaluate import logits_of
from .examples import Examples, Progress, examples_of, one_ahead
from .graphed import GraphedStep, cuda_graph
from .optimizer import build_optimizer, held_norms
from .randomness import own_draws, reseed, seed_of, uninterrupted
from .recipe import Recipe, checked

LATE_ERRORS = 2.0  # standard errors that a later epoch may be below the best: docs/recipes.md


@dataclass(frozen=True)
class Step:
    """What one training step did.

    Args:
        step, n_steps: number of the step, from 1, and how many there will be.
        epoch: number of the epoch it belongs to, from 1.
        loss: mean loss of the batch before the step.
        lr: the learning rate of this step, of what is trained with the recipe's `lr`.
        val_accuracy: accuracy on the validation data after an epoch's last step; else None.
        best: whether the network after this step is the one that stays so far (`Recipe.keep`).
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
    """What a training carries from one step to the next, besides the network and the optimiser."""

    step: int = 0
    epochs: int = 0  # done, validation included
    start_accuracy: float = -1.0  # no epoch below it is kept
    best_accuracy: float = -1.0  # the highest of those that are no worse
    best: Mapping[str, Tensor] = field(default_factory=dict)
    good: Mapping[str, Tensor] = field(default_factory=dict)


def fit(
    model: nn.Module,
    train: Any,
    recipe: Recipe | None = None,
    *,
    val: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float = 60.0,
    device: str | torch.device | None = None,
    graphed: bool = False,
    progress: Progress | None = None,
) -> Iterator[Step]:
    """Trains the domain's own numbers of `model` in place, one step for every record it yields.

    With `val`, the network is at the end the one of the epoch that `Recipe.keep` chooses by it, or
    as it came where every epoch did worse; leaving the loop early keeps the network of the last
    step. In the loop the network is in train mode, after it in eval mode.

    Under `torchrun`, with a process group joined (`distributed.join`), every process computes its
    share of each batch and gradients are averaged; only the first one writes the checkpoint.

    Args:
        train, val: `Images`, `Prepared` (see onetrunk.data), or a map-style dataset of (image,
            label) whose images are PIL images, uint8 arrays or float tensors (c, h, w).
        recipe: by default `Recipe()`.
        checkpoint: a file that is written every `checkpoint_every_s` seconds and when the loop is
            left, by Ctrl-C too; where it exists already, training goes on from it. Remove it when
            done. `for step in fit(...)` leaves it at once; steps with a name of their own are left
            when they are closed: `with contextlib.closing(fit(...)) as steps`.
        device: by default CUDA, then MPS, then the CPU, whatever there is; the network is moved.
        graphed: on CUDA, forward and backward are recorded as one CUDA graph and replayed, from
            which networks on small images gain most. Hooks and what else Python does in a forward
            then run once, in the recording.
        progress: called with (images read, images) while the images are prepared.

    Raises:
        TrainingError: for data or a checkpoint that does not fit, and for a loss or gradient that
            is not finite; the network then has the state after its last good epoch. With `graphed`
            where there is no CUDA, or the step cannot be recorded.
        DamagedError: where the checkpoint's bytes are not what was written.
        DataError: where images cannot be read.

    >>> from torch.utils.data import TensorDataset
    >>> from onetrunk import Recipe, attach
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ... )
    >>> model = attach(net, classes=["dark", "light"], input_size=(3, 8, 8))
    >>> images = TensorDataset(torch.rand(8, 3, 8, 8), torch.tensor([0, 1] * 4))
    >>> [step.epoch for step in fit(model, images, Recipe(epochs=2, batch_size=4))]
    [1, 1, 2, 2]
    """
    recipe = checked(recipe)
    if trains_basis(model):
        _refuse_going_back(val=val, checkpoint=checkpoint)
    device = torch.device(device or best_device())
    train_examples = examples_of(model, train, progress)
    val_examples = None if val is None else examples_of(model, val, progress)
    check_dtype(model)
    model.to(device)
    loop = Loop(model, train_examples, val_examples, recipe, device)
    if graphed:
        loop.record_steps()
    keeper = None
    if checkpoint is not None:
        keeper = Keeper(Path(checkpoint), checkpoint_every_s, loop)
        keeper.resume()
    try:
        with closing(loop.steps()) as steps:
            for record in steps:
                yield record
                if keeper is not None:
                    keeper.save_if_due()
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        # the caller left its loop, by `break` or an exception of its own, or somebody stopped us:
        # never inside a step, which is `uninterrupted`
        if keeper is not None:
            keeper.save()
        raise
    else:
        try:
            if keeper is not None:  # what comes of the training may find no room
                keeper.save()
        finally:
            loop.take_best()
    finally:
        loop.leave()


def _refuse_going_back(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise TrainingError(
                f"fit with {name} on a network whose basis is trained too: other domains move the "
                "basis between its steps, so an earlier state of its own numbers is no network to "
                f"go back to. Leave {name} out, and evaluate after with_frozen_basis(models)."
            )


@contextmanager
def told_of_lone_image(n_images: int) -> Iterator[None]:
    """Batch norm's complaint about a variance over one number, in the words of a recipe."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            f"a batch of {n_images} image is too few for batch norm, which takes the "
            "variance over the batch: give at least two images and Recipe(batch_size=2)."
        ) from error


def best_device() -> str:
    """`cuda`, `mps` or `cpu`: the first that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Loop:
    """The steps of one training over its parts."""

    def __init__(
        self,
        model: nn.Module,
        train: Examples,
        val: Examples | None,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.model, self.train, self.val = model, train, val
        self.recipe, self.device = recipe, device
        self.optimizer = build_optimizer(model, recipe, len(train))
        self.run = _Run(good=_snapshot(model))
        self.batch_size = min(recipe.batch_size, len(train))
        self.world = world()
        check_batch(self.batch_size, self.world.size)
        self.forward = self.world.wrap(model)
        self.steps_an_epoch = len(train) // self.batch_size
        self.n_epochs = recipe.n_epochs(len(train))
        self.n_steps = recipe.n_steps(len(train))
        self.dtype = reference_of(model).dtype
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=_autocasts(recipe, device)
        )
        self.held_norms = held_norms(model, recipe, len(train))
        self.graphed: GraphedStep | None = None
        self.failed = False  # then network and step do not belong together: nothing to keep

    def steps(self) -> Generator[Step, None, None]:
        with_gradients = self.graphed or self._with_gradients
        with closing(self.batches()) as batches:
            for x_bchw, labels_b in batches:
                with uninterrupted():
                    self.begin()
                    with own_draws(self.device):
                        reseed(self.draws_seed, self.device)
                        x_bchw = x_bchw.to(self.device, self.dtype)
                        loss = with_gradients(x_bchw, labels_b.to(self.device))
                    found = self.finish(loss)
                yield self.record(found)

    def record_steps(self) -> None:
        """From now on steps are recorded.

        Raises:
            TrainingError: where this is no training in one process on a CUDA device.
        """
        if self.device.type != "cuda" or self.world.size > 1:
            raise TrainingError(
                f"fit(graphed=True) on {self.device} with {self.world.size} process(es): CUDA "
                "graphs are for one process on a CUDA device. Leave graphed out."
            )
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        record = functools.partial(cuda_graph, device=self.device)
        self.graphed = GraphedStep(self._with_gradients, trained, record)

    def batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """What is still to be done, a batch (b, c, h, w) and its labels (b,) a step.

        Whoever takes one calls `begin`, computes the `loss` and its gradients, and calls `finish`
        and `record`, before taking the next.
        """
        if self._at_end_of_epoch():  # stopped in its validation
            self._end_epoch()
        if self.run.step == 0:
            self._score_start()
        for epoch in range(self.run.epochs, self.n_epochs):
            done = self.run.step - epoch * self.steps_an_epoch
            with closing(self._made(self._order(epoch)[done:], epoch)) as made:
                yield from made

    @property
    def draws_seed(self) -> int:
        """Of what the next step draws at random: dropout."""
        step = self.run.step * self.world.size + self.world.rank
        return seed_of(self.recipe.seed, "dropout", step)

    def begin(self) -> None:
        """Makes the network ready for a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self._lr(self.run.step)
        if self.graphed is not None and self.graphed.replay is not None and self.model.training:
            return  # a replay asks no module, and fills the same gradients
        self._train_mode()
        self.optimizer.zero_grad()

    def _train_mode(self) -> None:
        self.model.train()
        for held in self.held_norms:
            held.eval()

    def loss(self, logits_bc: Tensor, labels_b: Tensor) -> Tensor:
        half = logits_bc.dtype in (torch.bfloat16, torch.float16)
        return F.cross_entropy(
            logits_bc.float() if half else logits_bc,
            labels_b.to(self.device),
            label_smoothing=self.recipe.label_smoothing,
        )

    def finish(self, loss: Tensor) -> float:
        """Takes the step whose gradients are there; its loss."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, self.recipe.clip_norm or math.inf)
        found = self.world.mean(float(loss.detach()))
        if not math.isfinite(found):
            raise self._stopped(f"the loss is {found} at step {self.run.step + 1}")
        if not math.isfinite(norm):
            raise self._stopped(f"the gradient is not finite at step {self.run.step + 1}")
        self.optimizer.step()
        self.run.step += 1
        return found

    def record(self, loss: float) -> Step:
        """What the step did; validates after the last one of an epoch."""
        epoch, lr = self.run.epochs + 1, self.recipe.lr * self._lr(self.run.step - 1)
        accuracy, best = self._end_epoch() if self._at_end_of_epoch() else (None, False)
        return Step(self.run.step, self.n_steps, epoch, loss, lr, accuracy, best)

    def take_best(self) -> None:
        """Gives the network the state that validation chose, where there was any."""
        if self.run.best:
            _restore(self.model, self.run.best)

    def leave(self) -> None:
        """Gradients are let go, and the network is as it is used."""
        self.graphed = None
        self.optimizer.zero_grad()
        self.model.eval()

    def _lr(self, step: int) -> float:
        return self.recipe.learning_rate(step, self.n_steps)

    def _at_end_of_epoch(self) -> bool:
        return self.run.step == (self.run.epochs + 1) * self.steps_an_epoch

    def _order(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed_of(self.recipe.seed, "order", epoch))
        order = torch.randperm(len(self.train), generator=generator)
        return list(order[: self.steps_an_epoch * self.batch_size].split(self.batch_size))

    def _made(
        self, batches: list[Tensor], epoch: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        def make(batch: Tensor) -> tuple[Tensor, Tensor]:
            rows, scale = self.world.rows(batch), self.recipe.crop_scale
            x_bchw = self.train.training_views(rows, self.recipe.seed, epoch, scale)
            return x_bchw, self.train.labels[rows]

        return one_ahead(make, batches) if self.train.runs_ahead else (make(r) for r in batches)

    def _with_gradients(self, x_bchw: Tensor, labels_b: Tensor) -> Tensor:
        """The loss of a batch, whose gradients are at the parameters then."""
        loss = self.loss(self._logits(x_bchw), labels_b)
        loss.backward()
        return loss.detach()  # a recording needs the graph of this one gone

    def _logits(self, x_bchw: Tensor) -> Tensor:
        with self.autocast, told_of_lone_image(len(x_bchw)):
            y = self.forward(x_bchw)
        # torchvision's Inception and GoogLeNet put auxiliary logits behind in train mode
        return y if isinstance(y, Tensor) else y[0]

    def _end_epoch(self) -> tuple[float | None, bool]:
        """Validates and keeps the network: (accuracy, whether it is the best so far)."""
        self.world.agree(delta(self.model).values())
        state = _snapshot(self.model)
        if not all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point()):
            raise self._stopped(f"the network has NaN or infinity after step {self.run.step}")
        accuracy, best = None, False
        if self.val is not None:
            accuracy = self._val_accuracy()
            if accuracy is None:
                raise self._stopped(f"the validation logits are not finite at step {self.run.step}")
            best = self._stays(accuracy, len(self.val))
        with uninterrupted():
            self.run.good = state
            self.run.epochs += 1
            if best and accuracy is not None:
                self.run.best_accuracy = max(accuracy, self.run.best_accuracy)
                self.run.best = state
        return accuracy, best

    def _stays(self, accuracy: float, n_images: int) -> bool:
        """Whether the network of this epoch takes the place of the one that was kept so far."""
        best = self.run.best_accuracy
        if accuracy < self.run.start_accuracy:
            return False
        if self.recipe.keep == "best":
            return accuracy > best
        return accuracy >= best - LATE_ERRORS * standard_error(max(best, 0.0), n_images)

    def _score_start(self) -> None:
        """Keeps the network as it came, until an epoch is as good."""
        accuracy = self._val_accuracy()
        if accuracy is not None:
            self.run.start_accuracy, self.run.best = accuracy, self.run.good

    def _val_accuracy(self) -> float | None:
        """None where there is no validation, or a logit that is not finite."""
        if self.val is None:
            return None
        self.model.eval()  # else a copy of the tree would be evaluated
        logits_nc = logits_of(self.model, self.val)
        self._train_mode()
        if not torch.isfinite(logits_nc).all():
            return None
        return float((logits_nc.argmax(1) == self.val.labels).double().mean())

    def _stopped(self, what: str) -> DivergedError:
        """Gives the network its last good state; the error to raise then."""
        self.failed = True
        _restore(self.model, self.run.good)
        epochs = self.run.epochs
        good = f"its state after epoch {epochs}" if epochs else "the state it came with"
        return DivergedError(
            f"{what} of {self.n_steps}: the network has {good} again. Lower the learning rate "
            f"(lr={self.recipe.lr:g}), or look for broken numbers in the data."
        )


def standard_error(accuracy: float, n_images: int) -> float:
    """Of an accuracy on so many images: sqrt(p (1 - p) / n), p by Laplace's rule of succession.

    >>> round(standard_error(0.75, 20), 3), round(standard_error(1.0, 20), 3)
    (0.1, 0.047)
    """
    p = (accuracy * n_images + 1) / (n_images + 2)
    return math.sqrt(p * (1 - p) / n_images)


class Keeper:
    """Writes a training's checkpoint, and reads it where there is one."""

    def __init__(self, path: Path, every_s: float, loop: Loop) -> None:
        self.path, self.every_s, self.loop = path, every_s, loop
        self.identity = _identity(loop)
        self.computed_with = {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": loop.device.type,
        }
        self.saved_at = time.monotonic()

    def save_if_due(self) -> None:
        if time.monotonic() - self.saved_at >= self.every_s:
            self.save()

    def save(self) -> None:
        if self.loop.failed or not self.loop.world.leads:
            return
        run = self.loop.run
        checkpoint = Checkpoint(
            identity=self.identity,
            computed_with=self.computed_with,
            step=run.step,
            epochs=run.epochs,
            start_accuracy=run.start_accuracy,
            best_accuracy=run.best_accuracy,
            network=delta(self.loop.model),
            best=run.best,
            good=run.good,
            optimizer=_optimizer_state(self.loop.optimizer),
        )
        write_checkpoint(self.path, checkpoint)
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        if not self.path.exists():
            make_folder(self.path)  # a path that cannot be written fails before the training
            return
        saved = read_checkpoint(self.path, self.identity, self.computed_with)
        _restore(self.loop.model, saved.network)
        self.loop.run = _Run(
            saved.step,
            saved.epochs,
            saved.start_accuracy,
            saved.best_accuracy,
            _moved(saved.best, self.loop.device),
            _moved(saved.good, self.loop.device),
        )
        _fill_optimizer(self.loop.optimizer, saved.optimizer)


def check_dtype(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise TrainingError(
                f"{name} is float16, in which training overflows: attach to backbone.float(), and "
                "for speed train with Recipe(precision='bfloat16')."
            )


def _autocasts(recipe: Recipe, device: torch.device) -> bool:
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.precision == "bfloat16"


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in delta(model).items()}


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@torch.no_grad()
def _restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fills the domain's own tensors in place."""
    for name, tensor in delta(model).items():
        tensor.copy_(state[name])


def _identity(loop: Loop) -> dict[str, Any]:
    """What a checkpoint must agree on with the training that goes on from it."""
    domain, state = domain_of(loop.model), loop.model.state_dict()
    own = [[name, list(t.shape), str(t.dtype)] for name, t in delta(loop.model).items()]
    recipe = {f"recipe.{key}": value for key, value in dataclasses.asdict(loop.recipe).items()}
    return {
        **recipe,
        "family": domain.family,
        "classes": list(domain.classes),
        "preprocessing": domain.preprocessing and domain.preprocessing.to_json(),
        "backbone": fingerprint_of({name: state[name] for name in domain.frozen}),
        "trained tensors": hashlib.sha256(json.dumps(own).encode()).hexdigest(),
        "training images": _described(loop.train),
        "validation images": _described(loop.val),
        **({} if domain.basis is None else {"basis": domain.basis.fingerprint}),
    }


def _described(examples: Examples | None) -> str:
    return "none" if examples is None else f"{len(examples)}, {examples.fingerprint()[:16]}"


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }


def _fill_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": state})
