"""The challenge's own files: annotations and images, read as they are, checked, never unpacked.

    FOLDER/annotations/<name>_train.json, <name>_val.json, <name>_test_stripped.json
    FOLDER/data/<name>/{train,val,test}/...    or FOLDER/data/<name>.tar with the same inside

(imagenet12 may keep its tar's own name, `decathlon-1.0-data-imagenet.tar`.) The annotations are
COCO's: `images` with id and file_name `data/<name>/...`, `annotations` with image_id and
category_id, `categories` with id and name. An id is prefix * 10**7 plus a number.

An image is found by looking its name up among the files that are really in the folder or the tar,
links left out; so no name in a file leads anywhere else. Bytes are read from a tar at the member's
offset when an image is asked for. Reading costs one pass over the annotations and over the tar's
headers; no image is decoded.
"""

import abc
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

from pydantic import Field, TypeAdapter, ValidationError

from ...data import Images
from ...data.decoding import BrokenImageError, Limits
from ...errors import DataError
from ...files import PathLike, read_checked, reason
from .domains import DOMAINS, IDS_A_DOMAIN, Official, checked_names

MAX_JSON_BYTES = 2 << 30  # imagenet12_train.json has about 0.4 GB
IMAGENET_TAR = "decathlon-1.0-data-imagenet.tar"
Part = Literal["train", "val", "train+val", "test"]

Id = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Image:
    id: Id
    file_name: Text


@dataclass(frozen=True, slots=True)
class _Annotation:
    image_id: Id
    category_id: Id


@dataclass(frozen=True, slots=True)
class _Category:
    id: Id
    name: Text


@dataclass(frozen=True, slots=True)
class _Stripped:
    images: list[_Image]


@dataclass(frozen=True, slots=True)
class _Labels:
    annotations: list[_Annotation]


@dataclass(frozen=True, slots=True)
class _Labelled:
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class Archive(abc.ABC):
    """The image files of one domain, by name, `aircraft/train/...`."""

    where: Path

    @abc.abstractmethod
    def first(self) -> str | None:
        """The name of one of its files; None where it has none."""

    @abc.abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a regular file of that name."""

    @abc.abstractmethod
    def sources(self, names: Sequence[str]) -> Sequence[Any]:
        """What `Images` decodes, one for each name."""


class FolderArchive(Archive):
    """Unpacked images: the regular files below `data/<name>`; links are not followed."""

    def __init__(self, data: Path, name: str) -> None:
        self.where, self._data = data / name, data
        self._names = set(_files_below(self.where, f"{name}/"))

    def first(self) -> str | None:
        return min(self._names, default=None)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def sources(self, names: Sequence[str]) -> Sequence[Path]:
        return tuple(self._data / name for name in names)


class TarArchive(Archive):
    """An uncompressed tar: name -> (offset, size) of its regular files; the first of equals."""

    def __init__(self, path: Path) -> None:
        self.where = path
        self._places = _tar_places(path)

    def first(self) -> str | None:
        return min(self._places, default=None)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def sources(self, names: Sequence[str]) -> "TarBytes":
        return TarBytes(self.where, names, [self._places[name] for name in names])


class TarBytes(Sequence[bytes]):
    """Encoded images inside a tar, each read when asked for."""

    def __init__(self, path: Path, names: Sequence[str], places: Sequence[tuple[int, int]]) -> None:
        self._path, self._names, self._places = path, names, places
        self._limit = Limits().max_bytes

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "TarBytes": ...
    def __getitem__(self, index: int | slice) -> "bytes | TarBytes":
        if isinstance(index, slice):
            return TarBytes(self._path, self._names[index], self._places[index])
        offset, size = self._places[index]
        try:
            with open(self._path, "rb") as file:
                file.seek(offset)
                data = file.read(min(size, self._limit + 1))  # one more shows that it is too big
        except OSError as error:
            raise BrokenImageError(self._names[index], reason(error).rstrip(".")) from error
        if len(data) < min(size, self._limit + 1):
            raise BrokenImageError(self._names[index], f"{self._path} is cut short")
        return data


@dataclass(frozen=True)
class Rows:
    """One annotation file, checked: an id, a file name and a label for every image, in its order.

    labels: index into the domain's classes; of test images, whose labels nobody knows, all 0.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.ids + other.ids, self.names + other.names, self.labels + other.labels)


@dataclass(frozen=True)
class DomainFiles:
    """One domain of the challenge, read.

    Args:
        official: what the challenge says of it.
        classes: names, in the order of the labels; where two have one name, with their ids.
        category_ids: of each class, ascending.
        train, val, test: the images.
        archive: where their bytes are.
    """

    official: Official
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    train: Rows
    val: Rows
    test: Rows
    archive: Archive

    def rows(self, part: Part) -> Rows:
        """Ids, names and labels of a part."""
        if part == "train+val":
            return self.train + self.val
        return {"train": self.train, "val": self.val, "test": self.test}[part]

    def images(self, part: Part) -> Images:
        """A part as images, decoded when asked for."""
        rows = self.rows(part)
        return Images(self.archive.sources(rows.names), rows.labels, self.classes, rows.names)


@dataclass(frozen=True)
class Devkit:
    """The challenge's files, as far as they were asked for."""

    folder: Path
    domains: Mapping[str, DomainFiles]


def read_devkit(folder: PathLike, domains: Iterable[str] | None = None) -> Devkit:
    """The devkit's folder, `decathlon-1.0`: some of its domains, by default all ten.

    Raises:
        DataError: where a file is missing, damaged or contradicts another: ids that are twice or
            another domain's, unknown categories, images without a label or without a file, names
            that lead out of the folder.
    """
    names = checked_names(DOMAINS if domains is None else domains)
    root = Path(folder).expanduser()
    if not (root / "annotations").is_dir():
        raise DataError(
            f"{root} has no folder 'annotations': it is not the devkit. Unpack "
            "decathlon-1.0-devkit.tar.gz and give its folder decathlon-1.0."
        )
    return Devkit(root, {name: _read_domain(root, DOMAINS[name]) for name in names})


def read_labels(folder: PathLike, name: str) -> dict[int, int]:
    """Image id -> category id of `<name>_test.json`.

    Raises:
        DataError: where the file is missing or damaged, or labels an image twice.
    """
    path = Path(folder).expanduser() / f"{name}_test.json"
    file = _parsed(path, _Labels, "Give the folder that labels_test.zip was unpacked into.")
    labels = {one.image_id: one.category_id for one in file.annotations}
    if len(labels) < len(file.annotations):
        image_id = repeated(one.image_id for one in file.annotations)
        raise DataError(f"{path} labels image {image_id} twice. {_AGAIN}")
    for one in (*labels, *labels.values()):
        _check_id(one, DOMAINS[name], path)
    return labels


_AGAIN = "Unpack the official file again."


def _read_domain(root: Path, official: Official) -> DomainFiles:
    folder, name = root / "annotations", official.name
    hint = "It comes with decathlon-1.0-devkit.tar.gz."
    paths = {part: folder / f"{name}_{part}.json" for part in ("train", "val", "test_stripped")}
    train = _parsed(paths["train"], _Labelled, hint)
    val = _parsed(paths["val"], _Labelled, hint)
    test = _parsed(paths["test_stripped"], _Stripped, hint)
    categories = _categories(train, official, paths["train"])
    if _categories(val, official, paths["val"]) != categories:
        raise DataError(f"{paths['val']} and {paths['train']} list different categories. {_AGAIN}")
    label_of = {category: label for label, category in enumerate(categories)}
    files = DomainFiles(
        official,
        _class_names(categories),
        tuple(categories),
        _rows(train.images, _labels(train, label_of, paths["train"]), official, paths["train"]),
        _rows(val.images, _labels(val, label_of, paths["val"]), official, paths["val"]),
        _rows(test.images, None, official, paths["test_stripped"]),
        _archive(root, name),
    )
    _check_all_different(files)
    _check_all_there(files)
    return files


def _parsed(path: Path, kind: type[T], hint: str) -> T:
    try:
        data = read_checked(path, limit=MAX_JSON_BYTES)
    except FileNotFoundError:
        raise DataError(f"{path} is not there. {hint}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    try:
        return TypeAdapter(kind).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        at = f" at {place}" if place else ""
        raise DataError(
            f"{path} is no annotation file of the challenge: {first['msg']}{at} "
            f"({error.error_count()} such in all). {_AGAIN}"
        ) from None


def _categories(file: _Labelled, official: Official, path: Path) -> dict[int, str]:
    """Category id -> name, in the order of the ids."""
    if len(file.categories) < 2:
        raise DataError(f"{path} has {len(file.categories)} categories, and 2 are needed. {_AGAIN}")
    found = {one.id: one.name for one in file.categories}
    if len(found) < len(file.categories):
        raise DataError(
            f"{path} has category {repeated(c.id for c in file.categories)} twice. {_AGAIN}"
        )
    for category in found:
        _check_id(category, official, path)
    return dict(sorted(found.items()))


def _class_names(categories: Mapping[int, str]) -> tuple[str, ...]:
    """Names that differ: ImageNet has two classes 'crane'."""
    counts = Counter(categories.values())
    names = [name if counts[name] == 1 else f"{name} ({i})" for i, name in categories.items()]
    if len(set(names)) < len(names):  # a name that looks like another with its id
        names = [f"{name} ({i})" for i, name in categories.items()]
    return tuple(names)


def _labels(file: _Labelled, label_of: Mapping[int, int], path: Path) -> list[int]:
    """The label of each image, in the images' order."""
    category_of = {one.image_id: one.category_id for one in file.annotations}
    if len(category_of) < len(file.annotations):
        image_id = repeated(one.image_id for one in file.annotations)
        raise DataError(f"{path} labels image {image_id} twice. {_AGAIN}")
    unlabelled = [image.id for image in file.images if image.id not in category_of]
    if unlabelled:
        raise DataError(
            f"{path} has {len(unlabelled)} images without a label, the first {unlabelled[0]}. "
            f"{_AGAIN}"
        )
    strange = category_of.keys() - {image.id for image in file.images}
    if strange:
        raise DataError(f"{path} labels image {min(strange)}, which it does not list. {_AGAIN}")
    for image_id, category in category_of.items():
        if category not in label_of:
            raise DataError(
                f"{path} gives image {image_id} category {category}, which it does not list. "
                f"{_AGAIN}"
            )
    return [label_of[category_of[image.id]] for image in file.images]


def _rows(images: list[_Image], labels: list[int] | None, official: Official, path: Path) -> Rows:
    if not images:
        raise DataError(f"{path} lists no image. {_AGAIN}")
    for image in images:
        _check_id(image.id, official, path)
    return Rows(
        tuple(image.id for image in images),
        tuple(_inside(image.file_name, official.name, path) for image in images),
        (0,) * len(images) if labels is None else tuple(labels),
    )


def _check_id(found: int, official: Official, path: Path) -> None:
    if found // IDS_A_DOMAIN != official.prefix:
        raise DataError(
            f"{path} has the id {found}; those of {official.name} are {official.prefix} * 10**7 "
            f"and up to 10**7 more. {_AGAIN}"
        )


def _inside(file_name: str, name: str, path: Path) -> str:
    """`aircraft/train/...` of `data/aircraft/train/...`."""
    plain = file_name.removeprefix("data/")
    steps = plain.split("/")
    if steps[0] != name or not {"", ".", ".."}.isdisjoint(steps) or "\\" in plain or "\0" in plain:
        raise DataError(
            f"{path} names the image {file_name[:200]!r}, and images are at data/{name}/...: no "
            f"path is followed out of there. {_AGAIN}"
        )
    return plain


def _check_all_different(files: DomainFiles) -> None:
    """No image is twice, in one part or in two: a test image in training would be cheating."""
    every = files.train + files.val + files.test
    for what, values in (("id", every.ids), ("file", every.names)):
        if len(set(values)) < len(values):
            raise DataError(
                f"{files.official.name}: the image {what} {repeated(values)!r} is there twice in "
                f"the annotations of train, val and test. {_AGAIN}"
            )


def _check_all_there(files: DomainFiles) -> None:
    names = (*files.train.names, *files.val.names, *files.test.names)
    missing = [name for name in names if name not in files.archive]
    if missing:
        what = "it may have been cut short."
        if len(missing) == len(names):
            has = files.archive.first()
            what = f"it has {has!r}, say." if has else "it has no image."
        folder = files.archive.where
        if folder.is_dir() and (tar := _tar_of(folder.parent, files.official.name)) is not None:
            what += f" Without that folder, {tar.name} beside it is read."
        raise DataError(
            f"{files.archive.where} lacks {len(missing)} of the {len(names)} images that the "
            f"annotations of {files.official.name} list, the first {missing[0]!r} (links do not "
            f"count). Copy or unpack the official file again: {what}"
        )


def _archive(root: Path, name: str) -> Archive:
    data = root / "data"
    if _is_plain(data / name, folder=True):
        return FolderArchive(data, name)
    if (tar := _tar_of(data, name)) is not None:
        return TarArchive(tar)
    raise DataError(
        f"{data} has neither a folder {name!r} nor {' nor '.join(_tar_names(name))} (links do not "
        "count). Put the official tar there, or unpack it there; "
        + (
            f"{IMAGENET_TAR} comes from image-net.org."
            if name == "imagenet12"
            else "it comes with decathlon-1.0-data.tar.gz."
        )
    )


def _tar_of(data: Path, name: str) -> Path | None:
    """The tar of a domain, where it is there."""
    tars = (data / tar for tar in _tar_names(name))
    return next((tar for tar in tars if _is_plain(tar, folder=False)), None)


def _tar_names(name: str) -> list[str]:
    return [f"{name}.tar"] + ([IMAGENET_TAR] if name == "imagenet12" else [])


def _is_plain(path: Path, *, folder: bool) -> bool:
    return not path.is_symlink() and (path.is_dir() if folder else path.is_file())


def _files_below(folder: Path, prefix: str) -> Iterable[str]:
    """Names of the regular files below `folder`, as in a tar; a link is no file and no folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files_below(Path(entry.path), f"{prefix}{entry.name}/")
                elif entry.is_file(follow_symlinks=False):
                    yield prefix + entry.name
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {reason(error)}") from error


def _tar_places(path: Path) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            reached = -1
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= reached:  # else it could go round for ever
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                reached = tar.offset
                vars(tar)["members"].clear()  # it keeps every header, 2 GB of them for imagenet12
                if member.isreg() and not member.issparse():
                    name = member.name.removeprefix("./")
                    places.setdefault(name, (member.offset_data, member.size))
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is no whole uncompressed tar ({error}). Copy the official file again."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    return places


def repeated(values: Iterable[T]) -> T | None:
    """The first value that comes a second time; None where all differ.

    >>> repeated([3, 1, 4, 1, 3])
    1
    """
    seen: set[T] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
