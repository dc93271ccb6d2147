"""Examples: everything that users hand over as data, and what each mistake is told."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

import onetrunk as ot
from onetrunk.data import Images, Prepared, load
from onetrunk.errors import DataError, TrainingError
from onetrunk.training.examples import ImageExamples, TensorExamples, examples_of, one_ahead

Make = Callable[..., Any]
ROWS = torch.arange(4)


@pytest.fixture
def model(make_model: Make) -> nn.Module:
    return make_model()


class Pairs(Dataset[Any]):
    """Pairs with whatever attributes are given."""

    def __init__(self, pairs: list[Any], **attributes: Any) -> None:
        self.pairs = pairs
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


@pytest.fixture
def class_folder(tmp_path: Path, pictures: Make) -> Path:
    for number, x_hwc in enumerate(pictures(9)):
        folder = tmp_path / ("ant", "bee", "cat")[number % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(x_hwc).save(folder / f"{number}.png")
    return tmp_path


# Datasets that fit


def test_pictures_in_every_form_are_the_same_examples(model: nn.Module, pictures: Make) -> None:
    x_nhwc, labels = pictures(6), [0, 1, 2, 0, 1, 2]
    images = Images.from_arrays(x_nhwc, labels, ("ant", "bee", "cat"))
    x_nchw = torch.from_numpy(x_nhwc).permute(0, 3, 1, 2)
    forms = [
        images,
        Prepared(images, model.domain.preprocessing),
        Subset(images, range(6)),
        list(zip(x_nhwc, labels, strict=True)),
        Pairs([(Image.fromarray(x), y) for x, y in zip(x_nhwc, labels, strict=True)]),
        TensorDataset(x_nchw, torch.tensor(labels)),
        Pairs([(x, np.int64(y)) for x, y in zip(x_nhwc, labels, strict=True)]),
    ]
    wanted = examples_of(model, images)
    for form in forms:
        found = examples_of(model, form)
        assert isinstance(found, ImageExamples) and found.runs_ahead
        assert torch.equal(found.labels, wanted.labels)
        assert torch.equal(found.views(ROWS), wanted.views(ROWS))
        assert torch.equal(
            found.training_views(ROWS, 3, 1, (0.5, 1.0)),
            wanted.training_views(ROWS, 3, 1, (0.5, 1.0)),
        )
        assert found.fingerprint() == wanted.fingerprint()


def test_float_tensors_are_taken_as_they_are(model: nn.Module, make_tensors: Make) -> None:
    data = make_tensors(6)
    found = examples_of(model, data)
    assert isinstance(found, TensorExamples) and not found.runs_ahead
    assert torch.equal(found.views(ROWS), data.tensors[0][:4])
    assert torch.equal(found.training_views(ROWS, 0, 0, (0.1, 1.0)), data.tensors[0][:4])
    assert torch.equal(found.labels, data.tensors[1])


def test_torchvisions_fake_data_trains(model: nn.Module) -> None:
    fake = datasets.FakeData(12, (3, 20, 20), num_classes=3)
    assert len(list(ot.fit(model, fake, ot.Recipe(epochs=1, batch_size=4), device="cpu"))) == 3
    to_float = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    tensors = datasets.FakeData(12, (3, 16, 16), num_classes=3, transform=to_float)
    assert len(list(ot.fit(model, tensors, ot.Recipe(epochs=1, batch_size=4), device="cpu"))) == 3
    assert ot.evaluate(model, tensors).n_images == 12


def test_torchvisions_image_folder_with_random_transforms(
    model: nn.Module, class_folder: Path
) -> None:
    transform = v2.Compose(
        [v2.RandomResizedCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    data = datasets.ImageFolder(str(class_folder), transform)
    found = examples_of(model, data)
    assert found.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    views = [found.training_views(ROWS, 0, epoch, None) for epoch in (0, 1, 0)]
    assert torch.equal(views[0], views[2]) and not torch.equal(views[0], views[1])
    swapped = found.training_views(ROWS.flip(0), 0, 0, None)
    assert torch.equal(swapped.flip(0), views[0])
    assert torch.equal(found.views(ROWS), found.views(ROWS))


def test_a_broken_file_of_an_image_folder_is_left_out(model: nn.Module, class_folder: Path) -> None:
    broken = class_folder / "ant" / "0.png"
    broken.write_bytes(broken.read_bytes()[:30])
    data = datasets.ImageFolder(str(class_folder))
    result = ot.evaluate(model, data)
    assert result.n_images == 8
    assert [name for name, _ in result.problems] == ["image 0"]


def test_other_classes_of_an_image_folder_are_an_error(
    make_model: Make, class_folder: Path
) -> None:
    model = make_model(classes=("ant", "bee", "dog"))
    with pytest.raises(TrainingError) as error:
        examples_of(model, datasets.ImageFolder(str(class_folder)))
    assert str(error.value).splitlines()[1:] == ["- dog", "+ cat"]
    turned = make_model(classes=("cat", "bee", "ant"))
    with pytest.raises(TrainingError, match="the same names in another order"):
        examples_of(turned, datasets.ImageFolder(str(class_folder)))


def test_images_whose_classes_come_in_another_order_are_taken_by_name(
    make_model: Make, class_folder: Path
) -> None:
    images = load(class_folder).train
    turned = examples_of(make_model(classes=tuple(reversed(images.classes))), images)
    last = len(images.classes) - 1
    assert turned.labels.tolist() == [last - label for label in images.labels.tolist()]


# Labels


def test_labels_are_read_from_the_list_that_means_them(model: nn.Module, pictures: Make) -> None:
    x_nhwc = pictures(3)
    pairs = [(x, y) for x, y in zip(x_nhwc, (2, 0, 1), strict=True)]
    right = [2, 0, 1]
    for attributes in (
        {},
        {"targets": [2, 0, 1]},
        {"targets": torch.tensor([2, 0, 1])},
        {"labels": np.array([2, 0, 1], dtype=np.uint8)},
        {"labels": ["cat", "ant", "bee"]},
        {"targets": [[2, 5], [0, 5], [1, 5]]},
        {"targets": [2, 0]},
        {"targets": [1, 1, 1]},  # not what the pairs say
        {"targets": None},
        {"classes": 3},
    ):
        assert examples_of(model, Pairs(pairs, **attributes)).labels.tolist() == right


def test_a_target_transform_is_obeyed(model: nn.Module, class_folder: Path) -> None:
    data = datasets.ImageFolder(str(class_folder), target_transform=lambda label: (3 - label) % 3)
    assert examples_of(model, data).labels.tolist() == [0] * 3 + [2] * 3 + [1] * 3


def test_a_list_of_labels_that_a_dataset_maps_is_not_believed(
    model: nn.Module, pictures: Make
) -> None:
    class Mapped(Pairs):
        def __getitem__(self, index: int) -> Any:
            if index == 4:
                raise OSError("a broken image")
            x_hwc, label = self.pairs[index]
            return x_hwc, (0, 2, 1)[label]

    pairs = list(zip(pictures(6), [0, 1, 2, 0, 1, 2], strict=True))
    data = Mapped([pair for k, pair in enumerate(pairs) if k != 4], targets=[0, 1, 2, 0, 2])
    with pytest.raises(DataError, match="image 4 cannot be read for its label"):
        examples_of(model, data)
    data.pairs, data.targets = data.pairs[:4], data.targets[:4]
    assert examples_of(model, data).labels.tolist() == [0, 2, 1, 0]


@pytest.mark.parametrize("wrong", ["cat", 1.0, None, torch.tensor([0.0, 1.0]), True, [1]])
def test_labels_that_are_no_whole_numbers_are_an_error(
    wrong: Any, model: nn.Module, pictures: Make
) -> None:
    pairs = [(x, y) for x, y in zip(pictures(2), (wrong, wrong), strict=True)]
    with pytest.raises(TrainingError, match=r"labels are no whole numbers \(one is .*from 0 to"):
        examples_of(model, pairs)


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_labels_out_of_range_are_an_error(
    label: int, model: nn.Module, pictures: Make, make_tensors: Make
) -> None:
    with pytest.raises(DataError, match=rf"{label}.* outside 0\.\.2"):
        examples_of(model, [(x, y) for x, y in zip(pictures(2), (0, label), strict=True)])
    tensors = TensorDataset(make_tensors(2).tensors[0], torch.tensor([0, label]))
    with pytest.raises(DataError, match=rf"label {label} is outside 0\.\.2.* 3 classes"):
        examples_of(model, tensors)


# Data that is none


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield torch.zeros(3, 16, 16), 0


@pytest.mark.parametrize(
    "data", [Stream(), 7, None, "photos/", [{"image": 1, "label": 2}], [(1,)], {"a": 1}]
)
def test_what_is_no_dataset_is_told_what_one_is(data: Any, model: nn.Module) -> None:
    with pytest.raises(TrainingError, match=r"no dataset of \(image, label\)|images are str"):
        examples_of(model, data)


def test_a_loader_is_told_to_give_its_dataset(model: nn.Module, make_tensors: Make) -> None:
    loader: DataLoader[Any] = DataLoader(make_tensors(6), batch_size=2)
    with pytest.raises(TrainingError, match=r"DataLoader is no dataset.*its \.dataset"):
        examples_of(model, loader)


def test_a_pair_of_arrays_is_told_what_to_do(model: nn.Module, pictures: Make) -> None:
    with pytest.raises(TrainingError, match=r"labels are no whole numbers|no dataset"):
        examples_of(model, (pictures(3), np.array([0, 1, 2])))


@pytest.mark.parametrize("data", [[], Pairs([])])
def test_no_image_is_an_error(data: Any, model: nn.Module) -> None:
    with pytest.raises(DataError, match="has no image that can be read"):
        examples_of(model, data)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(16, 16), r"float tensors of shape \(16, 16\): give \(c, h, w\)"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), "images are tensors of torch.int64"),
        ("a.png", "images are str: give PIL images"),
    ],
)
def test_images_of_another_kind_are_an_error(image: Any, message: str, model: nn.Module) -> None:
    with pytest.raises(TrainingError, match=message):
        examples_of(model, [(image, 0)])


def test_pictures_need_a_backbone_that_takes_them(pictures: Make) -> None:
    net = nn.Sequential(nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = ot.attach(net, ot.Norm(), ["a", "b"], input_size=(5, 8, 8))
    with pytest.raises(DataError, match="neither 1 nor 3 channels"):
        examples_of(model, [(pictures(1)[0], 0)])
    assert len(examples_of(model, [(torch.zeros(5, 8, 8), 0)])) == 1


# Fingerprints


def test_a_fingerprint_sees_labels_and_pixels(model: nn.Module, make_tensors: Make) -> None:
    data = make_tensors(20)
    x_nchw, labels_n = data.tensors
    changed = x_nchw.clone()
    changed[0, 0, 0, 0] += 1e-6
    found = {
        examples_of(model, TensorDataset(*pair)).fingerprint()
        for pair in [
            (x_nchw, labels_n),
            (changed, labels_n),
            (x_nchw, labels_n.flip(0)),
            (x_nchw[:19], labels_n[:19]),
        ]
    }
    assert len(found) == 4
    assert examples_of(model, make_tensors(20)).fingerprint() in found
    assert len(examples_of(model, make_tensors(1)).fingerprint()) == 64


# One ahead


def test_one_ahead_makes_each_once_in_order_and_one_ahead() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item * item

    found = []
    for square in one_ahead(make, [1, 2, 3, 4]):
        found.append(square)
        deadline = time.monotonic() + 5
        while len(made) < min(4, len(found) + 1) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made == [1, 2, 3, 4][: len(found) + 1]
    assert found == [1, 4, 9, 16]
    assert list(one_ahead(make, [])) == [] and list(one_ahead(make, [5])) == [25]


def ours() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("onetrunk-ahead")]


def test_one_ahead_leaves_no_thread() -> None:
    steps = one_ahead(lambda item: item, range(10))
    assert next(steps) == 0 and len(ours()) == 1
    steps.close()
    assert ours() == []

    def fail(item: int) -> int:
        if item == 2:
            raise DataError("image 2 is broken")
        return item

    found = []
    with pytest.raises(DataError, match="image 2"):
        for item in one_ahead(fail, [0, 1, 2, 3]):
            found.append(item)
    assert found == [0, 1] and ours() == []


def test_a_users_dataset_is_read_in_the_callers_thread(
    model: nn.Module, make_tensors: Make
) -> None:
    class Where(Dataset[tuple[Tensor, int]]):
        def __init__(self) -> None:
            self.data, self.threads = make_tensors(8), set[str]()

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            self.threads.add(threading.current_thread().name)
            return self.data[index]

    data = Where()
    list(ot.fit(model, data, ot.Recipe(epochs=1, batch_size=4), device="cpu"))
    assert data.threads == {threading.current_thread().name}


def test_tensors_of_several_sizes_are_told_to_be_of_one(model: nn.Module) -> None:
    data = [(torch.rand(3, 16, 16), 0), (torch.rand(3, 16, 18), 1)] * 2
    with pytest.raises(TrainingError, match=r"several sizes \(\(3, 16, 16\) and \(3, 16, 18\)\)"):
        ot.evaluate(model, data)
