"""predict: every kind of input, and broken pictures that never change another's answer."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import onetrunk as ot
from onetrunk.data import Images, Preprocessing
from onetrunk.errors import DataError, TrainingError
from onetrunk.training.predict import Prediction

Make = Callable[..., Any]


@pytest.fixture
def model(make_model: Make) -> nn.Module:
    """Sure of itself, so that wrong rows would show."""
    made = make_model().eval()
    with torch.no_grad():
        made[12].weight *= 1000
    return made


@pytest.fixture
def folder(tmp_path: Path, pictures: Make) -> Path:
    """Five PNG files, one in a folder below, and two files of other kinds."""
    (tmp_path / "below").mkdir()
    names = ("a.png", "b.PNG", "c.jpeg.png", "below/d.png", "e.png")
    for name, x_hwc in zip(names, pictures(5), strict=True):
        Image.fromarray(x_hwc).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "f.npy").write_bytes(b"neither")
    return tmp_path


def expected(model: nn.Module, x_hwc: Any) -> tuple[tuple[str, float], ...]:
    """The naive way for one picture."""
    preprocessing = model.domain.preprocessing
    x_1chw = preprocessing.evaluation_view(preprocessing.prepare(Image.fromarray(x_hwc))[None])
    with torch.no_grad():
        shares = model(x_1chw).softmax(1)[0].tolist()
    pairs = zip(model.domain.classes, shares, strict=True)
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def close(found: tuple[tuple[str, float], ...], wanted: tuple[tuple[str, float], ...]) -> bool:
    return [n for n, _ in found] == [n for n, _ in wanted] and np.allclose(
        [p for _, p in found], [p for _, p in wanted], atol=1e-6
    )


def test_one_picture_in_every_form(model: nn.Module, pictures: Make, tmp_path: Path) -> None:
    (x_hwc,) = pictures(1)
    path, encoded = tmp_path / "one.png", io.BytesIO()
    Image.fromarray(x_hwc).save(path)
    Image.fromarray(x_hwc).save(encoded, "PNG")
    forms = [path, str(path), x_hwc, Image.fromarray(x_hwc), encoded.getvalue()]
    for form in forms:
        (prediction,) = ot.predict(model, form)
        assert close(prediction.classes, expected(model, x_hwc))
        assert prediction.name == (str(path) if isinstance(form, str | Path) else "0")
        assert prediction.best == prediction.classes[0][0] and not prediction.problem
    mixed = ot.predict(model, forms)
    assert [p.name for p in mixed] == [str(path), str(path), "2", "3", "4"]
    assert all(close(p.classes, expected(model, x_hwc)) for p in mixed)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_many_pictures_keep_their_order(batch_size: int, model: nn.Module, pictures: Make) -> None:
    x_nhwc = pictures(7)
    wanted = [expected(model, x_hwc) for x_hwc in x_nhwc]
    assert len({row[0] for row in wanted}) > 1
    for form in (x_nhwc, list(x_nhwc), (Image.fromarray(x) for x in x_nhwc)):
        found = ot.predict(model, form, batch_size=batch_size)
        assert [p.name for p in found] == [str(k) for k in range(7)]
        assert all(close(p.classes, row) for p, row in zip(found, wanted, strict=True))


def test_a_folder_is_its_image_files_at_any_depth(
    model: nn.Module, folder: Path, pictures: Make
) -> None:
    found = ot.predict(model, folder)
    names = ["a.png", "b.PNG", "below/d.png", "c.jpeg.png", "e.png"]
    assert [p.name for p in found] == [str(folder / name) for name in names]
    x_nhwc = pictures(5)
    for prediction, row in zip(found, (0, 1, 3, 2, 4), strict=True):
        assert close(prediction.classes, expected(model, x_nhwc[row]))
    assert ot.predict(model, str(folder)) == found


def test_a_folder_gives_what_a_training_would_take(
    model: nn.Module, pictures: Make, tmp_path: Path
) -> None:
    for name in ("a.jfif", "._a.jpg", ".hidden/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pictures(1)[0]).save(tmp_path / name, "PNG")
    found = ot.predict(model, tmp_path)
    assert [Path(prediction.name).name for prediction in found] == ["a.jfif", "c.png"]


def test_images_of_a_source_are_predicted_broken_ones_apart(
    model: nn.Module, folder: Path, pictures: Make
) -> None:
    paths = [folder / "a.png", folder / "notes.txt", folder / "e.png"]
    images = Images.from_files(paths, [0, 1, 0], ["x", "y"])
    found = ot.predict(model, images)
    first, _, _, _, last = pictures(5)
    for prediction, x_hwc in zip(found[::2], (first, last), strict=True):
        assert dict(prediction.classes) == pytest.approx(dict(expected(model, x_hwc)), rel=1e-4)
    assert "notes.txt" in found[1].problem and not found[1].classes


@pytest.mark.parametrize(
    ("wrap", "kind"), [(lambda x: (x, 0), "tuple"), (lambda x: torch.zeros(3, 8, 8), "Tensor")]
)
def test_a_list_of_what_is_no_image_is_refused(
    wrap: Make, kind: str, model: nn.Module, pictures: Make
) -> None:
    with pytest.raises(DataError, match=rf"item 0 is a {kind}: give pictures"):
        ot.predict(model, [wrap(x) for x in pictures(2)])


def test_a_float_tensor_is_the_networks_input(model: nn.Module) -> None:
    x_bchw = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = ot.predict(model, x_bchw, batch_size=2)
    with torch.no_grad():
        shares_bc = model(x_bchw).softmax(1)
    for prediction, shares_c in zip(found, shares_bc, strict=True):
        assert [p for _, p in prediction.classes] == pytest.approx(
            shares_c.sort(descending=True).values.tolist(), abs=1e-6
        )
    assert [p.name for p in found] == list("01234")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(3, 16, 16)]
)
def test_any_other_tensor_is_refused(tensor: torch.Tensor, model: nn.Module) -> None:
    with pytest.raises(DataError, match=r"tensor of torch\..*float \(b, c, h, w\).*numpy\(\)"):
        ot.predict(model, tensor)


def test_probabilities_sum_to_one_and_fall(model: nn.Module, pictures: Make) -> None:
    for prediction in ot.predict(model, pictures(4), top_k=99):
        shares = [share for _, share in prediction.classes]
        assert len(shares) == 3 and sum(shares) == pytest.approx(1.0, abs=1e-6)
        assert shares == sorted(shares, reverse=True)
        assert {name for name, _ in prediction.classes} == {"ant", "bee", "cat"}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_is_how_many(top_k: int, model: nn.Module, pictures: Make) -> None:
    (prediction,) = ot.predict(model, pictures(1), top_k=top_k)
    assert prediction.classes == ot.predict(model, pictures(1))[0].classes[:top_k]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_broken_picture_in_a_list_has_a_problem_and_harms_no_other(
    batch_size: int, model: nn.Module, pictures: Make, tmp_path: Path
) -> None:
    x_nhwc = pictures(4)
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    items = [x_nhwc[0], broken, x_nhwc[1], str(missing), x_nhwc[2], b"", 7, x_nhwc[3]]
    found = ot.predict(model, items, batch_size=batch_size)
    assert len(found) == len(items)
    for place, row in ((0, 0), (2, 1), (4, 2), (7, 3)):
        assert close(found[place].classes, expected(model, x_nhwc[row]))
    for place, said in ((1, "broken.png"), (3, "No such file"), (5, "empty"), (6, "int")):
        assert found[place].classes == () and said in found[place].problem
        with pytest.raises(DataError, match=said):
            _ = found[place].best


def test_equal_names_are_kept_apart(
    model: nn.Module, pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_nhwc = pictures(7)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(x_nhwc[5]).save(tmp_path / "0", "PNG")
    found = ot.predict(model, [x_nhwc[6], "0"])
    assert [p.name for p in found] == ["0", "0"]
    assert close(found[0].classes, expected(model, x_nhwc[6]))
    assert close(found[1].classes, expected(model, x_nhwc[5]))


def test_a_single_broken_picture_is_an_error(
    model: nn.Module, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    for form in (broken, str(broken), b"not a picture", np.zeros((2, 2), dtype=np.int64)):
        with pytest.raises(DataError, match="cannot be read"):
            ot.predict(model, form)
    assert [bool(p.problem) for p in ot.predict(model, [broken])] == [True]
    only = tmp_path / "only"
    only.mkdir()
    broken.rename(only / "broken.jpg")
    assert [bool(p.problem) for p in ot.predict(model, only)] == [True]


def test_what_is_not_there_is_said(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png: there is no such file or folder"):
        ot.predict(model, tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"no image below this folder \(\.bmp, "):
        ot.predict(model, tmp_path)
    with pytest.raises(DataError, match="no image at all"):
        ot.predict(model, [])
    with pytest.raises(DataError, match="given a int: give a file, a folder, a picture, or a list"):
        ot.predict(model, 7)
    with pytest.raises(DataError, match="top_k=0: ask for at least one class"):
        ot.predict(model, [], top_k=0)


@pytest.mark.parametrize("in_training", [True, False])
def test_the_network_stays_as_it_was(
    in_training: bool, model: nn.Module, pictures: Make, bits: Make, same: Make
) -> None:
    model.train(in_training)
    before = bits(model)
    first = ot.predict(model, pictures(3))
    assert all(module.training == in_training for module in model.modules())
    assert same(bits(model), before)
    assert ot.predict(model.eval(), pictures(3)) == first


def test_a_backbone_of_five_channels_takes_tensors_only(pictures: Make) -> None:
    net = nn.Sequential(nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = ot.attach(net, ot.Norm(), ["a", "b"], input_size=(5, 8, 8))
    assert len(ot.predict(model, torch.zeros(2, 5, 8, 8))) == 2
    with pytest.raises(DataError, match=r"neither 1 nor 3 channels.*float tensors"):
        ot.predict(model, pictures(1))


def test_pictures_are_seen_through_the_domains_preprocessing(
    make_net: Make, pictures: Make
) -> None:
    def answer(size_px: int) -> Prediction:
        model = ot.attach(
            make_net(),
            ot.Norm(),
            ["a", "b"],
            preprocessing=Preprocessing(size_px=size_px),
            input_size=(3, 16, 16),
        )
        return ot.predict(model, pictures(1))[0]

    assert answer(16) != answer(20)


def test_scores_that_are_not_finite_are_a_problem_of_their_image_alone(model: nn.Module) -> None:
    x_bchw = torch.rand(3, 3, 16, 16)
    x_bchw[1, 0, 0, 0] = torch.nan
    first, broken, last = ot.predict(model, x_bchw)
    assert (broken.classes, first.problem, last.problem) == ((), "", "")
    assert "not finite (NaN or infinity)" in broken.problem
    with pytest.raises(DataError, match="look for broken numbers in the image"):
        broken.best  # noqa: B018


def test_a_batch_has_an_image(model: nn.Module, folder: Path) -> None:
    with pytest.raises(TrainingError, match="batch_size=0: give at least one image a batch"):
        ot.predict(model, folder, batch_size=0)
