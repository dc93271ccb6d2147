"""builtin:textures, builtin:science, builtin:photos: which picture does a small patch come from?

Every picture is cut into square blocks of 2 x 2 patches; a block as a whole goes to train, val or
test, so no pixel is in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from onetrunk.data.builtin.bundled import bundled_file
from onetrunk.data.decoding import decode
from onetrunk.data.images import Images
from onetrunk.data.splits import Splits

Picture = npt.NDArray[np.uint8]
FRACTIONS = (0.6, 0.15, 0.25)  # train, val, test
_BLOCK = 2  # patches along a block's side
_MOST_BLOCKS = 64  # of one picture
_LEAST_RANGE = 16  # grey values: a black patch could come from anywhere


def textures() -> Splits:
    """Brick, grass and gravel in grey, 24 x 24 pixels."""
    pictures = {name: _picture("skimage", f"{name}.png") for name in ("brick", "grass", "gravel")}
    return _patches("textures", "patches of three grey textures", pictures, patch_px=24)


def science() -> Splits:
    """Pictures of five instruments, microscopes to telescopes, in grey, 32 x 32 pixels."""
    files = {
        "cell": "cell.png",
        "galaxies": "hubble_deep_field.jpg",
        "moon": "moon.png",
        "retina": "retina.jpg",
        "tissue": "ihc.png",
    }
    pictures = {name: _grey(_picture("skimage", file)) for name, file in files.items()}
    pictures["retina"] = pictures["retina"][256:1152, 256:1152]  # without the black rim
    return _patches("science", "grey patches of five scientific pictures", pictures, patch_px=32)


def photos() -> Splits:
    """Eight colour photographs, 32 x 32 pixels."""
    files = {
        "astronaut": "astronaut.png",
        "cat": "chelsea.png",
        "coffee": "coffee.png",
        "motorcycle": "motorcycle_left.png",
        "rocket": "rocket.jpg",
    }
    pictures = {name: _picture("skimage", file) for name, file in files.items()}
    pictures["camera"] = _picture("skimage", "camera.png")
    pictures["flower"] = _picture("sklearn", "flower.jpg")
    pictures["pagoda"] = _picture("sklearn", "china.jpg")
    return _patches("photos", "patches of eight photographs", pictures, patch_px=32)


def _picture(package: str, file: str) -> Picture:
    return np.asarray(decode(bundled_file(package, file)))


def _grey(picture: Picture) -> Picture:
    return np.asarray(Image.fromarray(picture).convert("L"))


def _patches(name: str, description: str, pictures: Mapping[str, Picture], patch_px: int) -> Splits:
    classes = sorted(pictures)
    parts: tuple[list[Picture], list[Picture], list[Picture]] = ([], [], [])
    labels: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label, class_name in enumerate(classes):
        blocks = _blocks(pictures[class_name], patch_px, class_name)
        n_train, n_val = (round(fraction * len(blocks)) for fraction in FRACTIONS[:2])
        groups = blocks[:n_train], blocks[n_train : n_train + n_val], blocks[n_train + n_val :]
        for part, part_labels, group in zip(parts, labels, groups, strict=True):
            for block in group:
                part.extend(block)
                part_labels.extend([label] * len(block))
    train, val, test = (
        Images.from_arrays(part, part_labels, classes)
        for part, part_labels in zip(parts, labels, strict=True)
    )
    return Splits(train, val, test, tuple(classes), name, hflip=True, description=description)


def _blocks(picture: Picture, patch_px: int, salt: str) -> list[list[Picture]]:
    """At most _MOST_BLOCKS in an order that looks random, each a list of its patches."""
    side = patch_px * _BLOCK
    height, width = picture.shape[:2]
    corners = [
        (top, left)
        for top in range(0, height - side + 1, side)
        for left in range(0, width - side + 1, side)
    ]
    corners.sort(key=lambda corner: hashlib.sha256(f"{salt}{corner}".encode()).digest())
    blocks = [
        _cut(picture[top : top + side, left : left + side], patch_px) for top, left in corners
    ]
    return [block for block in blocks if min(map(np.ptp, block)) >= _LEAST_RANGE][:_MOST_BLOCKS]


def _cut(block: Picture, patch_px: int) -> list[Picture]:
    steps = range(0, patch_px * _BLOCK, patch_px)
    return [
        block[top : top + patch_px, left : left + patch_px].copy()
        for top in steps
        for left in steps
    ]
