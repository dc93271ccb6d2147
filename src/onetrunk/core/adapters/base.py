"""What every family promises: a few numbers beside one frozen convolution or linear layer.

An adapter is linear in the layer's input once its own norm is in eval mode, so it folds into the
layer: `fold` gives the weight and bias of the single layer that computes the same.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ... import written
from ...errors import AttachError
from ..sites import Site

Init = Literal["identity", "released"]
FEW_PIXELS = 1024  # of a batch, up to which a product takes less time: benchmarks/pixels.py


@dataclass(frozen=True)
class Correction:
    """What an adapter does in eval mode, as numbers: y' = gain . y + F_1 ... F_n z + shift.

    Args:
        factors: F_1 to F_n, each (g, p, q): one p x q matrix for each group of channels; none
            where no product is added.
        on_input: whether z is the layer's input (the pixels under the tap); else it is y.
        gain_o, shift_o: (o,); None where they are 1 and 0.
    """

    factors: tuple[Tensor, ...] = ()
    on_input: bool = True
    gain_o: Tensor | None = None
    shift_o: Tensor | None = None


class Adapter(nn.Module, abc.ABC):
    """The numbers that one domain keeps at one site."""

    reads_input: ClassVar[bool]  # whether `forward` looks at `x`; where not, `x` is `y`
    inner: ClassVar[tuple[str, ...]] = ()  # of a product's factors those that the input meets first

    @abc.abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Corrects the frozen layer's output.

        Args:
            x: the layer's input, aligned with its output: (b, i, h, w) at a convolution, one pixel
                under the adapter's tap for every output pixel; (..., i) at a linear layer.
            y: the frozen layer's output: (b, o, h, w) or (..., o).
        """

    @abc.abstractmethod
    def fold(
        self, weight_oikk: Tensor, bias_o: Tensor, tap: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one layer that computes the same in eval mode, as new tensors.

        Args:
            weight_oikk: the frozen weight, (o, i / groups, k, k); k = 1 at a linear layer.
            bias_o: the frozen bias, zeros where the layer has none.
            tap: row and column of the kernel that see the pixel which `forward` gets as `x`.
        """

    @abc.abstractmethod
    def correction(self) -> Correction:
        """What `forward` does in eval mode, for a batch whose rows have adapters of their own."""

    def matrix(self) -> Tensor | None:
        """A (o, i / groups), where the adapter adds A x to the layer's output in train mode too.

        None (the default) where it does not, as under dropout: then nothing is folded in training.
        """
        return None


class Family(abc.ABC):
    """A kind of adapter with its options. Concrete families are frozen dataclasses."""

    name: ClassVar[str]
    scope: ClassVar[Literal["adapters", "head", "everything"]] = "adapters"

    def refuses(self, site: Site) -> str | None:
        """Why this family cannot adapt `site`, or None where it can."""
        return None

    @abc.abstractmethod
    def n_numbers(self, site: Site) -> int:
        """How many numbers the family adds at `site`, running statistics included."""

    @abc.abstractmethod
    def make(self, site: Site, generator: Generator) -> Adapter | None:
        """A fresh adapter for a site that is not refused; None where nothing is added there."""

    def build(self, site: Site, generator: Generator | None = None) -> Adapter | None:
        """A fresh adapter for `site`.

        Raises:
            AttachError: where the family refuses the site; the message says why and what to do.
        """
        reason = self.refuses(site)
        if reason is not None:
            raise AttachError(f"{self} at {site.name or 'a site'}: {reason}")
        return self.make(site, generator or torch.Generator().manual_seed(0))

    def __str__(self) -> str:
        return written.write(self.name, written.changed_fields(self))


def check_options(family: Family, init: str, dropout: float = 0.0) -> None:
    """The checks that families share, made once when one is built."""
    if init not in ("identity", "released"):
        raise AttachError(
            f"{family.name}(init={init!r}): the initialisations are 'identity' (a fresh domain "
            "computes what the backbone computes) and 'released' (the authors' code)."
        )
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise AttachError(
            f"{family.name}(dropout={dropout!r}): dropout is a share from 0 to below 1."
        )


def mix_channels(x: Tensor, a_oi: Tensor, site: Site, groups: int | None = None) -> Tensor:
    """A x: a 1x1 convolution over (b, i, h, w), or a matrix over the last axis of (..., i)."""
    if site.kind == "linear":
        return F.linear(x, a_oi)
    groups = site.groups if groups is None else groups
    if groups == 1 and has_few_pixels(x):
        return on_pixels(x, a_oi)
    return F.conv2d(x, a_oi[:, :, None, None], groups=groups)


def has_few_pixels(x_bihw: Tensor) -> bool:
    """Whether the memory is a matrix (b h w, i) of so few rows that `on_pixels` takes less time.

    On a CPU only: on a GPU float32 convolutions may round to TensorFloat-32, products do not.
    """
    n_rows = x_bihw.numel() // x_bihw.shape[1]
    in_rows = x_bihw.is_contiguous(memory_format=torch.channels_last)
    return x_bihw.device.type == "cpu" and in_rows and n_rows <= FEW_PIXELS


def on_pixels(x_bihw: Tensor, a_oi: Tensor, bias_o: Tensor | None = None) -> Tensor:
    """A x + b at every pixel, as one product of matrices."""
    return F.linear(x_bihw.movedim(1, -1), a_oi, bias_o).movedim(-1, 1)


def drop_channels(x: Tensor, share: float, training: bool, site: Site) -> Tensor:
    """Dropout on the adapter's input: whole channels of an image, single numbers of a vector."""
    if not share or not training:
        return x
    return F.dropout2d(x, share) if site.kind == "conv" else F.dropout(x, share)


def add_at_tap(weight_oikk: Tensor, a_oi: Tensor, tap: tuple[int, int]) -> Tensor:
    """w + diag_k(A): a copy of the bank with A added at one tap."""
    merged_oikk = weight_oikk.clone()
    merged_oikk[:, :, tap[0], tap[1]] += a_oi
    return merged_oikk
