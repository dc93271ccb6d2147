"""Images and Prepared: what they hold, what they refuse, and what becomes of broken files."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from onetrunk.data import Images, Prepared, Preprocessing, Problem
from onetrunk.errors import DataError

SMALL = Preprocessing(size_px=8, crop_ratio=0.8)


def greys(*values: int, labels: list[int] | None = None, classes: str = "ab") -> Images:
    arrays = [np.full((6, 5), value, np.uint8) for value in values]
    return Images.from_arrays(arrays, labels or [0] * len(values), tuple(classes))


def test_images_are_a_dataset_of_pictures_and_labels() -> None:
    images = greys(10, 20, 30, labels=[1, 0, 1])
    assert len(images) == 3
    assert images.classes == ("a", "b")
    assert images.names == ("image 0", "image 1", "image 2")
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == [1, 0, 1]
    picture, label = images[2]
    assert (picture.getpixel((0, 0)), label) == (30, 1)
    assert images[-1][0].getpixel((0, 0)) == 30
    assert [label for _, label in images] == [1, 0, 1]
    assert repr(images) == "Images(3 images, 2 classes)"
    for outside in (3, -4):
        with pytest.raises(IndexError, match=f"image {outside} of 3"):
            images[outside]


def test_files_are_read_when_asked_for(tmp_path: Path, picture: Image.Image) -> None:
    images = Images.from_files([tmp_path / "later.png"], [0], ["a"])
    assert images.names == (str(tmp_path / "later.png"),)
    with pytest.raises(DataError, match=r"later\.png' cannot be read: No such file"):
        images[0]
    picture.save(tmp_path / "later.png")
    assert images[0][0].size == (48, 32)


def test_encoded_images(picture: Image.Image, encode: Callable[..., bytes]) -> None:
    images = Images.from_encoded([encode(picture, "PNG"), b"no"], [0, 1], ["a", "b"], ["x", "y"])
    assert images[0][0].tobytes() == picture.tobytes()
    with pytest.raises(DataError, match="image 'y' cannot be read"):
        images[1]


def test_a_batch_array_is_a_list_of_images() -> None:
    x_nhwc = np.random.default_rng(0).random((4, 5, 6, 3))
    images = Images.from_arrays(x_nhwc, np.array([0, 1, 0, 1]), ["a", "b"])
    assert images[3][0].size == (6, 5)


def test_classes_in_another_order_keep_every_images_class() -> None:
    images = Images.from_arrays(
        [np.full((4, 4), 10 * label, np.uint8) for label in (0, 1, 2, 1)],
        [0, 1, 2, 1],
        ["a", "b", "c"],
    )
    turned = images.subset([3, 2, 0]).in_order(("c", "a", "b"))
    assert turned.classes == ("c", "a", "b") and turned.labels.tolist() == [2, 0, 1]
    assert [turned.classes[label] for _, label in turned] == ["b", "c", "a"]
    assert images.classes == ("a", "b", "c") and images.in_order(images.classes) is images
    with pytest.raises(DataError, match=r"in_order\(\['a', 'b'\]\) of the classes"):
        images.in_order(("a", "b"))


def test_subsets_keep_classes_and_order() -> None:
    images = greys(10, 20, 30, 40, labels=[0, 1, 0, 1])
    smaller = images.subset([3, 0, 2]).subset(torch.tensor([2, 0]))
    assert smaller.labels.tolist() == [0, 1]
    assert smaller.names == ("image 2", "image 3")
    assert [smaller[i][0].getpixel((0, 0)) for i in range(2)] == [30, 40]
    assert smaller.classes == ("a", "b")
    with pytest.raises(DataError, match="no images: at least one is needed"):
        images.subset([])
    with pytest.raises(DataError, match="subset asked for image 4 of 4"):
        images.subset([0, 4])


def test_what_does_not_fit_is_refused() -> None:
    grey = np.zeros((2, 2), np.uint8)
    with pytest.raises(DataError, match="no images: at least one is needed"):
        Images.from_arrays([], [], ["a"])
    with pytest.raises(DataError, match="2 images came with 1 labels and 2 names"):
        Images.from_arrays([grey, grey], [0], ["a"])
    with pytest.raises(DataError, match="1 images came with 1 labels and 2 names"):
        Images.from_arrays([grey], [0], ["a"], ["x", "y"])
    with pytest.raises(
        DataError, match=r"'image 1' has label 2, and 2 of 3 labels are outside 0\.\.1"
    ):
        Images.from_arrays([grey] * 3, [0, 2, -1], ["a", "b"])
    with pytest.raises(DataError, match="classes must be a list of names, found"):
        Images.from_arrays([grey], [0], [])
    with pytest.raises(DataError, match="classes must be a list of names, found"):
        Images.from_arrays([grey], [0], ["a", 3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="the class 'a' is named twice in 3 classes"):
        Images.from_arrays([grey], [0], ["a", "b", "a"])


@pytest.mark.parametrize("limit", [2**31, 0])
def test_prepared_is_the_same_in_memory_and_not(limit: int, picture: Image.Image) -> None:
    arrays = [np.roll(np.asarray(picture), shift, axis=1) for shift in range(4)]
    images = Images.from_arrays(arrays, [0, 1, 1, 0], ["a", "b"])
    seen: list[tuple[int, int]] = []
    prepared = Prepared(
        images, SMALL, memory_limit_bytes=limit, progress=lambda *step: seen.append(step)
    )
    assert prepared.in_memory == (limit > 0)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(prepared) == 4 and prepared.problems == ()
    assert (prepared.classes, prepared.names) == (images.classes, images.names)
    x_chw, label = prepared[2]
    assert (x_chw.dtype, tuple(x_chw.shape), label) == (torch.uint8, (3, 10, 10), 1)
    assert torch.equal(x_chw, SMALL.prepare(images[2][0]))
    x_bchw, labels_b = prepared.batch([3, 1])
    assert torch.equal(x_bchw, torch.stack([prepared[3][0], prepared[1][0]]))
    assert labels_b.tolist() == [0, 1]
    assert prepared.batch([])[0].shape == (0, 3, 10, 10)
    assert torch.equal(prepared[-1][0], prepared[3][0])
    with pytest.raises(IndexError, match="image 4 of 4"):
        prepared[4]
    where = "in memory" if limit else "decoded when asked for"
    assert repr(prepared) == f"Prepared(4 images {where}, 0 left out)"


def test_the_memory_limit_counts_bytes() -> None:
    images = greys(1, 2, 3)
    assert Prepared(images, SMALL, memory_limit_bytes=3 * 3 * 10 * 10).in_memory
    assert not Prepared(images, SMALL, memory_limit_bytes=3 * 3 * 10 * 10 - 1).in_memory


@pytest.mark.parametrize("limit", [2**31, 0])
def test_broken_images_are_left_out_and_named(
    limit: int, picture: Image.Image, encode: Callable[..., bytes]
) -> None:
    good = encode(picture, "PNG")
    other = encode(picture.rotate(180), "PNG")
    encoded = [good, b"", good[: len(good) // 2], other, b"text", good]
    images = Images.from_encoded(encoded, [0, 0, 1, 1, 1, 0], ["a", "b"], list("uvwxyz"))
    prepared = Prepared(images, SMALL, memory_limit_bytes=limit)
    assert prepared.names == ("u", "x", "z")
    assert torch.equal(prepared[1][0], SMALL.prepare(picture.rotate(180)))
    assert torch.equal(prepared[2][0], SMALL.prepare(picture))
    assert prepared.labels.tolist() == [0, 1, 0]
    assert len(prepared.batch(range(3))[0]) == 3
    assert [problem.name for problem in prepared.problems] == ["v", "w", "y"]
    assert prepared.problems[0] == Problem("v", "it is empty (0 bytes)")
    assert prepared.problems[1].reason.startswith("damaged or truncated")
    assert repr(prepared).endswith("3 left out)")
    with pytest.raises(DataError, match="image 'v' cannot be read: it is empty"):
        Prepared(images, SMALL, on_broken="fail")


def test_a_class_must_not_vanish(picture: Image.Image, encode: Callable[..., bytes]) -> None:
    good = encode(picture, "PNG")
    images = Images.from_encoded([good, b"", b"no"], [0, 1, 1], ["cat", "dog"])
    with pytest.raises(
        DataError,
        match=r"no image of class 'dog' can be read \(2 of 3 images are broken; "
        r"the first: 'image 1', it is empty \(0 bytes\)\)",
    ):
        Prepared(images, SMALL)
    with pytest.raises(DataError, match="none of the 2 images can be read; the first: 'image 1'"):
        Prepared(images.subset([1, 2]), SMALL)


def test_a_class_without_images_from_the_start_is_no_loss() -> None:
    assert len(Prepared(greys(1, 2, classes="abc"), SMALL)) == 2


def test_workers_give_the_same(class_tree: Callable[..., Path]) -> None:
    folder = class_tree({"a": 3, "b": 3})
    files = sorted(folder.glob("*/*.png"))
    prepared = Prepared(Images.from_files(files, [0] * 6, ["a", "b"]), SMALL, memory_limit_bytes=0)
    again = pickle.loads(pickle.dumps(prepared))  # noqa: S301
    assert torch.equal(again[5][0], prepared[5][0])
    loader = DataLoader(prepared, batch_size=2)
    assert torch.equal(torch.cat([x for x, _ in loader]), prepared.batch(range(6))[0])


def test_files_that_break_later_are_named(class_tree: Callable[..., Path]) -> None:
    folder = class_tree({"a": 2})
    files = sorted(folder.glob("*/*.png"))
    prepared = Prepared(Images.from_files(files, [0, 0], ["a"]), SMALL, memory_limit_bytes=0)
    files[1].write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.png' cannot be read: it is empty"):
        prepared[1]


@pytest.mark.parametrize(("n", "values"), [(3, [0, 3, 6]), (4, [0, 2, 4, 6]), (100, [*range(7)])])
def test_few_views_are_evenly_spread_and_at_most_so_many(n: int, values: list[int]) -> None:
    plain = Preprocessing(size_px=8, crop_ratio=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    views_bchw = Prepared(greys(*range(7)), plain).few_views(n)
    assert views_bchw.shape == (len(values), 3, 8, 8)
    assert (255 * views_bchw[:, 0, 0, 0]).round().int().tolist() == values


@pytest.mark.parametrize("labels", [[[1, 0], [0, 1]], [0.9, 1.9], [True, False]])
def test_labels_are_one_whole_number_an_image(labels: list[object]) -> None:
    arrays = [np.zeros((8, 8), np.uint8)] * 2
    with pytest.raises(DataError, match=r"labels of shape .* give whole numbers \(n,\), one for"):
        Images.from_arrays(arrays, labels, ["a", "b"])  # type: ignore[arg-type]


def test_a_fingerprint_tells_images_apart(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.png")
    array, names = np.zeros((8, 8), np.uint8), ["x"]

    def of(source: Any, labels: Any = (0,), classes: Any = ("a", "b")) -> str:
        return Images([source], list(labels), classes, names).fingerprint()

    data = (tmp_path / "a.png").read_bytes()
    prints = [
        of(array), of(array + 1), of(array.astype(float)), of(data), of(data + b"0"),
        of(array, labels=[1]), of(array, classes=["a", "c"]),
    ]  # fmt: skip
    assert len(set(prints)) == len(prints)
    assert of(array.copy()) == prints[0] and of(tmp_path / "a.png") == of(data)
    (tmp_path / "a.png").write_bytes(data[:-1] + b"0")  # of the same size
    assert of(tmp_path / "a.png") != of(data)
