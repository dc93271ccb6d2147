"""Examples: whatever the user hands over as data, as batches of tensors for a network.

Two kinds: prepared images with views (the domain's preprocessing, augmentation drawn from seeds), and
tensors that are the network's input already.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..core.attach import domain_of
from ..data import Images, Prepared, Preprocessing, view_seeds
from ..errors import DataError, TrainingError

Progress = Callable[[int, int], None]
T = TypeVar("T")


class Examples(abc.ABC):
    """Labelled examples of one domain, by number."""

    labels: Tensor  # int64 (n,)

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def views(self, indices: Tensor) -> Tensor:
        """What the network sees in evaluation: float (b, c, h, w)."""

    @abc.abstractmethod
    def training_views(
        self, indices: Tensor, seed: int, epoch: int, scale: tuple[float, float] | None
    ) -> Tensor:
        """What it sees in training: a function of (seed, epoch, index) and of nothing else."""


class ImageExamples(Examples):
    """Prepared images seen through a domain's preprocessing."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.labels = prepared, prepared.labels

    def views(self, indices: Tensor) -> Tensor:
        return self.prepared.preprocessing.evaluation_view(self.prepared.batch(indices)[0])

    def training_views(
        self, indices: Tensor, seed: int, epoch: int, scale: tuple[float, float] | None
    ) -> Tensor:
        seeds_b = view_seeds(seed, epoch, indices)
        images_bchw = self.prepared.batch(indices)[0]
        return self.prepared.preprocessing.training_view(images_bchw, seeds_b, scale=scale)


class TensorExamples(Examples):
    """Float tensors (c, h, w) that are the network's input as they are; not augmented."""

    def __init__(self, dataset: Any, labels: Tensor) -> None:
        self.dataset, self.labels = dataset, labels

    def views(self, indices: Tensor) -> Tensor:
        return torch.stack([self.dataset[i][0] for i in indices.tolist()])

    def training_views(
        self, indices: Tensor, seed: int, epoch: int, scale: tuple[float, float] | None
    ) -> Tensor:
        return self.views(indices)


def examples_of(model: nn.Module, data: Any, progress: Progress | None = None) -> Examples:
    """`data` as examples for `model`.

    Args:
        data: `Images`, `Prepared`, or a map-style dataset of (image, label): float tensors
            (c, h, w) are taken as they are, PIL images and uint8 arrays are prepared.

    Raises:
        TrainingError: where the classes are not the domain's, or the data is no such dataset.
        DataError: where no image can be read, or a label is out of range.
    """
    if isinstance(data, Examples):
        return data
    domain = domain_of(model)
    if isinstance(data, Prepared):
        _check_preprocessing(data, preprocessing_of(model))
        _check_classes(data.classes, domain.classes)
        return ImageExamples(data)
    if isinstance(data, Images):
        _check_classes(data.classes, domain.classes)
        return ImageExamples(Prepared(data, preprocessing_of(model), progress=progress))
    try:
        n, first = len(data), data[0][0]
    except (TypeError, IndexError, KeyError) as error:
        raise TrainingError(
            f"{type(data).__name__} is no dataset of (image, label) pairs with a length "
            f"({type(error).__name__}). Give onetrunk.data.load(SOURCE).train, or such a dataset."
        ) from error
    classes = getattr(data, "classes", None)
    if classes is not None:
        _check_classes(tuple(classes), domain.classes)
    labels = _labels(data, n)
    if isinstance(first, Tensor) and first.is_floating_point():
        return TensorExamples(data, _in_range(labels, domain.classes))
    if not isinstance(first, (Image.Image, np.ndarray)):
        raise TrainingError(
            f"the dataset's images are {type(first).__name__}: give PIL images, uint8 arrays, or "
            "float tensors (c, h, w) that are the network's input."
        )
    images = Images(_Column(data, n), labels, domain.classes, [f"image {i}" for i in range(n)])
    return ImageExamples(Prepared(images, preprocessing_of(model), progress=progress))


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The domain's preprocessing.

    Raises:
        DataError: where the backbone takes images of another number of channels than 1 or 3.
    """
    preprocessing = domain_of(model).preprocessing
    if preprocessing is None:
        raise DataError(
            "this backbone takes images of neither 1 nor 3 channels, so pictures cannot be "
            "prepared for it: give a dataset of float tensors (c, h, w)."
        )
    return preprocessing


class _Column(Sequence[Any]):
    """The images of a dataset of pairs, read when asked for."""

    def __init__(self, dataset: Any, n: int) -> None:
        self.dataset, self.n = dataset, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][0]


def _labels(data: Any, n: int) -> Tensor:
    for name in ("targets", "labels"):
        known = getattr(data, name, None)
        if known is not None and len(known) == n:
            return torch.as_tensor(known, dtype=torch.int64)
    return torch.tensor([int(data[i][1]) for i in range(n)], dtype=torch.int64)


def _in_range(labels: Tensor, classes: tuple[str, ...]) -> Tensor:
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} is outside 0..{len(classes) - 1}: "
            f"the domain has {len(classes)} classes."
        )
    return labels


def _check_classes(found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if found == expected:
        return
    lines = [f"- {name}" for name in expected if name not in found]
    lines += [f"+ {name}" for name in found if name not in expected]
    raise TrainingError(
        "the data's classes are not the domain's (- the domain's, + the data's):\n"
        + ("\n".join(lines[:12]) or "the same names in another order")
    )


def _check_preprocessing(data: Prepared, expected: Preprocessing) -> None:
    if data.preprocessing != expected:
        raise TrainingError(
            f"the data was prepared with {data.preprocessing}, the domain reads images with "
            f"{expected}: prepare it again, or hand over the images."
        )


def one_ahead(make: Callable[[T], Any], items: Sequence[T]) -> Iterator[Any]:
    """`make(item)` for every item, the next one being made while the last is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(make, items[0]) if items else None
        for item in [*items[1:], None]:
            assert waiting is not None
            made = waiting.result()
            waiting = pool.submit(make, item) if item is not None else None
            yield made
