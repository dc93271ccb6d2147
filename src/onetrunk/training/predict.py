"""predict: the likeliest classes, with names and probabilities, of files, folders or arrays."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..core.attach import domain_of
from ..core.merge import model_in_eval
from ..data import decode
from ..errors import DataError
from .examples import preprocessing_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image.

    Args:
        name: the file, or the image's number.
        classes: (class, probability), the likeliest first.
        problem: why the image could not be read; then there are no classes.
    """

    name: str
    classes: tuple[tuple[str, float], ...]
    problem: str = ""

    @property
    def best(self) -> str:
        """The likeliest class."""
        return self.classes[0][0]


def predict(
    model: nn.Module,
    images: Any,
    *,
    top_k: int = 5,
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> list[Prediction]:
    """The `top_k` likeliest classes of every image; the network stays as it was.

    Args:
        images: a file, a folder (its image files, at any depth), a PIL image, a uint8 array
            (h, w, c), a float tensor (b, c, h, w) that is the network's input, or a list of files,
            images or arrays.

    Raises:
        DataError: where there is no such file or no image at all. An image in a folder or list that
            cannot be read gets a prediction with `problem` instead.
    """
    if top_k < 1:
        raise DataError(f"top_k={top_k}: ask for at least one class.")
    network = model_in_eval(model)
    if device is not None:
        network = network.to(device)
    if isinstance(images, Tensor):
        names = [str(i) for i in range(len(images))]
        return _named(network, names, images.split(batch_size), top_k)
    return list(_predicted(network, _listed(images), top_k, batch_size))


def _predicted(
    network: nn.Module, items: Sequence[tuple[str, Any]], top_k: int, batch_size: int
) -> Iterator[Prediction]:
    preprocessing = preprocessing_of(network)
    for start in range(0, len(items), batch_size):
        prepared: list[Tensor] = []
        names: list[str] = []
        problems: dict[str, str] = {}
        for name, item in items[start : start + batch_size]:
            try:
                prepared.append(preprocessing.prepare(decode(item, name=name)))
                names.append(name)
            except DataError as error:
                if len(items) == 1:
                    raise
                problems[name] = str(error)
        found = {}
        if prepared:
            views_bchw = preprocessing.evaluation_view(torch.stack(prepared))
            found = {p.name: p for p in _named(network, names, [views_bchw], top_k)}
        for name, _ in items[start : start + batch_size]:
            yield found.get(name) or Prediction(name, (), problems[name])


@torch.no_grad()
def _named(
    network: nn.Module, names: Sequence[str], batches: Iterable[Tensor], top_k: int
) -> list[Prediction]:
    classes = domain_of(network).classes
    reference = next(network.parameters())
    rows: list[tuple[tuple[str, float], ...]] = []
    for x_bchw in batches:
        probabilities_bc = network(x_bchw.to(reference.device, reference.dtype)).float().softmax(1)
        top = probabilities_bc.topk(min(top_k, len(classes)), dim=1)
        for values, places in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            rows.append(tuple((classes[i], p) for i, p in zip(places, values, strict=True)))
    return [Prediction(name, row) for name, row in zip(names, rows, strict=True)]


def _listed(images: Any) -> list[tuple[str, Any]]:
    """(name, something `decode` takes) of every image."""
    if isinstance(images, (str, Path)):
        return _files(Path(images))
    if isinstance(images, (Image.Image, np.ndarray)):
        return [("0", images)]
    items = [
        (str(item) if isinstance(item, (str, Path)) else str(number), item)
        for number, item in enumerate(images)
    ]
    if not items:
        raise DataError("predict was given no image at all: give a file, a folder, or a list.")
    return [(name, Path(item) if isinstance(item, str) else item) for name, item in items]


def _files(path: Path) -> list[tuple[str, Any]]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise DataError(f"{path}: no image below this folder ({', '.join(SUFFIXES)}).")
        return [(str(p), p) for p in found]
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder.")
    return [(str(path), path)]
