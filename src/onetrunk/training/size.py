"""sensible_size: how large the images should be that a domain's network sees."""

from statistics import median

from torch import nn

from ..data import Images
from ..errors import DataError

STEP_PX, LEAST_PX, N_LOOKED_AT = 32, 64, 50


def sensible_size(backbone: nn.Module, images: Images) -> int:
    """The side in pixels: the backbone's own, but no larger than the images are sharp.

    Enlarging small pictures costs time and buys nothing: a side is the images' median short side,
    down to a multiple of 32, at least 64 and at most what the backbone was trained with. Backbones
    that take one size only (most ViTs) keep it.
    """
    config = getattr(backbone, "pretrained_cfg", None) or {}
    own = int((config.get("input_size") or (3, 224, 224))[-1])
    fixed = getattr(backbone, "image_size", None)  # torchvision's ViT
    if config.get("fixed_input_size") or isinstance(fixed, int):
        return int(fixed) if isinstance(fixed, int) else own
    return min(own, max(LEAST_PX, int(_short_side(images)) // STEP_PX * STEP_PX))


def _short_side(images: Images) -> float:
    sides = []
    for index in range(0, len(images), max(1, len(images) // N_LOOKED_AT)):
        try:
            sides.append(min(images[index][0].size))
        except DataError:  # a broken image is reported when the images are prepared
            continue
    return median(sides) if sides else LEAST_PX
