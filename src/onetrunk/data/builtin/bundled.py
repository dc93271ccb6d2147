"""Files that other packages install beside their code: where they are, and what to do without."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from onetrunk.errors import MissingExtraError

_PIP_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def bundled_file(package: str, relative: str) -> Path:
    """`relative` below the data folder of skimage, matplotlib, or below sklearn/datasets/images.

    Raises MissingExtraError if the package is not installed, or came without the file.
    """
    try:
        path = _data_folder(package) / relative
    except ImportError as error:
        raise _missing(package, "is not installed") from error
    if not path.is_file():
        raise _missing(package, f"came without its file {relative!r}")
    return path


def _data_folder(package: str) -> Path:
    module = import_module(package)
    if package == "skimage":
        return Path(module.data_dir)
    if package == "matplotlib":
        return Path(module.get_data_path())
    return Path(str(module.__file__)).parent / "datasets" / "images"


def _missing(package: str, what: str) -> MissingExtraError:
    return MissingExtraError(
        f"this builtin source needs {_PIP_NAMES[package]}, which {what}: "
        'pip install "onetrunk[quickstart]"'
    )
