"""Trains a network without batch norm and writes its numbers: alone, or under `torchrun` on two.

torchrun --standalone --nproc-per-node 2 two_processes.py OUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import onetrunk as ot
from onetrunk.core.domain import delta
from onetrunk.training.distributed import join

RECIPE = ot.Recipe(epochs=2, batch_size=4, lr=0.02, optimizer="sgd")


def trained(checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
    model = ot.attach(net, ot.Parallel(), ["dark", "light"], input_size=(3, 8, 8))
    images = TensorDataset(torch.rand(16, 3, 8, 8), torch.tensor([0, 1] * 8))
    for _ in ot.fit(model, images, RECIPE, val=images, checkpoint=checkpoint, device="cpu"):
        pass
    return {name: tensor.contiguous() for name, tensor in delta(model).items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join() as world:
        assert world.size == 2
        tensors = trained(Path(sys.argv[1]).with_suffix(".checkpoint"))
        save_file(tensors, f"{sys.argv[1]}.{world.rank}")
