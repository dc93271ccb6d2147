"""Images prepared for a network, on a bar; what is left out is counted and the first one named."""

from ..data import Images, Prepared, Preprocessing, Splits
from ..data.sources import expanded
from .console import Screen


def name_of(source: str) -> str:
    """What a source is called in a domain's provenance: a folder by its own name."""
    if ":" in source:
        return source
    return expanded(source).resolve().name.encode(errors="replace").decode()


def read(
    images: Images, preprocessing: Preprocessing, what: str, screen: Screen, whose: str = ""
) -> Prepared:
    """`what` is the part, such as `train`; `whose`, such as ` of flowers`, comes after it."""
    with screen.bar(f"reading {what} images{whose}") as show:
        prepared = Prepared(images, preprocessing, progress=show)
    if prepared.problems:
        first = prepared.problems[0]
        screen.warn(
            f"{len(prepared.problems)} of {len(images)} {what} images{whose} left out; the first: "
            f"{first.name}: {first.reason}"
        )
    return prepared


def say_how_it_was_read(splits: Splits, screen: Screen) -> None:
    """Where the parts come from, and files that are no images."""
    if splits.note:
        screen.say(f"  {splits.note}")
    if splits.skipped:
        screen.warn(
            f"{len(splits.skipped)} left out that are no images of a class: {splits.skipped[0]}"
            f"{' ...' if len(splits.skipped) > 1 else ''}"
        )
