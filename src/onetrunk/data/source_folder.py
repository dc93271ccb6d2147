"""A folder of class folders: root/class/*.jpg, or root/{train,val,test}/class/*.jpg.

Hidden files are ignored, other files that are no images are named in `Splits.skipped`; folders
inside a class folder belong to the class. Classes are sorted by name.
"""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from onetrunk.data.images import Images
from onetrunk.data.options import Options
from onetrunk.data.splits import Splits, check_classes_everywhere, split_single
from onetrunk.errors import DataError

ENDINGS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
)
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def load_folder(root: Path, options: Options) -> Splits:
    """Read the tree below `root`. Raises DataError that names the class, split or file at fault."""
    folders = _split_folders(root)
    skipped: list[str] = []
    if not folders:
        found = _class_files(root, root, skipped)
        images = _images(root, found, sorted(found))
        name = root.resolve().name
        splits = split_single(images, name, options, skipped=tuple(skipped))
        if odd := [entry for entry in found if entry.casefold() in _SPLIT_FOLDERS]:
            note = f"{', '.join(odd)}: a class here, as images lie in it and other classes beside."
            return dataclasses.replace(splits, note=f"{note} {splits.note}")
        return splits
    if "train" not in folders:
        raise DataError(
            f"folder {str(root)!r} has {sorted(path.name for path in folders.values())} but no "
            "'train'. Add it, or put the class folders directly below."
        )
    beside = (entry for entry in _visible(root) if entry not in folders.values())
    skipped += [str(entry.relative_to(root)) for entry in beside]
    trees = {part: _class_files(path, root, skipped) for part, path in folders.items()}
    classes = sorted(set().union(*trees.values()))
    images_by_split = {part: _images(root, tree, classes) for part, tree in trees.items()}
    check_classes_everywhere(images_by_split)
    return Splits(
        train=images_by_split["train"],
        val=images_by_split.get("val"),
        test=images_by_split.get("test"),
        classes=tuple(classes),
        name=root.resolve().name,
        skipped=tuple(skipped),
    )


def _split_folders(root: Path) -> dict[str, Path]:
    """Split -> folder; none where all that could be one are classes by that name.

    Those hold images and no folders, and stand beside folders by other names.
    """
    folders: dict[str, Path] = {}
    for entry in _visible(root):
        part = _SPLIT_FOLDERS.get(entry.name.casefold())
        if part is None or not entry.is_dir():
            continue
        if part in folders:
            raise DataError(
                f"folder {str(root)!r} has both {folders[part].name!r} and {entry.name!r}: "
                f"which one is the {part} split? Keep one."
            )
        folders[part] = entry
    others = [e for e in _visible(root) if e.is_dir() and e not in folders.values()]
    if others and all(_holds_images_only(folder) for folder in folders.values()):
        return {}
    return folders


def _holds_images_only(folder: Path) -> bool:
    entries = _visible(folder)
    return not any(entry.is_dir() for entry in entries) and any(
        entry.suffix.lower() in ENDINGS for entry in entries
    )


def _class_files(folder: Path, root: Path, skipped: list[str]) -> dict[str, list[Path]]:
    """Image files by class; what is no image is added to `skipped`, relative to `root`."""
    files: dict[str, list[Path]] = {}
    folder_of: dict[str, str] = {}
    loose = 0
    for entry in _visible(folder):
        if not entry.is_dir():
            loose += entry.suffix.lower() in ENDINGS
            skipped.append(str(entry.relative_to(root)))
            continue
        class_name = _class_name(entry)
        if class_name in files:
            raise DataError(
                f"folders {folder_of[class_name]!r} and {entry.name!r} in {str(folder)!r} are the "
                "same class name in two spellings of Unicode. Merge them."
            )
        files[class_name] = list(images_below(entry, root, skipped))
        folder_of[class_name] = entry.name
        if not files[class_name]:
            raise DataError(
                f"class folder {str(entry)!r} has no images ({', '.join(sorted(ENDINGS))}). "
                "Add some or remove the folder."
            )
    if not files:
        raise DataError(
            f"folder {str(folder)!r} has no class folders ({loose} images lie directly in it). "
            "Make one folder for each class and put the class's images into it."
            + (f" A folder {folder.name!r} is a split, not a class." if folder != root else "")
        )
    return files


def _class_name(folder: Path) -> str:
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"class folder {str(folder)!r}: its name is not valid UTF-8.") from error
    return unicodedata.normalize("NFC", folder.name)


def images_below(top: Path, root: Path, skipped: list[str]) -> Iterator[Path]:
    """Image files at any depth; other files are added to `skipped`, relative to `root`."""
    visited: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            continue  # a loop of symbolic links
        visited.add((status.st_dev, status.st_ino))
        for entry in _visible(folder):
            if entry.is_dir():
                waiting.append(entry)
            elif entry.suffix.lower() in ENDINGS and entry.is_file():
                yield entry
            else:
                skipped.append(str(entry.relative_to(root)))


def _visible(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        raise DataError(f"folder {str(folder)!r} cannot be read: {error.strerror}.") from error


def _images(root: Path, found: dict[str, list[Path]], classes: list[str]) -> Images:
    pairs = [(path, classes.index(name)) for name in sorted(found) for path in found[name]]
    paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
    names = [str(path.relative_to(root)) for path in paths]
    return Images.from_files(paths, labels, classes, names)
