"""load: a written source -> Splits. One file a kind of source, one line a kind in KINDS.

path/to/folder            class folders, or train.parquet ... (also val, test)
hf:owner/name[:config]    a Hugging Face dataset, or hf:./folder
torchvision:GTSRB         a classification dataset of torchvision
sklearn:digits            8 x 8 handwritten digits that come with scikit-learn
builtin:textures          real images that come with the quickstart's dependencies
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from onetrunk.data.builtin import load_builtin
from onetrunk.data.options import Fractions, Options
from onetrunk.data.source_folder import load_folder
from onetrunk.data.source_hub import load_hub
from onetrunk.data.source_parquet import has_parquet, load_parquet
from onetrunk.data.source_sklearn import load_sklearn
from onetrunk.data.source_torchvision import load_torchvision
from onetrunk.data.splits import Splits
from onetrunk.errors import DataError

FORMS = (
    "a folder of class folders (optionally below train/, val/, test/), a folder with "
    "train.parquet, hf:owner/name, torchvision:GTSRB, sklearn:digits, builtin:textures"
)

# what follows the colon, options -> Splits
Loader = Callable[[str, Options], Splits]
KINDS: Mapping[str, Loader] = MappingProxyType(
    {
        "hf": load_hub,
        "torchvision": load_torchvision,
        "sklearn": load_sklearn,
        "builtin": load_builtin,
    }
)


def load(
    source: str | os.PathLike[str],
    *,
    split_fractions: Fractions = (0.7, 0.15, 0.15),
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Splits:
    """Read a source in one of the forms above.

    split_fractions, seed: how to cut a source that has no splits of its own (train, val, test; they
    sum to 1; stratified by class). cache_dir: where downloads go (default: ~/.cache/onetrunk).
    Raises DataError for a source that is unknown, missing, empty or damaged, MissingExtraError for
    one that needs a package which is not installed.

    >>> load("builtin:faces").classes
    ('face', 'no face')
    """
    written = os.fspath(source)
    options = Options(split_fractions, seed, None if cache_dir is None else Path(cache_dir))
    kind, colon, rest = written.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](rest, options)
    path = expanded(written)
    _check_folder(written, path)
    found = load_parquet(path) if has_parquet(path) else load_folder(path, options)
    if found.val or found.test or found.cut:
        return found
    alone = f"{found.name} has a train split alone: it is not cut, and there are no test images."
    return dataclasses.replace(found, note=f"{found.note} {alone}".strip())


def expanded(written: str) -> Path:
    """The path with its ~ as a home; as it is where there is no such user."""
    path = Path(written)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _check_folder(written: str, path: Path) -> None:
    if not written:
        raise DataError(f"an empty source was asked for. A source is {FORMS}.")
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        exists, is_folder = False, False
    if not exists:
        raise DataError(f"source {written!r} was not found.{_meant(written)} A source is {FORMS}.")
    if not is_folder:
        raise DataError(
            f"source {written!r} is a file; expected a folder. Give the folder that holds it: "
            f"a source is {FORMS}."
        )
    if not any(path.iterdir()):
        raise DataError(f"source {written!r} is an empty folder. A source is {FORMS}.")


def _meant(written: str) -> str:
    """A guess at what a source that does not exist was meant to be."""
    kind, colon, rest = written.partition(":")
    close = difflib.get_close_matches(kind.lower(), KINDS, n=1)
    if colon and close:
        return f" Did you mean {close[0]}:{rest}?"
    siblings = _names_beside(expanded(written))
    if close := difflib.get_close_matches(Path(written).name, siblings, n=1):
        return f" Did you mean {str(Path(written).parent / close[0])!r}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", written):
        return f" Did you mean hf:{written}?"
    return ""


def _names_beside(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        return []
