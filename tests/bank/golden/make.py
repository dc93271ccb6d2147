"""Makes the golden banks of the current format: `python tests/bank/golden/make.py`. Once a format.

A small bank of domains that no older format can say, and what their networks answer. It refuses to
overwrite: a golden bank is written by the release that made its format and stays as it is, so that
every later release must open it.
"""

from pathlib import Path

import torch
from torch import nn

import onetrunk as ot
from onetrunk.bank.card import FORMAT
from onetrunk.core.compress import compress
from onetrunk.data import Preprocessing
from onetrunk.tensorfile import pack

HERE = Path(__file__).parent
SIZE = (3, 16, 16)
FAMILIES = {
    "series": ot.Series(init="released"),
    "parallel": ot.Parallel(init="released"),
    "lowrank": ot.LowRank(rank=2, init="released"),
    "channelwise": ot.Channelwise(),
    "full": ot.Full(),
}


class Own(nn.Module):
    """A user's own network of 2,000 numbers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x_bchw):
        x = self.norm1(self.conv1(x_bchw)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def own(seed=0):
    """The network whose fingerprint `own.bank` has: its numbers come from whole numbers alone."""
    net = Own()
    for place, tensor in enumerate(net.state_dict().values()):
        if tensor.is_floating_point():
            steps = torch.arange(tensor.numel(), dtype=torch.float64) * (37 + place) + 11 * seed
            tensor.copy_(((steps % 101) / 101 - 0.5).abs_().add_(0.01).view(tensor.shape))
    return net.eval()


def shake(model, seed):
    """Numbers that no fresh domain has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def attached(net, family, seed=0):
    """A domain whose early norms stay the backbone's."""
    return ot.attach(
        net, family, ["daisy", "rose", "tulip"], where=ot.Where(pattern="conv2"), norms="placed",
        input_size=SIZE, preprocessing=Preprocessing(size_px=16), seed=seed,
    )  # fmt: skip


def compressed(net):
    """Two domains over one basis."""
    models = {f"shared-{k}": attached(net, FAMILIES["parallel"], seed=k) for k in range(2)}
    return compress(models, rank_fraction=0.5).items()


def main():
    torch.set_num_threads(1)
    folder = HERE / f"format-{FORMAT}"
    folder.mkdir()  # refuses to overwrite
    x_bchw = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(0))
    expected, net = {"input": x_bchw}, own()
    models = {name: attached(net, family) for name, family in FAMILIES.items()}
    bank = ot.Bank.create(folder / "own", net)
    for seed, (name, model) in enumerate({**models, **dict(compressed(net))}.items()):
        shake(model, seed)
        bank.add(name, model, metrics={"test_accuracy": 0.5}, provenance={"seed": seed})
        with torch.no_grad():
            expected[f"own.{name}"] = model.eval()(x_bchw)
    (folder / "own" / "bank.lock").unlink()
    (folder / "expected.safetensors").write_bytes(pack(expected, {"golden": FORMAT}))


if __name__ == "__main__":
    main()
