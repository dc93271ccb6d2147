"""hf:owner/name[:config], a dataset of the Hugging Face hub, or hf:./folder, through `datasets`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onetrunk.data.decoding import BrokenImageError
from onetrunk.data.images import Images
from onetrunk.data.options import Options
from onetrunk.data.splits import Splits, split_single
from onetrunk.errors import DataError, MissingExtraError, first_line

_SPLIT_VALUES = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}


class _Encoded(Sequence[Any]):
    """The undecoded images of a column: bytes, or the path of a file that `datasets` fetched."""

    def __init__(self, column: Any, roots: tuple[Path, ...], name: str) -> None:
        self._column, self._roots, self._name = column, roots, name

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        image = self._column[index]
        if image is None:
            raise BrokenImageError(f"{self._name}[{index}]", "the column has no image here")
        if image["bytes"] is not None:
            return image["bytes"]
        path = Path(image["path"] or "")
        # a dataset may name any file of this machine; only those fetched with it are opened
        if not any(path.resolve().is_relative_to(root) for root in self._roots):
            raise BrokenImageError(
                f"{self._name}[{index}]", f"it is only a path, {str(path)!r}, outside the dataset"
            )
        return path


def load_hub(written: str, options: Options) -> Splits:
    """Read a dataset with one image column and one label column.

    Raises DataError if it cannot be found, fetched or understood, MissingExtraError without the
    `data` extra.
    """
    name, config = _name_and_config(written)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"source 'hf:{written}' needs datasets, which is not installed: "
            'pip install "onetrunk[data]"'
        ) from error
    cache = None if options.cache_dir is None else str(options.cache_dir / "huggingface")
    try:
        with _without_progress_bars():
            found = datasets.load_dataset(name, config, cache_dir=cache)
    except Exception as error:  # a dozen kinds: no network, no such dataset, config needed, ...
        raise DataError(
            f"source 'hf:{written}' could not be loaded ({type(error).__name__}: "
            f"{first_line(error)}). Check the name (owner/name, or owner/name:config) and the "
            "network."
        ) from error
    wanted = {
        part: found[value]
        for part, values in _SPLIT_VALUES.items()
        if (value := next((value for value in values if value in found), None)) is not None
    }
    if "train" not in wanted:
        raise DataError(f"source 'hf:{written}' has splits {sorted(found)}, none called 'train'.")
    unlabelled = [part for part, dataset in wanted.items() if _hides_labels(dataset, written)]
    classes = _classes(wanted["train"], written)
    roots = _roots(name, cache)
    parts = {
        part: _images(dataset, f"{written} {part}", classes, roots)
        for part, dataset in wanted.items()
        if part not in unlabelled
    }
    short = Path(name).resolve().name if Path(name).is_dir() else name.split("/")[-1]
    note = f"left out, as all its labels are -1: {', '.join(unlabelled)}." if unlabelled else ""
    if len(parts) == 1:
        splits = split_single(parts["train"], short, options, description=f"hf:{written}")
        return dataclasses.replace(splits, note=f"{splits.note} {note}".strip())
    return Splits(
        train=parts["train"],
        val=parts.get("val"),
        test=parts.get("test"),
        classes=classes,
        name=short,
        description=f"hf:{written}",
        note=note,
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """The terminal belongs to the caller; what was switched off before stays off."""
    import datasets.utils
    import huggingface_hub.utils

    rooms = [datasets.utils, huggingface_hub.utils]
    talking = [room for room in rooms if not room.are_progress_bars_disabled()]
    for room in talking:
        room.disable_progress_bars()
    try:
        yield
    finally:
        for room in talking:
            room.enable_progress_bars()


def _name_and_config(written: str) -> tuple[str, str | None]:
    if not written:
        raise DataError("source 'hf:' names no dataset. Write hf:owner/name or hf:./folder.")
    if Path(written).is_dir():
        return written, None
    name, _, config = written.partition(":")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise DataError(f"source 'hf:{written}' is a local path, and there is no folder {name!r}.")
    return str(Path(name).expanduser()) if name.startswith("~") else name, config or None


def _roots(name: str, cache: str | None) -> tuple[Path, ...]:
    import datasets.config

    roots = [Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE)]
    roots += [Path(cache)] if cache else []
    roots += [Path(name)] if Path(name).is_dir() else []
    return tuple(root.resolve() for root in roots)


def _label_column(dataset: Any, name: str) -> str:
    import datasets

    return _column(dataset, datasets.ClassLabel, ("label", "labels"), name)


def _hides_labels(dataset: Any, name: str) -> bool:
    """Whether this is the test split of a competition, where every label is -1."""
    return set(dataset[_label_column(dataset, name)][:]) == {-1}


def _classes(train: Any, name: str) -> tuple[str, ...]:
    import datasets

    column = _label_column(train, name)
    if isinstance(train.features[column], datasets.ClassLabel):
        return tuple(train.features[column].names)
    labels = train[column][:]
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted(set(labels)))
    if all(isinstance(label, int) for label in labels):
        return tuple(str(label) for label in range(max(labels) + 1))
    raise DataError(f"dataset {name!r}: its labels in {column!r} are neither numbers nor strings.")


def _images(dataset: Any, name: str, classes: tuple[str, ...], roots: tuple[Path, ...]) -> Images:
    import datasets

    image_column = _column(dataset, datasets.Image, ("image", "img"), name)
    labels = dataset[_label_column(dataset, name)][:]
    odd = next((k for k, label in enumerate(labels) if not isinstance(label, int | str)), None)
    if odd is not None:
        raise DataError(f"{name}[{odd}] has the label {labels[odd]!r}: every image needs a class.")
    unknown = [label for label in labels if isinstance(label, str) and label not in classes]
    if unknown:
        raise DataError(f"{name} has label {unknown[0]!r}, a class that train does not have.")
    indices = [classes.index(label) if isinstance(label, str) else label for label in labels]
    encoded = dataset.cast_column(image_column, datasets.Image(decode=False))[image_column]
    names = [f"{name}[{index}]" for index in range(len(dataset))]
    return Images(_Encoded(encoded, roots, name), indices, classes, names)


def _column(dataset: Any, kind: type, usual: tuple[str, ...], name: str) -> str:
    declared = [each for each, feature in dataset.features.items() if isinstance(feature, kind)]
    candidates = [each for each in usual if each in declared] or declared
    candidates = candidates or [each for each in usual if each in dataset.features]
    if not candidates:
        raise DataError(
            f"dataset {name!r} has columns {list(dataset.features)}; expected one whose feature is "
            f"{kind.__name__}, or one called {usual[0]!r}."
        )
    return candidates[0]
