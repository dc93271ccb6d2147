"""Folders of class folders, tidy and untidy."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from onetrunk.data import Prepared, Preprocessing, load
from onetrunk.errors import DataError

Tree = Callable[..., Path]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folders_by_split(val: str, class_tree: Tree) -> None:
    root = class_tree(
        {
            "train/cat": 3,
            "train/dog": 2,
            f"{val}/cat": 1,
            f"{val}/dog": 1,
            "test/cat": 2,
            "test/dog": 1,
        }
    )
    splits = load(root)
    assert (splits.name, splits.classes, splits.note) == ("pets", ("cat", "dog"), "")
    assert splits.hflip is None and splits.skipped == ()
    assert splits.val is not None and splits.test is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [5, 2, 3]
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert splits.train.names[3] == os.path.join("train", "dog", "0.png")
    assert splits.train[3][0].size == (12, 8)


def test_train_alone_has_no_other_splits(class_tree: Tree) -> None:
    splits = load(class_tree({"train/cat": 10, "train/dog": 10}))
    assert splits.val is None and splits.test is None
    assert "has a train split alone: it is not cut" in splits.note
    assert len(splits.with_validation().train) == 16


def test_folders_by_class_are_split_and_say_so(class_tree: Tree) -> None:
    root = class_tree({"dog": 20, "cat": 10})
    splits = load(str(root), split_fractions=(0.5, 0.3, 0.2), seed=4)
    assert splits.classes == ("cat", "dog")
    assert splits.val is not None and splits.test is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [15, 9, 6]
    assert (
        splits.note == "pets has no splits of its own: cut by class into 0.5 / 0.3 / 0.2, seed 4."
    )
    assert load(root, split_fractions=(0.5, 0.3, 0.2), seed=4).test.names == splits.test.names
    assert load(root, split_fractions=(0.5, 0.3, 0.2), seed=5).test.names != splits.test.names


def test_other_files_are_skipped_and_named(class_tree: Tree) -> None:
    root = class_tree({"train/cat": 2, "train/dog": 2})
    (root / "train" / "cat" / "notes.txt").write_text("cats")
    (root / "train" / "readme.md").write_text("pets")
    (root / "train" / "cat" / ".DS_Store").write_text("hidden")
    (root / "train" / ".cache").mkdir()
    os.mkfifo(root / "train" / "dog" / "pipe.jpg")
    (root / "train" / "dog" / "gone.jpg").symlink_to("nowhere.jpg")
    splits = load(root)
    assert len(splits.train) == 4
    assert sorted(splits.skipped) == [
        "train/cat/notes.txt",
        "train/dog/gone.jpg",
        "train/dog/pipe.jpg",
        "train/readme.md",
    ]


def test_nested_folders_belong_to_their_class_and_loops_end(class_tree: Tree) -> None:
    root = class_tree({"train/cat": 2, "train/cat/indoor/night": 3, "train/dog": 1})
    (root / "train" / "cat" / "indoor" / "loop").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat" / "indoor")
    (root / "train" / "dog" / "folder.jpg").mkdir()
    splits = load(root)
    assert splits.train.labels.tolist() == [0] * 5 + [1]


def test_linked_class_folders_are_followed(class_tree: Tree, tmp_path: Path) -> None:
    root = class_tree({"train/cat": 2})
    class_tree({"dogs": 3}, root="elsewhere")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere" / "dogs")
    assert load(root).train.labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".jfif", ".WebP", ".tif", ".bmp", ".gif"])
def test_endings(ending: str, class_tree: Tree) -> None:
    root = class_tree({"train/cat": 1})
    os.rename(root / "train" / "cat" / "0.png", root / "train" / "cat" / f"0{ending}")
    assert load(root).train[0][0].size == (12, 8)


def test_odd_names(class_tree: Tree) -> None:
    root = class_tree({"train/naïve 图": 1, "train/two\nlines": 1})
    os.rename(root / "train/two\nlines/0.png", root / "train/two\nlines/a\nb.png")
    splits = load(root)
    assert splits.classes == ("naïve 图", "two\nlines")
    assert len(Prepared(splits.train, Preprocessing(size_px=8))) == 2


def test_a_class_name_that_is_no_text_is_refused(class_tree: Tree) -> None:
    root = class_tree({"train/cat": 1})
    os.mkdir(os.fsencode(root / "train") + b"/\xff")
    with pytest.raises(DataError, match="its name is not valid UTF-8"):
        load(root)


def test_one_class_in_two_spellings_is_refused(class_tree: Tree) -> None:
    composed, split_up = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    root = class_tree({f"train/{composed}": 1, f"val/{split_up}": 1})
    assert load(root).classes == (composed,)  # one class in two splits is one class
    (root / "val" / split_up).rename(root / "train" / split_up)
    with pytest.raises(DataError, match="are the same class name in two spellings of Unicode"):
        load(root)


def test_an_empty_class_is_named(class_tree: Tree) -> None:
    root = class_tree({"train/cat": 1, "train/dog": 0})
    (root / "train" / "dog" / "dog.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"class folder '.*train/dog' has no images \(\.bmp, "):
        load(root)


def test_a_class_missing_from_a_split_is_named(class_tree: Tree) -> None:
    root = class_tree({"train/cat": 1, "train/dog": 1, "test/cat": 1})
    with pytest.raises(DataError, match="class 'dog' has images in some splits but none in 'test'"):
        load(root)
    other = class_tree({"train/cat": 1, "test/cat": 1, "test/dog": 1}, root="other")
    with pytest.raises(DataError, match="'dog' has images in some splits but none in 'train'"):
        load(other)


def test_two_validation_folders_are_refused(class_tree: Tree) -> None:
    root = class_tree({"train/cat": 1, "val/cat": 1, "valid/cat": 1})
    with pytest.raises(DataError, match="has both 'val' and 'valid': which one is the val split"):
        load(root)


@pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "testing")])
def test_other_spellings_of_splits_are_splits(train: str, test: str, class_tree: Tree) -> None:
    splits = load(
        class_tree({f"{train}/cat": 2, f"{train}/dog": 1, f"{test}/cat": 1, f"{test}/dog": 1})
    )
    assert splits.classes == ("cat", "dog") and splits.test is not None
    assert (len(splits.train), len(splits.test)) == (3, 2)


def test_folders_beside_the_splits_are_named(class_tree: Tree) -> None:
    splits = load(class_tree({"train/cat": 1, "train/dog": 1, "extra/cat": 1}))
    assert splits.skipped == ("extra",)


def test_a_class_may_have_a_splits_name_where_others_stand_beside_it(class_tree: Tree) -> None:
    root = class_tree({"bus": 10, "car": 10, "train": 10})
    splits = load(root)
    assert splits.classes == ("bus", "car", "train") and len(splits.train) == 18
    assert splits.note.startswith("train: a class here, as images lie in it")
    (root / "train" / "fast").mkdir()  # then it is none
    with pytest.raises(DataError, match=r"class folder .* has no images"):
        load(root)


def test_a_folder_train_alone_is_told_to_be_a_split(class_tree: Tree) -> None:
    with pytest.raises(DataError, match="is a split, not a class"):
        load(class_tree({"train": 2, "test": 2}))


def test_splits_without_train_are_refused(class_tree: Tree) -> None:
    root = class_tree({"val/cat": 1, "test/cat": 1})
    with pytest.raises(DataError, match=r"has \['test', 'val'\] but no 'train'"):
        load(root)


def test_images_without_class_folders_are_refused(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"has no class folders \(1 images lie directly in it\)"):
        load(tmp_path)


def test_a_folder_that_cannot_be_listed(class_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root, listdir = class_tree({"train/cat": 1}), os.listdir

    def refuse(folder: Path) -> list[str]:
        if Path(folder).name == "cat":
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"cat' cannot be read: Permission denied"):
        load(root)


def test_three_hundred_untidy_files(class_tree: Tree, picture: Image.Image) -> None:
    root = class_tree({"train/a": 100, "train/b": 100})
    for index in range(100):
        kind = index % 4
        body = [b"", b"text", (root / "train/a/0.png").read_bytes()[:60], b"\xff\xd8\xff\xe0"][kind]
        (root / "train" / "ab"[index % 2] / f"bad{index}.jpg").write_bytes(body)
    prepared = Prepared(load(root).train, Preprocessing(size_px=8))
    assert len(prepared) == 200
    assert len(prepared.problems) == 100
    assert all("bad" in problem.name and problem.reason for problem in prepared.problems)


def test_a_home_that_nobody_has_is_a_folder_that_is_not_there() -> None:
    with pytest.raises(DataError, match="source '~nobody-of-that-name/x' was not found"):
        load("~nobody-of-that-name/x")
