"""cost: one honest counter, against what is stored and what PyTorch's FLOP counter sees."""

import json

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import onetrunk as ot
from onetrunk.backbones import resnet26
from onetrunk.core.adapters import Family
from onetrunk.core.attach import attach
from onetrunk.core.cost import cost
from onetrunk.core.domain import delta
from onetrunk.errors import AttachError, BackboneError

CLASSES = ["daisy", "rose", "tulip"]
EVERYWHERE = ot.Where(layers="all")


def make(name: str) -> nn.Module:
    return resnet26(0.25) if name == "resnet26" else timm.create_model(name)


def multiply_adds(model: nn.Module, side: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("family", [ot.Series(), ot.Parallel(), ot.LowRank(rank=1)], ids=str)
@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet26", 64),
        ("efficientnet_b0", 64),
        ("convnext_atto", 64),
        ("vit_tiny_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
    ],
)
def test_multiply_adds_are_half_of_what_pytorch_counts(
    name: str, side: int, family: Family
) -> None:
    backbone = make(name)
    with_adapters = attach(backbone, family, CLASSES, where=EVERYWHERE)
    without = attach(backbone, ot.Norm(), CLASSES)
    counted = multiply_adds(with_adapters, side) - multiply_adds(without, side)
    assert cost(with_adapters, (3, side, side)).multiply_adds == counted > 0


def test_the_backbones_multiply_adds_are_those_of_its_adaptable_layers() -> None:
    backbone = resnet26(0.25)
    model = attach(backbone, ot.Parallel(), CLASSES)
    head = backbone.fc.in_features * backbone.fc.out_features
    counted = multiply_adds(backbone, 64) - head
    assert cost(model, (3, 64, 64)).backbone_multiply_adds == counted


def test_a_layer_that_is_called_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.fc(self.conv(self.conv(x_bihw)).mean((2, 3)))

    model = attach(Twice(), ot.Parallel(), CLASSES)
    added = multiply_adds(model, 8) - multiply_adds(attach(Twice(), ot.Norm(), CLASSES), 8)
    assert cost(model, (3, 8, 8)).multiply_adds == added == 2 * 64 * 9


@pytest.mark.parametrize(
    "family",
    [ot.Series(), ot.Parallel(), ot.LowRank(rank=2), ot.Channelwise(), ot.Norm(), ot.Head()],
    ids=str,
)
def test_numbers_and_bytes_are_those_of_the_stored_tensors(family: Family) -> None:
    model = attach(resnet26(0.25), family, CLASSES)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    kept = [t for n, t in delta(model).items() if ".adapter." in n or not n.endswith(statistics)]
    found = cost(model)
    assert found.numbers == sum(t.numel() for t in kept)
    assert found.delta_bytes == sum(t.nbytes for t in kept)
    assert found.adapters == sum(site.numbers for site in found.sites)
    assert found.head == 64 * 3 + 3 and not found.weights


def test_statistics_count_once_a_batch_has_moved_them() -> None:
    model = attach(resnet26(0.25), ot.Parallel(), CLASSES)
    still = cost(model).norms
    model.train()(torch.rand(2, 3, 64, 64))
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    counters = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert (still, cost(model).norms) == (2 * channels, 4 * channels + counters)
    assert cost(model).numbers == sum(t.numel() for t in delta(model).values())


def test_what_holds_the_numbers_is_told_apart() -> None:
    everything = cost(attach(resnet26(0.25), ot.Full(), CLASSES))
    convs = sum(p.numel() for p in resnet26(0.25).parameters() if p.ndim == 4)
    assert everything.weights == convs and everything.share > 0.5 and not everything.adapters
    placed = cost(attach(resnet26(0.25), ot.Full(), CLASSES, where=ot.Where(pattern="stem")))
    assert placed.weights == 8 * 3 * 9 and [s.numbers for s in placed.sites] == [8 * 3 * 9]


def test_a_backbones_own_module_called_adapter_is_no_adapter() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter, self.fc = nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Linear(4, 2)
            self.adapter.append(nn.BatchNorm2d(4))

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.fc(self.adapter(x_bihw).mean((2, 3)))

    found = cost(attach(Named(), ot.Norm(), CLASSES), (3, 8, 8))
    assert (found.adapters, found.norms) == (0, 2 * 4)


def test_sites_come_in_the_order_of_execution_with_stage_and_layer() -> None:
    sites = cost(attach(resnet26(0.25), ot.Parallel(), CLASSES)).sites
    first = sites[0]
    assert (first.name, first.stage, first.family) == ("stem", "early", "parallel")
    assert (first.numbers, first.multiply_adds) == (8 * 3, 64 * 64 * 8 * 3)
    assert (first.layer_numbers, first.layer_multiply_adds) == (9 * 24, 9 * 24 * 64 * 64)
    assert len(sites) == 25


def test_the_size_counted_is_the_domains_own() -> None:
    model = attach(resnet26(0.25), ot.Parallel(), CLASSES)
    assert cost(model).multiply_adds == cost(model, (3, 64, 64)).multiply_adds
    assert cost(model, (3, 32, 32)).multiply_adds * 4 == cost(model).multiply_adds


def test_a_named_head_is_no_part_of_the_backbones_cost() -> None:
    class Two(nn.Module):
        """A linear layer behind the classifier, so that the head has to be named."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.relu = nn.Conv2d(3, 4, 1), nn.Linear(4, 6), nn.ReLU()

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.relu(self.fc(self.conv(x_bihw).mean((2, 3)))).unsqueeze(1)

    found = cost(attach(Two(), ot.Parallel(), CLASSES, head="fc"), (3, 8, 8))
    assert found.backbone_multiply_adds == 64 * 12 and found.head == 4 * 3 + 3


def test_the_table_and_json_hold_the_same_numbers() -> None:
    found = cost(attach(resnet26(0.25), ot.Parallel(), CLASSES))
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["numbers"] == found.numbers and len(plain["sites"]) == 25
    table = str(found)
    assert f"{found.numbers:,}" in table and f"{found.delta_bytes:,}" in table
    assert f"{found.share:.2%}" in table and "backbone, shared" in table


def test_what_is_no_domain_or_does_not_run_is_refused() -> None:
    with pytest.raises(AttachError, match="is no domain's network"):
        cost(resnet26(0.25))
    with pytest.raises(BackboneError, match="does not run on one image of 5x64x64"):
        cost(attach(resnet26(0.25), ot.Parallel(), CLASSES), (5, 64, 64))
