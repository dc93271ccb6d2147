"""Late layers on cached features: the time of a whole training, and what few views cost.

    python benchmarks/cached.py                          about 2 minutes on one core
    python benchmarks/cached.py DATA DOMAIN [IMAGES]     about 2 minutes a domain with 300 images

Without arguments: ResNet-26 at full width, 64 pixels, random weights and images, as the numbers do
not matter here; processor seconds of two epochs of 64 images each, medians of three rounds that go
through every training. The ratio of a longer training follows: (features + epochs * tail) /
(epochs * fine-tuning). Counting gives 0.23 for the late third at two thirds of a step.

With a domain of DATA (a folder of domains): the packaged ResNet-26, 15 epochs, late third; test
accuracy with training on images and on features of 0 (no augmentation), 1, 4 and 15 views.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.utils.data import TensorDataset

import onetrunk as ot
from onetrunk.data import Prepared, Preprocessing, load

N_IMAGES, N_EPOCHS, N_ROUNDS = 64, 2, 3
CLASSES = [str(c) for c in range(10)]
LATE = ot.Where(stages="late")
PLACES = {"late third": LATE, "last two blocks": ot.Where(pattern="stages.2.2.*,stages.2.3.*")}
EPOCHS_FOR_ACCURACY, VIEWS = 15, (None, 0, 1, 4, 15)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def late(backbone: nn.Module, classes: Any, where: ot.Where, **options: Any) -> nn.Module:
    return ot.attach(backbone, ot.Parallel(), classes, where=where, norms="placed", **options)


def times() -> None:
    torch.manual_seed(0)
    backbone = ot.backbone("resnet26(width=1.0)").to(memory_format=torch.channels_last)
    images = TensorDataset(torch.rand(N_IMAGES, 3, 64, 64), torch.arange(N_IMAGES) % 10)
    recipe, size = ot.Recipe(epochs=N_EPOCHS, batch_size=32), {"input_size": (3, 64, 64)}
    taken: dict[str, list[float]] = {}

    def note(name: str, call: Callable[[], object], epochs: int = N_EPOCHS) -> None:
        taken.setdefault(name, []).append(seconds(call) / epochs)

    for _ in range(N_ROUNDS):
        whole = ot.attach(backbone, ot.Full(), CLASSES, **size)
        note("full", lambda model=whole: list(ot.fit(model, images, recipe, device="cpu")))
        for name, where in PLACES.items():
            model, made = late(backbone, CLASSES, where, **size), list[Any]()
            note(
                f"{name} once",
                lambda model=model, made=made: made.append(
                    ot.cached(model, images, recipe, device="cpu")
                ),
                epochs=1,
            )
            note(
                f"{name} tail",
                lambda made=made: list(ot.fit(made[0].model, made[0].train, recipe, device="cpu")),
            )
    found = {name: statistics.median(each) for name, each in taken.items()}
    for name in PLACES:
        once, tail, full = found[f"{name} once"], found[f"{name} tail"], found["full"]
        ratios = (f"{(once + n * tail) / (n * full):.2f} ({n} epochs)" for n in (10, 20, 50))
        print(
            f"{name}: an epoch of {N_IMAGES} images: fine-tuning {full:.2f} s, on features "
            f"{tail:.2f} s; features once {once:.2f} s; whole training / fine-tuning: "
            + ", ".join(ratios)
        )


def accuracy(folder: str, domain: str, n_images: int = 300) -> None:
    backbone = ot.backbone("resnet26(width=0.5)").to(memory_format=torch.channels_last)
    splits = load(f"{folder}/{domain}").with_validation()
    seen = Preprocessing.for_backbone(backbone, 64, splits.hflip is not False)
    chosen = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
    train = Prepared(splits.train.subset(chosen[:n_images].tolist()), seen)
    val, test = Prepared(splits.val, seen), Prepared(splits.test, seen)
    recipe = ot.Recipe(epochs=EPOCHS_FOR_ACCURACY)
    for views in VIEWS:
        model = late(
            backbone, train.classes, LATE, preprocessing=seen, input_size=(seen.channels, 64, 64)
        )
        network, data, val_data = model, train, val
        if views is not None:
            made = ot.cached(model, train, recipe, val=val, views=views)
            network, data, val_data = made.model, made.train, made.val
        took = seconds(lambda: list(ot.fit(network, data, recipe, val=val_data)))  # noqa: B023
        on = "on images" if views is None else f"on {views} views"
        found = ot.evaluate(model, test).accuracy
        print(f"{domain}, {len(train)} images, {on}: {found:.3f}, {took:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        accuracy(*sys.argv[1:3], *map(int, sys.argv[3:]))
    else:
        times()
