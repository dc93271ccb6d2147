"""A folder of Parquet files in the Hugging Face image layout, read with pyarrow alone.

    root/train.parquet  [val.parquet | validation.parquet]  [test.parquet]  [info.json]
    root/data/train-00000-of-00002.parquet ...    (shards, as the hub stores them)

Columns: an image, struct {bytes, path} or plain bytes, and a label, integer or string. Class names
come from the ClassLabel feature in the schema's metadata, else from `classes` in info.json, else
they are the label strings. A `path` is only ever a name: it is never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onetrunk.data.images import Images
from onetrunk.data.splits import Splits
from onetrunk.errors import DataError, MissingExtraError, first_line

_FILE_NAMES = {
    "train": ("train",),
    "val": ("val", "validation", "valid"),
    "test": ("test",),
}


@dataclass(frozen=True)
class _Table:
    """One split's columns: encoded images, names, labels (class indices or strings)."""

    encoded: list[bytes]
    names: list[str]
    labels: list[Any]
    classes: tuple[str, ...] | None


def has_parquet(root: Path) -> bool:
    """Whether the folder holds any file that `load_parquet` reads."""
    return any(_files(root, stem) for stems in _FILE_NAMES.values() for stem in stems)


def load_parquet(root: Path) -> Splits:
    """Read the files in `root`. Raises DataError that names the file, column or row at fault."""
    info = _info(root)
    files = {part: paths for part, stems in _FILE_NAMES.items() if (paths := _one(root, stems))}
    if "train" not in files:
        found = sorted(path.name for paths in files.values() for path in paths)
        raise DataError(f"folder {str(root)!r} has {found} but no 'train.parquet'. Add it.")
    tables = {part: _joined([_read(path) for path in paths]) for part, paths in files.items()}
    classes = _classes(tables, info.classes, root)
    parts = {
        part: _images(table, classes, f"{part} in {str(root)!r}") for part, table in tables.items()
    }
    return Splits(
        train=parts["train"],
        val=parts.get("val"),
        test=parts.get("test"),
        classes=classes,
        name=info.name,
        hflip=info.flip_ok,
        description=info.description,
    )


@dataclass(frozen=True)
class _Info:
    name: str
    description: str
    classes: tuple[str, ...] | None
    flip_ok: bool | None


def _info(root: Path) -> _Info:
    path = root / "info.json"
    if not path.exists():
        return _Info(root.resolve().name, "", None, None)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"file {str(path)!r} is not readable JSON: {error}.") from error
    if not isinstance(values, dict):
        raise DataError(
            f"file {str(path)!r} must hold a JSON object, found {type(values).__name__}."
        )

    def field(key: str, fits: Callable[[object], bool], expected: str) -> Any:
        value = values.get(key)
        if value is not None and not fits(value):
            raise DataError(f"file {str(path)!r}: {key} is {value!r}; expected {expected}.")
        return value

    classes = field("classes", _is_names, "a list of names")
    return _Info(
        name=field("name", lambda value: isinstance(value, str), "a string") or root.resolve().name,
        description=field("description", lambda value: isinstance(value, str), "a string") or "",
        classes=None if classes is None else tuple(classes),
        flip_ok=field("flip_ok", lambda value: isinstance(value, bool), "true or false"),
    )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _files(root: Path, stem: str) -> list[Path]:
    """root/stem.parquet, or its shards in root or root/data."""
    whole = root / f"{stem}.parquet"
    if whole.exists():
        return [whole]
    pattern = f"{stem}-*-of-*.parquet"
    shards = sorted(root.glob(pattern)) or sorted((root / "data").glob(pattern))
    _refuse_missing(shards)
    return shards


def _refuse_missing(shards: list[Path]) -> None:
    """Of `-00000-of-00003` all three must be there, and none of another number."""
    names = [re.search(r"-(\d+)-of-(\d+)", path.stem) for path in shards]
    numbers = sorted((int(name[1]), int(name[2])) for name in names if name)
    if shards and numbers != [(k, len(shards)) for k in range(len(shards))]:
        raise DataError(
            f"folder {str(shards[0].parent)!r} has the shards "
            f"{', '.join(path.name for path in shards[:4])}{' ...' if shards[4:] else ''}, which "
            "are not all of one data set. Download it again, or remove those of another one."
        )


def _one(root: Path, stems: tuple[str, ...]) -> list[Path]:
    found = [paths for stem in stems if (paths := _files(root, stem))]
    if len(found) > 1:
        raise DataError(
            f"folder {str(root)!r} has both {found[0][0].name!r} and {found[1][0].name!r}: "
            "which one is the validation split? Keep one."
        )
    return found[0] if found else []


def _joined(tables: list[_Table]) -> _Table:
    if len({table.classes for table in tables}) > 1:
        names = [name.partition("[")[0] for table in tables for name in table.names[:1]]
        raise DataError(
            f"the shards {', '.join(names[:4])} name different classes, so their labels do not "
            "mean the same. Write them again from one data set."
        )
    return _Table(
        encoded=[encoded for table in tables for encoded in table.encoded],
        names=[name for table in tables for name in table.names],
        labels=[label for table in tables for label in table.labels],
        classes=tables[0].classes,
    )


def _read(path: Path) -> _Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError(
            f"reading {str(path)!r} needs pyarrow, which is not installed: "
            'pip install "onetrunk[data]"'
        ) from error
    try:
        table = pq.read_table(path, partitioning=None)
        features = _features(table.schema.metadata)
        image_column = _column(table, features, "Image", ("image", "img"), path)
        label_column = _column(table, features, "ClassLabel", ("label", "labels"), path)
        images, labels = table[image_column].to_pylist(), table[label_column].to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"file {str(path)!r} is not a readable Parquet file: {first_line(error)}."
        ) from error
    pairs = [_bytes_and_name(image, row, path) for row, image in enumerate(images)]
    return _Table(
        encoded=[encoded for encoded, _ in pairs],
        names=[name for _, name in pairs],
        labels=labels,
        classes=_named_classes(features.get(label_column), path),
    )


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """The Hugging Face features by column, empty where the metadata has none or is unreadable."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _column(
    table: Any, features: dict[str, Any], kind: str, usual: tuple[str, ...], path: Path
) -> str:
    declared = [
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == kind and name in table.column_names
    ]
    named = [name for name in usual if name in (declared or table.column_names)]
    if len(declared) > 1 and not named:
        raise DataError(
            f"file {str(path)!r} has the {kind} columns {', '.join(declared)}: which one is meant? "
            f"Call it {usual[0]!r}."
        )
    candidates = named or declared
    if not candidates:
        raise DataError(
            f"file {str(path)!r} has columns {table.column_names}; expected {usual[0]!r} "
            f"(or a column whose Hugging Face feature is {kind}). Rename it."
        )
    return candidates[0]


def _bytes_and_name(image: Any, row: int, path: Path) -> tuple[bytes, str]:
    name = f"{path.name}[{row}]"
    if isinstance(image, dict):
        if isinstance(image.get("path"), str):
            name = f"{name} {image['path']}"
        image = image.get("bytes") if "bytes" in image else image
        if image is None:
            raise DataError(
                f"file {str(path)!r} row {row}: the image has no bytes, only the path of a file. "
                "Embed the images before writing it: "
                'ds.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)'
                ".to_parquet(...)."
            )
    if not isinstance(image, bytes):
        found = "null" if image is None else type(image).__name__
        raise DataError(
            f"file {str(path)!r} row {row}: the image is {found}; "
            "expected a struct {bytes, path} or bytes."
        )
    return image, name


def _named_classes(feature: Any, path: Path) -> tuple[str, ...] | None:
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    if names is None or not _is_names(names):
        raise DataError(f"file {str(path)!r}: its ClassLabel feature has names {names!r}.")
    return tuple(names)


def _classes(
    tables: dict[str, _Table], from_info: tuple[str, ...] | None, root: Path
) -> tuple[str, ...]:
    named = {part: table.classes for part, table in tables.items() if table.classes is not None}
    if len(set(named.values())) > 1:
        raise DataError(f"the Parquet files in {str(root)!r} name different classes: {named}.")
    if named:
        return next(iter(named.values()))
    if from_info is not None:
        return from_info
    labels = tables["train"].labels
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted(set(labels)))
    raise DataError(
        f"the Parquet files in {str(root)!r} have labels without names. Store them as a ClassLabel "
        "feature or as strings, or write an info.json beside them with classes: [names]."
    )


def _images(table: _Table, classes: tuple[str, ...], where: str) -> Images:
    index = {name: label for label, name in enumerate(classes)}
    labels = []
    for name, label in zip(table.names, table.labels, strict=True):
        known = index.get(label) if isinstance(label, str) else label
        if not isinstance(known, int) or isinstance(known, bool):
            raise DataError(
                f"image {name!r} of {where} has label {label!r}, which is none of the "
                f"{len(classes)} classes. Correct it, or add the class to train."
            )
        labels.append(known)
    if not labels:
        raise DataError(f"{where} has no rows.")
    return Images.from_encoded(table.encoded, labels, classes, table.names)
