"""Sensitivity: what a site's matrix could buy, direction by direction, before any is trained.

Beside every site stands a matrix A that is zero, y = w * x + A x. One pass over labelled images
gives, with g = dL/dy of an image's loss L and sums over output positions p,

    G = mean_b sum_p g x'       S_in = mean_b sum_p x x'       S_out = mean_{b,p} g g'

and with S_in and S_out the loss near A is  <G, A> + 1/2 tr(S_out A S_in A'): the Fisher information
as a Kronecker product (K-FAC for convolutions, Grosse and Martens, ICML 2016). Three energies of
the singular directions follow:

    by_gradient     s_k(G)^2, the steepest descent
    by_curvature    s_k(S_out^-1/2 G S_in^-1/2)^2, twice what the best step of rank r takes off L
    by_training     s_k(S_out^1/2 A S_in^1/2)^2, twice what L loses without a trained direction

The last two do not change when a layer's inputs or outputs are scaled. Measuring costs one forward
and one backward pass without weight gradients, and three matrices a site: o i + i i + o o numbers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AttachError
from ..tensorfile import fingerprint_of
from .adapted import Adapted
from .adapters.lowrank import LowRankAdapter
from .adapters.parallel import ParallelAdapter
from .domain import domain_of, trace_of
from .plan import Where
from .sites import Site, Tap
from .tree import Wrapper, copy_tree, replace_modules

DAMPING = 0.1  # of a covariance's mean variance, added to every direction before it is inverted


@dataclass(frozen=True)
class Moments:
    """What one pass saw at one site; g groups, in float64.

    Args:
        gradient_goi: G, the mean gradient of an image's loss by the matrix beside the layer.
        inputs_gii: S_in.
        outputs_goo: S_out.
    """

    gradient_goi: Tensor
    inputs_gii: Tensor
    outputs_goo: Tensor


@dataclass(frozen=True)
class Measured:
    """Moments of every watched site of one network, and whose they are.

    Args:
        backbone: fingerprint of the backbone.
        sites: the watched sites, in order of execution.
        moments: site name -> moments.
    """

    backbone: str
    sites: tuple[Site, ...]
    moments: Mapping[str, Moments]


@dataclass(frozen=True)
class Sensitivity:
    """What each site could buy: the energies of its directions, falling.

    Args:
        backbone: fingerprint of the backbone that it was measured on.
        how: `gradient`, `curvature` or `trained`.
        sites: the sites, in order of execution.
        energies: site name -> energies, min(o, i) / groups of them; under a grouped convolution the
            sum over the groups, since a rank buys one direction in each.
    """

    backbone: str
    how: str
    sites: tuple[Site, ...]
    energies: Mapping[str, tuple[float, ...]]


def measure(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], where: Where | None = None
) -> Measured:
    """One pass over labelled images, with a zero matrix beside every chosen site; `model` stays.

    The network computes as in evaluation, running statistics included.

    Args:
        model: a domain's network whose head fits it: a linear probe, or a trained domain.
        batches: inputs (b, c, h, w) and labels (b,), on any device.
        where: which sites; by default all of them.

    Raises:
        AttachError: where `model` is no domain's network, there is no batch, or a gradient is not
            finite.
        BackboneError: as `trace`.
    """
    domain = domain_of(model)
    sites = (where or Where(layers="all")).choose(trace_of(domain).sites)
    watched = copy_tree(model, own=model.buffers()).eval()
    meters = {site.name: _Meter(site) for site in sites}
    replace_modules(watched, {s.name: _watching(watched, s, meters[s.name]) for s in sites})
    reference = next(watched.parameters())
    n_images = 0
    for x_bchw, labels_b in batches:
        y = watched(x_bchw.to(reference.device, reference.dtype))
        logits_bc = y if isinstance(y, Tensor) else y[0]
        F.cross_entropy(logits_bc, labels_b.to(logits_bc.device), reduction="sum").backward()
        n_images += len(labels_b)
    if n_images == 0:
        raise AttachError("measuring got no batch of images: give (images, labels) at least once.")
    moments = {name: meter.moments(n_images) for name, meter in meters.items()}
    return Measured(fingerprint_of(domain.backbone.state_dict()), sites, moments)


def by_gradient(measured: Measured) -> Sensitivity:
    """Energies s_k(G)^2: how steeply the loss falls along each direction, whatever a step costs."""
    energies = {name: _energies(seen.gradient_goi) for name, seen in measured.moments.items()}
    return Sensitivity(measured.backbone, "gradient", measured.sites, energies)


def by_curvature(measured: Measured) -> Sensitivity:
    """Energies s_k(S_out^-1/2 G S_in^-1/2)^2: twice the loss that the best step takes off.

    The covariances are damped by `DAMPING` of their mean variance. Cholesky factors stand for the
    square roots: the two differ by a rotation, which singular values do not see.
    """
    energies = {}
    for name, seen in measured.moments.items():
        out_goo, in_gii = _damped_root(seen.outputs_goo), _damped_root(seen.inputs_gii)
        left_goi = torch.linalg.solve_triangular(out_goo, seen.gradient_goi, upper=False)
        both_gio = torch.linalg.solve_triangular(in_gii, left_goi.mT, upper=False)
        energies[name] = _energies(both_gio)
    return Sensitivity(measured.backbone, "curvature", measured.sites, energies)


def by_training(model: nn.Module, measured: Measured) -> Sensitivity:
    """Energies s_k(S_out^1/2 A S_in^1/2)^2 of the matrices A that `model` was trained with.

    Args:
        model: a domain trained with `Parallel()` (or low-rank) adapters at the sites in question.
        measured: of the same model. Sites without an adapter are left out.

    Raises:
        AttachError: where `model` has no such adapter.
    """
    adapted = {site.name: model.get_submodule(site.name) for site in measured.sites}
    matrices = {n: _matrix(m) for n, m in adapted.items() if isinstance(m, Adapted)}
    found = {name: a_goi for name, a_goi in matrices.items() if a_goi is not None}
    if not found:
        raise AttachError(
            f"the sensitivity by training was asked for, and {domain_of(model).family} has no "
            "matrix beside a layer. Train the domain with Parallel() first."
        )
    energies = {}
    for name, a_goi in found.items():
        seen = measured.moments[name]
        out_goo, in_gii = _damped_root(seen.outputs_goo), _damped_root(seen.inputs_gii)
        energies[name] = _energies(out_goo.mT @ a_goi @ in_gii)
    sites = tuple(site for site in measured.sites if site.name in found)
    return Sensitivity(measured.backbone, "trained", sites, energies)


class _Meter:
    """Sums over the images of one pass at one site."""

    def __init__(self, site: Site) -> None:
        self.site, self.n_positions = site, 0
        o, i, g = site.cout // site.groups, site.cin // site.groups, site.groups
        self.gradient_goi = torch.zeros(g, o, i, dtype=torch.float64)
        self.inputs_gii = torch.zeros(g, i, i, dtype=torch.float64)
        self.outputs_goo = torch.zeros(g, o, o, dtype=torch.float64)

    def add(self, x: Tensor, g: Tensor) -> None:
        x_gip, g_gop = self._by_group(x), self._by_group(g)
        self.gradient_goi += (g_gop @ x_gip.mT).cpu().double()
        self.inputs_gii += (x_gip @ x_gip.mT).cpu().double()
        self.outputs_goo += (g_gop @ g_gop.mT).cpu().double()
        self.n_positions += x_gip.shape[-1]

    def _by_group(self, x: Tensor) -> Tensor:
        """(groups, channels of a group, positions of all images)."""
        x = x if x.dtype == torch.float64 else x.float()
        x_cp = x.transpose(0, 1).flatten(1) if self.site.kind == "conv" else x.flatten(0, -2).T
        return x_cp.unflatten(0, (self.site.groups, -1))

    def moments(self, n_images: int) -> Moments:
        if not self.gradient_goi.isfinite().all():
            raise AttachError(
                f"the gradient at {self.site.name} is not finite (NaN or infinity): look for "
                "broken numbers in the images or in the network's weights."
            )
        return Moments(
            self.gradient_goi / n_images,
            self.inputs_gii / n_images,
            self.outputs_goo / max(1, self.n_positions),
        )


class _Watch(torch.autograd.Function):
    """y, noting x and dL/dy; autograd itself refuses an x that was changed in place since."""

    @staticmethod
    def forward(ctx: Any, zero: Tensor, x: Tensor, y: Tensor, meter: _Meter) -> Tensor:
        ctx.meter = meter
        ctx.save_for_backward(x)
        return y + zero  # zero: a gradient is wanted here even where nothing before learns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        ctx.meter.add(ctx.saved_tensors[0], grads[0])
        return None, None, grads[0], None


class _Watched(Wrapper):
    """A layer, adapted or not, whose inputs and output gradients are noted."""

    def __init__(self, layer: nn.Module, tap: Tap | None, meter: _Meter, zero: Tensor) -> None:
        super().__init__()
        self.layer, self.tap, self.meter = layer, tap, meter
        self.zero = nn.Parameter(zero)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        x = x if self.tap is None else self.tap.pick(x, y.shape[-2:])
        watched: Tensor = _Watch.apply(self.zero, x, y, self.meter)
        return watched


def _watching(model: nn.Module, site: Site, meter: _Meter) -> _Watched:
    module = model.get_submodule(site.name)
    layer: Any = module.layer if isinstance(module, Adapted) else module
    tap = Tap.of(layer, site) if site.kind == "conv" else None
    return _Watched(module, tap, meter, layer.weight.new_zeros(()))


def _matrix(module: Adapted) -> Tensor | None:
    """A of an adapter that adds A x, (g, o, i) in float64; None where it adds something else."""
    adapter = module.adapter
    if not isinstance(adapter, ParallelAdapter | LowRankAdapter):
        return None
    site = adapter.site
    shape = site.cout, site.cin // site.groups, 1, 1
    with torch.no_grad():  # folded into nothing, A alone is left
        nothing_oikk = torch.zeros(shape, dtype=torch.float64)
        a_oikk, _ = adapter.fold(nothing_oikk, torch.zeros(0), (0, 0))
    return a_oikk[:, :, 0, 0].unflatten(0, (site.groups, -1))


def _damped_root(covariance_gcc: Tensor) -> Tensor:
    """Lower Cholesky factors of the covariances, damped; a dead layer's stay invertible."""
    variance_g = covariance_gcc.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping_g = (DAMPING * variance_g).clamp_min(math.sqrt(torch.finfo(torch.float64).tiny))
    identity_cc = torch.eye(covariance_gcc.shape[-1], dtype=torch.float64)
    return torch.linalg.cholesky(covariance_gcc + damping_g[:, None, None] * identity_cc)


def _energies(matrix_goi: Tensor) -> tuple[float, ...]:
    squared_gr = torch.linalg.svdvals(matrix_goi).square()
    return tuple(squared_gr.sum(0).tolist())
