"""results.json, the challenge's submission, and its score against local label files.

    [{"image_id": 10206668, "category_id": 10000001}, ...]     every test image of every domain

The labels are the `<name>_test.json` of the authors' `labels_test.zip`. They are public: choose
nothing by them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ...errors import DataError
from ...files import PathLike, read_checked, reason, write_atomically
from .domains import BY_PREFIX, DOMAINS, IDS_A_DOMAIN
from .files import Devkit, read_labels, repeated
from .scoring import points, score

MAX_BYTES = 256 << 20  # the ten test sets make about 8 MB
Id = Annotated[int, Field(strict=True, ge=0)]


@dataclass(frozen=True, slots=True)
class _Answer:
    image_id: Id
    category_id: Id


_ANSWERS = TypeAdapter(list[_Answer])


@dataclass(frozen=True)
class Scored:
    """A submission's test accuracies, in [0, 1], and points by domain, in the papers' order."""

    accuracies: Mapping[str, float]
    points: Mapping[str, float]

    @property
    def score(self) -> float | None:
        """S, where all ten domains are there."""
        return score(self.accuracies) if len(self.accuracies) == len(DOMAINS) else None

    def to_json(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "accuracies": dict(self.accuracies),
            "points": dict(self.points),
            "score": self.score,
        }


def write_results(path: PathLike, answers: Mapping[int, int]) -> None:
    """Writes image id -> category id as results.json, whole or not at all.

    Raises:
        DataError: where the file cannot be written.
    """
    rows = [{"image_id": image, "category_id": answers[image]} for image in answers]
    try:
        write_atomically(path, json.dumps(rows).encode())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {reason(error)}") from error


def read_results(path: PathLike) -> dict[int, int]:
    """Image id -> category id of a results.json.

    Raises:
        DataError: where it is missing, damaged, empty, or answers an image twice.
    """
    answers = _read(Path(path).expanduser())
    found = {answer.image_id: answer.category_id for answer in answers}
    if not found:
        raise DataError(f"{path} has no answer. Give a results.json with one for every test image.")
    if len(found) < len(answers):
        twice = repeated(answer.image_id for answer in answers)
        raise DataError(f"{path} answers image {twice} twice. Give every image one category.")
    return found


def score_results(path: PathLike, labels: PathLike) -> Scored:
    """The score of a results.json against the `<name>_test.json` in the folder `labels`.

    Scored are the domains that it has answers for; each must be answered whole.

    Raises:
        DataError: where a file is missing or damaged, or ids are missing or strange.
    """
    return score_answers(read_results(path), labels, path)


def score_answers(
    answers: Mapping[int, int], labels: PathLike, source: PathLike = "the answers"
) -> Scored:
    """The same of answers, image id -> category id, that `source` names in the messages."""
    by_domain = _by_domain(answers, source)
    accuracies = {
        name: _accuracy(name, by_domain[name], read_labels(labels, name), source)
        for name in DOMAINS
        if name in by_domain
    }
    return Scored(accuracies, points(accuracies))


def check_labels(devkit: Devkit, labels: PathLike) -> None:
    """Looks at the labels before the work that they are for.

    Raises:
        DataError: where a domain's file is missing or damaged, or labels other images.
    """
    for name, files in devkit.domains.items():
        if read_labels(labels, name).keys() != set(files.test.ids):
            raise DataError(
                f"{Path(labels) / f'{name}_test.json'} does not label exactly the images of "
                f"{name}_test_stripped.json. Take both from the same official files."
            )


def _read(path: Path) -> list[_Answer]:
    try:
        return _ANSWERS.validate_json(read_checked(path, limit=MAX_BYTES))
    except FileNotFoundError:
        raise DataError(f"{path} is not there. Give a results.json.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DataError(
            f"{path} is no results.json: {first['msg']} at {'.'.join(map(str, first['loc']))}. "
            'It is a list of {"image_id": ..., "category_id": ...} with whole numbers.'
        ) from None


def _by_domain(answers: Mapping[int, int], path: PathLike) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for image, category in answers.items():
        official = BY_PREFIX.get(image // IDS_A_DOMAIN)
        if official is None:
            raise DataError(
                f"{path} answers image {image}, which is of no domain: ids are 1 to 10 times 10**7 "
                "and more. Take the ids from the test annotations."
            )
        if category // IDS_A_DOMAIN != official.prefix:
            raise DataError(
                f"{path} answers image {image} of {official.name} with category {category}, and "
                f"those of {official.name} are {official.prefix} times 10**7 and more. Give the "
                "annotations' category ids, no class indices."
            )
        found.setdefault(official.name, {})[image] = category
    return found


def _accuracy(
    name: str, answers: Mapping[int, int], labels: Mapping[int, int], path: PathLike
) -> float:
    _refuse(answers.keys() - labels.keys(), f"{path} answers", name, "that are not in the labels")
    _refuse(labels.keys() - answers.keys(), f"{path} lacks", name, "that are in the labels")
    return sum(answers[image] == category for image, category in labels.items()) / len(labels)


def _refuse(ids: Iterable[int], what: str, name: str, why: str) -> None:
    listed = sorted(ids)
    if listed:
        raise DataError(
            f"{what} {len(listed)} image ids of {name} {why}, the first {listed[0]}. "
            f"Answer exactly the images of {name}_test_stripped.json."
        )
