"""Late layers on cached features: what few views an image cost in accuracy.

    python benchmarks/cached.py DATA DOMAIN [IMAGES]     about 2 minutes a domain with 300 images

DATA is a folder of domains. The packaged ResNet-26, 15 epochs, late third, one thread; test
accuracy with training on images and on features of 0 (no augmentation), 1, 4 and 15 views. For the
time that features save: onetrunk benchmark speed --only cached.
"""

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import onetrunk as ot
from onetrunk.data import Prepared, Preprocessing, load

N_EPOCHS, VIEWS = 15, (None, 0, 1, 4, 15)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def accuracy(folder: str, domain: str, n_images: int = 300) -> None:
    backbone = ot.backbone("resnet26(width=0.5)").to(memory_format=torch.channels_last)
    splits = load(f"{folder}/{domain}").with_validation()
    seen = Preprocessing.for_backbone(backbone, 64, splits.hflip is not False)
    chosen = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
    train = Prepared(splits.train.subset(chosen[:n_images].tolist()), seen)
    val, test = Prepared(splits.val, seen), Prepared(splits.test, seen)
    recipe = ot.Recipe(epochs=N_EPOCHS)
    for views in VIEWS:
        model = ot.attach(
            backbone, ot.Parallel(), train.classes, where=ot.Where(stages="late"), norms="placed",
            preprocessing=seen, input_size=(seen.channels, 64, 64),
        )  # fmt: skip
        network, data, val_data = model, train, val
        if views is not None:
            made = ot.cached(model, train, recipe, val=val, views=views)
            network, data, val_data = made.model, made.train, made.val
        took = seconds(lambda: list(ot.fit(network, data, recipe, val=val_data)))  # noqa: B023
        on = "on images" if views is None else f"on {views} views"
        found = ot.evaluate(model, test).accuracy
        print(f"{domain}, {len(train)} images, {on}: {found:.3f}, {took:.0f} s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("give a folder of domains and one of them: cached.py DATA DOMAIN [IMAGES]")
    torch.set_num_threads(1)
    accuracy(*sys.argv[1:3], *map(int, sys.argv[3:]))
