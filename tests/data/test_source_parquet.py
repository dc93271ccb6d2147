"""Folders of Parquet files in the Hugging Face image layout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from onetrunk.data import load
from onetrunk.errors import DataError, MissingExtraError

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
}


@pytest.fixture
def write(
    tmp_path: Path, picture: Image.Image, encode: Callable[..., bytes]
) -> Callable[..., Path]:
    """write("train", [0, 1], ...) -> the folder with a train.parquet of so many PNG images."""
    encoded = encode(picture, "PNG")

    def written(
        stem: str,
        labels: Sequence[Any],
        *,
        features: dict[str, Any] | None = FEATURES,
        images: Sequence[Any] | None = None,
        columns: tuple[str, str] = ("image", "label"),
        info: dict[str, Any] | None = None,
    ) -> Path:
        rows = [{"bytes": encoded, "path": f"{row}.png"} for row in range(len(labels))]
        table = pa.table({columns[0]: images or rows, columns[1]: list(labels)})
        if features is not None:
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            table = table.replace_schema_metadata(metadata)
        path = tmp_path / f"{stem}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path)
        if info is not None:
            (tmp_path / "info.json").write_text(json.dumps(info))
        return tmp_path

    return written


@pytest.mark.parametrize("val", ["val", "validation", "valid"])
def test_the_usual_layout(val: str, write: Callable[..., Path], picture: Image.Image) -> None:
    write("train", [1, 0, 1])
    write(val, [0])
    root = write("test", [1, 1])
    splits = load(root)
    assert (splits.name, splits.classes) == (root.name, ("cat", "dog"))
    assert (splits.hflip, splits.description, splits.note) == (None, "", "")
    assert splits.train.labels.tolist() == [1, 0, 1]
    assert splits.train.names[1] == "train.parquet[1] 1.png"
    assert splits.train[1][0].tobytes() == picture.tobytes()
    assert splits.val is not None and splits.test is not None
    assert (len(splits.val), len(splits.test)) == (1, 2)


@pytest.mark.parametrize("folder", ["data/", ""])
def test_shards_as_the_hub_stores_them(folder: str, write: Callable[..., Path]) -> None:
    write(f"{folder}train-00001-of-00002", [1, 1])
    write(f"{folder}train-00000-of-00002", [0])
    root = write(f"{folder}test-00000-of-00001", [1])
    splits = load(root)
    assert splits.train.labels.tolist() == [0, 1, 1]
    assert splits.train.names[2] == "train-00001-of-00002.parquet[1] 1.png"
    assert splits.val is None and splits.test is not None


def test_missing_and_foreign_shards_are_refused(write: Callable[..., Path]) -> None:
    root = write("train-00000-of-00002", [0])
    with pytest.raises(DataError, match=r"has the shards train-00000-of-00002.parquet, which are "):
        load(root)
    write("train-00001-of-00002", [1])
    assert len(load(root).train) == 2
    write("train-00000-of-00001-abc", [1])
    with pytest.raises(DataError, match=r"not all of one data set. Download it again"):
        load(root)


def test_shards_must_agree_on_classes(write: Callable[..., Path]) -> None:
    write("train-00000-of-00002", [0])
    turned = {"label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    root = write("train-00001-of-00002", [0], features=turned)
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet name different classes"):
        load(root)


def test_of_several_label_columns_the_usual_name_counts(write: Callable[..., Path]) -> None:
    camera = {"_type": "ClassLabel", "names": ["left", "right"]}
    root = write("train", [0, 1], features={"camera": camera, **FEATURES})
    table = pq.read_table(root / "train.parquet")
    pq.write_table(table.append_column("camera", pa.array([1, 1])), root / "train.parquet")
    assert load(root).classes == ("cat", "dog")
    odd = {"camera": camera, "kind": FEATURES["label"], "image": FEATURES["image"]}
    metadata = {"huggingface": json.dumps({"info": {"features": odd}})}
    table = table.rename_columns(["image", "kind"]).append_column("camera", pa.array([1, 1]))
    pq.write_table(table.replace_schema_metadata(metadata), root / "train.parquet")
    with pytest.raises(DataError, match="ClassLabel columns camera, kind: which one is meant"):
        load(root)


def test_info_json_adds_what_the_files_do_not_say(write: Callable[..., Path]) -> None:
    info = {"name": "pets", "description": "two animals", "classes": ["x", "y"], "flip_ok": False}
    splits = load(write("train", [0, 1], info=info))
    assert splits.classes == ("cat", "dog")  # the files' own names come first
    assert (splits.name, splits.description, splits.hflip) == ("pets", "two animals", False)
    assert load(write("train", [0, 1], features=None)).classes == ("x", "y")


def test_labels_may_be_strings(write: Callable[..., Path]) -> None:
    write("test", ["dog"], features=None)
    splits = load(write("train", ["dog", "cat", "dog"], features=None))
    assert splits.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [1, 0, 1]
    assert splits.test is not None and splits.test.labels.tolist() == [1]


def test_columns_are_found_by_feature_or_usual_name(
    write: Callable[..., Path], picture: Image.Image, encode: Callable[..., bytes]
) -> None:
    features = {"photo": FEATURES["image"], "kind": FEATURES["label"]}
    root = write("train", [0, 1], features=features, columns=("photo", "kind"))
    assert load(root).classes == ("cat", "dog")
    plain = [encode(picture, "PNG")] * 2
    root = write("train", ["a", "b"], features=None, columns=("img", "labels"), images=plain)
    splits = load(root)
    assert splits.train[0][0].size == (48, 32)
    assert splits.train.names[0] == "train.parquet[0]"


@pytest.mark.parametrize(
    ("columns", "missing"), [(("photo", "label"), "image"), (("image", "kind"), "label")]
)
def test_missing_columns(
    columns: tuple[str, str], missing: str, write: Callable[..., Path]
) -> None:
    root = write("train", [0], features=None, columns=columns)
    with pytest.raises(DataError, match=rf"train\.parquet' has columns \[.*expected '{missing}'"):
        load(root)


def test_unreadable_metadata_counts_as_none(write: Callable[..., Path]) -> None:
    for features in ([1], {"image": 3, "label": None}):
        root = write("train", ["a", "b"], features=features)
        assert load(root).classes == ("a", "b")


def test_class_names_must_be_a_list(write: Callable[..., Path]) -> None:
    root = write("train", [0], features={"label": {"_type": "ClassLabel", "names": "ab"}})
    with pytest.raises(DataError, match="its ClassLabel feature has names 'ab'"):
        load(root)


def test_numbers_without_names_are_refused(write: Callable[..., Path]) -> None:
    root = write("train", [0, 1], features=None)
    with pytest.raises(DataError, match=r"have labels without names. .* info\.json"):
        load(root)


def test_splits_must_agree_on_classes(write: Callable[..., Path]) -> None:
    write("train", [0, 1])
    other = {**FEATURES, "label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    root = write("test", [0, 1], features=other)
    with pytest.raises(DataError, match="name different classes"):
        load(root)


@pytest.mark.parametrize("label", [None, 0.5])
def test_labels_that_are_no_class(label: object, write: Callable[..., Path]) -> None:
    root = write("train", [0, label])
    with pytest.raises(DataError, match=r"image 'train\.parquet\[\d\] \d\.png' of train .* label"):
        load(root)


def test_a_class_that_train_does_not_have(write: Callable[..., Path]) -> None:
    write("train", ["cat", "dog"], features=None)
    root = write("test", ["bird"], features=None)
    with pytest.raises(DataError, match=r"of test in .* has label 'bird', which is none of the 2"):
        load(root)


def test_a_label_out_of_range(write: Callable[..., Path]) -> None:
    root = write("train", [0, 1, 2])
    with pytest.raises(DataError, match=r"'train\.parquet\[2\] 2\.png' has label 2"):
        load(root)


def test_no_rows(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"train in .* has no rows"):
        load(write("train", [], images=pa.array([], pa.binary()), features=FEATURES))


def test_paths_in_a_file_are_never_followed(
    write: Callable[..., Path], tmp_path: Path, picture: Image.Image
) -> None:
    picture.save(tmp_path / "real.png")
    path = str(tmp_path / "real.png")
    root = write("train", [0], images=[{"bytes": None, "path": path}])
    with pytest.raises(DataError, match=r"row 0: the image has no bytes, only the path .* Embed"):
        load(root)
    with pytest.raises(DataError, match="row 0: the image is str; expected a struct"):
        load(write("train", [0], images=[path]))
    with pytest.raises(DataError, match="row 0: the image is null; expected a struct"):
        load(write("train", [0, 1], images=[None, {"bytes": b"", "path": path}]))


def test_damaged_files(write: Callable[..., Path]) -> None:
    root = write("train", [0, 1] * 30)
    whole = (root / "train.parquet").read_bytes()
    bodies = [b"", b"PAR1", b"text" * 50, whole[:-20], whole[len(whole) // 2 :], whole[:100]]
    bodies.append(whole[:40] + bytes(200) + whole[240:])
    for body in bodies:
        (root / "train.parquet").write_bytes(body)
        with pytest.raises(DataError, match=r"train\.parquet' is not a readable Parquet file"):
            load(root)


def test_a_folder_by_that_name(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").mkdir()
    with pytest.raises(DataError, match=r"train\.parquet"):
        load(tmp_path)


def test_splits_without_train_or_twice(write: Callable[..., Path]) -> None:
    root = write("test", [0])
    with pytest.raises(DataError, match=r"has \['test\.parquet'\] but no 'train\.parquet'"):
        load(root)
    write("train", [0])
    write("val", [0])
    write("validation", [0])
    with pytest.raises(DataError, match=r"has both 'val\.parquet' and 'validation\.parquet'"):
        load(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not readable JSON"),
        ("\xff", "is not readable JSON"),
        ("[]", "must hold a JSON object, found list"),
        ('{"flip_ok": 1}', "flip_ok is 1; expected true or false"),
        ('{"classes": "ab"}', "classes is 'ab'; expected a list of names"),
        ('{"name": 3}', "name is 3; expected a string"),
        ('{"description": 3}', "description is 3; expected a string"),
    ],
)
def test_info_json_that_is_wrong(text: str, message: str, write: Callable[..., Path]) -> None:
    root = write("train", [0])
    (root / "info.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"info\.json'") as refusal:
        load(root)
    assert message in str(refusal.value)


def test_without_pyarrow(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = write("train", [0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'needs pyarrow.*pip install "onetrunk\[data\]"'):
        load(root)
