"""hf:owner/name[:config], a dataset of the Hugging Face hub, or hf:./folder, through `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onetrunk.data.decoding import BrokenImageError
from onetrunk.data.images import Images
from onetrunk.data.options import Options
from onetrunk.data.splits import Splits, split_single
from onetrunk.errors import DataError, MissingExtraError

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
        found = datasets.load_dataset(name, config, cache_dir=cache)
    except Exception as error:  # a dozen kinds: no network, no such dataset, config needed, ...
        raise DataError(
            f"source 'hf:{written}' could not be loaded ({type(error).__name__}: {_line(error)}). "
            "Check the name (owner/name, or owner/name:config) and the network."
        ) from error
    roots = _roots(name, cache)
    parts = {
        part: _images(found[value], f"{written} {value}", roots)
        for part, values in _SPLIT_VALUES.items()
        if (value := next((value for value in values if value in found), None)) is not None
    }
    if "train" not in parts:
        raise DataError(f"source 'hf:{written}' has splits {sorted(found)}, none called 'train'.")
    short = Path(name).resolve().name if Path(name).is_dir() else name.split("/")[-1]
    if len(parts) == 1:
        return split_single(parts["train"], short, options, description=f"hf:{written}")
    return Splits(
        train=parts["train"],
        val=parts.get("val"),
        test=parts.get("test"),
        classes=parts["train"].classes,
        name=short,
        description=f"hf:{written}",
    )


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


def _images(dataset: Any, name: str, roots: tuple[Path, ...]) -> Images:
    import datasets

    image_column = _column(dataset, datasets.Image, ("image", "img"), name)
    label_column = _column(dataset, datasets.ClassLabel, ("label", "labels"), name)
    feature = dataset.features[label_column]
    labels = dataset[label_column][:]
    if isinstance(feature, datasets.ClassLabel):
        classes = feature.names
    elif all(isinstance(label, str) for label in labels):
        classes = sorted(set(labels))
        labels = [classes.index(label) for label in labels]
    else:
        classes = [str(label) for label in range(max(labels) + 1)]
    encoded = dataset.cast_column(image_column, datasets.Image(decode=False))[image_column]
    names = [f"{name}[{index}]" for index in range(len(dataset))]
    return Images(_Encoded(encoded, roots, name), labels, classes, names)


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


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
