"""Adapter families, one file each. To add one: write its file, its line here, its test."""

from ... import written
from .base import Adapter as Adapter
from .base import Family as Family
from .channelwise import Channelwise as Channelwise
from .full import Full as Full
from .head import Head as Head
from .lowrank import LowRank as LowRank
from .norm import Norm as Norm
from .parallel import Parallel as Parallel
from .series import Series as Series
from .shared import Shared as Shared

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Series, Parallel, LowRank, Channelwise, Norm, Full, Head)
}
# shared needs a basis: cards write it, nobody asks for it by name
_READABLE: dict[str, type[Family]] = {**FAMILIES, Shared.name: Shared}


def read_family(text: str) -> Family:
    """The family that `text` writes.

    >>> read_family("lowrank(rank=4)")
    LowRank(rank=4, init='identity', dropout=0.0)

    Raises:
        SpecError: where the form, the family's name or a field is unknown.
        AttachError: where an option is out of its range.
    """
    name, fields = written.read(text, "adapter")
    if name not in _READABLE:
        raise written.unknown("adapter family", name, FAMILIES)
    family: Family = written.build(_READABLE[name], fields, text, "adapter")
    return family
