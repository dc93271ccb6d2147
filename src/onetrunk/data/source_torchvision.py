"""torchvision:NAME, any classification dataset of torchvision.datasets, downloaded when not there.

Splits are the dataset's own where its constructor has `split` or `train`; the rest is cut by class.
"""

from __future__ import annotations

import difflib
import inspect
import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from PIL import Image

from onetrunk.data.decoding import BrokenImageError
from onetrunk.data.images import Images
from onetrunk.data.options import Options
from onetrunk.data.splits import Splits, split_single
from onetrunk.errors import DataError, first_line

# datasets whose labels are known to survive a mirror, or not to; the others are left open
_HFLIP = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "STL10", "DTD", "EuroSAT", "FashionMNIST"), True),
    **dict.fromkeys(("FGVCAircraft", "Flowers102", "Food101", "OxfordIIITPet", "PCAM"), True),
    **dict.fromkeys(("Caltech101", "Caltech256", "Country211", "StanfordCars", "SUN397"), True),
    **dict.fromkeys(("MNIST", "EMNIST", "KMNIST", "QMNIST", "USPS", "SVHN"), False),
    **dict.fromkeys(("GTSRB", "Omniglot", "RenderedSST2"), False),
}
_SPLIT_VALUES = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")


class _Pictures(Sequence[Image.Image]):
    """The images of a torchvision dataset, decoded by it when asked for."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._dataset[index][0]
        except OSError as error:  # a file that Pillow or torchvision cannot read
            raise BrokenImageError(f"{self._name}[{index}]", first_line(error)) from error


def load_torchvision(name: str, options: Options) -> Splits:
    """Read a dataset by its class name. Raises DataError if it is unknown or cannot be fetched."""
    dataset_class = _dataset_class(name)
    parts = {
        part: dataset
        for part in _SPLIT_VALUES
        if (dataset := _build(dataset_class, part, options)) is not None
    }
    if "train" not in parts:
        raise DataError(
            f"torchvision:{name} has no split 'train' that can be chosen by name alone. "
            "Save the split you want as a folder of class folders."
        )
    images = {part: _images(dataset, f"{name} {part}") for part, dataset in parts.items()}
    hflip = _HFLIP.get(name)
    description = f"torchvision.datasets.{name}"
    if "test" not in images and "val" not in images:
        return split_single(images["train"], name, options, hflip=hflip, description=description)
    return Splits(
        train=images["train"],
        val=images.get("val"),
        test=images.get("test"),
        classes=images["train"].classes,
        name=name,
        hflip=hflip,
        description=description,
    )


def _dataset_class(name: str) -> Any:
    from torchvision import datasets

    known = [
        each
        for each in datasets.__all__
        if inspect.isclass(getattr(datasets, each))
        and {"root", "transform"} <= set(inspect.signature(getattr(datasets, each)).parameters)
        and each not in ("DatasetFolder", "ImageFolder", "VisionDataset")
    ]
    if name in (*known, "FakeData"):
        return getattr(datasets, name)
    close = [each for each in known if each.lower() == name.lower()]
    close = close or difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean torchvision:{close[0]}?" if close else ""
    raise DataError(
        f"source 'torchvision:{name}' is unknown.{meant} "
        "Give the name of a class of torchvision.datasets, such as torchvision:GTSRB."
    )


def _build(dataset_class: Any, part: str, options: Options) -> Any:
    """The dataset of one split, or None where it has no such split."""
    parameters = inspect.signature(dataset_class).parameters
    where = {"root": str(options.downloads() / "torchvision")} if "root" in parameters else {}
    if "split" in parameters:
        choices: list[dict[str, Any]] = [{"split": value} for value in _SPLIT_VALUES[part]]
    elif "train" in parameters:
        choices = [] if part == "val" else [{"train": part == "train"}]
    else:
        choices = [{}] if part == "train" else []
    for choice in choices:
        try:
            return _present_or_downloaded(dataset_class, {**where, **choice})
        except ValueError as error:
            if "split" not in str(error):  # the message of a value that `split` does not take
                raise
    return None


def _present_or_downloaded(dataset_class: Any, arguments: dict[str, Any]) -> Any:
    try:
        return dataset_class(**arguments)
    except (RuntimeError, FileNotFoundError) as error:
        name = dataset_class.__name__
        if "download" not in inspect.signature(dataset_class).parameters:
            raise DataError(
                f"torchvision cannot download {name}: place it in {arguments['root']!r} as its "
                f"documentation says ({first_line(error)})."
            ) from error
        try:
            # torchvision prints while it downloads; the streams belong to the caller
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                return dataset_class(**arguments, download=True)
        except (OSError, RuntimeError) as failure:  # URLError is an OSError
            raise DataError(
                f"torchvision:{name} is not in {arguments.get('root')!r} and could not be "
                f"downloaded ({first_line(failure)}). Check the network, or place the files there."
            ) from failure
        except ImportError as failure:
            raise DataError(
                f"torchvision:{name} needs a package: {first_line(failure)}."
            ) from failure


def _images(dataset: Any, name: str) -> Images:
    try:
        labels = _labels(dataset)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"torchvision:{name} does not give one integer label an image ({first_line(error)}): "
            "it is no classification dataset."
        ) from error
    names = [f"{name}[{index}]" for index in range(len(dataset))]
    return Images(_Pictures(dataset, name), labels, _classes(dataset, labels), names)


def _labels(dataset: Any) -> list[int]:
    for attribute in _LABEL_ATTRIBUTES:
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return [int(value) for value in values]
    samples = getattr(dataset, "_samples", None)
    if samples is not None:
        return [int(label) for _, label in samples]
    return [int(dataset[index][1]) for index in range(len(dataset))]  # decodes everything


def _classes(dataset: Any, labels: list[int]) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if names is not None and len(set(names)) == len(names) > max(labels):
        return [str(name) for name in names]
    return [str(label) for label in range(max(labels) + 1)]
