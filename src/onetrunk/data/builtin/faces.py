"""builtin:faces, 100 faces and 100 other pictures of 25 x 25 grey pixels (LFW, scikit-image)."""

from __future__ import annotations

import numpy as np

from onetrunk.data.builtin.bundled import bundled_file
from onetrunk.data.images import Images
from onetrunk.data.splits import Splits, split

FRACTIONS = (0.5, 0.2, 0.3)


def faces() -> Splits:
    """100 / 40 / 60 images, half of each faces."""
    x_nhw = np.load(bundled_file("skimage", "lfw_subset.npy"), allow_pickle=False)
    n_faces = len(x_nhw) // 2  # the first half are faces
    labels = [0] * n_faces + [1] * (len(x_nhw) - n_faces)
    images = Images.from_arrays(x_nhw, labels, ("face", "no face"))
    train, val, test = split(images, FRACTIONS, seed=0)
    return Splits(
        train=train,
        val=val,
        test=test,
        classes=images.classes,
        name="faces",
        hflip=True,
        description="faces in photographs or not, 25 x 25 grey pixels (LFW, scikit-image)",
    )
