"""Late layers on cached features against fine-tuning: the time of a whole training.

    python benchmarks/cached.py          about a minute on one core; prints one line

ResNet-26 at full width, 64 pixels, random weights and images: the numbers do not matter here. One
thread; processor time, two epochs of 64 images each. The ratio of a longer training follows:
(features + epochs * tail) / (epochs * fine-tuning). Counting gives 0.23: the late third of the
network at two thirds of a step.
"""

import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.utils.data import TensorDataset

import onetrunk as ot
from onetrunk.training.cached import cached

N_IMAGES, N_EPOCHS = 64, 2
CLASSES = [str(c) for c in range(10)]


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = ot.backbone("resnet26(width=1.0)").to(memory_format=torch.channels_last)
    images = TensorDataset(torch.rand(N_IMAGES, 3, 64, 64), torch.arange(N_IMAGES) % 10)
    recipe, size = ot.Recipe(epochs=N_EPOCHS, batch_size=32), (3, 64, 64)
    whole = ot.attach(backbone, ot.Full(), CLASSES, input_size=size)
    late = ot.attach(
        backbone, ot.Parallel(), CLASSES, where=ot.Where(stages=("late",)), norms="placed",
        input_size=size,
    )  # fmt: skip
    full_s = seconds(lambda: list(ot.fit(whole, images, recipe, device="cpu"))) / N_EPOCHS
    made = cached(late, images, recipe, device="cpu")
    once_s = seconds(lambda: cached(late, images, recipe, device="cpu"))
    tail_s = seconds(lambda: list(ot.fit(made.model, made.train, recipe, device="cpu"))) / N_EPOCHS
    print(
        f"an epoch of {N_IMAGES} images: fine-tuning {full_s:.2f} s, on features {tail_s:.2f} s; "
        f"features once {once_s:.2f} s; whole training / fine-tuning: "
        + ", ".join(
            f"{(once_s + n * tail_s) / (n * full_s):.2f} ({n} epochs)" for n in (10, 20, 50)
        )
    )


if __name__ == "__main__":
    main()
