"""A backbone of your own: any module from images to scores. The bank keeps its weights.

python examples/own_backbone.py        a few seconds
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import onetrunk as ot


class Small(nn.Module):
    """Two convolutions, with a squeeze in between, and a head called `scores`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.scores = nn.Linear(32, 10)

    def forward(self, x_bihw: torch.Tensor) -> torch.Tensor:
        return self.scores(self.body(self.stem(x_bihw)).mean((2, 3)))


torch.manual_seed(0)
backbone = Small().eval()
model = ot.attach(backbone, ot.Series(), ["daisy", "rose"], input_size=(3, 32, 32))
print(f"{len(model.domain.plan)} sites: {', '.join(model.domain.plan)}")
print(ot.cost(model))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "own.bank")
    ot.Bank.create(path, backbone).add("flowers", model)
    again = ot.Bank.open(path, backbone=backbone).load("flowers")  # the module is yours to bring
    x_bchw = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x_bchw), model.eval()(x_bchw))
    try:
        torch.manual_seed(1)
        ot.Bank.open(path, backbone=Small())
    except ot.OnetrunkError as error:
        print(f"another backbone is refused: {error}")
