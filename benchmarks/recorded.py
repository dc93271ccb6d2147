"""Steps a second on a CUDA device, ordinary and recorded as a CUDA graph; 64 images at 64 pixels.

    python benchmarks/recorded.py "timm:tf_efficientnet_lite0" "lowrank(rank=16)"

Several at once share the GPU's time; with NVIDIA's MPS they share the GPU.
"""

import argparse
import time

import numpy as np
import torch

import onetrunk as ot
from onetrunk.data import Images, Prepared, Preprocessing

N_IMAGES, N_FIRST = 640, 10


def steps_a_second(form: str, family: str, graphed: bool, n_steps: int) -> float:
    backbone = ot.backbone(form).to(memory_format=torch.channels_last)
    preprocessing = Preprocessing.for_backbone(backbone, size_px=64)
    pixels = np.random.default_rng(0).integers(0, 256, (N_IMAGES, 80, 80, 3), dtype=np.uint8)
    classes = [str(c) for c in range(10)]
    images = Images.from_arrays(pixels, torch.arange(N_IMAGES) % len(classes), classes)
    train = Prepared(images, preprocessing)
    model = ot.attach(
        backbone, ot.read_family(family), classes,
        preprocessing=preprocessing, input_size=(3, 64, 64),
    )  # fmt: skip
    recipe = ot.Recipe(epochs=n_steps // 10, batch_size=64, norm_statistics="running")
    ends = [time.perf_counter() for _ in ot.fit(model, train, recipe, graphed=graphed)]
    return (len(ends) - N_FIRST - 1) / (ends[-1] - ends[N_FIRST])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("family")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--graphed", action="store_true", help="recorded alone; else both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for graphed in (True,) if arguments.graphed else (False, True):
        rate = steps_a_second(arguments.backbone, arguments.family, graphed, arguments.steps)
        print(f"{'recorded' if graphed else 'ordinary'}: {rate:.1f} steps/s", flush=True)


if __name__ == "__main__":
    main()
