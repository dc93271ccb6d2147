"""Recipe: what it refuses, its schedules at exact points, which decay reaches which parameter."""

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.errors import SpecError, TrainingError
from onetrunk.training.optimizer import build_optimizer, kinds
from onetrunk.training.recipe import (
    HEAD_LR_RATIO,
    LORAPLUS_LR_RATIO,
    PAPER,
    RECIPES,
    RELEASED,
    read_recipe,
)

Make = Callable[..., Any]

REFUSED = [
    ({"epochs": 0}, "epochs=0): give a whole number of at least 1"),
    ({"epochs": 2.5}, "epochs=2.5): give a whole number"),
    ({"epochs": True}, "epochs=True): give a whole number"),
    ({"batch_size": -1}, "batch_size=-1): give a whole number of at least 1"),
    ({"seed": "a"}, "seed='a'): give a whole number"),
    ({"lr": -0.1}, "lr=-0.1): give a number of 0 or more"),
    ({"lr": "0.1"}, "lr='0.1'): give a number"),
    ({"lr": math.nan}, "lr=nan): give a number"),
    ({"lr_full": math.inf}, "lr_full=inf): give a number"),
    ({"head_lr_ratio": -1}, "head_lr_ratio=-1): give a number of 0 or more, or None"),
    ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio=0): give a number above 0, or None"),
    ({"decay_adapter": None}, "decay_adapter=None): give a number"),
    ({"decay_norm": -1}, "decay_norm=-1): give a number"),
    ({"decay_head": -1}, "decay_head=-1): give a number"),
    ({"decay_full": -1}, "decay_full=-1): give a number"),
    ({"warmup": 1.0}, "warmup=1.0): give a share from 0 to below 1"),
    ({"momentum": 1}, "momentum=1): give a share"),
    ({"label_smoothing": -0.1}, "label_smoothing=-0.1): give a share"),
    ({"clip_norm": 0.0}, "clip_norm=0.0): give a number above 0, or None"),
    ({"clip_norm": math.inf}, "clip_norm=inf): give a number above 0, or None"),
    ({"optimizer": "adam"}, "optimizer='adam'): give one of adamw, sgd"),
    ({"schedule": "linear"}, "schedule='linear'): give one of cosine, step, constant"),
    ({"norm_statistics": "mine"}, "norm_statistics='mine'): give one of auto, batch, running"),
    ({"keep": "last"}, "keep='last'): give one of late, best"),
    ({"precision": "float16"}, "precision='float16'): give one of auto, float32, bfloat16"),
    ({"nesterov": 1}, "nesterov=1): give True (with sgd and a momentum above 0) or False"),
    ({"nesterov": True, "optimizer": "sgd", "momentum": 0}, "nesterov=True): give True (with sgd"),
    ({"nesterov": True}, "nesterov=True): give True (with sgd and a momentum above 0) or False"),
    ({"drops": 0.5}, "drops=0.5): give shares of the training"),
    ({"drops": (80, 100)}, "drops=(80, 100)): give shares of the training"),
    ({"decay_by_size": 2000}, "decay_by_size=2000): give (images, decay) pairs"),
    ({"decay_by_size": ((0.5, 1),)}, "decay_by_size=((0.5, 1),)): give (images, decay) pairs"),
    ({"decay_by_size": ((9, 0.1), (5, 0.2))}, "give the pair with the fewest images first"),
    ({"crop_scale": 0.5}, "crop_scale=0.5): give (least, most) with 0 < least <= most <= 1"),
    ({"crop_scale": (0.5, 0.2)}, "crop_scale=(0.5, 0.2)): give (least, most)"),
    ({"crop_scale": (0, 1)}, "crop_scale=(0, 1)): give (least, most)"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_value_out_of_range_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as error:
        ot.Recipe(**fields)
    assert str(error.value).startswith("Recipe(") and message in str(error.value)


def test_every_field_is_refused_somewhere() -> None:
    tried = {name for fields, _ in REFUSED for name in fields}
    assert tried == {field.name for field in dataclasses.fields(ot.Recipe)}


# Schedules


@pytest.mark.parametrize("steps_an_epoch", [1, 7, 26, 391])
def test_the_papers_rate_drops_at_epochs_80_and_100_of_120(steps_an_epoch: int) -> None:
    n = 120 * steps_an_epoch
    for recipe in (PAPER, RELEASED):
        for epoch, factor in ((0, 1), (79, 1), (80, 0.1), (99, 0.1), (100, 0.01), (119, 0.01)):
            first, last = epoch * steps_an_epoch, (epoch + 1) * steps_an_epoch - 1
            assert recipe.learning_rate(first, n) == pytest.approx(factor)
            assert recipe.learning_rate(last, n) == pytest.approx(factor)


def test_warm_up_rises_in_equal_steps_to_one() -> None:
    for schedule in ("cosine", "step", "constant"):
        recipe = ot.Recipe(warmup=0.1, schedule=schedule)
        rates = [recipe.learning_rate(step, 100) for step in range(11)]
        assert rates == pytest.approx([0.1 * k for k in range(1, 11)] + [1.0])


def test_cosine_falls_from_one_to_near_zero() -> None:
    recipe = ot.Recipe(warmup=0.0, schedule="cosine")
    rates = [recipe.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == 1.0 and rates[500] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-5
    assert all(a > b for a, b in pairwise(rates))


def test_constant_stays_at_one() -> None:
    recipe = ot.Recipe(warmup=0.0, schedule="constant")
    assert {recipe.learning_rate(step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 10])
def test_short_trainings_keep_a_rate_between_zero_and_one(warmup: float, n_steps: int) -> None:
    for schedule in ("cosine", "step", "constant"):
        recipe = ot.Recipe(warmup=warmup, schedule=schedule)
        assert all(0 < recipe.learning_rate(step, n_steps) <= 1 for step in range(n_steps))


# Decay


def test_decay_by_size_is_the_first_row_that_fits() -> None:
    recipe = ot.Recipe(decay_adapter=0.5, decay_by_size=((10, 0.1), (20, 0.2)))
    sizes = (1, 10, 11, 20, 21)
    assert [recipe.adapter_decay(n) for n in sizes] == [0.1, 0.1, 0.2, 0.2, 0.5]
    # the papers: flowers and DTD 0.005, aircraft and UCF 0.002, the rest 0.0005
    papers = [PAPER.adapter_decay(n) for n in (1_020, 1_880, 3_334, 7_629, 31_367)]
    assert papers == [5e-3, 5e-3, 2e-3, 2e-3, 5e-4]
    assert {RELEASED.adapter_decay(n) for n in (1, 10**6)} == {1e-4}


class Block(nn.Module):
    """A convolution, a norm and a free scale, registered in the order that is asked for."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        parts = {
            "conv": nn.Conv2d(4, 4, 3, padding=1),
            "norm": nn.BatchNorm2d(4),
            "scale": nn.Parameter(torch.ones(1, 4, 1, 1)),
        }
        for name in sorted(parts, reverse=turned):
            setattr(self, name, parts[name])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(self.conv(x)).relu()


class Net(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        parts = {
            "block": Block(turned),
            "head": nn.Linear(4, 2),
            "layer_norm": nn.LayerNorm(4),
            "stem": nn.Conv2d(3, 4, 3),
        }
        for name in sorted(parts, reverse=turned):
            setattr(self, name, parts[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer_norm(self.block(self.stem(x)).mean((2, 3))))


NORMS = {
    "block.norm.weight": "norm",
    "block.norm.bias": "norm",
    "layer_norm.weight": "norm",
    "layer_norm.bias": "norm",
}
HEAD = {"head.weight": "head", "head.bias": "head"}
KINDS: dict[str, dict[str, str]] = {
    "head": HEAD,
    "norm": {**HEAD, **NORMS},
    "parallel": {**HEAD, **NORMS, "block.conv.adapter.a_oi": "adapter"},
    "lowrank(rank=2)": {
        **HEAD,
        **NORMS,
        "block.conv.adapter.v_ri": "inner",
        "block.conv.adapter.u_or": "adapter",
    },
    "series": {
        **HEAD,
        **NORMS,
        "block.conv.adapter.a_oo": "adapter",
        "block.conv.adapter.norm.weight": "norm",
        "block.conv.adapter.norm.bias": "norm",
    },
    "channelwise": {
        **HEAD,
        **NORMS,
        "block.conv.adapter.s_o": "adapter",
        "block.conv.adapter.t_o": "adapter",
    },
    "full": {
        **HEAD,
        **NORMS,
        "block.conv.weight": "full",
        "block.conv.bias": "full",
        "block.scale": "full",
        "stem.weight": "full",
        "stem.bias": "full",
    },
}


def domain(family: str, turned: bool = False) -> nn.Module:
    where = None if family in ("head", "norm", "full") else ot.Where(pattern="block.conv")
    return ot.attach(
        Net(turned), ot.read_family(family), ["a", "b"], where=where, input_size=(3, 8, 8)
    )


@pytest.mark.parametrize("family", list(KINDS))
def test_the_kind_of_a_parameter_is_that_of_its_module(family: str) -> None:
    assert kinds(domain(family)) == KINDS[family]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", list(KINDS))
def test_rate_and_decay_follow_the_kind_whatever_the_order(family: str, optimizer: str) -> None:
    """In the released optimiser the decay of one layer leaks into those registered after it."""
    recipe = ot.Recipe(
        optimizer=optimizer,
        lr=1.0,
        lr_full=2.0,
        head_lr_ratio=0.1,
        loraplus_lr_ratio=4.0,
        decay_adapter=0.9,
        decay_by_size=((100, 0.3),),
        decay_norm=0.4,
        decay_head=0.5,
        decay_full=0.6,
    )
    lr = {"adapter": 1.0, "inner": 0.25, "norm": 1.0, "head": 0.1, "full": 2.0}
    decay = {"adapter": 0.3, "inner": 0.3, "norm": 0.4, "head": 0.5, "full": 0.6}
    for turned in (False, True):
        model = domain(family, turned)
        named = {id(p): (name, p) for name, p in model.named_parameters()}
        found = {}
        for group in build_optimizer(model, recipe, 100).param_groups:
            for parameter in group["params"]:
                found[named[id(parameter)][0]] = (group["peak_lr"], group["weight_decay"])
        expected = {
            name: (
                lr[kind],
                0.4 if model.get_parameter(name).ndim == 1 else decay[kind],
            )
            for name, kind in KINDS[family].items()
        }
        assert found == expected


@pytest.mark.parametrize(
    ("recipe", "head", "inner"),
    [
        (ot.Recipe(norm_statistics="running"), HEAD_LR_RATIO, 1 / LORAPLUS_LR_RATIO),
        (ot.Recipe(norm_statistics="batch"), 1.0, 1.0),
        (ot.Recipe(norm_statistics="batch", head_lr_ratio=0.5, loraplus_lr_ratio=2), 0.5, 0.5),
        (PAPER, 1.0, 1.0),
    ],
)
def test_head_and_inner_factor_are_slower_where_norms_keep_the_backbones_statistics(
    recipe: ot.Recipe, head: float, inner: float
) -> None:
    model = domain("lowrank(rank=2)")
    rates = {
        id(p): g["peak_lr"]
        for g in build_optimizer(model, recipe, 100).param_groups
        for p in g["params"]
    }
    of_kind = {kind: rates[id(model.get_parameter(name))] for name, kind in kinds(model).items()}
    expected = {"adapter": 1.0, "norm": 1.0, "head": head, "inner": inner}
    assert of_kind == pytest.approx({k: recipe.lr * share for k, share in expected.items()})


def test_tied_weights_are_trained_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
            self.second.weight = self.first.weight
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)).mean((2, 3)))

    model = ot.attach(Tied(), ot.Full(), ["a", "b"], input_size=(3, 8, 8))
    groups = build_optimizer(model, ot.Recipe(), 1).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) == 5


# The written form


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (ot.Recipe(), "default"),
        (PAPER, "paper"),
        (RELEASED, "released"),
        (ot.Recipe(epochs=7), "default(epochs=7)"),
        (dataclasses.replace(PAPER, epochs=3, lr=1), "paper(epochs=3, lr=1.0)"),
        (ot.Recipe(crop_scale=(0.5, 1)), "default(crop_scale=(0.5, 1.0))"),
        (ot.Recipe(clip_norm=None, drops=(0.25,)), "default(drops=(0.25,), clip_norm=None)"),
    ],
)
def test_the_written_form_reads_back(recipe: ot.Recipe, text: str) -> None:
    assert str(recipe) == text
    assert read_recipe(text) == recipe


def test_equal_values_have_one_written_form() -> None:
    lists = ot.Recipe(lr=1, drops=[0.5], decay_by_size=[[5, 1]], crop_scale=[1, 1])
    tuples = ot.Recipe(lr=1.0, drops=(0.5,), decay_by_size=((5, 1.0),), crop_scale=(1.0, 1.0))
    assert lists == tuples and str(lists) == str(tuples) and hash(lists) == hash(tuples)
    assert "np" not in str(ot.Recipe(lr=np.float64(0.125)))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("papper", SpecError, "unknown recipe 'papper'.*paper, pretrain, released.*mean 'paper'"),
        ("paper(lr=0.1", SpecError, "cannot read recipe"),
        ("paper(0.1)", SpecError, "cannot read recipe"),
        ("paper(lr=open('x'))", SpecError, "cannot read recipe"),
        ("paper(rate=1)", SpecError, "has no field 'rate': it takes epochs, batch_size"),
        ("paper(lr=-1)", TrainingError, r"Recipe\(lr=-1\)"),
        ("paper(lr='a')", TrainingError, r"Recipe\(lr='a'\)"),
        ("paper(drops=(0.5))", TrainingError, r"Recipe\(drops=0.5\): give shares"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_recipe(text)


def test_recipes_are_named_and_frozen() -> None:
    assert set(RECIPES) == {"default", "paper", "pretrain", "released"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER.lr = 1.0  # type: ignore[misc]
