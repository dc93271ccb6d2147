"""sklearn:digits, the 1,797 handwritten digits of 8 x 8 grey pixels that come with scikit-learn."""

from __future__ import annotations

import difflib

import numpy as np

from onetrunk.data.images import Images
from onetrunk.data.options import Options
from onetrunk.data.splits import Splits, split_single
from onetrunk.errors import DataError, MissingExtraError


def load_sklearn(name: str, options: Options) -> Splits:
    """Read `digits`. Raises DataError for another name."""
    if name != "digits":
        close = difflib.get_close_matches(name.lower(), ["digits"], n=1, cutoff=0.6)
        meant = " Did you mean sklearn:digits?" if close else ""
        raise DataError(f"source 'sklearn:{name}' is unknown.{meant} There is one: sklearn:digits.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "source 'sklearn:digits' needs scikit-learn, which is not installed: "
            'pip install "onetrunk[quickstart]"'
        ) from error
    digits = load_digits()
    images = Images.from_arrays(
        np.round(digits.images * (255 / 16)).astype(np.uint8),  # stored as 0..16
        digits.target,
        [str(digit) for digit in range(10)],
    )
    return split_single(
        images, "digits", options, hflip=False, description="handwritten digits, 8 x 8 pixels"
    )
