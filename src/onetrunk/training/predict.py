"""predict: the likeliest classes, with names and probabilities, of files, folders or arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..core.domain import domain_of
from ..core.tree import reference_of
from ..data import Images, Preprocessing, decode
from ..data.source_folder import ENDINGS, images_below
from ..errors import DataError
from .evaluate import check_batch_size, ready
from .examples import preprocessing_of

NOT_FINITE = (
    "its scores are not finite (NaN or infinity): look for broken numbers in the image, or train "
    "the domain again"
)
Row = tuple[tuple[str, float], ...]  # (class, probability), the likeliest first


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image.

    Args:
        name: the file, or the image's number.
        classes: (class, probability), the likeliest first.
        problem: why there are no classes: the image could not be read, or its scores are not
            finite.
    """

    name: str
    classes: Row
    problem: str = ""

    @property
    def best(self) -> str:
        """The likeliest class.

        Raises:
            DataError: where there is none, see `problem`.
        """
        if self.problem:
            raise DataError(self.problem)
        return self.classes[0][0]


def predict(
    model: nn.Module,
    images: Any,
    *,
    top_k: int = 5,
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> list[Prediction]:
    """The `top_k` likeliest classes of every image; the network stays as and where it was.

    Args:
        images: a file, a folder (its image files, at any depth), a PIL image, an encoded file's
            bytes, a uint8 array (h, w, c), a float tensor (b, c, h, w) that is the network's input,
            or a list (or an array of arrays) of files, images, bytes or arrays; `Images`, as the
            splits of a source have them.

    Raises:
        DataError: where there is no such file or no image at all, for what is no kind of image,
            and for a single image that cannot be read. One in a folder or list gets a prediction
            with `problem` instead.
        TrainingError: for a batch of less than one image.
    """
    if top_k < 1:
        raise DataError(f"top_k={top_k}: ask for at least one class.")
    check_batch_size(batch_size)
    network = ready(model, device)
    if isinstance(images, Tensor):
        return _of_input(network, images, top_k, batch_size)
    preprocessing = preprocessing_of(network)
    if _is_single(images):
        name = str(images) if isinstance(images, (str, Path)) else "0"
        x_1chw = preprocessing.evaluation_view(_prepared(name, images, preprocessing)[None])
        return [_told(name, row) for row in _likeliest(network, x_1chw, top_k)]
    items = _listed(images)
    return [
        prediction
        for start in range(0, len(items), batch_size)
        for prediction in _of_images(
            network, preprocessing, items[start : start + batch_size], top_k
        )
    ]


def _of_input(network: nn.Module, x_bchw: Tensor, top_k: int, batch_size: int) -> list[Prediction]:
    if x_bchw.ndim != 4 or not x_bchw.is_floating_point():
        raise DataError(
            f"predict was given a tensor of {x_bchw.dtype} {tuple(x_bchw.shape)}: a tensor is the "
            "network's input, float (b, c, h, w). Give pictures as arrays: tensor.numpy()."
        )
    rows = [row for x in x_bchw.split(batch_size) for row in _likeliest(network, x, top_k)]
    return [_told(str(number), row) for number, row in enumerate(rows)]


def _told(name: str, row: Row) -> Prediction:
    """The prediction of an image that could be read."""
    return Prediction(name, row, "" if row else NOT_FINITE)


def _of_images(
    network: nn.Module, preprocessing: Preprocessing, items: Sequence[tuple[str, Any]], top_k: int
) -> Iterator[Prediction]:
    """The predictions of one batch, in order; broken images among them."""
    prepared: list[Tensor] = []
    problems: dict[int, str] = {}
    for place, (name, item) in enumerate(items):
        try:
            prepared.append(_prepared(name, item, preprocessing))
        except DataError as error:
            problems[place] = str(error)
    rows: Iterator[Row] = iter(())
    if prepared:
        views_bchw = preprocessing.evaluation_view(torch.stack(prepared))
        rows = iter(_likeliest(network, views_bchw, top_k))
    for place, (name, _) in enumerate(items):
        if place in problems:
            yield Prediction(name, (), problems[place])
        else:
            yield _told(name, next(rows))


@torch.no_grad()
def _likeliest(network: nn.Module, x_bchw: Tensor, top_k: int) -> list[Row]:
    """The classes of every image; none where a score is not finite."""
    classes = domain_of(network).classes
    like = reference_of(network)
    logits_bc = network(x_bchw.to(like.device, like.dtype)).float()
    top = logits_bc.softmax(1).topk(min(top_k, len(classes)), dim=1)
    finite_b = logits_bc.isfinite().all(1).tolist()
    return [
        tuple((classes[i], p) for i, p in zip(places, values, strict=True)) if finite else ()
        for values, places, finite in zip(
            top.values.tolist(), top.indices.tolist(), finite_b, strict=True
        )
    ]


def _prepared(name: str, item: Any, preprocessing: Preprocessing) -> Tensor:
    if isinstance(item, tuple):  # a row of Images, which is decoded when its turn comes
        images, row = item
        return preprocessing.prepare(images[row][0])
    return preprocessing.prepare(decode(item, name=name))


def _is_single(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    if isinstance(images, (str, Path)):
        return _existing(Path(images)).is_file()
    return isinstance(images, (Image.Image, bytes))


def _listed(images: Any) -> list[tuple[str, Any]]:
    """(name, something `decode` takes, or Images and a row) of every image of a folder or list."""
    if isinstance(images, (str, Path)):
        return _files(Path(images))
    if isinstance(images, Images):
        return [(name, (images, row)) for row, name in enumerate(images.names)]
    try:
        listed = list(images)
    except TypeError:
        raise DataError(
            f"predict was given a {type(images).__name__}: give a file, a folder, a picture, "
            "or a list."
        ) from None
    if not listed:
        raise DataError("predict was given no image at all: give a file, a folder, or a list.")
    items: list[tuple[str, Any]] = []
    for number, item in enumerate(listed):
        if isinstance(item, (tuple, Tensor)):
            raise DataError(
                f"predict was given a list whose item {number} is a {type(item).__name__}: give "
                "pictures, files, bytes or arrays. Of (picture, label) pairs give the first of "
                "each, of tensors one batch: torch.stack(tensors)."
            )
        if not isinstance(item, (str, Path)):
            items.append((str(number), item))
        elif Path(item).is_dir():
            items += _files(Path(item))
        else:
            items.append((str(item), item))
    return items


def _files(folder: Path) -> list[tuple[str, Any]]:
    """Its image files: those that a training would take."""
    found = sorted(images_below(folder, folder, []))
    if not found:
        raise DataError(f"{folder}: no image below this folder ({', '.join(sorted(ENDINGS))}).")
    return [(str(path), path) for path in found]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder.")
    return path
