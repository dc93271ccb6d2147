"""fit: the same bits from the same seed, only the domain moves, a diverged loss does no harm."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.core.domain import delta_names
from onetrunk.errors import DamagedError, DataError, TrainingError
from onetrunk.training.fit import Loop, Step, fit
from onetrunk.training.optimizer import held_norms
from onetrunk.training.randomness import own_draws, reseed, seed_of

Make = Callable[..., Any]
SHORT = ot.Recipe(epochs=2, batch_size=8)


def train(model: nn.Module, data: Any, recipe: ot.Recipe = SHORT, **options: Any) -> list[Step]:
    return list(fit(model, data, recipe, device="cpu", **options))


class RandomCrops(Dataset[tuple[Tensor, int]]):
    """A user's dataset that draws from every global generator, as transforms do."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x_chw, label = self.dataset[index]
        x_chw = x_chw.roll(random.randrange(4), 1).roll(int(np.random.randint(4)), 2)
        return x_chw + 0.1 * torch.randn(x_chw.shape), int(label)


def draw_everywhere() -> None:
    torch.rand(7)
    np.random.rand(3)
    random.random()


def global_state() -> tuple[Any, ...]:
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()


# The same seed, the same bits


@pytest.mark.parametrize("kind", ["images", "random dataset"])
def test_one_seed_gives_the_same_bits_whatever_the_caller_draws(
    kind: str, training: SimpleNamespace, make_tensors: Make, own_bits: Make, same: Make
) -> None:
    data = training.images(24) if kind == "images" else RandomCrops(make_tensors(24))
    found = []
    for turn in range(3):
        reseed(turn)
        model = training.model()
        records = []
        for step in fit(model, data, SHORT, val=data, device="cpu"):
            records.append(step)
            for _ in range(turn):
                draw_everywhere()
        found.append((own_bits(model), records))
    for model_bits, records in found[1:]:
        assert same(model_bits, found[0][0]) and records == found[0][1]
    other = training.model()
    train(other, data, ot.Recipe(epochs=2, batch_size=8, seed=1), val=data)
    assert not same(own_bits(other), found[0][0])


def test_batches_made_ahead_are_the_batches_made_in_turn(
    training: SimpleNamespace, own_bits: Make, same: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for runs_ahead in (True, False):
        model = training.model()
        examples = ot.training.examples.examples_of(model, training.images(24))
        assert examples.runs_ahead
        monkeypatch.setattr(examples, "runs_ahead", runs_ahead)
        train(model, examples)
        found.append(own_bits(model))
    assert same(*found)


def test_dropout_differs_from_step_to_step(make_model: Make, make_tensors: Make) -> None:
    model, masks = make_model(), []
    model[11].register_forward_hook(lambda _m, args, y: masks.append((y == 0) & (args[0] != 0)))
    train(model, make_tensors(24))
    assert len(masks) == 6 and all(mask.any() for mask in masks)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6


def test_a_random_dataset_resumes_bit_for_bit(
    training: SimpleNamespace, make_tensors: Make, own_bits: Make, same: Make, tmp_path: Path
) -> None:
    data = RandomCrops(make_tensors(24))
    whole = training.model()
    train(whole, data)
    for step in fit(training.model(), data, SHORT, checkpoint=tmp_path / "run", device="cpu"):
        if step.step == 4:
            break
    resumed = training.model()
    assert len(train(resumed, data, checkpoint=tmp_path / "run")) == 2
    assert same(own_bits(resumed), own_bits(whole))


def test_the_callers_generators_go_on_where_they_were(
    training: SimpleNamespace, make_tensors: Make
) -> None:
    model, data = training.model(), RandomCrops(make_tensors(12))
    images = training.images(12)
    reseed(3)
    before = global_state()
    train(model, data, val=images)
    ot.evaluate(model, data)
    ot.evaluate(model, images)
    ot.predict(model, [images[0][0]])
    assert global_state() == before


def test_seeds_of_two_purposes_are_unrelated() -> None:
    seeds = {seed_of(s, what, k) for s in (-1, 0, 1) for what in ("a", "b") for k in range(50)}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    before = global_state()
    with pytest.raises(ZeroDivisionError), own_draws():
        reseed(2**62)
        raise ZeroDivisionError
    assert global_state() == before


def test_trainings_in_threads_draw_what_each_draws_alone(
    make_model: Make, make_tensors: Make, bits: Make, same: Make
) -> None:
    models = [make_model(ot.LowRank(rank=2, dropout=0.5)) for _ in range(4)]

    def trained(model: nn.Module) -> dict[str, Tensor]:
        train(model, RandomCrops(make_tensors(16)))
        return bits(model)

    before, alone = global_state(), trained(models[0])
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(trained, models[1:]))
    assert all(same(one, alone) for one in together) and global_state() == before


# What moves


@pytest.mark.parametrize(
    "family", ["parallel", "series", "lowrank(rank=2)", "channelwise", "norm", "head", "full"]
)
def test_only_the_domain_moves(
    family: str, make_net: Make, make_model: Make, make_tensors: Make, bits: Make, same: Make
) -> None:
    backbone = make_net()
    other = make_model(ot.Parallel(), backbone=backbone)
    model = make_model(ot.read_family(family), backbone=backbone)
    backbone_before, other_before, before = bits(backbone), bits(other), bits(model)
    own = set(delta_names(model))
    for _ in fit(model, make_tensors(24), SHORT, device="cpu"):
        assert same(bits(backbone), backbone_before)
        assert same(bits(other), other_before)
    after = bits(model)
    for name, tensor in after.items():
        frozen = name not in own or (family == "head" and not name.startswith("12."))
        assert torch.equal(tensor, before[name]) == frozen, name
    assert all(p.grad is None for p in [*backbone.parameters(), *model.parameters()])
    assert not model.training


def test_running_statistics_stay_the_backbones_and_an_adapters_own_do_not(
    make_net: Make, make_tensors: Make
) -> None:
    net = make_net()
    model = ot.attach(net, ot.Series(), ("ant", "bee", "cat"), input_size=(3, 16, 16))
    before = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
    gains = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, make_tensors(24), ot.Recipe(epochs=1, batch_size=8, norm_statistics="running"))
    moved = {n for n, b in model.named_buffers() if n in before and not torch.equal(b, before[n])}
    assert moved == {name for name in before if ".adapter." in name} != set()
    assert len(moved) < len(before)
    assert all(not torch.equal(p, gains[n]) for n, p in model.named_parameters() if n in gains)


def test_statistics_are_held_where_the_backbones_were_trained_and_steps_are_few(
    make_net: Make,
) -> None:
    def held(net: nn.Module, statistics: str, n_images: int = 300) -> int:
        model = ot.attach(net, ot.Series(), ("ant", "bee", "cat"), input_size=(3, 16, 16))
        return len(held_norms(model, ot.Recipe(norm_statistics=statistics), n_images))

    untrained, trained = make_net(), make_net()
    n_norms = sum(isinstance(m, nn.BatchNorm2d) for m in untrained.modules())
    trained.train()(torch.randn(4, 3, 16, 16))
    found = [held(net, s) for net in (untrained, trained) for s in ("auto", "batch", "running")]
    assert found == [0, 0, n_norms, n_norms, 0, n_norms]
    assert [held(trained, s, 2_000) for s in ("auto", "batch", "running")] == [0, 0, n_norms]


def test_norms_that_stay_the_backbones_are_held_whatever_the_recipe_says(make_net: Make) -> None:
    net = make_net()
    model = ot.attach(net, ot.Series(), ("ant", "bee"), norms="none", input_size=(3, 16, 16))
    n_norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    for statistics in ("auto", "batch", "running"):
        recipe = ot.Recipe(norm_statistics=statistics)  # type: ignore[arg-type]
        assert len(held_norms(model, recipe, 2_000)) == n_norms
    probe = ot.attach(net, ot.Head(), ("ant", "bee"), input_size=(3, 16, 16))
    assert not held_norms(probe, ot.Recipe(norm_statistics="batch"), 2_000)  # asked for nothing


def test_nothing_to_train_is_an_error(make_model: Make, make_tensors: Make) -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        train(model, make_tensors(8))


def test_any_module_but_a_domains_is_an_error(make_net: Make, make_tensors: Make) -> None:
    with pytest.raises(ot.OnetrunkError, match=r"no domain's network.*attach"):
        train(make_net(), make_tensors(8))


# Against plain PyTorch


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_sgd_is_the_naive_loop(
    clip_norm: float | None, make_model: Make, make_tensors: Make
) -> None:
    """float64: schedule, smoothing, clipping and decay by kind, written out."""
    dataset = make_tensors(20)
    recipe = ot.Recipe(
        epochs=3,
        batch_size=8,
        optimizer="sgd",
        lr=0.1,
        nesterov=True,
        decay_adapter=0.03,
        decay_norm=0.01,
        decay_head=0.02,
        label_smoothing=0.2,
        clip_norm=clip_norm,
        warmup=0.4,
        seed=5,
    )
    models = [make_model(ot.Parallel()).double() for _ in range(2)]
    with torch.no_grad():
        models[0][11].p = models[1][11].p = 0.0  # dropout has a test of its own
    records = train(models[0], dataset, recipe)

    x_nchw, labels_n = dataset.tensors[0].double(), dataset.tensors[1]
    named = {n: p for n, p in models[1].named_parameters() if p.requires_grad}
    velocity = {name: torch.zeros_like(p) for name, p in named.items()}
    norms = [m for m in models[1].modules() if isinstance(m, nn.BatchNorm2d)]
    in_norms = {id(p) for norm in norms for p in norm.parameters()}
    models[1].train()
    losses, step = [], 0
    for epoch in range(3):
        generator = torch.Generator().manual_seed(seed_of(5, "order", epoch))
        order = torch.randperm(20, generator=generator)
        for rows in (order[:8], order[8:16]):
            logits_bc = models[1](x_nchw[rows])
            target_bc = 0.8 * F.one_hot(labels_n[rows], 3).double() + 0.2 / 3
            loss = -(target_bc * logits_bc.log_softmax(1)).sum(1).mean()
            gradients = torch.autograd.grad(loss, list(named.values()))
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (float(norm) + 1e-6))
            n_warmup = round(0.4 * 6)
            lr = 0.1 * (
                (step + 1) / n_warmup
                if step < n_warmup
                else 0.5 * (1 + np.cos(np.pi * (step - n_warmup) / (6 - n_warmup)))
            )
            with torch.no_grad():
                for (name, p), gradient in zip(named.items(), gradients, strict=True):
                    is_vector = id(p) in in_norms or p.ndim == 1
                    decay = 0.01 if is_vector else 0.02 if name.startswith("12.") else 0.03
                    g = gradient * scale + decay * p
                    velocity[name] = g if step == 0 else 0.9 * velocity[name] + g
                    p -= lr * (g + 0.9 * velocity[name])
            losses.append(float(loss.detach()))
            step += 1
    assert [r.loss for r in records] == pytest.approx(losses, rel=1e-9)
    for name, p in models[0].named_parameters():
        expected = dict(models[1].named_parameters())[name]
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-9)


def test_with_validation_the_best_epoch_stays(
    make_model: Make, make_tensors: Make, own_bits: Make, same: Make
) -> None:
    model = make_model()
    val, best = make_tensors(15, seed=9), {}
    best_accuracy = ot.evaluate(model, val).accuracy - 1e-9  # one as good as the start is taken
    recipe = ot.Recipe(epochs=4, batch_size=8, seed=1, keep="best")
    for step in fit(model, make_tensors(24), recipe, val=val):
        assert (step.val_accuracy is None) == (step.step % 3 != 0)
        assert step.best == ((step.val_accuracy or -2.0) > best_accuracy)
        if step.best:
            best, best_accuracy = own_bits(model), step.val_accuracy
    assert same(own_bits(model), best)
    assert ot.evaluate(model, val).accuracy == best_accuracy


@pytest.mark.parametrize(
    ("keep", "accuracies", "stays"),  # the start's, then every epoch's, on 15 images
    [
        ("best", [0.4, 0.5, 0.9, 0.9, 0.8], 2),
        ("late", [0.4, 0.5, 0.9, 0.9, 0.8], 4),
        ("late", [0.4, 0.5, 0.9, 0.9, 0.6], 3),  # two standard errors of 0.9 are 0.18
        ("late", [0.4, 0.9, 1.0, 0.9, 0.8], 3),  # of 1.0, 0.12
        ("late", [0.85, 0.5, 0.9, 0.8, 0.8], 2),
        ("late", [0.6, 0.5, 0.6, 0.5, 0.5], 2),
        ("best", [0.6, 0.5, 0.6, 0.5, 0.5], 2),
        ("late", [0.6, 0.5, 0.5, 0.5, 0.5], 0),
        ("best", [0.6, 0.5, 0.5, 0.5, 0.5], 0),
    ],
)
def test_the_epoch_that_the_recipe_names_stays(
    make_model: Make, make_tensors: Make, own_bits: Make, same: Make, monkeypatch: Any,
    keep: Any, accuracies: list[float], stays: int,
) -> None:  # fmt: skip
    model, left = make_model(), iter(accuracies)
    monkeypatch.setattr(Loop, "_val_accuracy", lambda _: next(left))
    states = [own_bits(model)]
    recipe = ot.Recipe(epochs=4, batch_size=8, keep=keep)
    for step in fit(model, make_tensors(24), recipe, val=make_tensors(15)):
        if step.val_accuracy is not None:
            states.append(own_bits(model))
    assert same(own_bits(model), states[stays])


@pytest.mark.parametrize(("statistics", "batch_norms_train"), [("batch", True), ("running", False)])
def test_in_the_loop_the_network_is_in_train_mode_after_validation_too(
    make_model: Make, make_tensors: Make, statistics: Any, batch_norms_train: bool
) -> None:
    model = make_model()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    recipe = ot.Recipe(epochs=2, batch_size=8, norm_statistics=statistics)
    for _ in fit(model, make_tensors(16), recipe, val=make_tensors(9)):
        assert norms and model.training
        assert all(norm.training == batch_norms_train for norm in norms)


def test_where_every_epoch_is_worse_the_network_stays_as_it_came(
    make_model: Make, make_tensors: Make, own_bits: Make, same: Make
) -> None:
    data, model = make_tensors(24), make_model()
    for _ in fit(model, data, ot.Recipe(epochs=30, batch_size=8), val=data):
        pass
    came = own_bits(model)
    harmful = ot.Recipe(epochs=2, batch_size=8, lr=10.0, clip_norm=None)
    assert not any(step.best for step in fit(model, data, harmful, val=data))
    assert same(own_bits(model), came)


def test_steps_report_the_schedule(make_model: Make, make_tensors: Make) -> None:
    recipe = ot.Recipe(epochs=2, batch_size=8, lr=0.5, warmup=0.0, schedule="step", drops=(0.5,))
    records = train(make_model(), make_tensors(26), recipe)
    assert [(s.step, s.n_steps, s.epoch) for s in records] == [
        (k + 1, 6, 1 + k // 3) for k in range(6)
    ]
    assert [s.lr for s in records] == pytest.approx([0.5] * 3 + [0.05] * 3)


# Losses and gradients that are not finite


def with_nan(dataset: TensorDataset, row: int) -> TensorDataset:
    x_nchw = dataset.tensors[0].clone()
    x_nchw[row] = torch.nan
    return TensorDataset(x_nchw, dataset.tensors[1])


class BreaksIn(Dataset[tuple[Tensor, int]]):
    """Images that become NaN after so many were read."""

    def __init__(self, dataset: TensorDataset, after: int) -> None:
        self.dataset, self.left = dataset, after

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        x_chw, label = self.dataset[index]
        return (x_chw if self.left >= 0 else x_chw * torch.nan), int(label)


def test_nan_in_an_image_stops_at_its_step_and_gives_the_start_back(
    make_model: Make, make_tensors: Make, own_bits: Make, same: Make
) -> None:
    model = make_model()
    before = own_bits(model)
    with pytest.raises(
        TrainingError, match=r"loss is nan at step [1-3] of 6.*state it came with.*Lower the"
    ):
        train(model, with_nan(make_tensors(24), 5))
    assert same(own_bits(model), before)


@pytest.mark.parametrize("good_steps", [3, 4, 5])
def test_a_loss_that_breaks_later_gives_the_last_good_epoch_back(
    good_steps: int,
    make_model: Make,
    make_tensors: Make,
    own_bits: Make,
    same: Make,
    tmp_path: Path,
) -> None:
    data = make_tensors(24)
    model, after_epoch = make_model(), {}
    broken = BreaksIn(data, len(data) + 1 + 8 + 8 * good_steps)  # labels, a fingerprint
    steps = fit(
        model,
        broken,
        ot.Recipe(epochs=4, batch_size=8),
        device="cpu",
        checkpoint=tmp_path / "run",
        checkpoint_every_s=0,
    )
    seen, kept = 0, b""
    with pytest.raises(
        TrainingError, match=f"loss is nan at step {good_steps + 1} of 12.*state after epoch 1"
    ):
        for step in steps:
            seen = step.step
            if step.step == 3:
                after_epoch = own_bits(model)
            kept = (tmp_path / "run").read_bytes() if seen > 1 else b""
    assert seen == good_steps
    assert same(own_bits(model), after_epoch) and not model.training
    # written once more between the last good step and the broken one, then never
    assert (tmp_path / "run").read_bytes() != kept
    whole, resumed = make_model(), make_model()
    train(whole, data, ot.Recipe(epochs=4, batch_size=8))
    rest = train(resumed, data, ot.Recipe(epochs=4, batch_size=8), checkpoint=tmp_path / "run")
    assert [step.step for step in rest] == list(range(good_steps + 1, 13))
    assert same(own_bits(resumed), own_bits(whole))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("validate", [True, False])
def test_a_huge_learning_rate_leaves_finite_numbers(
    optimizer: str, validate: bool, make_model: Make, make_tensors: Make, own_bits: Make
) -> None:
    model = make_model(ot.Full())
    recipe = ot.Recipe(
        epochs=3, batch_size=8, lr=1e30, lr_full=1e30, optimizer=optimizer, clip_norm=None
    )
    val = make_tensors(12) if validate else None
    with pytest.raises(TrainingError, match="lr=1e\\+30"):
        train(model, make_tensors(24), recipe, val=val)
    assert all(torch.isfinite(t).all() for t in own_bits(model).values())


class SquareRoot(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sqrt()  # at 0 its gradient is 0 times infinity


def test_a_broken_gradient_under_a_finite_loss_is_stopped_too(make_tensors: Make) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), SquareRoot(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    model = ot.attach(net, ot.Full(), classes=("ant", "bee", "cat"), input_size=(3, 16, 16))
    with pytest.raises(TrainingError, match="gradient is not finite at step 1 of 6"):
        train(model, make_tensors(24))
    assert all(torch.isfinite(p).all() for p in model.parameters())


# Numbers of less precision


def test_bfloat16_autocast_trains(make_model: Make, make_tensors: Make) -> None:
    data, seen = make_tensors(24), set()
    model = make_model()
    model[0].register_forward_hook(lambda _m, _a, y: seen.add(y.dtype) if model.training else None)
    recipe = ot.Recipe(epochs=15, batch_size=8, lr=2e-2, precision="bfloat16")
    records = train(model, data, recipe)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert records[-1].loss < 0.7 * records[0].loss
    assert ot.evaluate(model, data).accuracy > 0.8


def test_on_the_cpu_auto_means_float32(make_model: Make, make_tensors: Make) -> None:
    model, seen = make_model(), set()
    model[0].register_forward_hook(lambda _m, _a, y: seen.add(y.dtype))
    train(model, make_tensors(8))
    assert seen == {torch.float32}


def test_a_bfloat16_network_trains_and_resumes(
    make_model: Make, make_net: Make, make_tensors: Make, own_bits: Make, same: Make, tmp_path: Path
) -> None:
    data = make_tensors(24)

    def model() -> nn.Module:
        return make_model(ot.Parallel(), backbone=make_net().bfloat16())

    whole, resumed = model(), model()
    train(whole, data)
    for step in fit(model(), data, SHORT, checkpoint=tmp_path / "run", device="cpu"):
        if step.step == 4:
            break
    train(resumed, data, checkpoint=tmp_path / "run")
    assert same(own_bits(resumed), own_bits(whole))
    assert {t.dtype for t in own_bits(whole).values()} == {torch.bfloat16, torch.int64}


def test_float16_is_refused_with_the_way_out(make_model: Make, make_tensors: Make) -> None:
    with pytest.raises(TrainingError, match=r"float16.*backbone\.float\(\).*bfloat16"):
        train(make_model().half(), make_tensors(8))


# Few images


def test_fewer_images_than_a_batch_are_one_step_an_epoch(
    make_model: Make, make_tensors: Make
) -> None:
    records = train(make_model(), make_tensors(5), ot.Recipe(epochs=3, batch_size=32))
    assert [(s.step, s.epoch, s.n_steps) for s in records] == [(1, 1, 3), (2, 2, 3), (3, 3, 3)]


def test_one_image_trains_where_batch_norm_sees_a_map(make_model: Make, make_tensors: Make) -> None:
    assert len(train(make_model(), make_tensors(1), ot.Recipe(epochs=2))) == 2


def test_one_image_under_batch_norm_on_vectors_says_what_to_do(make_tensors: Make) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    model = ot.attach(net, ot.Norm(), classes=("ant", "bee", "cat"), input_size=(3, 16, 16))
    with pytest.raises(TrainingError, match=r"batch of 1 image.*at least two.*batch_size=2"):
        train(model, make_tensors(8), ot.Recipe(epochs=1, batch_size=1))


def test_every_image_is_used_once_an_epoch_but_the_remainder(
    make_model: Make, make_tensors: Make
) -> None:
    class Counts(RandomCrops):
        def __init__(self, dataset: TensorDataset) -> None:
            super().__init__(dataset)
            self.read: list[int] = []

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            self.read.append(index)
            return super().__getitem__(index)

    data = Counts(make_tensors(19))
    model = make_model()
    examples = ot.training.examples.examples_of(model, data)
    data.read.clear()
    train(model, examples, ot.Recipe(epochs=2, batch_size=8))
    first, second = data.read[:16], data.read[16:]
    assert len(set(first)) == len(set(second)) == 16 and first != second


# Checkpoints that do not fit


@pytest.fixture
def left_behind(make_model: Make, make_tensors: Make, tmp_path: Path) -> Path:
    for step in fit(
        make_model(), make_tensors(24), SHORT, checkpoint=tmp_path / "run", device="cpu"
    ):
        if step.step == 2:
            break
    return tmp_path / "run"


def test_another_recipe_is_named(left_behind: Path, make_model: Make, make_tensors: Make) -> None:
    recipe = ot.Recipe(epochs=3, batch_size=8, crop_scale=(0.5, 1))
    with pytest.raises(TrainingError) as error:
        train(make_model(), make_tensors(24), recipe, checkpoint=left_behind)
    assert str(error.value).splitlines() == [
        f"{left_behind} is the checkpoint of another training (- its, + this one's):",
        f"- recipe.crop_scale {list(ot.Recipe().crop_scale)}",
        "+ recipe.crop_scale [0.5, 1.0]",
        "- recipe.epochs 2",
        "+ recipe.epochs 3",
        "Train with what it has, or remove it to start over.",
    ]


def test_other_images_labels_or_validation_are_named(
    left_behind: Path, make_model: Make, make_tensors: Make
) -> None:
    data = make_tensors(24)
    others = {
        "other pixels": make_tensors(24, seed=1),
        "other labels": TensorDataset(data.tensors[0], data.tensors[1].flip(0)),
        "fewer": make_tensors(23),
    }
    for other in others.values():
        with pytest.raises(
            TrainingError, match=r"another training[^$]*\+ training images '2[34], "
        ):
            train(make_model(), other, checkpoint=left_behind)
    with pytest.raises(
        TrainingError, match=r"- validation images 'none'\n\+ validation images '9,"
    ):
        train(make_model(), data, val=make_tensors(9), checkpoint=left_behind)


def test_another_network_is_named(
    left_behind: Path, make_model: Make, make_net: Make, make_tensors: Make
) -> None:
    wanted = {
        "backbone": make_model(backbone=make_net(seed=8)),
        "family": make_model(ot.LowRank(rank=2)),
        "classes": make_model(classes=("ant", "bee", "dog")),
        "preprocessing": make_model(size_px=32),
        "trained tensors": make_model(classes=("ant", "bee", "cat", "dog")),
    }
    for what, model in wanted.items():
        with pytest.raises(TrainingError, match=rf"another training[\s\S]*\+ {what} "):
            train(model, make_tensors(24), checkpoint=left_behind)


def test_another_thread_count_is_a_warning(
    left_behind: Path, make_model: Make, make_tensors: Make
) -> None:
    torch.set_num_threads(2)
    try:
        with pytest.warns(
            UserWarning, match=r"not bit for bit:\n- threads 1\n\+ threads 2"
        ) as seen:
            steps = fit(make_model(), make_tensors(24), SHORT, checkpoint=left_behind, device="cpu")
            assert next(iter(steps)).step == 3
    finally:
        torch.set_num_threads(1)
    assert seen[0].filename == __file__


def test_a_damaged_checkpoint_is_named(
    left_behind: Path, make_model: Make, make_tensors: Make, own_bits: Make, same: Make
) -> None:
    model = make_model()
    before, whole = own_bits(model), left_behind.read_bytes()
    damaged = {
        "one bit": whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:],
        "cut": whole[:-100],
        "empty": b"",
        "foreign": b"PK\x03\x04" + bytes(500),
    }
    for content in damaged.values():
        left_behind.write_bytes(content)
        with pytest.raises(DamagedError, match=str(left_behind)):
            train(model, make_tensors(24), checkpoint=left_behind)
    assert same(own_bits(model), before)


def test_a_folder_that_cannot_be_made_is_said_before_the_training(
    make_model: Make, make_tensors: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    steps = fit(make_model(), make_tensors(8), checkpoint=tmp_path / "file" / "run", device="cpu")
    with pytest.raises(TrainingError, match=r"cannot write the checkpoint .*run: "):
        next(iter(steps))


def test_the_checkpoint_is_written_when_due_and_its_folder_made(
    make_model: Make, make_tensors: Make, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "down" / "run"
    steps = fit(make_model(), make_tensors(24), ot.Recipe(epochs=1), checkpoint=path)
    with closing(steps):
        next(steps)
        assert path.parent.is_dir() and not path.exists()
    path.unlink()
    train(make_model(), make_tensors(24), checkpoint=path, checkpoint_every_s=0)
    assert [p.name for p in path.parent.iterdir()] == ["run"]


def test_a_training_that_ended_is_kept_for_whoever_could_not_store_it(
    make_model: Make, make_tensors: Make, tmp_path: Path
) -> None:
    path, data = tmp_path / "run", make_tensors(24)
    first, again = make_model(), make_model()
    assert train(first, data, checkpoint=path, checkpoint_every_s=1e9)
    assert train(again, data, checkpoint=path) == []
    assert fingerprint(first) == fingerprint(again)


def test_broken_validation_data_is_an_error_before_the_first_step(
    make_model: Make, make_tensors: Make
) -> None:
    with pytest.raises(DataError, match=r"label 2 is outside 0..1"):
        train(make_model(classes=("ant", "bee")), make_tensors(8), val=make_tensors(8))


def test_the_text_of_a_recipe_is_told_to_be_read(make_model):
    with pytest.raises(TrainingError, match=r"'paper' is no recipe: give a Recipe, or read_recipe"):
        next(ot.fit(make_model(), [], "paper"))


def test_a_full_disk_at_the_end_costs_no_epoch(
    make_model: Make, make_tensors: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise TrainingError("no space left")

    model, data, options = make_model(), make_tensors(24), {"checkpoint_every_s": 1e9}
    best = make_model()
    train(best, data, val=data)
    monkeypatch.setattr("onetrunk.training.fit.Keeper.save", full)
    with pytest.raises(TrainingError, match="no space left"):
        train(model, data, val=data, checkpoint=tmp_path / "run", **options)
    assert fingerprint(model) == fingerprint(best)
