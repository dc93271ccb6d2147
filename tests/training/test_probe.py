"""linear_probe: the optimum on the backbone's own features, whatever the head is made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import onetrunk as ot
from onetrunk.core.domain import delta_names
from onetrunk.errors import TrainingError
from onetrunk.training import probe
from onetrunk.training.examples import examples_of
from onetrunk.training.probe import best_logistic, features_of, linear_probe, start_from_probe

Make = Callable[..., Any]
CLASSES = ("ant", "bee", "cat")


def separable(n: int, seed: int = 0, side: int = 8) -> TensorDataset:
    """Flat images whose colour is their class, nearly."""
    generator = torch.Generator().manual_seed(seed)
    labels_n = torch.arange(n) % 3
    x_nchw = 0.2 * torch.randn(n, 3, side, side, generator=generator)
    x_nchw[torch.arange(n), labels_n] += 1.0
    return TensorDataset(x_nchw, labels_n)


class Colours(nn.Module):
    """A backbone whose features are the mean colours; its head is what is asked for."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.fc = head
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3), keepdim=True)
        return self.fc(x if isinstance(self.fc, nn.Conv2d) else x.flatten(1)).flatten(1)


def test_separable_features_are_separated() -> None:
    model = linear_probe(Colours(nn.Linear(3, 2)), separable(60), separable(30, 1), CLASSES)
    assert ot.evaluate(model, separable(90, 2)).accuracy == 1.0
    assert model.domain.family == "head" and not model.training


def test_its_features_are_the_backbones_and_nothing_but_the_head_moves(
    make_net: Make, bits: Make, same: Make
) -> None:
    backbone, data = make_net().train(), separable(24, side=16)
    before = bits(backbone)
    model = linear_probe(backbone, data, separable(12, 1, side=16), CLASSES)
    assert same(bits(backbone), before)
    moved = set(delta_names(model)) - {"12.weight", "12.bias"}
    for name in model.state_dict():
        shown = name.replace(".layer.", ".")
        if not name.startswith("12."):
            assert torch.equal(model.state_dict()[name], before[shown]), name
    assert all("." in name for name in moved)
    found = features_of(model, "12", examples_of(model, data), None, None)
    with torch.no_grad():
        assert torch.equal(found, backbone.eval()[:12](data.tensors[0]))


def test_it_is_the_optimum_of_scikit_learn() -> None:
    """One decay, the same standardised features: the same minimum."""
    generator = torch.Generator().manual_seed(0)
    x_nf = torch.randn(120, 6, generator=generator) * torch.arange(1.0, 7.0) + 5
    labels_n = (x_nf[:, 0] + x_nf[:, 5] + torch.randn(120, generator=generator) > 10).long()
    decay, n, f = 0.1, 120, 6
    z_nf = (x_nf - x_nf.mean(0)) / x_nf.std(0, correction=0)
    weight, bias = probe._logistic(z_nf, labels_n, torch.zeros(2, f), torch.zeros(2), decay)
    # two classes: scikit-learn's single weight w is W_1 - W_0, and |W|^2 = w^2 / 2 at the optimum
    theirs = LogisticRegression(C=2 * f / (decay * n), tol=1e-9, max_iter=10_000).fit(
        z_nf, labels_n
    )
    assert (weight[1] - weight[0]).tolist() == pytest.approx(theirs.coef_[0].tolist(), abs=2e-3)
    assert float(bias[1] - bias[0]) == pytest.approx(float(theirs.intercept_[0]), abs=2e-3)


def test_the_weights_are_those_of_raw_features() -> None:
    x_nf = 50 + 10 * torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    x_nf[:, 3] = 7.0  # a dead feature
    labels_n = x_nf[:, :3].argmax(1)
    weight, bias = probe.best_logistic(x_nf, labels_n, x_nf, labels_n, 3)
    assert torch.isfinite(weight).all() and torch.isfinite(bias).all()
    found = torch.nn.functional.linear(x_nf, weight, bias).argmax(1)
    assert float((found == labels_n).float().mean()) > 0.9
    assert weight[:, 3].abs().max() < 1e-3


def test_one_image_a_class_is_enough() -> None:
    model = linear_probe(Colours(nn.Linear(3, 2)), separable(3), separable(3, 1), CLASSES)
    assert ot.evaluate(model, separable(30, 2)).accuracy == 1.0


@pytest.mark.parametrize("head", [nn.Linear(3, 2, bias=False), nn.Conv2d(3, 2, 1)])
def test_other_heads_are_trained_by_steps(head: nn.Module) -> None:
    backbone = Colours(head)
    before = [t.clone() for t in backbone.state_dict().values()]
    model = linear_probe(backbone, separable(96), separable(30, 1), CLASSES)
    assert ot.evaluate(model, separable(60, 2)).accuracy > 0.9
    assert all(map(torch.equal, backbone.state_dict().values(), before))
    assert {p.device.type for p in model.parameters()} == {"cpu"} and not model.training


def test_two_heads_are_trained_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = timm.create_model(
            "deit_tiny_distilled_patch16_224",
            img_size=32, patch_size=16, depth=1, embed_dim=24, num_heads=3,
        )  # fmt: skip
    monkeypatch.setattr(probe, "BY_STEPS", dataclasses.replace(probe.BY_STEPS, epochs=4))
    data = separable(48, side=32)
    preprocessing = ot.data.Preprocessing(size_px=32)
    model = linear_probe(backbone, data, data, CLASSES, preprocessing=preprocessing)
    assert len(model.domain.head) == 2
    assert ot.evaluate(model, data).accuracy > 0.6
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "head",
        "head_dist",
    }


class PerToken(nn.Module):
    """Classifies every pixel, then takes the mean: its head sees no single vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(2).transpose(1, 2)).mean(1)


def test_a_head_on_tokens_is_trained_by_steps() -> None:
    model = linear_probe(PerToken(), separable(96), separable(30, 1), CLASSES, head="head")
    assert ot.evaluate(model, separable(60, 2)).accuracy > 0.6


def test_features_that_are_not_finite_are_an_error() -> None:
    backbone = Colours(nn.Linear(3, 2))
    with torch.no_grad():
        backbone.conv.weight[0, 0] = torch.inf
    with pytest.raises(TrainingError, match="features are not finite"):
        linear_probe(backbone, separable(6), separable(6), CLASSES)


def test_a_domain_may_start_from_its_probe() -> None:
    backbone, data = Colours(nn.Linear(3, 2)), separable(60)
    probed = linear_probe(backbone, data, separable(30, 1), CLASSES)
    model = ot.attach(backbone, ot.Norm(), CLASSES, input_size=(3, 8, 8))
    start_from_probe(model, probed)
    assert (
        ot.evaluate(model, data).confusion.tolist() == ot.evaluate(probed, data).confusion.tolist()
    )


@pytest.mark.parametrize("constant", [0.0, 1.1, 100.1])
def test_features_that_only_round_get_no_weight(constant: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x_nf = torch.randn(60, 4, generator=generator)
    x_nf[:, 3] = constant * (1 + 1e-7 * torch.randn(60, generator=generator))
    labels_n = (x_nf[:, 0] > 0).long()
    weight, bias = best_logistic(x_nf, labels_n, x_nf, labels_n, 2)
    assert weight[:, 3].tolist() == [0, 0] and weight.abs().max() < 100
    exact = F.linear(x_nf.double(), weight.double(), bias.double())
    assert torch.allclose(F.linear(x_nf, weight, bias).double(), exact, atol=1e-4)
