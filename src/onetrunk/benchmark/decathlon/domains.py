"""The ten domains of the Visual Decathlon: what the challenge and the released code fix for each.

    prefix          the challenge's number of the domain; ids are prefix * 10**7 + ...
    reference       test accuracy of the challenge's fine-tuned networks (Rebuffi et al., NIPS 2017)
    e_max           2 (1 - reference): the error that scores 0
    mean, std       of the training images, from the authors' `decathlon_mean_std.pickle`
    crops           training crops 64 of 72 pixels and flips; else whole 72-pixel squares, no flips

The class and test image counts are those of the official files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ...errors import DataError

IDS_A_DOMAIN = 10**7
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Official:
    """One domain as the challenge has it; accuracies and errors in [0, 1]."""

    name: str
    prefix: int
    n_classes: int
    n_test: int
    reference: float
    mean: Channels
    std: Channels
    crops: bool = True

    @property
    def e_max(self) -> float:
        """The error from which on the domain scores nothing: twice the reference's."""
        return 2 * (1 - self.reference)


# fmt: off
_IN_PAPER_ORDER = (
    Official("imagenet12", 6, 1000, 48238, 0.5987,
             (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Official("aircraft", 1, 100, 3333, 0.6034,
             (0.47983, 0.51074, 0.53438), (0.21070, 0.20509, 0.23730)),
    Official("cifar100", 2, 100, 10000, 0.8212,
             (0.50706, 0.48667, 0.44078), (0.26745, 0.25647, 0.27608)),
    Official("daimlerpedcls", 3, 2, 19600, 0.9282,
             (0.48204, 0.48204, 0.48204), (0.23613, 0.23613, 0.23613)),
    Official("dtd", 4, 47, 1880, 0.5553,
             (0.52696, 0.47025, 0.42397), (0.25227, 0.24092, 0.24994)),
    Official("gtsrb", 5, 43, 12630, 0.9753,
             (0.33921, 0.31178, 0.32047), (0.27560, 0.26576, 0.27090), crops=False),
    Official("vgg-flowers", 10, 102, 6149, 0.8141,
             (0.43415, 0.38310, 0.29715), (0.28510, 0.23842, 0.26396)),
    Official("omniglot", 7, 1623, 8115, 0.8769,
             (0.08100, 0.08100, 0.08100), (0.27047, 0.27047, 0.27047), crops=False),
    Official("svhn", 8, 10, 26032, 0.9655,
             (0.43768, 0.44377, 0.47280), (0.19803, 0.20102, 0.19704), crops=False),
    Official("ucf101", 9, 101, 3783, 0.5120,
             (0.49953, 0.49880, 0.49982), (0.10899, 0.10810, 0.10680)),
)
# fmt: on
DOMAINS: Mapping[str, Official] = MappingProxyType({one.name: one for one in _IN_PAPER_ORDER})
E_MAX: Mapping[str, float] = MappingProxyType({one.name: one.e_max for one in _IN_PAPER_ORDER})
BY_PREFIX: Mapping[int, Official] = MappingProxyType({one.prefix: one for one in _IN_PAPER_ORDER})


def checked_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each one of the ten and there once.

    Raises:
        DataError: for a name that is unknown or twice, or none at all.
    """
    listed = tuple(names)
    for place, name in enumerate(listed):
        if name not in DOMAINS:
            raise DataError(
                f"{name!r} is no domain of the decathlon. The ten are {', '.join(DOMAINS)}."
            )
        if name in listed[:place]:
            raise DataError(f"{name!r} is there twice. Give every domain once.")
    if not listed:
        raise DataError(f"no domain was asked for. Give one or more of {', '.join(DOMAINS)}.")
    return listed
