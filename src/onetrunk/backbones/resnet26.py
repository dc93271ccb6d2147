"""ResNet-26, the paper's backbone: exactly the released architecture, without its adapters.

    stem  3x3, 32 width, and a norm, no ReLU
    3 stages of 4 blocks, 64, 128, 256 width, each starting with stride 2; a block is
          conv 3x3, norm, ReLU, conv 3x3, norm, plus the shortcut, ReLU
    norm, ReLU, average pool, linear

The shortcut of a stage's first block is average pooling and zero channels: no parameters. At
width 1 the 25 convolutions hold 5,806,944 numbers. Initialised as released: N(0, 2 / (k k o)).
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BackboneError

N_BLOCKS, STAGE_CHANNELS, STEM_CHANNELS = 4, (64, 128, 256), 32


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a parameter-free shortcut."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.grows = cin != cout
        self.conv1 = nn.Conv2d(cin, cout, 3, 2 if self.grows else 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(cout)

    def forward(self, x_bihw: Tensor) -> Tensor:
        y_bohw = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_bihw)))))
        if self.grows:
            pooled = F.avg_pool2d(x_bihw, 2)
            x_bihw = torch.cat((pooled, torch.zeros_like(pooled)), dim=1)
        return F.relu(y_bohw + x_bihw)


class ResNet26(nn.Module):
    """The paper's network. Images (b, 3, h, w), h and w multiples of 8, to logits (b, c)."""

    def __init__(self, width: float = 1.0, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        stem, *stages = (int(n * width) for n in (STEM_CHANNELS, *STAGE_CHANNELS))
        if stem < 1 or stem != STEM_CHANNELS * width:
            raise BackboneError(
                f"resnet26(width={width}): its stages must double, so 32 width has to be a whole "
                "number. Use for example 0.25, 0.5, 1.0 or 2.0."
            )
        self.num_classes, self.num_features = num_classes, stages[-1]
        self.stem = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(stem)
        widths = [stem, *stages]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    BasicBlock(cin, cout), *(BasicBlock(cout, cout) for _ in range(N_BLOCKS - 1))
                )
                for cin, cout in itertools.pairwise(widths)
            )
        )
        self.norm = nn.BatchNorm2d(self.num_features)
        self.fc = nn.Linear(self.num_features, num_classes)
        self.pretrained_cfg: dict[str, Any] = {
            "architecture": "resnet26",
            "input_size": (in_chans, 64, 64),
            "interpolation": "bilinear",
            "crop_pct": 64 / 72,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "classifier": "fc",
            "first_conv": "stem",
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=(2 / (9 * module.out_channels)) ** 0.5)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x_bihw: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, f, h / 8, w / 8)."""
        return F.relu(self.norm(self.stages(self.stem_norm(self.stem(x_bihw)))))

    def forward_head(self, x_bfhw: Tensor, pre_logits: bool = False) -> Tensor:
        """(b, f, h, w) to logits (b, c), or to pooled features (b, f)."""
        x_bf = x_bfhw.mean(dim=(2, 3))
        return x_bf if pre_logits else self.fc(x_bf)

    def forward(self, x_bihw: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_bihw))


def resnet26(width: float = 1.0, num_classes: int = 1000, in_chans: int = 3) -> ResNet26:
    """The paper's ResNet-26 with fresh weights of the global random generator.

    Raises:
        BackboneError: where `width` does not give whole, doubling widths.

    >>> sum(p.numel() for n, p in resnet26().named_parameters() if p.ndim == 4)
    5806944
    """
    return ResNet26(width, num_classes, in_chans)
