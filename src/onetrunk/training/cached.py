"""cached: a frozen trunk runs once, and training goes over what came out of it.

Where only late layers are adapted and the norms before them are the backbone's, one view of an
image gives the same features in every epoch. So they are computed once, kept in memory or in a
folder, and the tail of the network is trained on them by `fit`, as any network on any examples.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.domain import domain_of, trains_basis
from ..core.tree import reference_of
from ..errors import TrainingError
from ..tensorfile import fingerprint_of
from .cut import Cut, cut_off, features, is_close
from .examples import Examples, ImageExamples, Progress, examples_of
from .featurefile import FeatureFile, digest_of, n_bytes
from .fit import best_device
from .recipe import Recipe, checked

MEMORY_LIMIT_BYTES = 2 * 2**30
BATCH_SIZE = 64
N_PROVED_ON = 3  # images


class Features(Examples):
    """The features of a data set, as examples for the tail of a network.

    Args:
        stored: (views, n, ...) as `Cut.packed` lays them out.
        facts: what they follow from.
        drawn_with: (seed, crop scale) of the augmented views; None: of the evaluation view.
    """

    def __init__(
        self,
        stored: Tensor,
        labels: Tensor,
        cut: Cut,
        facts: dict[str, Any],
        drawn_with: tuple[int, tuple[float, float] | None] | None,
        runs_ahead: bool,
    ) -> None:
        self.stored, self.labels, self.cut = stored, labels, cut
        self.facts, self.drawn_with, self.runs_ahead = facts, drawn_with, runs_ahead

    def views(self, indices: Tensor) -> Tensor:
        if self.drawn_with is not None:
            raise TrainingError(
                "these features are of augmented views, on which no network is evaluated: give "
                "`val` to `cached`, or evaluate the domain's own network on images."
            )
        return self._rows(0, indices)

    def training_views(
        self, indices: Tensor, seed: int, epoch: int, scale: tuple[float, float] | None
    ) -> Tensor:
        if self.drawn_with not in (None, (seed, scale)):
            raise TrainingError(
                f"these features are of views drawn with seed and crop scale {self.drawn_with}, "
                f"the recipe has {(seed, scale)}: give `cached` the recipe of `fit`."
            )
        return self._rows(epoch % len(self.stored), indices)

    def fingerprint(self) -> str:
        return digest_of(self.facts)

    def _rows(self, view: int, indices: Tensor) -> Tensor:
        return self.cut.unpacked(self.stored[view][indices])


@dataclass(frozen=True)
class Cached:
    """What `fit` trains in the place of a network on images.

    Args:
        model: the tail of the network; its parameters and statistics are the network's own.
        train, val: features.
        cut: where they come from.
    """

    model: nn.Module
    train: Features
    val: Features | None
    cut: Cut


def cached(
    model: nn.Module,
    train: Any,
    recipe: Recipe | None = None,
    *,
    val: Any = None,
    views: int = 1,
    folder: str | Path | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Cached:
    """The tail of a domain's network and the features that it is trained on; `fit` does the rest.

    To train the tail is to train `model`, which is left in eval mode: they have the same
    parameters. The tail is proved on a few images to compute what the network does, bit for bit on
    the CPU. Features are computed in the network's own type, whatever the recipe's precision.

    Args:
        train, val: as for `fit`.
        recipe: the one that `fit` gets; its seed and crop scale draw the views.
        views: augmented views an image; epoch e sees view e mod `views`, which is the one that
            epoch would see without a cache. 0: the evaluation view, without augmentation.
        folder: where features are kept as files, one for each trunk, data set and set of views;
            what lies there is used again. By default they are kept in memory.
        memory_limit_bytes: of features in memory.
        device: as for `fit`, and the same; the network is moved.
        progress: called with (views done, views) while features are computed.

    Raises:
        TrainingError: where the network has no frozen trunk, for too many features, for features
            that are not finite, and where the folder refuses.
        TrainingError, DataError: as `fit`, for data that does not fit.

    >>> from torch.utils.data import TensorDataset
    >>> from onetrunk import Parallel, Recipe, Where, attach, fit
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
    ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ... )
    >>> model = attach(
    ...     net, Parallel(), ["dark", "light"], where=Where(pattern="3"), norms="placed",
    ...     input_size=(3, 8, 8),
    ... )
    >>> images = TensorDataset(torch.rand(8, 3, 8, 8), torch.tensor([0, 1] * 4))
    >>> short = Recipe(epochs=2, batch_size=4)
    >>> made = cached(model, images, short, device="cpu")
    >>> made.cut.at, [step.epoch for step in fit(made.model, made.train, short, device="cpu")]
    ('3', [1, 1, 2, 2])
    """
    recipe = checked(recipe)
    if type(views) is not int or views < 0:
        raise TrainingError(f"cached(views={views!r}): give a whole number of views, 0 or more.")
    if trains_basis(model):
        raise TrainingError(
            "cached on a network whose basis is trained too: its domains are trained together, on "
            "images. Train the domain alone, over the basis as it is."
        )
    examples = examples_of(model, train)
    val_examples = None if val is None else examples_of(model, val)
    model.to(device or best_device())
    few = torch.arange(N_PROVED_ON) % len(examples)
    x_bchw = examples.training_views(few, recipe.seed, 0, recipe.crop_scale)
    cut, tail = cut_off(model, _moved(model, x_bchw))
    state = model.state_dict()
    trunk = _Trunk(model, cut, fingerprint_of({name: state[name] for name in cut.trunk}), recipe)
    total = len(examples) * max(1, views) + (0 if val_examples is None else len(val_examples))
    place = None if folder is None else Path(folder)
    store = _Store(place, memory_limit_bytes, total, progress)
    try:
        train_features = store.features(trunk, examples, views)
        val_features = None if val_examples is None else store.features(trunk, val_examples, None)
    finally:
        model.eval()  # as `fit` will leave what the tail has of it
    return Cached(tail, train_features, val_features, cut)


def _moved(model: nn.Module, x_bchw: Tensor) -> Tensor:
    like = reference_of(model)
    return x_bchw.to(like.device, like.dtype)


@dataclass(frozen=True)
class _Trunk:
    """What features are computed with."""

    model: nn.Module
    cut: Cut
    fingerprint: str
    recipe: Recipe

    def facts(self, examples: Examples, views: int | None) -> dict[str, Any]:
        """All that they follow from; `views` is None for validation."""
        preprocessing, crop = domain_of(self.model).preprocessing, self.recipe.crop_scale
        drawn = {"seed": self.recipe.seed, "crop_scale": None if crop is None else list(crop)}
        return {
            "trunk": self.fingerprint,
            "network": type(self.model).__name__,
            "cut": [self.cut.at, str(self.cut.dtype), *self.cut.shape],
            "order": list(self.cut.order),
            "preprocessing": preprocessing and preprocessing.to_json(),
            "data": _digest_of(examples),
            "views": views,
            **(drawn if views else {}),
        }

    def batches(self, examples: Examples, views: int | None) -> Iterator[Tensor]:
        """The features of every view, batch by batch, on the CPU.

        Raises:
            TrainingError: where a feature is not finite.
        """
        for view in range(max(1, views or 0)):
            for indices in torch.arange(len(examples)).split(BATCH_SIZE):
                z = self.of(examples, views, view, indices)
                if not torch.isfinite(z).all():
                    raise TrainingError(
                        f"the features at {self.cut.at} are not finite (NaN or infinity): look "
                        "for broken numbers in the images or in the backbone's weights."
                    )
                yield z

    def of(self, examples: Examples, views: int | None, view: int, indices: Tensor) -> Tensor:
        """The features of one view of some images, as they are stored, on the CPU."""
        train, recipe = views is not None, self.recipe
        self.model.train(train)  # nothing in the trunk depends on it but the way it is computed
        x_bchw = (
            examples.training_views(indices, recipe.seed, view, recipe.crop_scale)
            if views
            else examples.views(indices)
        )
        with torch.set_grad_enabled(train):
            z = features(self.model, self.cut, _moved(self.model, x_bchw))
        return self.cut.packed(z.cpu())


class _Store:
    """Keeps features in memory or in a folder."""

    def __init__(
        self, folder: Path | None, limit_bytes: int, total: int, progress: Progress | None
    ) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.done, self.total, self.progress = 0, total, progress

    def features(self, trunk: _Trunk, examples: Examples, views: int | None) -> Features:
        """The features of `examples`; `views` is None for validation."""
        facts = trunk.facts(examples, views)
        shape = (max(1, views or 0), len(examples), *trunk.cut.stored_shape)
        if self.folder is None:
            batches = self._counted(trunk.batches(examples, views))
            stored = self._in_memory(shape, trunk.cut.dtype, batches)
        else:
            file = FeatureFile(self.folder, facts, shape, trunk.cut.dtype)
            stored = self._in_file(file, trunk, examples, views)
        drawn_with = (trunk.recipe.seed, trunk.recipe.crop_scale) if views else None
        ahead = self.folder is not None  # a page may have to come from the disk
        return Features(stored, examples.labels, trunk.cut, facts, drawn_with, ahead)

    def _in_memory(
        self, shape: tuple[int, ...], dtype: torch.dtype, batches: Iterator[Tensor]
    ) -> Tensor:
        size = n_bytes(shape, dtype)
        if size > self.limit_bytes:
            raise TrainingError(
                f"the features of {shape[1]:,} images in {shape[0]} views take {size:,} bytes, "
                f"above the limit of {self.limit_bytes:,} in memory: give a folder, take fewer "
                "views, or raise memory_limit_bytes."
            )
        stored, n = torch.empty(shape, dtype=dtype), 0
        rows = stored.flatten(0, 1)
        for batch in batches:
            rows[n : n + len(batch)] = batch
            n += len(batch)
        return stored

    def _in_file(
        self, file: FeatureFile, trunk: _Trunk, examples: Examples, views: int | None
    ) -> Tensor:
        stored = file.read()
        if stored is not None and not _are_of(stored, trunk, examples, views):
            stored = None  # of a network with the same weights that computes something else
        if stored is None:
            file.write(self._counted(trunk.batches(examples, views)))
            stored = file.read()
        else:
            self._note(file.shape[0] * file.shape[1])
        if stored is None:
            raise TrainingError(
                f"{file.path} was changed while it was written: no other program may write there."
            )
        return stored

    def _counted(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield batch
            self._note(len(batch))

    def _note(self, n_done: int) -> None:
        self.done += n_done
        if self.progress is not None:
            self.progress(self.done, self.total)


def _are_of(stored: Tensor, trunk: _Trunk, examples: Examples, views: int | None) -> bool:
    """Whether the first of the stored features are what the trunk computes now."""
    few = torch.arange(min(N_PROVED_ON, len(examples)))
    return is_close(stored[0, few], trunk.of(examples, views, 0, few))


def _digest_of(examples: Examples) -> str:
    """SHA-256 over every label and every image: whole, or as a user's dataset gives it."""
    digest = hashlib.sha256(fingerprint_of({"labels": examples.labels}).encode())
    for indices in torch.arange(len(examples)).split(BATCH_SIZE):
        if isinstance(examples, ImageExamples):
            x_bchw = examples.prepared.batch(indices)[0]  # a view leaves the image's rim out
        else:
            x_bchw = examples.views(indices)
        digest.update(fingerprint_of({"images": x_bchw}).encode())
    return digest.hexdigest()
