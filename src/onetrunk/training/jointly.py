"""jointly: several domains trained by turns, and compressed ones together with their basis.

A step of one domain costs what it costs alone; the trainings only take turns. Over a trained basis
every domain's steps move the same numbers, which is the multi-task training of the shared factors.
"""

import dataclasses
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..core.domain import domain_of
from ..core.rebuild import with_frozen_basis, with_trainable_basis
from ..errors import DivergedError, TrainingError
from .evaluate import evaluate
from .examples import Progress
from .fit import Step, fit
from .recipe import Recipe

RATES = (0.1, 0.5)  # shares of a recipe's learning rates: what is trained already moves slowly


def interleave(trainings: Mapping[str, Iterator[Step]]) -> Iterator[tuple[str, Step]]:
    """The steps of several trainings by turns, each with its domain's name.

    The training that is least far goes next, so that long and short ones end together; of equals
    the first, so that trainings of one length go round. Leaving the loop closes them all.

    >>> from onetrunk.training.fit import Step
    >>> def steps(n): return (Step(k + 1, n, 1, 0.0, 0.0) for k in range(n))
    >>> [name for name, _ in interleave({"a": steps(2), "b": steps(4)})]
    ['a', 'b', 'b', 'a', 'b', 'b']
    """
    with ExitStack() as stack:
        for training in trainings.values():
            if isinstance(training, Generator):
                stack.callback(training.close)
        done = dict.fromkeys(trainings, 0.0)
        while done:
            name = min(done, key=lambda one: done[one])
            step = next(trainings[name], None)
            if step is None:
                del done[name]
                continue
            done[name] = step.step / step.n_steps
            yield name, step


def fit_jointly(
    models: Mapping[str, nn.Module],
    train: Mapping[str, Any],
    recipe: Recipe | Mapping[str, Recipe] | None = None,
    *,
    device: str | torch.device | None = None,
) -> Iterator[tuple[str, Step]]:
    """Trains several domains by turns in place, and the basis with them where it is trainable:

        loose = with_trainable_basis(compressed)
        for name, step in fit_jointly(loose, train): ...
        tuned = with_frozen_basis(loose)

    There is no validation in between: the state of one domain at its best epoch would lie over a
    basis that the others have moved since.

    Args:
        train: domain -> its data, as for `fit`.
        recipe: of all, or domain -> its own.

    Raises:
        TrainingError: where a domain has no data or no recipe, and as `fit`.
    """
    recipes = recipe if isinstance(recipe, Mapping) else dict.fromkeys(models, recipe)
    _refuse_lacking(models, train, recipes)
    yield from interleave(
        {n: fit(m, train[n], recipes[n], device=device) for n, m in models.items()}
    )


def tune_basis(
    models: Mapping[str, nn.Module],
    train: Mapping[str, Any],
    val: Mapping[str, Any],
    recipe: Recipe | Mapping[str, Recipe] | None = None,
    *,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, nn.Module]:
    """New networks over their basis, trained by all of them at `RATES` of the recipe's rates.

    Of these trainings and the networks as they are, the highest mean accuracy on `val` chooses, as
    what moves one domain moves all; each may tune its own factors with `fit` afterwards. Networks
    that are over no basis, as nothing was worth sharing, come back as they are.

    Args:
        models: domain -> its network, all over one basis; they stay as they are.
        train, val: domain -> its data, as for `fit`.
        recipe: of all, or domain -> its own.
        device: as for `fit`.
        progress: is called with (steps done, of all trainings) after each step.

    Raises:
        CompressError: where the networks are not over one basis.
        TrainingError: as `fit_jointly`, and where a domain has no validation data.
    """
    if all(domain_of(model).basis is None for model in models.values()):
        return dict(models)
    recipe = recipe or Recipe()
    recipes = recipe if isinstance(recipe, Mapping) else dict.fromkeys(models, recipe)
    _refuse_lacking(models, train, recipes)
    if lacking := next((name for name in models if name not in val), None):
        raise TrainingError(
            f"domain {lacking!r} has no validation data, which says whether the basis is better. "
            "Give val for every domain."
        )

    def mean_accuracy(found: Mapping[str, nn.Module]) -> float:
        return fmean(evaluate(found[name], val[name], device=device).accuracy for name in found)

    best, best_accuracy, n_done = dict(models), mean_accuracy(models), 0
    for rate in RATES:
        candidates = with_trainable_basis(models)
        slower = {
            name: dataclasses.replace(own, lr=own.lr * rate, lr_full=own.lr_full * rate)
            for name, own in recipes.items()
        }
        n_steps: dict[str, int] = {}
        try:
            for name, step in fit_jointly(candidates, train, slower, device=device):
                n_steps[name], n_done = step.n_steps, n_done + 1
                if progress is not None and len(n_steps) == len(models):
                    progress(n_done, sum(n_steps.values()) * len(RATES))
            found = with_frozen_basis(candidates)
            accuracy = mean_accuracy(found)
        except DivergedError:
            continue  # too high a rate is no better one
        if accuracy > best_accuracy:
            best, best_accuracy = found, accuracy
    return best


def _refuse_lacking(
    models: Mapping[str, nn.Module], train: Mapping[str, Any], recipes: Mapping[str, Any]
) -> None:
    for name in models:
        if name not in train:
            raise TrainingError(
                f"domain {name!r} has no training data, and the others would move the basis under "
                "it. Give data for every domain, or tune each one's own factors with fit."
            )
        if name not in recipes:
            raise TrainingError(
                f"domain {name!r} has no recipe. Give one for every domain, or one for all."
            )
