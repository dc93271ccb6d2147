"""Examples: whatever the user hands over as data, as batches of tensors for a network.

Two kinds: prepared images with views (the domain's preprocessing, augmentation drawn from seeds),
and tensors that are the network's input already. What a user's own dataset draws at random (a
transform of torchvision's, say) is seeded by (seed, epoch, index) too, so that it is the same again
after a resume.
"""

import abc
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..core.domain import domain_of
from ..data import Images, Prepared, Preprocessing, view_seeds
from ..data.decoding import BrokenImageError
from ..errors import DataError, TrainingError
from ..tensorfile import fingerprint_of
from .randomness import own_draws, reseed

N_LOOKED_AT = 8  # images whose pixels a fingerprint covers
Progress = Callable[[int, int], None]
T = TypeVar("T")
R = TypeVar("R")


class Examples(abc.ABC):
    """Labelled examples of one domain, by number."""

    labels: Tensor  # int64 (n,)
    runs_ahead: bool  # whether another thread may make the next batch: no code of the user's runs

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

    def fingerprint(self) -> str:
        """SHA-256 over the labels and a few of the images: tells two data sets apart."""
        few = torch.linspace(0, len(self) - 1, min(len(self), N_LOOKED_AT)).round().long()
        return fingerprint_of({"labels": self.labels, "views": self.views(few)})


class ImageExamples(Examples):
    """Prepared images seen through a domain's preprocessing."""

    def __init__(self, prepared: Prepared, runs_ahead: bool = True) -> None:
        self.prepared, self.labels, self.runs_ahead = prepared, prepared.labels, runs_ahead

    def views(self, indices: Tensor) -> Tensor:
        return self.prepared.preprocessing.evaluation_view(self.prepared.batch(indices)[0])

    def training_views(
        self, indices: Tensor, seed: int, epoch: int, scale: tuple[float, float] | None
    ) -> Tensor:
        seeds_b = view_seeds(seed, epoch, indices)
        images_bchw = self.prepared.batch(indices)[0]
        return self.prepared.preprocessing.training_view(images_bchw, seeds_b, scale=scale)


class TensorExamples(Examples):
    """Float tensors (c, h, w) that are the network's input as they are; not augmented here."""

    runs_ahead = False

    def __init__(self, dataset: Any, labels: Tensor) -> None:
        self.dataset, self.labels = dataset, labels

    def views(self, indices: Tensor) -> Tensor:
        return _stacked(_read(self.dataset, indices.tolist(), view_seeds(0, 0, indices)))

    def training_views(
        self, indices: Tensor, seed: int, epoch: int, scale: tuple[float, float] | None
    ) -> Tensor:
        seeds_b = view_seeds(seed, epoch, indices)
        return _stacked(_read(self.dataset, indices.tolist(), seeds_b))


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """(b, c, h, w). Raises TrainingError where the images are not of one size."""
    if len(shapes := {tuple(image.shape) for image in images}) > 1:
        few = " and ".join(map(str, sorted(shapes)[:2]))
        raise TrainingError(
            f"the dataset's tensors are of several sizes ({few}), and a batch has one: scale or "
            "crop them to one size, (c, h, w)."
        )
    return torch.stack(tuple(images))


def _read(dataset: Any, indices: Sequence[int], seeds_b: Tensor) -> list[Any]:
    """The images at `indices`, each with its own seed for what the dataset draws at random."""
    images = []
    with own_draws():
        for index, seed in zip(indices, seeds_b.tolist(), strict=True):
            reseed(seed % 2**63)
            images.append(dataset[index][0])
    return images


def examples_of(model: nn.Module, data: Any, progress: Progress | None = None) -> Examples:
    """`data` as examples for `model`.

    Args:
        data: `Images`, `Prepared`, or a map-style dataset of (image, label): float tensors
            (c, h, w) are taken as they are; PIL images, uint8 arrays and uint8 tensors are
            prepared, once. Its labels are read once too.

    Raises:
        TrainingError: where the classes are not the domain's, or the data is no such dataset.
        DataError: where there is no image, none can be read, or a label is out of range.
    """
    if isinstance(data, Examples):
        return data
    domain = domain_of(model)
    if isinstance(data, Prepared):
        _check_preprocessing(data, preprocessing_of(model))
        _check_classes(data.classes, domain.classes)
        return ImageExamples(data)
    if isinstance(data, Images):
        if sorted(data.classes) == sorted(domain.classes):
            data = data.in_order(domain.classes)
        _check_classes(data.classes, domain.classes)
        return ImageExamples(Prepared(data, preprocessing_of(model), progress=progress))
    with own_draws():
        return _examples_of_dataset(model, data, progress)


def _examples_of_dataset(model: nn.Module, data: Any, progress: Progress | None) -> Examples:
    classes = domain_of(model).classes
    first, image, label = _first_readable(data)
    named = getattr(data, "classes", None)
    if isinstance(named, (list, tuple)) and all(isinstance(name, str) for name in named):
        _check_classes(tuple(named), classes)
    labels = _labels(data, first, label)
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim != 3:
            raise TrainingError(
                f"the dataset's images are float tensors of shape {tuple(image.shape)}: give "
                "(c, h, w), the network's input for one image."
            )
        return TensorExamples(data, _in_range(labels, classes))
    if not isinstance(image, (Image.Image, np.ndarray)) and not _is_uint8(image):
        found = f"tensors of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise TrainingError(
            f"the dataset's images are {found}: give PIL images, uint8 arrays, or "
            "float tensors (c, h, w) that are the network's input."
        )
    names = [f"image {index}" for index in range(len(data))]
    images = Images(_Column(data), labels, classes, names)
    prepared = Prepared(images, preprocessing_of(model), progress=progress)
    return ImageExamples(prepared, runs_ahead=prepared.in_memory)


def _first_readable(data: Any) -> tuple[int, Any, Any]:
    """(index, image, label) of the first example whose file can be read."""
    try:
        for index in range(len(data)):
            try:
                example = data[index]
            except OSError:
                continue
            return index, example[0], example[1]
    except (TypeError, IndexError, KeyError, ValueError, NotImplementedError) as error:
        raise TrainingError(
            f"{type(data).__name__} is no dataset of (image, label) pairs with a length "
            f"({type(error).__name__}). Give onetrunk.data.load(SOURCE).train, or such a dataset; "
            "of a DataLoader its .dataset, of arrays onetrunk.data.Images.from_arrays."
        ) from error
    raise DataError(f"{type(data).__name__} has no image that can be read: one at least is needed.")


def _is_uint8(image: object) -> bool:
    return isinstance(image, Tensor) and image.dtype == torch.uint8


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The domain's preprocessing.

    Raises:
        DataError: where the backbone takes images of neither 1 nor 3 channels, or no square ones.
    """
    preprocessing = domain_of(model).preprocessing
    if preprocessing is None:
        raise DataError(
            "this backbone takes images of neither 1 nor 3 channels, or none that are square, so "
            "pictures cannot be prepared for it: give a dataset of float tensors (c, h, w)."
        )
    return preprocessing


class _Column(Sequence[Any]):
    """The images of a dataset of pairs, read when asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            (image,) = _read(self.dataset, [index], view_seeds(0, 0, [index]))
        except OSError as error:  # Pillow's for a file that it cannot read, and the system's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BrokenImageError(f"image {index}", reason) from error
        return image.cpu().numpy() if isinstance(image, Tensor) else image


def _labels(data: Any, first: int, label: Any) -> Tensor:
    """The labels: of the dataset's own list where it shows one and means it, else one by one."""
    expected = _whole_numbers([label])
    for name in ("targets", "labels"):
        known = _whole_numbers(getattr(data, name, None))
        if known is None or expected is None or len(known) != len(data):
            continue
        if known[first] == expected[0] and _means(data, known):
            return known
    labels = [label] if expected is None else [_label(data, index) for index in range(len(data))]
    found = _whole_numbers(labels)
    if found is None:
        wrong = next((one for one in labels if _whole_numbers([one]) is None), label)
        raise TrainingError(
            f"the dataset's labels are no whole numbers (one is {_short(wrong)}): give "
            "(image, label) pairs with labels from 0 to the number of classes less one."
        )
    return found


def _means(data: Any, known: Tensor) -> bool:
    """Whether a dataset gives the labels that it lists: it is asked for one example of each."""
    for label in known.unique():
        for index in (known == label).nonzero().flatten().tolist():
            try:
                given = _whole_numbers([data[index][1]])
            except OSError:
                continue  # an image that cannot be read says nothing
            if given is None or given[0] != label:
                return False
            break
    return True


def _label(data: Any, index: int) -> Any:
    try:
        return data[index][1]
    except OSError as error:
        raise DataError(f"image {index} cannot be read for its label: {error}.") from error


def _whole_numbers(values: Any) -> Tensor | None:
    """int64 (n,) of a list, array or tensor of whole numbers; None of anything else."""
    if values is None or not hasattr(values, "__len__"):
        return None
    try:
        array = np.array([v.item() if isinstance(v, Tensor) else v for v in values])
    except (TypeError, ValueError, RuntimeError):
        return None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        return None
    return torch.from_numpy(array.astype(np.int64))


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]} ..."


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


def one_ahead(make: Callable[[T], R], items: Sequence[T]) -> Generator[R, None, None]:
    """`make(item)` for every item, the next one being made while the last is used.

    One thread, which has ended when the generator is exhausted, closed, or has raised.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="onetrunk-ahead") as pool:
        waiting = [pool.submit(make, item) for item in items[:1]]
        for item in items[1:]:
            made = waiting.pop().result()
            waiting.append(pool.submit(make, item))
            yield made
        for last in waiting:
            yield last.result()
