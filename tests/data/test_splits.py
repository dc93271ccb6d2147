"""Splitting: stratified, deterministic by seed and name, and never without a class."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onetrunk.data import Images, Splits
from onetrunk.data.splits import split
from onetrunk.errors import DataError


def images_of(*counts: int) -> Images:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    arrays = [np.zeros((2, 2), np.uint8)] * len(labels)
    return Images.from_arrays(arrays, labels, [f"class {label}" for label in range(len(counts))])


def per_class(images: Images | None) -> list[int]:
    assert images is not None
    return np.bincount(images.labels.numpy(), minlength=len(images.classes)).tolist()


def test_each_class_keeps_its_share() -> None:
    train, val, test = split(images_of(100, 20, 3), (0.7, 0.15, 0.15), seed=0)
    assert (per_class(train), per_class(val), per_class(test)) == (
        [70, 14, 1],
        [15, 3, 1],
        [15, 3, 1],
    )
    names = [name for part in (train, val, test) for name in part.names]
    assert sorted(names) == sorted(images_of(100, 20, 3).names)


def test_an_examples_place_depends_on_its_name_and_the_seed_only() -> None:
    images = images_of(60, 40)
    shuffled = images.subset(np.random.default_rng(0).permutation(100).tolist())
    first, again = (split(each, (0.5, 0.0, 0.5), seed=3) for each in (images, shuffled))
    assert set(first[0].names) == set(again[0].names)
    assert first[1] is None
    assert set(first[0].names) != set(split(images, (0.5, 0.0, 0.5), seed=4)[0].names)


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5, 0.5), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5), ()]
)
def test_wrong_fractions_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match=r"were asked for; expected three numbers .* sum to 1"):
        split(images_of(10), fractions, seed=0)


def test_a_class_too_small_to_split_is_named() -> None:
    with pytest.raises(DataError, match="class 'class 1' has 2 images; 3 splits need at least one"):
        split(images_of(10, 2), (0.7, 0.15, 0.15), seed=0)
    assert per_class(split(images_of(10, 2), (0.8, 0.0, 0.2), seed=0)[0]) == [8, 1]


def test_a_large_share_leaves_train_one_image() -> None:
    parts = split(images_of(4), (0.1, 0.45, 0.45), seed=0)
    assert [per_class(part) for part in parts] == [[1], [1], [2]]


def test_validation_is_carved_out_only_when_asked() -> None:
    train = images_of(100, 20)
    splits = Splits(train, None, None, train.classes, "x")
    carved = splits.with_validation()
    assert (per_class(carved.train), per_class(carved.val)) == ([85, 17], [15, 3])
    assert carved.note == "15% of train was taken for validation, by class, seed 0."
    assert carved.test is None and splits.val is None
    assert carved.with_validation() is carved
    noted = dataclasses.replace(splits, note="Before.").with_validation(fraction=0.5, seed=2)
    assert noted.note == "Before. 50% of train was taken for validation, by class, seed 2."
