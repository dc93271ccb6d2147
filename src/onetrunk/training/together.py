"""fit_together: several domains trained in one batch, over one run of the layers that they share.

Every domain is trained as `fit` trains it: its own batches, views, dropout, optimiser, schedule
and best epoch, the same numbers but for rounding. Only the frozen layers run once for all, which
pays where a batch of one domain is too small for the machine.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.together import Together
from ..errors import DivergedError, TrainingError
from .distributed import world
from .examples import Progress, examples_of
from .fit import Keeper, Loop, Step, best_device, check_dtype, told_of_lone_image
from .randomness import Stream, own_draws, uninterrupted
from .recipe import Recipe, checked


def fit_together(
    models: Mapping[str, nn.Module],
    train: Mapping[str, Any],
    recipe: Recipe | None = None,
    *,
    val: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, str | Path] | None = None,
    checkpoint_every_s: float = 60.0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Step]]:
    """Trains several domains of one backbone in place, and yields their steps by name.

    A batch holds one of each domain; where one has fewer steps than the longest, it sits out in
    between, so that all end together. Compare with `fit_jointly`, which takes turns.

    Args:
        models: name -> the domain's network; all over one backbone.
        train, val: name -> data as for `fit`; domains without validation data are not in `val`.
        checkpoints: name -> a file as `fit` writes it, so that either goes on from it.
        recipe, checkpoint_every_s, device, progress: as for `fit`.

    Raises:
        MixError: for domains that share no forward, see `mix`.
        TrainingError: where a domain has no data, under torchrun, and as `fit`; where one domain
            diverges, the others stay as they are.

    >>> from torch.utils.data import TensorDataset
    >>> import onetrunk as ot
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ... )
    >>> models = {n: ot.attach(net, classes=["no", "yes"], input_size=(3, 8, 8)) for n in "ab"}
    >>> images = {
    ...     n: TensorDataset(torch.rand(k, 3, 8, 8), torch.tensor([0, 1] * (k // 2)))
    ...     for n, k in {"a": 8, "b": 4}.items()
    ... }
    >>> recipe = ot.Recipe(epochs=1, batch_size=4)
    >>> [(name, step.step) for name, step in fit_together(models, images, recipe)]
    [('a', 1), ('b', 1), ('a', 2)]
    """
    recipe, val, checkpoints = checked(recipe), val or {}, checkpoints or {}
    _check_names(models, train, val, checkpoints)
    if world().size > 1:
        raise TrainingError(
            "fit_together trains in one process: under torchrun, train each domain with fit."
        )
    device = torch.device(device or best_device())
    loops: dict[str, Loop] = {}
    for name, model in models.items():
        check_dtype(model)
        examples = [
            None if data is None else examples_of(model, data, progress)
            for data in (train[name], val.get(name))
        ]
        assert examples[0] is not None
        model.to(device)
        loops[name] = Loop(model, examples[0], examples[1], recipe, device)
    together = Together(models)
    keepers = {n: Keeper(Path(p), checkpoint_every_s, loops[n]) for n, p in checkpoints.items()}
    for keeper in keepers.values():
        keeper.resume()
    try:
        with closing(_rounds(together, loops)) as rounds:
            for name, step in rounds:
                yield name, step
                if name in keepers:
                    keepers[name].save_if_due()
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        for keeper in keepers.values():
            keeper.save()
        raise
    else:
        try:
            for keeper in keepers.values():
                keeper.save()
        finally:
            for loop in loops.values():
                loop.take_best()
    finally:
        for loop in loops.values():
            loop.leave()


def _check_names(
    models: Mapping[str, nn.Module], train: Mapping[str, Any], *others: Mapping[str, Any]
) -> None:
    for name in models:
        if name not in train:
            raise TrainingError(f"domain {name!r} has no training data: give train[{name!r}].")
    for given in (train, *others):
        for name in given:
            if name not in models:
                raise TrainingError(
                    f"there is data or a file for {name!r}, which is none of the domains "
                    f"{', '.join(models)}."
                )


def _rounds(
    together: Together, loops: Mapping[str, Loop]
) -> Generator[tuple[str, Step], None, None]:
    """The steps, domain by domain, of one joint step after another."""
    with ExitStack() as stack:
        batches = {n: stack.enter_context(closing(loop.batches())) for n, loop in loops.items()}
        while due := _due(loops):
            taken = {name: next(batches[name]) for name in due}
            with uninterrupted():
                losses = _step(together, loops, taken)
                found = {name: _finished(name, loops[name], losses[name]) for name in losses}
            for name, loss in found.items():
                yield name, loops[name].record(loss)


def _finished(name: str, loop: Loop, loss: Tensor) -> float:
    try:
        return loop.finish(loss)
    except DivergedError as error:
        raise DivergedError(f"domain {name!r}: {error}") from error


def _due(loops: Mapping[str, Loop]) -> list[str]:
    """Who is in the next joint step: the longest always, the others so that all end together."""
    longest = max(loops.values(), key=lambda loop: loop.n_steps)
    done = min(longest.run.step + 1, longest.n_steps) / max(longest.n_steps, 1)
    return [n for n, loop in loops.items() if loop.run.step < done * loop.n_steps]


def _step(
    together: Together, loops: Mapping[str, Loop], taken: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Every domain's loss, with the gradients at its own parameters."""
    first = next(iter(loops.values()))
    for name in taken:
        loops[name].begin()
    streams = [Stream(loop.draws_seed, loop.device) for loop in loops.values()]
    sizes = [len(taken[name][1]) if name in taken else 0 for name in loops]
    x_bchw = torch.cat([x.to(first.device, first.dtype) for x, _ in taken.values()])
    with own_draws(first.device):
        with first.autocast, told_of_lone_image(min(size for size in sizes if size)):
            logits = together(x_bchw, sizes, lambda place: streams[place].drawing())
        losses = {
            name: loops[name].loss(y_bc, taken[name][1])
            for name, y_bc in zip(taken, logits, strict=True)
        }
        torch.stack(list(losses.values())).sum().backward()
    return losses
