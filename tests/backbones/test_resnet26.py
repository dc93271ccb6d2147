"""ResNet-26: the paper's numbers, its blocks against a plain reference, timm's conventions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onetrunk.backbones import resnet26
from onetrunk.backbones.resnet26 import BasicBlock


def test_the_25_convolutions_hold_the_papers_numbers() -> None:
    convs = [m for m in resnet26().modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 25 and sum(c.weight.numel() for c in convs) == 5_806_944
    assert all(c.kernel_size == (3, 3) and c.bias is None for c in convs)


def test_weights_start_as_released() -> None:
    torch.manual_seed(0)
    conv = resnet26().stages[2][3].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("channels", [(4, 8), (8, 8)])
@torch.no_grad()
def test_a_block_is_two_convolutions_beside_pooling_and_zero_channels(
    channels: tuple[int, int],
) -> None:
    cin, cout = channels
    torch.manual_seed(0)
    block = BasicBlock(cin, cout).double().eval()
    x_bihw = torch.randn(2, cin, 6, 6, dtype=torch.float64)
    stride = 2 if cin != cout else 1
    y = F.conv2d(x_bihw, block.conv1.weight, stride=stride, padding=1)
    y = F.relu(y / (1 + block.norm1.eps) ** 0.5)
    y = F.conv2d(y, block.conv2.weight, padding=1) / (1 + block.norm2.eps) ** 0.5
    short = x_bihw.clone()
    if cin != cout:
        short = torch.zeros(2, cout, 3, 3, dtype=torch.float64)
        for p in range(3):
            for q in range(3):
                window = x_bihw[:, :, 2 * p : 2 * p + 2, 2 * q : 2 * q + 2]
                short[:, :cin, p, q] = window.sum((2, 3)) / 4
    assert torch.allclose(block(x_bihw), F.relu(y + short), rtol=0, atol=1e-12)


def test_it_keeps_timms_conventions() -> None:
    net = resnet26(0.25, num_classes=9).eval()
    x_bihw = torch.zeros(1, 3, 64, 64)
    features = net.forward_features(x_bihw)
    assert features.shape == (1, 64, 8, 8)
    assert torch.equal(net.forward_head(features), net(x_bihw))
    assert net.forward_head(features, pre_logits=True).shape == (1, net.num_features)
    assert net.get_classifier() is net.fc and net.num_classes == 9
    net.reset_classifier(4)
    assert net(x_bihw).shape == (1, 4) and net.num_classes == 4
    assert net.pretrained_cfg["classifier"] == "fc"
