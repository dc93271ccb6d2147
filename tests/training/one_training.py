"""A training of 12 steps with everything that could break a resume; also a script that is killed.

    python one_training.py FOLDER

Reads requests from stdin, a line each: `OPTIMIZER CHECKPOINT OUT`. For each it forks a child, which
trains from the checkpoint, if there is one, to the end, and writes OUT; prints the child's number
at once, and `done` when it is dead. The parent has trained once, so that what torch imports at
first use is there, and a child starts in milliseconds.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import onetrunk as ot
from onetrunk.core.domain import delta
from onetrunk.data import Images, Preprocessing

CLASSES = ("ant", "bee", "cat")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": "sgd", "lr": 0.2},
    "nesterov": {"optimizer": "sgd", "lr": 0.2, "nesterov": True},
    "adamw": {"optimizer": "adamw", "lr": 0.02},
}


def net(n_classes: int = 4, seed: int = 7) -> nn.Module:
    """Three convolutions with batch norm, dropout before the classifier; seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(16, n_classes),
        )


def images(n: int = 24, seed: int = 0, noise: float = 60.0) -> Images:
    """Pictures of 20 x 20 pixels whose brightest channel is their class, under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    x_nhwc = rng.normal(100, noise, (n, 20, 20, 3))
    x_nhwc[np.arange(n), :, :, labels] += 25
    return Images.from_arrays(np.clip(x_nhwc, 0, 255).astype(np.uint8), labels, CLASSES)


def model() -> nn.Module:
    """A fresh domain, with dropout in its adapters."""
    return ot.attach(
        net(),
        ot.LowRank(rank=4, dropout=0.2),
        classes=CLASSES,
        preprocessing=Preprocessing(size_px=16, crop_ratio=16 / 18),
        input_size=(3, 16, 16),
    )


def recipe(optimizer: str) -> ot.Recipe:
    """Four epochs of three steps, the last image left out of each."""
    return ot.Recipe(
        epochs=4, batch_size=8, crop_scale=(0.5, 1.0), keep="best", **OPTIMIZERS[optimizer]
    )


def run(
    optimizer: str, checkpoint: Path | None = None, stop_after: int = 0, every_s: float = 0.0
) -> tuple[nn.Module, list[Any]]:
    """(the network, the step records) of a training that is left after step `stop_after`."""
    trained, records = model(), []
    for step in ot.fit(
        trained,
        images(25, seed=0),
        recipe(optimizer),
        val=images(12, seed=2, noise=140.0),
        checkpoint=checkpoint,
        checkpoint_every_s=every_s,
        device="cpu",
    ):
        records.append(step)
        if step.step == stop_after:
            break
    return trained, records


def child(optimizer: str, checkpoint: str, out: str) -> None:
    """What the forked process does."""
    trained, records = run(optimizer, Path(checkpoint))
    state = {name: t.contiguous() for name, t in delta(trained).items()}
    partial = f"{out}.partial"
    save_file(state, partial, {"steps": " ".join(str(step.step) for step in records)})
    os.rename(partial, out)


def main() -> None:
    torch.set_num_threads(1)
    for optimizer in OPTIMIZERS:
        run(optimizer, stop_after=4)
    for line in sys.stdin:
        number = os.fork()
        if number == 0:
            child(*line.split())
            os._exit(0)
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        os.waitpid(number, 0)
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
