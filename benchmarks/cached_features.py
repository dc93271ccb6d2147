"""Training on cached features: how long it takes, and what few views cost in accuracy.

    python benchmarks/cached_features.py time [ROUNDS]           about 5 minutes a round on one core
    python benchmarks/cached_features.py accuracy DATA DOMAIN..  about 6 minutes a domain
    python benchmarks/cached_features.py memory                  about 3 minutes, 3 GB

`time` trains ResNet-26 at width 1.0 on 100 images of 64 pixels for 20 epochs, features included, in
rounds that go through every method; the figures are medians of CPU seconds, as shares of
fine-tuning in the same round. `accuracy` trains the packaged ResNet-26 on up to 600 images of
domains of DATA (a folder of domains) for 30 epochs, with and without a cache. `memory` takes steps
of ResNet-50 at 224 pixels, 16 images each, with and without recomputation, a process each.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
from torch import nn

import onetrunk as ot
from onetrunk.data import Images, Prepared, Preprocessing, load

LATE = ot.Where(stages="late")
LAST_TWO = ot.Where(pattern="stages.2.2.*,stages.2.3.*")
# name -> family, where, views of cached features (None: no cache)
METHODS: dict[str, tuple[Any, ot.Where | None, int | None]] = {
    "fine-tuning": (ot.Full(), None, None),
    "late, parallel": (ot.Parallel(), LATE, None),
    "late, parallel, cached": (ot.Parallel(), LATE, 1),
    "late, parallel, cached, 4 views": (ot.Parallel(), LATE, 4),
    "late, lowrank(rank=16), cached": (ot.LowRank(16), LATE, 1),
    "last two blocks, parallel, cached": (ot.Parallel(), LAST_TWO, 1),
    "last two blocks, parallel, cached, 4 views": (ot.Parallel(), LAST_TWO, 4),
}


def train(
    net: nn.Module,
    data: Prepared,
    recipe: ot.Recipe,
    method: tuple[Any, ot.Where | None, int | None],
    val: Prepared | None = None,
) -> nn.Module:
    """A domain, trained; with a cache of so many views, or on images."""
    family, where, views = method
    seen = data.preprocessing
    model = ot.attach(
        net, family, data.classes, where=where, norms="placed" if where else "all",
        preprocessing=seen, input_size=(seen.channels, seen.size_px, seen.size_px),
    )  # fmt: skip
    network, train_data, val_data = model, data, val
    if views is not None:
        made = ot.cached(model, data, recipe, val=val, views=views)
        network, train_data, val_data = made.model, made.train, made.val
    for _ in ot.fit(network, train_data, recipe, val=val_data):
        pass
    return model


def seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def time_it(n_rounds: int = 2, n_images: int = 100, n_epochs: int = 20) -> None:
    net = ot.backbone("resnet26(width=1.0)", pretrained=False)
    net.to(memory_format=torch.channels_last)
    pixels = np.random.default_rng(0).integers(0, 255, (n_images, 72, 72, 3), dtype=np.uint8)
    classes = [f"class {k}" for k in range(10)]
    images = Images.from_arrays(pixels, np.arange(n_images) % 10, classes)
    data = Prepared(images, Preprocessing.for_backbone(net, 64))
    recipe = ot.Recipe(epochs=n_epochs)
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(n_rounds):
        for name, method in METHODS.items():
            taken[name].append(seconds(lambda method=method: train(net, data, recipe, method)))
    print(f"{n_images} images, {n_epochs} epochs, {n_rounds} rounds, CPU seconds\n")
    print("| training | seconds | of fine-tuning |\n|---|---|---|")
    for name, found in taken.items():
        shares = [one / full for one, full in zip(found, taken["fine-tuning"], strict=True)]
        spread = f"{min(shares):.3f} to {max(shares):.3f}"
        print(f"| {name} | {statistics.median(found):.0f} | "
              f"{statistics.median(shares):.3f} ({spread}) |")  # fmt: skip


def accuracy(folder: str, *domains: str, n_images: int = 600, n_epochs: int = 30) -> None:
    net = ot.backbone("resnet26(width=0.5)").to(memory_format=torch.channels_last)
    print("| domain | images | on images | 0 views | 1 view | 4 views | 10 views |")
    print("|---|---|---|---|---|---|---|")
    for domain in domains:
        splits = load(f"{folder}/{domain}").with_validation()
        seen = Preprocessing.for_backbone(net, 64, splits.hflip is not False)
        chosen = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
        data = Prepared(splits.train.subset(chosen[:n_images].tolist()), seen)
        val, test = Prepared(splits.val, seen), Prepared(splits.test, seen)
        found = []
        for views in (None, 0, 1, 4, 10):
            method = (ot.Parallel(), LATE, views)
            model = train(net, data, ot.Recipe(epochs=n_epochs), method, val)
            found.append(f"{ot.evaluate(model, test).accuracy:.3f}")
        print(f"| {domain} | {len(data)} | {' | '.join(found)} |", flush=True)


def memory() -> None:
    print("| training of ResNet-50 | peak memory above the network's | seconds a step |")
    print("|---|---|---|")
    for family in ("full", "parallel"):
        for how in ("plain", "recomputed"):
            words = [sys.executable, __file__, "steps", family, how]
            ran = subprocess.run(words, capture_output=True, text=True, check=True)
            print(f"| {family}, {how} | {ran.stdout.strip()} |", flush=True)


def steps(family: str, how: str) -> None:
    net = timm.create_model("resnet50").to(memory_format=torch.channels_last)
    model = ot.attach(net, ot.read_family(family), ["a", "b"], input_size=(3, 224, 224))
    network = (ot.recomputed(model) if how == "recomputed" else model).train()
    x_bchw = torch.randn(16, 3, 224, 224).to(memory_format=torch.channels_last)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = [seconds(lambda: network(x_bchw).logsumexp(1).sum().backward()) for _ in range(3)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{peak / 2**20:.2f} GiB | {statistics.median(taken):.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *words = sys.argv[1:] or ["help"]
    if command == "time":
        time_it(*map(int, words))
    elif command == "accuracy":
        accuracy(*words)
    elif command == "memory":
        memory()
    elif command == "steps":
        steps(*words)
    else:
        print(__doc__)
        print(Path(__file__).name, "time | accuracy DATA DOMAIN.. | memory")
