"""The released protocol: what the authors' code does to images, and in which recipe it trains.

    gtsrb, omniglot, svhn   shorter side 72, central 72 x 72, no flips, training and test alike
    the other seven         shorter side 72; training: 64 x 64 anywhere, mirrored half of the time;
                            test: central 64 x 64

`imdbfolder_coco.py` of the authors' repository. A training crop is taken from the whole image, the
long side included: an aircraft's tail is seen. In evaluation the domain's `Preprocessing` is used,
so that the network computes the same wherever it is loaded.

The views are the protocol's whatever the recipe: it must not crop by area.
"""

import dataclasses

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data import Images, Prepared, Preprocessing, view_seeds
from ...data.decoding import BrokenImageError
from ...data.images import MEMORY_LIMIT_BYTES
from ...training.examples import Examples, ImageExamples, Progress
from ...training.recipe import RELEASED, Recipe
from .domains import DOMAINS, Official, checked_names

SHORT_PX, CROP_PX = 72, 64
MAX_ASPECT = 20  # beyond it an image is damaged, and at 72 pixels would not fit in memory


def preprocessing(name: str) -> Preprocessing:
    """How images of this domain become inputs.

    Raises:
        DataError: where `name` is none of the ten.

    >>> [preprocessing(name).size_px for name in ("aircraft", "svhn")]
    [64, 72]
    """
    official = DOMAINS[checked_names([name])[0]]
    return Preprocessing(
        size_px=CROP_PX if official.crops else SHORT_PX,
        crop_ratio=CROP_PX / SHORT_PX if official.crops else 1.0,
        mean=official.mean,
        std=official.std,
        hflip=official.crops,
    )


def as_released(recipe: Recipe = RELEASED) -> Recipe:
    """`recipe` with crops of fixed size, the only ones of the protocol."""
    return dataclasses.replace(recipe, crop_scale=None)


def training_examples(
    official: Official,
    images: Images,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    progress: Progress | None = None,
) -> Examples:
    """Images as the released code trains on them.

    Raises:
        DataError: at the first image that cannot be read: the official files have none.
    """
    if official.crops:
        return WholeImages(images, preprocessing(official.name), memory_limit_bytes, progress)
    return evaluation_examples(
        official, images, memory_limit_bytes=memory_limit_bytes, progress=progress
    )


def evaluation_examples(
    official: Official,
    images: Images,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    progress: Progress | None = None,
) -> Examples:
    """Images as the released code evaluates on them; raises as `training_examples`."""
    prepared = Prepared(
        images,
        preprocessing(official.name),
        on_broken="fail",
        memory_limit_bytes=memory_limit_bytes,
        progress=progress,
    )
    return ImageExamples(prepared)


class WholeImages(Examples):
    """Whole images with a shorter side of 72 pixels, cropped to 64 x 64 anywhere, and mirrored.

    Held decoded as uint8 where all of them fit in `memory_limit_bytes`; else read once, to find
    damaged ones, and again when asked for.
    """

    runs_ahead = True

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        progress: Progress | None = None,
    ) -> None:
        self.labels, self._images, self._preprocessing = images.labels, images, preprocessing
        self._normalise = dataclasses.replace(preprocessing, crop_ratio=1.0).evaluation_view
        held: list[Tensor] = []
        n_bytes = 0
        for index in range(len(images)):
            x_chw = self._whole(index)
            n_bytes += x_chw.numel()
            if n_bytes <= memory_limit_bytes:
                held.append(x_chw)
            else:
                held.clear()
            if progress is not None:
                progress(index + 1, len(images))
        self._held = held if n_bytes <= memory_limit_bytes else None

    @property
    def in_memory(self) -> bool:
        """Whether the decoded images are held."""
        return self._held is not None

    def views(self, indices: Tensor) -> Tensor:
        squares = [self._preprocessing.prepare(self._images[i][0]) for i in indices.tolist()]
        return self._preprocessing.evaluation_view(torch.stack(squares))

    def training_views(
        self, indices: Tensor, seed: int, epoch: int, scale: tuple[float, float] | None
    ) -> Tensor:
        assert scale is None, "as_released makes the recipe"
        seeds_b = view_seeds(seed, epoch, indices).tolist()
        crops = [
            _crop(self._held[index] if self._held is not None else self._whole(index), own)
            for index, own in zip(indices.tolist(), seeds_b, strict=True)
        ]
        return self._normalise(torch.stack(crops))

    def _whole(self, index: int) -> Tensor:
        """uint8 (3, h, w) with a shorter side of 72."""
        image = self._images[index][0].convert("RGB")
        short, long = sorted(image.size)
        if long > MAX_ASPECT * short:
            width, height = image.size
            raise BrokenImageError(
                self._images.names[index],
                f"its {width} x {height} pixels are longer than {MAX_ASPECT} to 1",
            )
        if short != SHORT_PX:
            scaled = int(SHORT_PX * long / short)
            wide = image.size[0] > image.size[1]
            size = (scaled, SHORT_PX) if wide else (SHORT_PX, scaled)
            image = image.resize(size, Image.Resampling.BILINEAR)
        x_hwc = np.array(image, dtype=np.uint8)
        return torch.from_numpy(np.ascontiguousarray(x_hwc.transpose(2, 0, 1)))


def _crop(x_chw: Tensor, seed: int) -> Tensor:
    """64 x 64 anywhere, mirrored or not: three fields of one well-stirred 64-bit number."""
    bits = seed % 2**64
    top = (bits >> 1 & 0x7FFFFFFF) % (x_chw.shape[1] - CROP_PX + 1)
    left = (bits >> 32) % (x_chw.shape[2] - CROP_PX + 1)
    crop_chw = x_chw[:, top : top + CROP_PX, left : left + CROP_PX]
    return crop_chw.flip(-1) if bits & 1 else crop_chw
