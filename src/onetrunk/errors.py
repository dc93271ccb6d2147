"""The one family of exceptions that onetrunk raises on purpose.

Every message says what was asked, what was found and what to do. `except OnetrunkError` catches
them all; the leaves say which room refused.
"""


class OnetrunkError(ValueError):
    """A request that cannot be honoured: says what was asked, what was found, and what to do."""


class SpecError(OnetrunkError):
    """A written form, such as `lowrank(rank=8)` or `timm:resnet18`, that cannot be read."""


class BackboneError(OnetrunkError):
    """A backbone that cannot be built, loaded, traced, or that is not the one expected."""


class AttachError(OnetrunkError):
    """A family, placement or class list that does not fit the backbone."""


class MergeError(OnetrunkError):
    """A domain that does not merge exactly into an ordinary network."""


class MixError(OnetrunkError):
    """Domains, or rows of a batch, that cannot go through one network together."""


class ExportError(OnetrunkError):
    """A domain that cannot be written in a format, or not exactly."""


class CompressError(OnetrunkError):
    """Domains that cannot be compressed together, or not as far as asked."""


class DataError(OnetrunkError):
    """A data source that is missing, empty, damaged or inconsistent."""


class TrainingError(OnetrunkError):
    """A recipe that cannot be followed, a checkpoint that does not fit, a loss that diverged."""


class DivergedError(TrainingError):
    """A loss, gradient or network that is not finite; `fit` keeps the last good state."""


class BankError(OnetrunkError):
    """A bank that cannot be read or changed as asked."""


class DamagedError(BankError):
    """A file whose bytes are not the ones that were written: truncated, altered or foreign."""


class MissingExtraError(OnetrunkError):
    """An optional dependency that this request needs and that is not installed."""


def told(error: Exception) -> str:
    """The error in one line, with its type where it is none of ours."""
    text = str(error).rstrip(".")
    return text if isinstance(error, OnetrunkError) else f"{type(error).__name__}: {text}"[:300]


def first_line(error: BaseException) -> str:
    """The first line of what somebody else's error says; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
