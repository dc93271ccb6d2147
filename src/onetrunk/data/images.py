"""Images and labels of one split (Images), and the same decoded once to uint8 (Prepared)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from onetrunk.data.decoding import BrokenImageError, ImageSource, Limits, decode
from onetrunk.data.preprocessing import Preprocessing
from onetrunk.errors import DataError

MEMORY_LIMIT_BYTES = 2 * 2**30
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """An example that was left out: its name, and the reason in a few words."""

    name: str
    reason: str


class Images(Dataset[tuple[Image.Image, int]]):
    """Immutable labelled images: `images[i]` is (PIL image in mode RGB or L, int label).

    classes: names, in the order of the labels. labels: int64 (n,). names: what each example is
    called in messages and predictions. Images are decoded when asked for, each time.
    """

    classes: tuple[str, ...]
    labels: Tensor
    names: tuple[str, ...]

    def __init__(
        self,
        sources: Sequence[ImageSource],
        labels: Sequence[int] | Tensor | npt.NDArray[np.integer[Any]],
        classes: Iterable[str],
        names: Iterable[str],
        limits: Limits | None = None,
    ) -> None:
        """`sources[i]` is anything `decode` takes. Raises DataError where these do not fit."""
        self.classes = _checked_classes(classes)
        self.names = tuple(names)
        self.labels = _checked_labels(labels, len(sources), self.names, self.classes)
        self._sources = sources
        self._limits = limits or Limits()
        self._rows: Sequence[int] = range(len(sources))

    @classmethod
    def from_files(
        cls,
        paths: Sequence[str | Path],
        labels: Sequence[int] | Tensor,
        classes: Iterable[str],
        names: Iterable[str] | None = None,
    ) -> Images:
        """Files, read when asked for; named by their paths."""
        return cls(tuple(paths), labels, classes, names or [str(path) for path in paths])

    @classmethod
    def from_encoded(
        cls,
        encoded: Sequence[bytes],
        labels: Sequence[int] | Tensor,
        classes: Iterable[str],
        names: Iterable[str] | None = None,
    ) -> Images:
        """Encoded files held in memory, such as JPEG bytes; named `image 0` ... by default."""
        return cls(tuple(encoded), labels, classes, names or _numbered(len(encoded)))

    @classmethod
    def from_arrays(
        cls,
        arrays: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
        labels: Sequence[int] | Tensor | npt.NDArray[np.integer[Any]],
        classes: Iterable[str],
        names: Iterable[str] | None = None,
    ) -> Images:
        """Arrays (h, w), (h, w, c) or (c, h, w), uint8 or float in [0, 1]; see `decode`."""
        return cls(tuple(arrays), labels, classes, names or _numbered(len(arrays)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        source = self._sources[self._rows[index]]
        image = decode(source, name=self.names[index], limits=self._limits)
        return image, int(self.labels[index])

    def __repr__(self) -> str:
        return f"Images({len(self)} images, {len(self.classes)} classes)"

    def fingerprint(self) -> str:
        """SHA-256 over names, labels, classes and the bytes of files, encoded images and arrays."""
        facts = [list(self.classes), list(self.names), self.labels.tolist()]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for row in self._rows:
            source = self._sources[row]
            if isinstance(source, str | os.PathLike):
                try:
                    content = Path(source).read_bytes()
                except OSError as error:  # a broken image, which is told of where it is decoded
                    content = f"cannot be read: {error.strerror}".encode()
            elif isinstance(source, bytes):
                content = source
            else:
                array = np.asarray(source)
                content = f"{array.dtype} {array.shape}".encode() + array.tobytes()
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | Tensor) -> Images:
        """These examples in this order, the same classes. Raises DataError if there are none."""
        chosen = [int(index) for index in indices]
        outside = [index for index in chosen if not 0 <= index < len(self)]
        if outside:
            raise DataError(f"subset asked for image {outside[0]} of {len(self)}.")
        smaller = Images.__new__(Images)
        smaller.classes = self.classes
        smaller.names = tuple(self.names[index] for index in chosen)
        smaller.labels = _checked_labels(
            self.labels[chosen], len(chosen), smaller.names, self.classes
        )
        smaller._sources, smaller._limits = self._sources, self._limits
        smaller._rows = [self._rows[index] for index in chosen]
        return smaller

    def in_order(self, classes: Sequence[str]) -> Images:
        """The same images, their classes in that order. Raises DataError if they are others."""
        if tuple(classes) == self.classes:
            return self
        if sorted(classes) != sorted(self.classes):
            raise DataError(f"in_order({list(classes)[:6]}) of the classes {self.classes[:6]}.")
        ordered = self.subset(range(len(self)))
        place_of = {name: place for place, name in enumerate(classes)}
        places = torch.tensor([place_of[name] for name in self.classes])
        ordered.classes, ordered.labels = tuple(classes), places[self.labels]
        return ordered


class Prepared(Dataset[tuple[Tensor, int]]):
    """Images decoded once to uint8 (c, R, R) tensors: `prepared[i]` is (tensor, int label).

    labels: int64 (n,). names, classes: as in Images, of the examples that could be read.
    problems: the others. in_memory: False where all of them together are above
    `memory_limit_bytes`; then the images were read once to find the problems, and are decoded
    again when asked for.

    progress(done, total) is called after each image. on_broken: "skip" leaves broken images out,
    "fail" raises at the first. Raises DataError if a class loses all its images, or all are broken.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        *,
        on_broken: Literal["skip", "fail"] = "skip",
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        progress: Progress | None = None,
    ) -> None:
        side, channels = preprocessing.prepared_px, preprocessing.channels
        self.preprocessing = preprocessing
        self.in_memory = len(images) * channels * side * side <= memory_limit_bytes
        n_held = len(images) if self.in_memory else 0
        x_nchw = torch.empty((n_held, channels, side, side), dtype=torch.uint8)
        kept: list[int] = []
        problems: list[Problem] = []
        for index in range(len(images)):
            try:
                x_chw = preprocessing.prepare(images[index][0])
            except BrokenImageError as error:
                if on_broken == "fail":
                    raise
                problems.append(Problem(error.name, error.reason))
            else:
                if self.in_memory:
                    x_nchw[len(kept)] = x_chw
                kept.append(index)
            if progress is not None:
                progress(index + 1, len(images))
        self.problems = tuple(problems)
        _check_what_is_left(images, kept, self.problems)
        self._images = images.subset(kept)
        self._x_nchw = x_nchw[: len(kept)]

    @property
    def labels(self) -> Tensor:
        """int64 (n,)."""
        return self._images.labels

    @property
    def names(self) -> tuple[str, ...]:
        """What each example is called."""
        return self._images.names

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the labels."""
        return self._images.classes

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self._tensor(index), int(self.labels[index])

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Several examples at once: uint8 (b, c, R, R) and int64 labels (b,)."""
        rows_b = torch.as_tensor(indices, dtype=torch.int64)
        if self.in_memory:
            return self._x_nchw[rows_b], self.labels[rows_b]
        side, channels = self.preprocessing.prepared_px, self.preprocessing.channels
        x_bchw = torch.empty((len(rows_b), channels, side, side), dtype=torch.uint8)
        for place, index in enumerate(rows_b.tolist()):
            x_bchw[place] = self._tensor(index)
        return x_bchw, self.labels[rows_b]

    def few_views(self, n: int) -> Tensor:
        """What a network sees of at most n images, evenly spread: float (b, c, S, S)."""
        rows = range(0, len(self), -(-len(self) // n))
        return self.preprocessing.evaluation_view(self.batch(rows)[0])

    def __repr__(self) -> str:
        where = "in memory" if self.in_memory else "decoded when asked for"
        return f"Prepared({len(self)} images {where}, {len(self.problems)} left out)"

    def _tensor(self, index: int) -> Tensor:
        if self.in_memory:
            return self._x_nchw[index]
        return self.preprocessing.prepare(self._images[index][0])


def _numbered(n: int) -> list[str]:
    return [f"image {index}" for index in range(n)]


def _checked_classes(classes: Iterable[str]) -> tuple[str, ...]:
    names = tuple(classes)
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong or not names or isinstance(classes, str):
        raise DataError(f"classes must be a list of names, found {classes!r}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the class {twice[0]!r} is named twice in {len(names)} classes.")
    return names


def _checked_labels(
    labels: Sequence[int] | Tensor | npt.NDArray[np.integer[Any]],
    n_sources: int,
    names: tuple[str, ...],
    classes: tuple[str, ...],
) -> Tensor:
    given = torch.as_tensor(labels)
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if given.ndim != 1 or (len(given) and not whole):
        raise DataError(
            f"labels of shape {tuple(given.shape)} and type {given.dtype}: give whole numbers "
            "(n,), one for each image, places in `classes`."
        )
    labels_n = given.to(dtype=torch.int64, device="cpu", copy=True)
    if not (len(labels_n) == len(names) == n_sources):
        raise DataError(
            f"{n_sources} images came with {len(labels_n)} labels and {len(names)} names; "
            "give one of each an image."
        )
    if n_sources == 0:
        raise DataError("no images: at least one is needed.")
    outside = (labels_n < 0) | (labels_n >= len(classes))
    if outside.any():
        first = int(outside.nonzero()[0])
        raise DataError(
            f"image {names[first]!r} has label {int(labels_n[first])}, and "
            f"{int(outside.sum())} of {n_sources} labels are outside 0..{len(classes) - 1}: "
            f"there are {len(classes)} classes."
        )
    return labels_n


def _check_what_is_left(images: Images, kept: list[int], problems: tuple[Problem, ...]) -> None:
    if not problems:
        return
    first = f"the first: {problems[0].name!r}, {problems[0].reason}"
    if not kept:
        raise DataError(f"none of the {len(images)} images can be read; {first}.")
    lost = sorted(set(images.labels.tolist()) - set(images.labels[kept].tolist()))
    if lost:
        raise DataError(
            f"no image of class {images.classes[lost[0]]!r} can be read ({len(problems)} of "
            f"{len(images)} images are broken; {first}). Repair them or leave the class out."
        )
