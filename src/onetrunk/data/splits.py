"""Splits: the train, validation and test images of one source, and how to split what is not split.

A split is stratified (each class keeps its share) and deterministic: an example's place depends on
the seed and on its own name, not on the order in which files were found.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onetrunk.data.images import Images
from onetrunk.data.options import Fractions, Options
from onetrunk.errors import DataError


@dataclass(frozen=True)
class Splits:
    """One source, read: images by split and what is known about them.

    hflip: whether a mirrored image keeps its label; None where the source does not say.
    note: what a user should know about how the splits came about. skipped: files that are no
    images. cut: the fractions by which a source without splits of its own was cut.
    """

    train: Images
    val: Images | None
    test: Images | None
    classes: tuple[str, ...]
    name: str
    hflip: bool | None = None
    description: str = ""
    note: str = ""
    skipped: tuple[str, ...] = ()
    cut: Fractions | None = None

    def with_validation(self, fraction: float = 0.15, seed: int = 0) -> Splits:
        """Itself where there is a validation split, else with `fraction` of train carved out."""
        if self.val is not None:
            return self
        train, val, _ = split(self.train, (1 - fraction, fraction, 0.0), seed)
        note = f"{fraction:.0%} of train was taken for validation, by class, seed {seed}."
        note = f"{self.note} {note}".strip()
        return dataclasses.replace(self, train=train, val=val, note=note)


def split(
    images: Images, fractions: Fractions, seed: int
) -> tuple[Images, Images | None, Images | None]:
    """Cut into (train, val, test) by these fractions of each class; a fraction of 0 gives None.

    Every class gets at least one image in every split that is asked for. Raises DataError where a
    class has too few images for that, or where the fractions do not sum to 1.
    """
    _check_fractions(fractions)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label, class_name in enumerate(images.classes):
        rows = (images.labels == label).nonzero().flatten().tolist()
        if not rows:
            continue
        rows.sort(key=lambda row: _place(images.names[row], seed))
        n_train, n_val = _counts(len(rows), fractions, class_name)
        parts[0].extend(rows[:n_train])
        parts[1].extend(rows[n_train : n_train + n_val])
        parts[2].extend(rows[n_train + n_val :])
    train, val, test = (images.subset(sorted(part)) if part else None for part in parts)
    assert train is not None  # _counts leaves it at least one
    return train, val, test


def split_single(
    images: Images,
    name: str,
    options: Options,
    *,
    hflip: bool | None = None,
    description: str = "",
    skipped: tuple[str, ...] = (),
) -> Splits:
    """The Splits of a source that has no splits of its own."""
    train, val, test = split(images, options.fractions, options.seed)
    written = " / ".join(f"{fraction:g}" for fraction in options.fractions)
    return Splits(
        train=train,
        val=val,
        test=test,
        classes=images.classes,
        name=name,
        hflip=hflip,
        description=description,
        note=f"{name} has no splits of its own: cut by class into {written}, seed {options.seed}.",
        skipped=skipped,
        cut=options.fractions,
    )


def check_classes_everywhere(parts: dict[str, Images]) -> None:
    """Raise DataError naming the first class without images in one of the splits."""
    for split_name, images in parts.items():
        missing = missing_labels(images.labels, len(images.classes))
        if missing:
            class_name = images.classes[missing[0]]
            raise DataError(
                f"class {class_name!r} has images in some splits but none in {split_name!r} "
                f"({len(missing)} of {len(images.classes)} classes are missing there). "
                "Add some, or remove the class from every split."
            )


def missing_labels(labels_n: Tensor, n_classes: int) -> list[int]:
    """The labels in 0..n_classes-1 that never occur."""
    counts_c = torch.bincount(labels_n, minlength=n_classes)
    return [label for label, count in enumerate(counts_c.tolist()) if count == 0]


def _place(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest()


def _check_fractions(fractions: Sequence[float]) -> None:
    fits = len(fractions) == 3 and all(0 <= fraction <= 1 for fraction in fractions)
    if not fits or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise DataError(
            f"split fractions {tuple(fractions)!r} were asked for; expected three numbers for "
            "train, val and test that sum to 1, with some left for train."
        )


def _counts(n: int, fractions: Fractions, class_name: str) -> tuple[int, int]:
    """How many of a class's n images go to train and to val; the rest is test."""
    n_needed = sum(fraction > 0 for fraction in fractions)
    if n < n_needed:
        raise DataError(
            f"class {class_name!r} has {n} images; {n_needed} splits need at least one each. "
            "Add images, remove the class, or ask for fewer splits."
        )
    n_val = max(1, round(fractions[1] * n)) if fractions[1] > 0 else 0
    n_test = max(1, round(fractions[2] * n)) if fractions[2] > 0 else 0
    while n_val + n_test >= n:  # tiny classes: train keeps one
        n_val, n_test = (n_val - 1, n_test) if n_val >= n_test else (n_val, n_test - 1)
    return n - n_val - n_test, n_val
