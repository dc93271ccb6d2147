"""What the groups time: backbones by name, domains over them, PEFT's networks beside."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones import backbone as build_backbone
from ...core.adapted import Adapted
from ...core.adapters import Family
from ...core.attach import attach
from ...core.domain import delta
from ...errors import MissingExtraError, SpecError

CLASSES = tuple(f"class {c}" for c in range(10))


@dataclass(frozen=True)
class Subject:
    """A backbone with the size of its images; random weights do."""

    name: str
    size_px: int
    backbone: nn.Module

    @classmethod
    def read(cls, text: str) -> "Subject":
        """`NAME` or `NAME@PIXELS`, e.g. `timm:resnet50@224`; 64 pixels by default.

        Raises:
            BackboneError, SpecError: where the backbone cannot be built, or PIXELS is no number.
        """
        name, _, pixels = text.partition("@")
        if pixels and not pixels.isdecimal():
            raise SpecError(f"{text!r}: after @ comes the side in pixels, e.g. {name}@224.")
        module = build_backbone(name, pretrained=False).eval().to(device())
        return cls(name, int(pixels or 64), module.to(memory_format=torch.channels_last))

    def images(self, n: int) -> Tensor:
        """Seeded noise (n, 3, S, S), channels last as the backbone."""
        generator = torch.Generator().manual_seed(0)
        x_bchw = torch.randn(n, 3, self.size_px, self.size_px, generator=generator)
        return x_bchw.to(device()).contiguous(memory_format=torch.channels_last)

    def domain(self, family: Family | None, seed: int = 0) -> nn.Module:
        """A domain whose adapters are away from zero."""
        size = (3, self.size_px, self.size_px)
        model = attach(self.backbone, family, CLASSES, input_size=size, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in delta(model).items():
                if ".adapter." in name and tensor.is_floating_point():
                    drawn = 0.02 * torch.randn(tensor.shape, generator=generator)
                    tensor.copy_(drawn.to(tensor.device))
        return model

    @property
    def title(self) -> str:
        return f"{self.name}, {self.size_px} px"


def device() -> str:
    """Where everything is timed: CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def take_apart(model: nn.Module) -> nn.Module:
    """The domain's network with adapters beside their layers in training too; changes it."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module.folds = False
    return model


def peft() -> Any:
    """Hugging Face's PEFT.

    Raises:
        MissingExtraError: where it is not installed.
    """
    try:
        with quiet():
            import peft
    except ImportError as error:
        raise MissingExtraError('PEFT is not installed: pip install "onetrunk[rivals]"') from error
    return peft


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Rivals warn about their own imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
