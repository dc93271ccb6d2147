"""load: which source a written form means, and what it says about one it does not know."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image

from onetrunk.data import Prepared, Preprocessing, load
from onetrunk.data.sources import FORMS
from onetrunk.errors import DataError, MissingExtraError


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "an empty source was asked for. A source is a folder"),
        ("nowhere", "source 'nowhere' was not found. A source is a folder"),
        ("a\0b", "was not found"),
        ("x" * 5000, "was not found"),
        ("owner/name", "Did you mean hf:owner/name?"),
        ("sklaern:digits", "Did you mean sklearn:digits?"),
        ("torchvison:GTSRB", "Did you mean torchvision:GTSRB?"),
        ("Builtin:faces", "Did you mean builtin:faces?"),
        ("sklearn:digit", "source 'sklearn:digit' is unknown. Did you mean sklearn:digits?"),
        ("sklearn:wine", "is unknown. There is one: sklearn:digits."),
        ("builtin:texture", "Did you mean builtin:textures? There are builtin:faces, builtin:"),
        ("builtin:", "source 'builtin:' is unknown. There are builtin:faces"),
        ("torchvision:gtsrb", "Did you mean torchvision:GTSRB?"),
        ("torchvision:GTSBR", "Did you mean torchvision:GTSRB?"),
        ("torchvision:zzz", "is unknown. Give the name of a class of torchvision.datasets"),
        ("torchvision:ImageFolder", "is unknown"),
        ("hf:", "names no dataset. Write hf:owner/name"),
        ("hf:./nowhere", "is a local path, and there is no folder './nowhere'"),
    ],
)
def test_sources_that_are_unknown(source: str, message: str) -> None:
    with pytest.raises(DataError) as refusal:
        load(source)
    assert message in str(refusal.value)


def test_paths_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    (tmp_path / "a.zip").write_bytes(b"zip")
    with pytest.raises(DataError, match=r"Did you mean '.*flowers'\?"):
        load(tmp_path / "flower")
    with pytest.raises(DataError, match=r"a\.zip' is a file; expected a folder"):
        load(tmp_path / "a.zip")
    with pytest.raises(
        DataError, match=r"flowers' is an empty folder\. A source is a folder"
    ) as no:
        load(tmp_path / "flowers")
    assert FORMS in str(no.value)


def test_sklearn_digits() -> None:
    splits = load("sklearn:digits")
    assert splits.val is not None and splits.test is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1259, 269, 269]
    assert (splits.classes[3], splits.hflip, splits.name) == ("3", False, "digits")
    assert "cut by class into 0.7 / 0.15 / 0.15, seed 0" in splits.note
    picture, _ = splits.train[0]
    assert (picture.size, picture.mode) == ((8, 8), "L")
    assert np.asarray(picture).max() > 200


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [
        ("sklearn:digits", "sklearn.datasets", "quickstart"),
        ("builtin:faces", "skimage", "quickstart"),
        ("builtin:glyphs", "matplotlib", "quickstart"),
        ("hf:owner/name", "datasets", "data"),
    ],
)
def test_missing_extras(
    source: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "onetrunk\[{extra}\]"'):
        load(source)


def test_a_package_without_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skimage.data_dir", str(tmp_path))
    with pytest.raises(
        MissingExtraError, match=r"scikit-image, which came without its file 'brick"
    ):
        load("builtin:textures")


@pytest.mark.parametrize(
    ("name", "sizes", "n_classes", "hflip"),
    [
        ("textures", (456, 120, 192), 3, True),
        ("science", (584, 148, 244), 5, True),
        ("photos", (1004, 252, 416), 8, True),
        ("faces", (100, 40, 60), 2, True),
        ("glyphs", (1248, 416, 416), 26, False),
    ],
)
def test_builtin_domains(
    name: str, sizes: tuple[int, int, int], n_classes: int, hflip: bool
) -> None:
    splits = load(f"builtin:{name}")
    assert splits.val is not None and splits.test is not None
    parts = [splits.train, splits.val, splits.test]
    assert tuple(len(part) for part in parts) == sizes
    assert (splits.name, splits.hflip, len(splits.classes)) == (name, hflip, n_classes)
    assert splits.description
    pixels = [{part[index][0].tobytes() for index in range(len(part))} for part in parts]
    assert not (pixels[0] & pixels[1] or pixels[0] & pixels[2] or pixels[1] & pixels[2])
    for part in parts:
        assert len(part.labels.unique()) == n_classes
    again = load(f"builtin:{name}", seed=1)
    assert again.train[5][0].tobytes() == splits.train[5][0].tobytes()
    small = Prepared(splits.val, Preprocessing(size_px=16))
    assert small.problems == ()


def test_torchvision_without_splits() -> None:
    splits = load("torchvision:FakeData", split_fractions=(0.8, 0.0, 0.2))
    assert splits.val is None and splits.test is not None
    assert len(splits.train) + len(splits.test) == 1000
    assert splits.hflip is None
    assert splits.train[0][0].size == (224, 224)


class Signs(torchvision.datasets.VisionDataset):
    """A torchvision dataset with splits by name, as GTSRB is."""

    def __init__(
        self, root: str, split: str = "train", transform: Any = None, download: bool = False
    ) -> None:
        super().__init__(root, transform=transform)
        if split not in ("train", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        if download:
            print("Downloading")  # noqa: T201 (as torchvision does)
            Path(root, "Signs").mkdir(parents=True)
        if not Path(root, "Signs").exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self._samples = [("a.png", 0), ("b.png", 1)] * (2 if split == "train" else 1)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self._samples[index][0] == "b.png":
            raise OSError("image file is truncated")
        return Image.new("RGB", (4, 4)), self._samples[index][1]


def register(monkeypatch: pytest.MonkeyPatch, dataset_class: type, name: str) -> None:
    monkeypatch.setattr(torchvision.datasets, name, dataset_class, raising=False)
    names = (*torchvision.datasets.__all__, name)
    monkeypatch.setattr(torchvision.datasets, "__all__", names)


def test_torchvision_with_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, Signs, "Signs")
    splits = load("torchvision:Signs", cache_dir=tmp_path)
    assert (tmp_path / "torchvision" / "Signs").is_dir()
    assert tuple(capsys.readouterr()) == ("", "")
    assert splits.val is None and splits.test is not None
    assert (splits.classes, splits.train.labels.tolist()) == (("0", "1"), [0, 1, 0, 1])
    assert splits.train.names[1] == "Signs train[1]"
    with pytest.raises(DataError, match="cannot be read: image file is truncated"):
        splits.train[1]
    assert len(load("torchvision:Signs", cache_dir=tmp_path).test or ()) == 2


def test_the_usual_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Signs, "Signs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load("torchvision:Signs")
    assert (tmp_path / "onetrunk" / "torchvision" / "Signs").is_dir()


def test_torchvision_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Far(Signs):
        def __init__(self, root: str, transform: Any = None, download: bool = False) -> None:
            if download:
                raise URLError("no route to host")
            super().__init__(root, transform=transform)

    register(monkeypatch, Far, "Far")
    with pytest.raises(
        DataError, match=r"could not be downloaded .*no route to host.* Check the network"
    ):
        load("torchvision:Far", cache_dir=tmp_path)


def test_torchvision_that_must_be_placed_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ByHand(Signs):
        def __init__(self, root: str, transform: Any = None) -> None:
            super().__init__(root, transform=transform)

    register(monkeypatch, ByHand, "ByHand")
    with pytest.raises(DataError, match="torchvision cannot download ByHand: place it in"):
        load("torchvision:ByHand", cache_dir=tmp_path)


def test_torchvision_that_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Packed(Signs):
        def __init__(self, root: str, transform: Any = None, download: bool = False) -> None:
            if download:
                raise ImportError("No module named 'scipy'")
            super().__init__(root, transform=transform)

    register(monkeypatch, Packed, "Packed")
    with pytest.raises(DataError, match="torchvision:Packed needs a package: No module named 'sc"):
        load("torchvision:Packed", cache_dir=tmp_path)


def test_torchvision_that_is_no_classification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Boxes(Signs):
        def __init__(self, root: str, transform: Any = None) -> None:
            self.targets = [{"boxes": []}] * 3

        def __len__(self) -> int:
            return 3

    register(monkeypatch, Boxes, "Boxes")
    with pytest.raises(DataError, match="does not give one integer label an image"):
        load("torchvision:Boxes", cache_dir=tmp_path)


def test_torchvision_without_a_train_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Letters(Signs):
        def __init__(self, root: str, split: str, transform: Any = None) -> None:
            raise ValueError(f"Unknown value '{split}' for argument split.")

    register(monkeypatch, Letters, "Letters")
    with pytest.raises(DataError, match="Letters has no split 'train' that can be chosen"):
        load("torchvision:Letters", cache_dir=tmp_path)


@pytest.mark.parametrize("module", ["decoding", "preprocessing", "sources"])
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"onetrunk.data.{module}"))
    assert result.attempted > 0 and result.failed == 0


# the Hugging Face hub, from local folders


def test_hub_from_a_local_image_folder(
    class_tree: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    counts = {f"{split}/{name}": 3 for split in ("train", "test") for name in ("cat", "dog")}
    root = class_tree(counts)
    splits = load(f"hf:{root}", cache_dir=tmp_path / "cache")
    assert tuple(capfd.readouterr()) == ("", "")
    assert (splits.name, splits.classes) == ("pets", ("cat", "dog"))
    assert splits.val is None and splits.test is not None
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.train[4][0].size == (12, 8)
    assert splits.train.names[4].endswith("train[4]")
    assert splits.train.subset([4])[0][1] == 1


def test_hub_without_splits(class_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = class_tree({"cat": 10, "dog": 10})
    splits = load(f"hf:{root}", cache_dir=tmp_path / "cache", split_fractions=(0.5, 0.3, 0.2))
    assert len(splits.train) == 10 and "has no splits of its own" in splits.note


def test_hub_refuses_paths_outside_the_dataset(
    class_tree: Callable[..., Path], tmp_path: Path, picture: Image.Image
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture.save(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    features = {"image": {"_type": "Image"}}
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}, None]
    table = pa.table({"image": rows, "label": ["a", "b"]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    splits = load(f"hf:{tmp_path / 'set'}", cache_dir=tmp_path / "cache", split_fractions=(1, 0, 0))
    assert splits.classes == ("a", "b")
    with pytest.raises(DataError, match=r"it is only a path, .* outside the dataset"):
        splits.train[0]
    with pytest.raises(DataError, match="the column has no image here"):
        splits.train[1]


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        DataError,
        match=r"'hf:owner/name:small' could not be loaded \(ConnectionError: no network\)",
    ):
        load("hf:owner/name:small")


def test_hub_without_train_or_columns(
    monkeypatch: pytest.MonkeyPatch, picture: Image.Image
) -> None:
    import datasets

    words = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    for found, message in [
        ({"extra": words}, r"has splits \['extra'\], none called 'train'"),
        ({"train": words}, r"has columns \['text', 'label'\]; expected one whose feature is Image"),
    ]:
        monkeypatch.setattr("datasets.load_dataset", lambda *_, found=found, **__: found)
        with pytest.raises(DataError, match=message):
            load("hf:owner/name")
    numbers = datasets.Dataset.from_dict({"image": [picture, picture], "label": [2, 0]})
    numbers = numbers.cast_column("image", datasets.Image())
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"train": numbers})
    splits = load("hf:owner/name", split_fractions=(1, 0, 0))
    assert (splits.name, splits.classes) == ("name", ("0", "1", "2"))
    assert splits.train[0][0].tobytes() == picture.tobytes()


def test_hub_labels(monkeypatch: pytest.MonkeyPatch, picture: Image.Image) -> None:
    import datasets

    def dataset(*labels: object) -> datasets.Dataset:
        columns = {"image": [picture] * len(labels), "label": list(labels)}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    def found(**parts: datasets.Dataset) -> None:
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: parts)

    found(train=dataset("b", "a", "b"), validation=dataset("b"), test=dataset(*"ab"))
    splits = load("hf:owner/name")
    assert splits.val is not None and splits.val.labels.tolist() == [1]
    found(train=dataset("b", "a"), test=dataset("c"))
    with pytest.raises(DataError, match="test has label 'c', a class that train does not have"):
        load("hf:owner/name")
    found(train=dataset(0.5, 1.5))
    with pytest.raises(DataError, match="labels in 'label' are neither numbers nor strings"):
        load("hf:owner/name")
    found(train=dataset(0, 1), validation=dataset(1, 0), test=dataset(-1, -1))
    splits = load("hf:owner/name")
    assert splits.test is None and splits.note == "left out, as all its labels are -1: test."
    found(train=dataset(*[0, 1] * 5), test=dataset(-1, -1))
    splits = load("hf:owner/name")
    assert len(splits.train) == 6
    assert splits.note.endswith("seed 0. left out, as all its labels are -1: test.")
