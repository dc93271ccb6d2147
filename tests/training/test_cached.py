"""cached: training on features is training on images, and no wrong feature is ever trained on."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.core.compress import compress
from onetrunk.core.domain import delta
from onetrunk.core.rebuild import with_trainable_basis
from onetrunk.data import Images
from onetrunk.errors import TrainingError
from onetrunk.training import cached as module
from onetrunk.training.cached import Cached, cached
from onetrunk.training.examples import Examples, examples_of
from onetrunk.training.fit import Step, fit

Make = Callable[..., Any]
LATE = ot.Where(pattern="6")  # the last of three convolutions
SHORT = ot.Recipe(epochs=3, batch_size=8, crop_scale=(0.5, 1.0), lr=0.02)


@pytest.fixture
def make_late(make_model: Make, training: Any) -> Make:
    """make_late(family, double=True) -> a domain whose trunk is the first two convolutions."""

    def made(family: Any = None, *, double: bool = False, **options: Any) -> nn.Module:
        family = family or ot.LowRank(rank=4, dropout=0.2)
        if double:
            options["backbone"] = training.net().double()
        return make_model(family, **{"where": LATE, "norms": "placed", **options})

    return made


class Views(Examples):
    """The reference: image i in epoch e as it was in epoch e mod `n_views`; 0: in evaluation."""

    runs_ahead = False

    def __init__(self, examples: Examples, n_views: int) -> None:
        self.examples, self.n_views, self.labels = examples, n_views, examples.labels

    def views(self, indices: Tensor) -> Tensor:
        return self.examples.views(indices)

    def training_views(self, indices: Tensor, seed: int, epoch: int, scale: Any) -> Tensor:
        if not self.n_views:
            return self.views(indices)
        return self.examples.training_views(indices, seed, epoch % self.n_views, scale)


def train(network: nn.Module, data: Any, recipe: ot.Recipe = SHORT, **options: Any) -> list[Step]:
    return list(fit(network, data, recipe, device="cpu", **options))


def train_cached(
    model: nn.Module, data: Any, recipe: ot.Recipe = SHORT, **options: Any
) -> list[Step]:
    made = cached(model, data, recipe, device="cpu", **options)
    return train(made.model, made.train, recipe, val=made.val)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, delta(b)[name]) for name, t in delta(a).items())


def close(a: nn.Module, b: nn.Module) -> None:
    for name, tensor in delta(a).items():
        torch.testing.assert_close(tensor, delta(b)[name], rtol=0, atol=1e-10, msg=name)


# It is the training on images


@pytest.mark.parametrize("views", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "nesterov"])
def test_it_is_the_training_on_the_same_views_of_images(
    make_late: Make, make_images: Make, training: Any, views: int, optimizer: str
) -> None:
    recipe = training.recipe(optimizer)
    ours, theirs = make_late(double=True), make_late(double=True)
    steps = train_cached(ours, make_images(25), recipe, views=views)
    expected = train(theirs, Views(examples_of(theirs, make_images(25)), views), recipe)
    assert len(steps) == len(expected) == 12
    for ours_step, their_step in zip(steps, expected, strict=True):
        assert abs(ours_step.loss - their_step.loss) < 1e-10
        assert (ours_step.lr, ours_step.epoch) == (their_step.lr, their_step.epoch)
    close(ours, theirs)


def test_with_a_view_an_epoch_it_is_the_training_without_a_cache(
    make_late: Make, make_images: Make
) -> None:
    ours, theirs = make_late(double=True), make_late(double=True)
    options = {"val": make_images(12, seed=2, noise=140.0)}
    steps = train_cached(ours, make_images(), views=3, **options)
    expected = train(theirs, make_images(), **options)
    assert [s.val_accuracy for s in steps] == [s.val_accuracy for s in expected]
    assert [s.best for s in steps] == [s.best for s in expected]
    close(ours, theirs)


def test_a_dataset_of_tensors_is_cached_too(make_late: Make, make_tensors: Make) -> None:
    ours, theirs = make_late(), make_late()
    train_cached(ours, make_tensors())
    train(theirs, make_tensors())
    for name, tensor in delta(ours).items():
        torch.testing.assert_close(tensor, delta(theirs)[name], rtol=1e-3, atol=1e-4)


def test_the_trunk_runs_once_for_every_view(make_late: Make, make_images: Make) -> None:
    model, seen = make_late(), list[int]()
    made = cached(model, make_images(), SHORT, views=2, val=make_images(12), device="cpu")
    model.get_submodule("0").register_forward_hook(lambda _m, args, _y: seen.append(len(args[0])))
    train(made.model, made.train, val=made.val)
    assert seen == [] and made.cut.at == "6"
    assert made.train.stored.shape[:2] == (2, 24) and made.val.stored.shape[:2] == (1, 12)


def test_the_networks_numbers_stay(make_late: Make, make_images: Make) -> None:
    model = make_late().train()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    cached(model, make_images(), SHORT, device="cpu")
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_what_was_trained_is_the_domain(make_late: Make, make_images: Make) -> None:
    model = make_late()
    made = cached(model, make_images(), SHORT, val=make_images(12, seed=2), device="cpu")
    train(made.model, made.train, val=made.val)
    on_images = ot.evaluate(model, make_images(12, seed=2))
    assert ot.evaluate(made.model, made.val).to_json() == on_images.to_json()
    assert not model.training


def test_a_training_that_was_left_goes_on_bit_for_bit(
    make_late: Make, make_images: Make, tmp_path: Path
) -> None:
    def made(model: nn.Module) -> Cached:
        return cached(model, make_images(25), SHORT, views=2, val=make_images(9), device="cpu")

    whole, left, again = make_late(), make_late(), make_late()
    one = made(whole)
    train(one.model, one.train, val=one.val)
    file, part = tmp_path / "checkpoint.safetensors", made(left)
    for step in fit(part.model, part.train, SHORT, val=part.val, checkpoint=file, device="cpu"):
        if step.step == 4:
            break
    rest = made(again)
    steps = train(rest.model, rest.train, val=rest.val, checkpoint=file)
    assert steps[0].step == 5 and same(again, whole)


def test_a_checkpoint_of_other_features_is_refused(
    make_late: Make, make_images: Make, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    first = cached(make_late(), make_images(), SHORT, views=2, device="cpu")
    next(steps := fit(first.model, first.train, SHORT, checkpoint=file, device="cpu"))
    steps.close()
    other = cached(make_late(), make_images(), SHORT, views=1, device="cpu")
    with pytest.raises(TrainingError, match=r"another training [\s\S]*- training images '24, "):
        train(other.model, other.train, checkpoint=file)


# Features in a folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that went through a trunk, by their size."""
    seen, whole = list[int](), module.features

    def features(model: nn.Module, cut: Any, x_bchw: Tensor) -> Tensor:
        seen.append(len(x_bchw))
        return whole(model, cut, x_bchw)

    monkeypatch.setattr(module, "features", features)
    return seen


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_what_lies_there_is_used_again(
    make_late: Make, make_images: Make, tmp_path: Path, counted: list[int]
) -> None:
    options = {"views": 2, "val": make_images(12, seed=2), "folder": tmp_path / "a" / "b"}
    in_memory, first, second = make_late(), make_late(), make_late()
    train_cached(in_memory, make_images(), **{**options, "folder": None})
    train_cached(first, make_images(), **options)
    assert counted == 2 * [24, 24, 12] and len(files(tmp_path / "a" / "b")) == 2
    train_cached(second, make_images(), **options)
    looked_at = 2 * [module.N_PROVED_ON]  # to see that they are the same
    assert counted == 2 * [24, 24, 12] + looked_at
    assert same(first, in_memory) and same(second, in_memory)


def test_other_adapters_over_the_same_trunk_share_it(
    make_late: Make, make_images: Make, tmp_path: Path, counted: list[int]
) -> None:
    for family in (ot.Parallel(), ot.LowRank(rank=2), ot.Series(), ot.Full()):
        cached(make_late(family), make_images(), SHORT, folder=tmp_path, device="cpu")
    assert counted == [24, *3 * [module.N_PROVED_ON]] and len(files(tmp_path)) == 1


def repainted(images: Images, row: int) -> Images:
    """One pixel of one image has another colour."""
    arrays = [np.array(images[index][0]) for index in range(len(images))]
    arrays[13][row, 9, 0] ^= 128
    return Images.from_arrays(arrays, images.labels, images.classes)


CHANGES: dict[str, Callable[..., dict[str, Any]]] = {
    "another pixel": lambda images: {"data": repainted(images(), row=9)},
    "another pixel at the rim": lambda images: {"data": repainted(images(), row=0)},
    "other images": lambda images: {"data": images(seed=1)},
    "fewer images": lambda images: {"data": images(23)},
    "other views": lambda images: {"views": 2},
    "the evaluation view": lambda images: {"views": 0},
    "another seed": lambda images: {"recipe": ot.Recipe(epochs=3, crop_scale=(0.5, 1.0), seed=1)},
    "other crops": lambda images: {"recipe": ot.Recipe(epochs=3, crop_scale=None)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_features_follow_from_has_its_own_file(
    make_late: Make, make_images: Make, tmp_path: Path, counted: list[int], change: str
) -> None:
    given = {"data": make_images(), "recipe": SHORT, "views": 1, **CHANGES[change](make_images)}
    cached(make_late(), make_images(), SHORT, folder=tmp_path, device="cpu")
    cached(
        make_late(), given["data"], given["recipe"], views=given["views"], folder=tmp_path,
        device="cpu",
    )  # fmt: skip
    assert len(counted) == 2 + (given["views"] == 2) and len(files(tmp_path)) == 2


def test_another_trunk_cut_or_size_has_its_own_file(
    make_late: Make, make_images: Make, training: Any, tmp_path: Path, counted: list[int]
) -> None:
    other_net = {"backbone": training.net(seed=8)}
    for options in ({}, other_net, {"size_px": 12}, {"where": ot.Where(pattern="3")}):
        cached(make_late(**options), make_images(), SHORT, folder=tmp_path, device="cpu")
    assert len(counted) == len(files(tmp_path)) == 4


def one_file(make_late: Make, make_images: Make, folder: Path) -> Path:
    cached(make_late(), make_images(), SHORT, folder=folder, device="cpu")
    (file,) = files(folder)
    return file


def test_every_flipped_bit_is_seen_and_computed_again(
    make_late: Make, make_images: Make, tmp_path: Path
) -> None:
    file = one_file(make_late, make_images, tmp_path)
    good = file.read_bytes()
    places = [*range(8), *range(8, len(good), len(good) // 40), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        with pytest.warns(UserWarning, match=f"{file.name}: these cached features .* again"):
            cached(make_late(), make_images(), SHORT, folder=tmp_path, device="cpu")
        assert file.read_bytes() == good


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda good: b"", "have 0 bytes where"),
        (lambda good: good[:-1], r"have [\d,]+ bytes where [\d,]+ were written"),
        (lambda good: good[: len(good) // 2], r"have [\d,]+ bytes where"),
        (lambda good: good + b"\0", r"have [\d,]+ bytes where"),
        (lambda good: good.replace(b"crop_scale", b"crop_Scale"), "of something else"),
        (lambda good: bytes(len(good)), "of something else"),
        (lambda good: good[:-40] + bytes(8) + good[-32:], "not match their own checksum"),
    ],
)
def test_a_stale_cut_or_foreign_file_is_computed_again(
    make_late: Make, make_images: Make, tmp_path: Path, damage: Callable[[bytes], bytes], says: str
) -> None:
    file = one_file(make_late, make_images, tmp_path)
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with pytest.warns(UserWarning, match=f"{says}.*, so they are computed again") as told:
        cached(make_late(), make_images(), SHORT, folder=tmp_path, device="cpu")
    assert told[0].filename == __file__
    assert file.read_bytes() == good


def test_the_file_is_one_that_safetensors_reads(
    make_late: Make, make_images: Make, tmp_path: Path
) -> None:
    made = cached(make_late(), make_images(), SHORT, folder=tmp_path, device="cpu")
    found = load_file(files(tmp_path)[0])
    assert torch.equal(found["features"], made.train.stored)


def test_an_interrupted_computation_leaves_nothing(
    make_late: Make, make_images: Make, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done > 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(
            make_late(), make_images(), SHORT, views=3, folder=tmp_path, device="cpu", progress=stop
        )
    assert files(tmp_path) == []


def test_what_a_killed_computation_left_goes_after_an_hour(
    make_late: Make, make_images: Make, tmp_path: Path
) -> None:
    names = [".onetrunk-0123456789abcdef.tmp", ".onetrunk-fedcba9876543210.tmp", "notes.txt"]
    old = time.time() - 7200
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (old, old))
    cached(make_late(), make_images(), SHORT, folder=tmp_path, device="cpu")
    assert [name for name in names if (tmp_path / name).exists()] == names[1:]


def test_progress_counts_views(make_late: Make, make_images: Make, tmp_path: Path) -> None:
    told = list[tuple[int, int]]()
    options = {"views": 2, "val": make_images(12), "folder": tmp_path, "device": "cpu"}
    for _ in range(2):  # computed, then read
        cached(
            make_late(), make_images(70), SHORT, progress=lambda *now: told.append(now), **options
        )
    assert told == [(n, 152) for n in (64, 70, 134, 140, 152, 140, 152)]


# What is refused


@pytest.mark.parametrize("views", [-1, 1.5, True, "2"])
def test_a_number_of_views_is_a_whole_number(
    make_late: Make, make_images: Make, views: Any
) -> None:
    with pytest.raises(TrainingError, match=r"cached\(views=.*\): give a whole number of views"):
        cached(make_late(), make_images(), SHORT, views=views, device="cpu")


def test_too_many_features_for_memory(make_late: Make, make_images: Make, tmp_path: Path) -> None:
    message = (
        r"features of 24 images in 2 views take 98,304 bytes, above the limit of 90,000 in memory: "
        "give a folder, take fewer views, or raise memory_limit_bytes"
    )
    options: dict[str, Any] = {"views": 2, "memory_limit_bytes": 90_000, "device": "cpu"}
    with pytest.raises(TrainingError, match=message):
        cached(make_late(), make_images(), SHORT, **options)
    cached(make_late(), make_images(), SHORT, folder=tmp_path, **options)


def test_a_network_without_a_trunk(make_model: Make, make_images: Make) -> None:
    with pytest.raises(TrainingError, match=r"no frozen trunk to take features from: 0\.adapter"):
        cached(make_model(ot.Parallel()), make_images(), SHORT, device="cpu")


def test_a_basis_that_is_trained_too(make_late: Make, make_images: Make) -> None:
    models = {f"d{k}": make_late(ot.Parallel(init="released"), seed=k).eval() for k in range(2)}
    training = with_trainable_basis(compress(models, rank_fraction=0.5))
    with pytest.raises(TrainingError, match="cached on a network whose basis is trained too"):
        cached(training["d0"], make_images(), SHORT, device="cpu")


def test_features_that_are_not_finite(make_late: Make, make_tensors: Make) -> None:
    data = make_tensors()
    data.tensors[0][17] = float("inf")
    with pytest.raises(TrainingError, match=r"the features at 6 are not finite \(NaN or infinity"):
        cached(make_late(), data, SHORT, device="cpu")


def test_the_recipe_of_fit_is_the_one_of_cached(make_late: Make, make_images: Make) -> None:
    made = cached(make_late(), make_images(), SHORT, device="cpu")
    other = ot.Recipe(epochs=1, batch_size=8, crop_scale=(0.5, 1.0), seed=4)
    with pytest.raises(TrainingError, match=r"\(0, \(0.5, 1.0\)\), the recipe has \(4, \(0.5, 1"):
        train(made.model, made.train, other)
    unaugmented = cached(make_late(), make_images(), SHORT, views=0, device="cpu")
    assert len(train(unaugmented.model, unaugmented.train, other)) == 3


def test_no_network_is_evaluated_on_augmented_views(make_late: Make, make_images: Make) -> None:
    made = cached(make_late(), make_images(), SHORT, device="cpu")
    with pytest.raises(TrainingError, match="these features are of augmented views, on which no"):
        ot.evaluate(made.model, made.train)


def test_images_are_not_for_a_tail(make_late: Make, make_images: Make) -> None:
    made = cached(make_late(), make_images(), SHORT, device="cpu")
    with pytest.raises(TrainingError, match="this is the tail of a network, which takes features"):
        ot.evaluate(made.model, make_images())


def test_a_folder_that_is_none(make_late: Make, make_images: Make, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(TrainingError, match=r"cannot .* cached features: .*taken"):
        cached(make_late(), make_images(), SHORT, folder=tmp_path / "taken", device="cpu")


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_no_link_is_followed(make_late: Make, make_images: Make, tmp_path: Path, kind: str) -> None:
    file = one_file(make_late, make_images, tmp_path)
    moved = file.rename(tmp_path / "moved")
    file.mkdir() if kind == "folder" else file.symlink_to(moved)
    with pytest.raises(TrainingError, match=r"where cached features belong, and it is no regular"):
        cached(make_late(), make_images(), SHORT, folder=tmp_path, device="cpu")


def test_a_file_that_is_changed_at_once(
    make_late: Make, make_images: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onetrunk.training import featurefile

    def written(path: Path, parts: Any) -> None:
        path.write_bytes(b"".join(parts)[:-1])

    monkeypatch.setattr(featurefile, "write_parts_atomically", written)
    with (
        pytest.warns(UserWarning, match="have .* bytes where"),
        pytest.raises(TrainingError, match="was changed while it was written: no other program"),
    ):
        cached(make_late(), make_images(), SHORT, folder=tmp_path, device="cpu")


def test_features_of_a_network_that_computes_something_else_are_computed_again(
    make_late: Make, make_images: Make, training: Any, tmp_path: Path
) -> None:
    found = {}
    for activation in (nn.ReLU, nn.Tanh):
        net = training.net()
        for name, child in net.named_children():
            if isinstance(child, nn.ReLU):
                setattr(net, name, activation())
        model = make_late(backbone=net)
        options = {"folder": tmp_path, "device": "cpu"}
        found[activation] = cached(model, make_images(), SHORT, **options).train.stored.clone()
        fresh = cached(model, make_images(), SHORT, device="cpu").train.stored
        assert torch.equal(found[activation], fresh)
    assert not torch.equal(found[nn.ReLU], found[nn.Tanh]) and len(files(tmp_path)) == 1
