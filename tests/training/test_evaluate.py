"""evaluate: its figures against naive loops and scikit-learn; the network stays as it was."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.data import Images, Prepared
from onetrunk.errors import TrainingError
from onetrunk.training.evaluate import figures, logits_of, ready
from onetrunk.training.examples import examples_of

Make = Callable[..., Any]
NAMES = ("a", "b", "c", "d", "e")


def random_logits(seed: int, n: int = 200) -> tuple[Tensor, Tensor]:
    """Logits of a network that is often right, and confident to different degrees."""
    generator = torch.Generator().manual_seed(seed)
    labels_n = torch.randint(0, len(NAMES), (n,), generator=generator)
    logits_nc = torch.randn(n, len(NAMES), generator=generator) * 2
    logits_nc[torch.arange(n), labels_n] += 3 * torch.rand(n, generator=generator)
    return logits_nc, labels_n


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    logits_nc, labels_n = random_logits(seed)
    result = figures(logits_nc, labels_n, NAMES)
    found, truth = logits_nc.argmax(1).numpy(), labels_n.numpy()
    probabilities = logits_nc.double().softmax(1).numpy()
    assert result.accuracy == pytest.approx(metrics.accuracy_score(truth, found), abs=1e-12)
    balanced = metrics.balanced_accuracy_score(truth, found)
    assert result.balanced_accuracy == pytest.approx(balanced, abs=1e-12)
    recalls = metrics.recall_score(truth, found, average=None, labels=range(5))
    assert list(result.per_class.values()) == pytest.approx(list(recalls), abs=1e-12)
    assert tuple(result.per_class) == NAMES
    matrix = metrics.confusion_matrix(truth, found, labels=range(5))
    assert np.array_equal(result.confusion, matrix)
    loss = metrics.log_loss(truth, probabilities, labels=range(5))
    assert result.loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_is_the_naive_loop(seed: int) -> None:
    logits_nc, labels_n = random_logits(seed)
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for logits_c, label in zip(logits_nc.double().tolist(), labels_n.tolist(), strict=True):
        powers = [math.exp(z - max(logits_c)) for z in logits_c]
        confidence = max(powers) / sum(powers)
        edges = (k for k in range(15) if k / 15 < confidence <= (k + 1) / 15)
        bins[next(edges)].append((confidence, logits_c.index(max(logits_c)) == label))
    expected = 0.0
    for rows in filter(None, bins):
        gap = sum(right for _, right in rows) / len(rows) - sum(c for c, _ in rows) / len(rows)
        expected += len(rows) / len(labels_n) * abs(gap)
    found = figures(logits_nc, labels_n, NAMES).calibration_error
    assert found == pytest.approx(expected, abs=1e-9) and found > 0.01


def test_a_sure_and_right_network_is_calibrated() -> None:
    result = figures(100.0 * torch.eye(5), torch.arange(5), NAMES)
    assert (result.accuracy, result.calibration_error) == (1.0, pytest.approx(0.0, abs=1e-12))


def test_classes_without_images_do_not_count() -> None:
    logits_nc, labels_n = random_logits(1)
    kept = (labels_n == 0) | (labels_n == 3)
    result = figures(logits_nc[kept], labels_n[kept], NAMES)
    found, truth = logits_nc[kept].argmax(1), labels_n[kept]
    shares = [float((found[truth == k] == k).double().mean()) for k in (0, 3)]
    assert result.balanced_accuracy == pytest.approx(sum(shares) / 2, abs=1e-12)
    assert [result.per_class[name] for name in "bce"] == [0.0] * 3
    assert result.confusion.sum(axis=1)[[1, 2, 4]].tolist() == [0, 0, 0]
    assert result.confusion.shape == (5, 5)


def test_it_is_the_network_on_every_image(make_model: Make, make_images: Make) -> None:
    model, images = make_model().eval(), make_images(30)
    preprocessing = model.domain.preprocessing
    rows = []
    with torch.no_grad():
        for index in range(len(images)):
            x_chw = preprocessing.prepare(images[index][0])
            rows.append(int(model(preprocessing.evaluation_view(x_chw[None])).argmax()))
    for batch_size in (1, 7, 64):
        result = ot.evaluate(model, images, batch_size=batch_size)
        expected = metrics.confusion_matrix(images.labels, rows, labels=range(3))
        assert np.array_equal(result.confusion, expected)
        assert result.n_images == 30


@pytest.mark.parametrize("in_training", [True, False])
def test_the_network_stays_as_it_was(
    in_training: bool, make_model: Make, make_images: Make, bits: Make, same: Make
) -> None:
    model = make_model().train(in_training)
    model[4].eval()  # flags that differ inside stay as they are too
    flags = [module.training for module in model.modules()]
    before, images = bits(model), make_images(12)
    first = ot.evaluate(model, images)
    assert [module.training for module in model.modules()] == flags
    assert same(bits(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert ot.evaluate(model.eval(), images).to_json() == first.to_json()


def test_another_device_gets_a_copy(make_model: Make) -> None:
    """`meta` stands for an accelerator: moving the domain there would destroy it."""
    model = make_model().eval()
    moved = ready(model, "meta")
    assert {p.device.type for p in moved.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert ready(model, "cpu") is ready(model, None) is model


def test_progress_counts_images(make_model: Make, make_images: Make) -> None:
    seen: list[tuple[int, int]] = []
    model, images = make_model(), make_images(10)
    result = ot.evaluate(
        model, images, batch_size=4, progress=lambda done, n: seen.append((done, n))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)] and result.n_images == 10


def test_broken_images_are_reported(make_model: Make, tmp_path: Any) -> None:
    from PIL import Image

    paths = [tmp_path / f"{k}.png" for k in range(6)]
    for path in paths:
        Image.new("RGB", (20, 20), (200, 10, 10)).save(path)
    paths[4].write_bytes(paths[4].read_bytes()[:40])
    images = Images.from_files(paths, [0, 1, 2, 0, 1, 2], ("ant", "bee", "cat"))
    result = ot.evaluate(make_model(), images)
    assert result.n_images == 5
    assert [name for name, _ in result.problems] == [str(paths[4])]
    assert json.loads(json.dumps(result.to_json()))["problems"][0][0] == str(paths[4])


def test_figures_are_plain_values_in_json(make_model: Make, make_images: Make) -> None:
    result = ot.evaluate(make_model(), make_images(9))
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert values["confusion"] == result.confusion.tolist()
    assert set(values) == {
        "accuracy", "balanced_accuracy", "loss", "calibration_error", "per_class", "confusion",
        "n_images", "problems",
    }  # fmt: skip


def test_a_network_of_nan_is_an_error_not_a_figure(make_model: Make, make_images: Make) -> None:
    model = make_model()
    with torch.no_grad():
        model[12].bias[0] = torch.nan
    with pytest.raises(TrainingError, match=r"logits are not finite.*train the domain again"):
        ot.evaluate(model, make_images(4))


def test_prepared_images_must_have_been_prepared_for_it(
    make_model: Make, make_images: Make
) -> None:
    small, large = make_model(size_px=16), make_model(size_px=32)
    prepared = Prepared(make_images(6), small.domain.preprocessing)
    with pytest.raises(TrainingError, match=r"prepared with .*size_px=16.*prepare it again"):
        ot.evaluate(large, prepared)
    assert ot.evaluate(small, prepared).n_images == 6


def test_half_precision_networks_are_evaluated(make_net: Make, make_images: Make) -> None:
    from onetrunk.data import Preprocessing

    model = ot.attach(
        make_net().bfloat16(),
        ot.Parallel(),
        ["ant", "bee", "cat"],
        preprocessing=Preprocessing(size_px=16),
        input_size=(3, 16, 16),
    )
    logits_nc = logits_of(model, examples_of(model, make_images(6)))
    assert logits_nc.dtype == torch.float32 and logits_nc.shape == (6, 3)
    assert isinstance(model, nn.Module)
