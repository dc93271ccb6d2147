"""Sites: the convolutions and linear layers of a backbone that may be adapted, as plain facts.

What a module says of itself (channels, kernel, stride, groups) is read without running anything;
what only an execution shows (order, output size, stage, cost) is filled in by `trace`. A layer that
cannot be adapted gets a reason instead of a site: nothing is skipped silently.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

STAGES = ("early", "mid", "late")

# Convolutions with a forward of their own that is known, by package and class name: how they pad
# ("given": as the module says; "same": as TensorFlow, by the input's size) and whether they
# standardise their weight in every forward. Any other class must have torch's own forward.
KNOWN_CONVS: dict[tuple[str, str], tuple[Literal["given", "same"], bool]] = {
    ("timm", "Conv2dSame"): ("same", False),
    ("timm", "StdConv2d"): ("given", True),
    ("timm", "StdConv2dSame"): ("same", True),
    ("timm", "ScaledStdConv2d"): ("given", True),
    ("timm", "ScaledStdConv2dSame"): ("same", True),
}
KNOWN_LINEARS = {("timm", "Linear")}


@dataclass(frozen=True)
class Site:
    """One convolution or linear layer that may be adapted.

    Args:
        name: the module's path in the backbone.
        kind: `conv` for Conv2d, `linear` for Linear.
        cin, cout: channels in and out.
        kernel, stride, dilation: rows and columns; (1, 1) at a linear layer.
        groups: groups of channels; equal to `cin` at a depthwise convolution.
        same: whether it pads as TensorFlow's "same", by the input's size.
        standardised: whether it standardises its weight in every forward.
        order: place in the order of execution, from 0; -1 where nothing was executed.
        stage: `early`, `mid` or `late`; empty where nothing was executed.
        out_hw: pixels of the output for the traced input; (positions, 1) at a linear layer.
        positions: output positions an image, h w or the number of tokens; summed over the calls of
            a layer that is called more than once.
        n_other: numbers of the frozen layer beside its weight: bias, gains.
    """

    name: str
    kind: Literal["conv", "linear"]
    cin: int
    cout: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    same: bool = False
    standardised: bool = False
    order: int = -1
    stage: str = ""
    out_hw: tuple[int, int] = (0, 0)
    positions: int = 0
    n_other: int = 0

    @property
    def spatial(self) -> bool:
        """Whether the kernel sees more than one pixel."""
        return self.kernel != (1, 1)

    @property
    def depthwise(self) -> bool:
        """Whether every input channel is convolved alone."""
        return self.groups == self.cin and self.groups > 1

    @property
    def n_weights(self) -> int:
        """Numbers in the frozen weight, without bias."""
        return self.cout * self.cin // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the frozen layer an image, at the traced size."""
        return self.positions * self.n_weights


def forward_known(module: nn.Conv2d | nn.Linear) -> bool:
    """Whether a layer computes as its weight and geometry say: another may take its place."""
    if "weight" not in module._parameters:
        return False
    if isinstance(module, nn.Linear):
        return _forward_known(module, nn.Linear, KNOWN_LINEARS)
    return _forward_known(module, nn.Conv2d, set(KNOWN_CONVS))


def package_and_class(module: nn.Module) -> tuple[str, str]:
    """("torch", "Conv2d") for torch.nn.modules.conv.Conv2d."""
    cls = type(module)
    return cls.__module__.partition(".")[0], cls.__name__


def site_of(name: str, module: nn.Module) -> Site | str | None:
    """The site that a module is, the reason why it is none, or None for modules of other kinds."""
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return None
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if isinstance(module, nn.Linear):
        if not _forward_known(module, nn.Linear, KNOWN_LINEARS):
            return f"{type(module).__name__} computes in its own way: its forward is not Linear's"
        return Site(
            name, "linear", module.in_features, module.out_features, n_other=_n_other(module)
        )
    if not _forward_known(module, nn.Conv2d, set(KNOWN_CONVS)):
        return f"{type(module).__name__} computes in its own way: its forward is not Conv2d's"
    pads, standardised = KNOWN_CONVS.get(package_and_class(module), ("given", False))
    site = Site(
        name,
        "conv",
        module.in_channels,
        module.out_channels,
        _pair(module.kernel_size),
        _pair(module.stride),
        _pair(module.dilation),
        module.groups,
        pads == "same" and getattr(module, "same_pad", True),
        standardised,
        n_other=_n_other(module),
    )
    if module.padding_mode != "zeros" and not Tap.of(module, site).reads_only_pixels:
        return f"it pads with {module.padding_mode!r} where a 1x1 filter would see zeros"
    return site


def _n_other(module: nn.Module) -> int:
    every = sum(p.numel() for p in module._parameters.values() if p is not None)
    weight = module._parameters["weight"]
    return every - (0 if weight is None else weight.numel())


def _forward_known(module: nn.Module, base: type[nn.Module], known: set[tuple[str, str]]) -> bool:
    if package_and_class(module) in known:
        return True
    cls: Any = type(module)
    inner = getattr(cls, "_conv_forward", None) is getattr(base, "_conv_forward", None)
    return bool(cls.forward is base.forward and inner)


def _pair(value: object) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])  # type: ignore[index]


@dataclass(frozen=True)
class Tap:
    """The place in a kernel where a 1x1 filter beside the convolution sits.

    Output pixel j sees input pixel s j - left + t d at tap t. The tap is the one that sees pixel
    s j (t d = left: the centre for k = 3, padding 1), else the centre. `pick` gives the pixels
    under the tap, so that adding A at the tap is exact for every input size.
    """

    tap: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]] | None  # ((top, bottom), (left, right))

    @classmethod
    def of(cls, conv: nn.Conv2d, site: Site) -> "Tap":
        kernel, dilation = site.kernel, site.dilation
        padding = None if site.same else tuple(_padding(conv, axis) for axis in (0, 1))
        tap = tuple(
            _tap(kernel[axis], dilation[axis], None if padding is None else padding[axis][0])
            for axis in (0, 1)
        )
        return cls(tap, kernel, site.stride, dilation, padding)  # type: ignore[arg-type]

    @property
    def reads_only_pixels(self) -> bool:
        """Whether the tap never sees padding, whatever the input's size."""
        if self.padding is None:
            return False
        for (left, right), tap, kernel, dilation in zip(
            self.padding, self.tap, self.kernel, self.dilation, strict=True
        ):
            if left != tap * dilation or right > (kernel - 1 - tap) * dilation:
                return False
        return True

    def pick(self, x_bihw: Tensor, out_hw: torch.Size) -> Tensor:
        """The input pixel under the tap for every output pixel: (b, i, *out_hw)."""
        for axis in (0, 1):
            x_bihw = self._pick_axis(x_bihw, axis, out_hw[axis])
        return x_bihw

    def _pick_axis(self, x_bihw: Tensor, axis: int, n_out: int) -> Tensor:
        size, stride = x_bihw.shape[2 + axis], self.stride[axis]
        first = self.tap[axis] * self.dilation[axis] - self._left(axis, size)
        last = first + stride * (n_out - 1)
        if first == 0 and stride == 1 and last == size - 1:
            return x_bihw
        if first < 0 or last >= size:
            before, after = max(0, -first), max(0, last - size + 1)
            pad = (0, 0, before, after) if axis == 0 else (before, after, 0, 0)
            x_bihw, first, last = nn.functional.pad(x_bihw, pad), first + before, last + before
        index = slice(first, last + 1, stride)
        return x_bihw[:, :, index] if axis == 0 else x_bihw[:, :, :, index]

    def _left(self, axis: int, size: int) -> int:
        if self.padding is not None:
            return self.padding[axis][0]
        stride, kernel, dilation = self.stride[axis], self.kernel[axis], self.dilation[axis]
        total = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size
        return max(total, 0) // 2


def _padding(conv: nn.Conv2d, axis: int) -> tuple[int, int]:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = _pair(conv.dilation)[axis] * (_pair(conv.kernel_size)[axis] - 1)
        return total // 2, total - total // 2
    pad = _pair(conv.padding)[axis]
    return pad, pad


def _tap(kernel: int, dilation: int, left: int | None) -> int:
    if left is not None and left % dilation == 0 and left // dilation < kernel:
        return left // dilation
    return (kernel - 1) // 2


def effective_weight(module: nn.Conv2d | nn.Linear) -> Tensor:
    """The bank that a known layer really convolves with: standardised where it standardises."""
    weight = module.weight.detach()
    _, standardised = KNOWN_CONVS.get(package_and_class(module), ("given", False))
    if not standardised:
        return weight
    layer: Any = module
    gain = layer.gain.detach() * layer.scale if hasattr(layer, "gain") else None
    flat_1of = torch.nn.functional.batch_norm(
        weight.reshape(1, weight.shape[0], -1),
        None,
        None,
        weight=None if gain is None else gain.view(-1).to(weight),
        training=True,
        momentum=0.0,
        eps=layer.eps,
    )
    return flat_1of.reshape_as(weight)
