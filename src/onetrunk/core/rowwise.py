"""Layers of a batch whose rows belong to different domains: one computation, numbers by row.

Each holds the numbers of all domains stacked along their first axis, `_d`, and takes those of a
row's domain by index. A row is multiplied with its own numbers alone, in products whose shapes do
not depend on the other rows: so they cannot change a bit of it, and a NaN stays where it is.
"""

import abc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MixError
from .adapters.base import Correction
from .sites import Site, Tap
from .tree import Wrapper


class Rows:
    """The domain of each row of the batch that is under way, by thread."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self.traced: Tensor | None = None  # a graph's own input while it is compiled

    @contextmanager
    def of(self, index_b: Tensor) -> Iterator[None]:
        """While it is entered, `expanded` gives this index to this thread."""
        self._of_thread.index_b = index_b
        try:
            yield
        finally:
            del self._of_thread.index_b

    def expanded(self, n_rows: int) -> Tensor:
        """The index for an inner batch of `n_rows`: windows and patches lie within their image.

        Raises:
            MixError: where that is no multiple of the batch.
        """
        traced = torch.compiler.is_compiling()
        index_b: Tensor | None = (
            self.traced if traced else getattr(self._of_thread, "index_b", None)
        )
        assert index_b is not None  # `Mixed.forward` enters `of` first
        n_images = index_b.shape[0]  # len() would fix the number in a graph
        if n_rows == n_images:
            return index_b
        if n_rows % n_images:
            raise MixError(
                f"inside the network a batch of {n_images} becomes {n_rows} rows, which is no "
                "multiple: which domain a row belongs to is unknown there. This backbone's "
                "domains cannot be mixed; call them one after another."
            )
        return index_b.repeat_interleave(n_rows // n_images)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rows":
        return memo.setdefault(id(self), Rows())

    def __reduce__(self) -> str:
        raise MixError("a mixture is not saved: keep its domains in a bank, load and mix them.")


class Rowwise(nn.Module, abc.ABC):
    """A layer with numbers of its own for every domain."""

    rows: Rows

    @property
    @abc.abstractmethod
    def parts(self) -> list[Any]:
        """What each domain has here, in their order, as views."""


def table(tensors: Sequence[Tensor]) -> nn.Parameter:
    """The domains' tensors stacked: (d, ...), frozen."""
    return nn.Parameter(torch.stack([t.detach() for t in tensors]), requires_grad=False)


class RowwiseSite(Rowwise, Wrapper):
    """A shared layer, and the correction of each row's own domain.

    Corrections of one form (the number of factors, their shapes but for the rank, what they are
    multiplied with) are one product over the batch; ranks are filled up with zeros, by less than
    twice. Rows whose domain has another form take zeros there.
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        site: Site,
        corrections: Sequence[Correction | None],
        rows: Rows,
    ) -> None:
        super().__init__()
        self.layer, self.site, self.rows = layer, site, rows
        self.tap = Tap.of(layer, site) if isinstance(layer, nn.Conv2d) else None
        forms: dict[object, list[int]] = {}
        for k, correction in enumerate(corrections):
            if correction is not None and correction.factors:
                forms.setdefault(_form(correction), []).append(k)
        self.products = nn.ModuleList(
            _Product({k: corrections[k] for k in members}, len(corrections))  # type: ignore[misc]
            for members in forms.values()
        )
        like = layer.weight.detach()
        ones, zeros = like.new_ones(site.cout), like.new_zeros(site.cout)
        gains = [None if c is None else c.gain_o for c in corrections]
        shifts = [None if c is None else c.shift_o for c in corrections]
        self.gain_do = _table_or_none(gains, ones)
        self.shift_do = _table_or_none(shifts, zeros)

    @property
    def parts(self) -> list[Correction | None]:
        found: list[Correction | None] = [
            Correction(
                gain_o=None if self.gain_do is None else self.gain_do[k],
                shift_o=None if self.shift_do is None else self.shift_do[k],
            )
            for k in range(self._n_domains)
        ]
        for product in self._products:
            for k, (factors, on_input) in product.parts.items():
                one = found[k]
                assert one is not None
                found[k] = Correction(factors, on_input, one.gain_o, one.shift_o)
        return found

    @property
    def _products(self) -> "list[_Product]":
        return list(self.products)  # type: ignore[arg-type]

    @property
    def _n_domains(self) -> int:
        tables = [t for t in (self.gain_do, self.shift_do) if t is not None]
        return len(tables[0]) if tables else len(self._products[0].slot_d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        index_b = self.rows.expanded(y.shape[0])
        corrected = self._affine(y, index_b)
        for product in self._products:
            z = y if not product.on_input else x if self.tap is None else self._picked(x, y)
            corrected = product(z, corrected, index_b, self.site.kind == "linear")
        return corrected

    def _picked(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.tap is not None
        return self.tap.pick(x, y.shape[-2:])

    def _affine(self, y: Tensor, index_b: Tensor) -> Tensor:
        axis = 1 if self.site.kind == "conv" else -1
        shift = None if self.shift_do is None else by_row(self.shift_do, index_b, y, axis)
        if self.gain_do is None:
            return y if shift is None else y + shift
        gain = by_row(self.gain_do, index_b, y, axis)
        return y * gain if shift is None else torch.addcmul(shift, y, gain)


def _table_or_none(vectors: Sequence[Tensor | None], neutral: Tensor) -> nn.Parameter | None:
    if all(vector is None for vector in vectors):
        return None
    return table([neutral if vector is None else vector for vector in vectors])


def _form(correction: Correction) -> object:
    """Equal for corrections that one product computes; ranks count by their power of two."""
    shapes = [tuple(factor.shape) for factor in correction.factors]
    inner = [(shape[2] - 1).bit_length() for shape in shapes[:-1]]
    return correction.on_input, shapes[0][:2], shapes[-1][2], tuple(inner)


def by_row(table_dc: Tensor, index_b: Tensor, like: Tensor, axis: int) -> Tensor:
    """Each row's vector of `table_dc`, shaped so that it lies along `axis` of `like`."""
    picked_bc = table_dc.index_select(0, index_b)
    shape = [1] * like.ndim
    shape[0], shape[axis] = picked_bc.shape[0], picked_bc.shape[1]
    return picked_bc.view(shape)


class _Product(nn.Module):
    """F_1 ... F_n z for every row, the factors its domain's; added to what is there."""

    def __init__(self, corrections: dict[int, Correction], n_domains: int) -> None:
        super().__init__()
        first = next(iter(corrections.values()))
        self.on_input = first.on_input
        self.ranks = {k: [f.shape[2] for f in c.factors[:-1]] for k, c in corrections.items()}
        most = [max(column) for column in zip(*self.ranks.values(), strict=True)]
        everywhere = len(corrections) == n_domains
        slots = torch.zeros(n_domains, dtype=torch.long, device=first.factors[0].device)
        slots[list(corrections)] = torch.arange(len(corrections)).to(slots) + (not everywhere)
        self.register_buffer("slot_d", slots, persistent=False)
        self.slot_d: Tensor
        self.n_factors = len(first.factors)
        for n in range(self.n_factors):
            filled = [_filled(c.factors[n], n, most) for c in corrections.values()]
            if not everywhere:  # slot 0: of domains without such a correction
                filled.insert(0, torch.zeros_like(filled[0]))
            self.register_parameter(f"factor_{n}", table(filled))

    @property
    def factors_dgpq(self) -> list[Tensor]:
        """The stacked factors, (d, g, p, q) each."""
        return [self.get_parameter(f"factor_{n}") for n in range(self.n_factors)]

    @property
    def parts(self) -> dict[int, tuple[tuple[Tensor, ...], bool]]:
        """Domain -> its factors at their own ranks, and what they are multiplied with."""
        found = {}
        for k, ranks in self.ranks.items():
            own = [t[int(self.slot_d[k])] for t in self.factors_dgpq]
            for n, rank in enumerate(ranks):
                own[n], own[n + 1] = own[n][:, :, :rank], own[n + 1][:, :rank]
            found[k] = (tuple(own), self.on_input)
        return found

    def forward(self, z: Tensor, y: Tensor, index_b: Tensor, linear: bool) -> Tensor:
        """y + F_1 ... F_n z."""
        slot_b = self.slot_d.index_select(0, index_b)
        matrices = [t.index_select(0, slot_b) for t in self.factors_dgpq]
        if not self.on_input:
            y = y.clone()  # what is multiplied must stay while the products are added
        if linear:
            return _added_behind(z, y, matrices)
        if matrices[0].shape[1] == 1 and y.is_contiguous(memory_format=torch.channels_last):
            rows = z.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
            return _added_behind(*rows, matrices).permute(0, 3, 1, 2)
        return _added_before(z, y, matrices)


def _added_behind(z: Tensor, y: Tensor, matrices: list[Tensor]) -> Tensor:
    """Adds z F_n^T ... F_1^T to y; z is (b, ..., i) and y (b, ..., o)."""
    z_bni, y_bno = z.reshape(z.shape[0], -1, z.shape[-1]), y.reshape(y.shape[0], -1, y.shape[-1])
    *rest, last = (m[:, 0].transpose(1, 2) for m in reversed(matrices))
    for matrix in rest:
        z_bni = torch.bmm(z_bni, matrix)
    return _added(y_bno, z_bni, last).view(y.shape)


def _added_before(z: Tensor, y: Tensor, matrices: list[Tensor]) -> Tensor:
    """Adds F_1 ... F_n z to y, group by group; z is (b, i, h, w) and y (b, o, h, w)."""
    b, g = matrices[0].shape[:2]
    z_bgin = z.reshape(b * g, z.shape[1] // g, -1)
    y_bgon = y.reshape(b * g, y.shape[1] // g, -1)
    first, *rest = (m.flatten(0, 1) for m in matrices)
    for matrix in reversed(rest):
        z_bgin = torch.bmm(matrix, z_bgin)
    return _added(y_bgon, first, z_bgin).view(y.shape)


def _added(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y + left right, in y where autocast leaves types alone: it casts nothing in place."""
    kind = y.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.baddbmm(y, left, right)
    return y.baddbmm_(left, right)


def _filled(factor_gpq: Tensor, n: int, most: list[int]) -> Tensor:
    """Factor `n` with zeros up to the ranks `most` on the sides it shares with its neighbours."""
    rows = most[n - 1] - factor_gpq.shape[1] if n > 0 else 0
    columns = most[n] - factor_gpq.shape[2] if n < len(most) else 0
    return F.pad(factor_gpq, (0, columns, 0, rows))


@dataclass(frozen=True)
class Affine:
    """A norm's gain and shift, (c,) each; None where it has none."""

    gain: Tensor | None
    shift: Tensor | None


class RowwiseAffine(Rowwise):
    """A norm whose gain and shift are the row's own domain's.

    Args:
        core: what normalises without gain and shift; None for a batch norm, whose statistics are
            in them.
        after: dropout and activation that timm fuses into its norms.
        axis: where the channels are: 1, or -1.
    """

    def __init__(
        self, core: nn.Module | None, after: nn.Module, axis: int, parts: Sequence[Affine],
        rows: Rows,
    ) -> None:  # fmt: skip
        super().__init__()
        self.core, self.after, self.axis, self.rows = core, after, axis, rows
        self.gain_dc = _stacked([part.gain for part in parts])
        self.shift_dc = _stacked([part.shift for part in parts])

    @property
    def parts(self) -> list[Affine]:
        tables = self.gain_dc, self.shift_dc
        n_domains = next((len(t) for t in tables if t is not None), 0)
        return [Affine(*(None if t is None else t[k] for t in tables)) for k in range(n_domains)]

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.core is None else self.core(x)
        index_b = self.rows.expanded(y.shape[0])
        tables = self.gain_dc, self.shift_dc
        gain, shift = (None if t is None else by_row(t, index_b, y, self.axis) for t in tables)
        if gain is not None and shift is not None:
            y = torch.addcmul(shift, y, gain)
        elif gain is not None:
            y = y * gain
        elif shift is not None:
            y = y + shift
        return self.after(y.to(x.dtype))  # a norm in float32 gives bfloat16 for bfloat16


def _stacked(vectors: Sequence[Tensor | None]) -> nn.Parameter | None:
    present = [vector for vector in vectors if vector is not None]
    return table(present) if present else None


class RowwiseModules(Rowwise):
    """The domains' own modules, each over its own rows: for norms of any other kind."""

    def __init__(self, parts: Sequence[nn.Module], rows: Rows) -> None:
        super().__init__()
        self.modules_d, self.rows = nn.ModuleList(parts), rows

    @property
    def parts(self) -> list[nn.Module]:
        return list(self.modules_d)

    def forward(self, x: Tensor) -> Tensor:
        index_b, y = self.rows.expanded(x.shape[0]), None
        for k in index_b.unique().tolist():
            own = (index_b == k).nonzero().flatten()
            found = self.modules_d[k](x[own])
            y = found.new_empty((len(x), *found.shape[1:])) if y is None else y
            y[own] = found
        assert y is not None  # a batch has rows
        return y


@dataclass(frozen=True)
class Classifier:
    """Weight (c, f), or (c, f, 1, 1) of a convolution, and bias (c,) or None."""

    weight: Tensor
    bias: Tensor | None


class RowwiseHead(Rowwise):
    """Every domain's classifier in one product, of which a row keeps its own domain's scores.

    Scores are (b, c_max) along the classes' axis; behind a domain's own they are -inf.
    """

    def __init__(self, parts: Sequence[Classifier], rows: Rows) -> None:
        super().__init__()
        self.rows, self.n_classes = rows, [len(part.weight) for part in parts]
        weight = torch.cat([part.weight.detach() for part in parts])
        self.weight = nn.Parameter(weight, requires_grad=False)
        biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]
        self.bias = nn.Parameter(torch.cat([b.detach() for b in biases]), requires_grad=False)
        most = max(self.n_classes)
        place_dc, own_dc = torch.zeros(2, len(parts), most, dtype=torch.long)
        start = 0
        for k, n in enumerate(self.n_classes):
            place_dc[k, :n] = torch.arange(start, start + n)
            own_dc[k, :n] = 1
            start += n
        self.register_buffer("place_dc", place_dc.to(weight.device), persistent=False)
        self.register_buffer("own_dc", own_dc.bool().to(weight.device), persistent=False)
        self.place_dc: Tensor
        self.own_dc: Tensor

    @property
    def parts(self) -> list[Classifier]:
        weights, biases = self.weight.split(self.n_classes), self.bias.split(self.n_classes)
        return [Classifier(w, b) for w, b in zip(weights, biases, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        conv = self.weight.ndim == 4
        scores = (F.conv2d if conv else F.linear)(x, self.weight, self.bias)
        axis = 1 if conv else -1
        index_b = self.rows.expanded(scores.shape[0])
        place, own = (t.index_select(0, index_b) for t in (self.place_dc, self.own_dc))
        shape = [1] * scores.ndim
        shape[0], shape[axis] = place.shape
        sizes = list(scores.shape)
        sizes[axis] = place.shape[1]
        picked = scores.gather(axis, place.view(shape).expand(sizes))
        return picked.masked_fill(~own.view(shape), -torch.inf)
