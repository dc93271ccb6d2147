"""Late layers trained on features that are computed once, against fine-tuning: shares of an epoch.

A training of n epochs takes (once + n * an epoch on features) / n of fine-tuning's. The limit of an
epoch counts multiply-adds: the part above the cut, at the share of a step that adapters take.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import TensorDataset

from ...core.adapters import Full
from ...core.attach import attach
from ...core.plan import Where
from ...errors import TrainingError
from ...training.cached import cached
from ...training.fit import fit
from ...training.recipe import Recipe
from .rounds import Call, Contest
from .subjects import CLASSES, Subject, device

REFERENCE = "fine-tuning, an epoch"
N_IMAGES = 64
RECIPE = Recipe(epochs=1, batch_size=32)
SHARE_OF_A_STEP = 2 / 3  # forward and the inputs' gradient, of three


def contests(subject: Subject) -> Iterator[Contest]:
    """Epochs of a late third on one backbone."""
    x_bchw = subject.images(N_IMAGES).cpu()
    images = TensorDataset(x_bchw, torch.arange(N_IMAGES) % len(CLASSES))
    size = (3, subject.size_px, subject.size_px)
    late = attach(
        subject.backbone, None, CLASSES, where=Where(stages="late"), norms="placed",
        input_size=size,
    )  # fmt: skip
    whole = subject.domain(Full())
    calls: dict[str, Call] = {REFERENCE: lambda: list(fit(whole, images, RECIPE, device=device()))}
    limits: dict[str, float] = {}
    skipped: dict[str, str] = {}
    epoch, once = "late third on features, an epoch", "its features, once"
    try:
        made = cached(late, images, RECIPE, device=device())
        limits[epoch] = SHARE_OF_A_STEP * (1 - made.cut.share)
        calls[once] = lambda: cached(late, images, RECIPE, device=device())
        calls[epoch] = lambda: list(fit(made.model, made.train, RECIPE, device=device()))
    except TrainingError as error:
        skipped[epoch] = str(error)
    title = f"{subject.title}, {N_IMAGES} images"
    yield Contest("cached", title, REFERENCE, calls, limits, skipped=skipped)
